from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from export.tensorrt.profiles import Chunk, Profile, pick_profile, split_batch

ranges = st.lists(st.integers(1, 40), min_size=3, max_size=3).map(sorted)
profiles = st.lists(ranges, min_size=1, max_size=4).map(
    lambda found: [Profile(index, *batches) for index, batches in enumerate(found)]
)


@given(st.integers(0, 200), profiles)
def test_pieces_cover_the_batch_in_sizes_the_engine_takes(count: int, profiles: list[Profile]) -> None:
    pieces = list(split_batch(count, profiles))
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(count))
    for piece in pieces:
        profile = profiles[piece.profile]
        assert max(piece.stop - piece.start, profile.least) == piece.size <= profile.most
    most = max(profile.most for profile in profiles)
    assert len(pieces) == -(-count // most)


def test_a_rest_below_the_least_batch_is_padded_to_it() -> None:
    assert list(split_batch(11, [Profile(0, 4, 8, 8)])) == [Chunk(0, 8, 8, 0), Chunk(8, 11, 4, 0)]


def test_the_profile_of_least_padding_is_chosen_then_the_one_tuned_nearest() -> None:
    small, large = Profile(0, 1, 1, 8), Profile(1, 4, 32, 64)
    assert pick_profile(2, [large, small]) == small
    assert pick_profile(7, [small, large]) == small
    assert pick_profile(8, [Profile(0, 1, 1, 8), Profile(1, 4, 9, 64)]).index == 1
    assert pick_profile(9, [small, large]) == large
