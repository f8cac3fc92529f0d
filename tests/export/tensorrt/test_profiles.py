from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from export.tensorrt.profiles import Chunk, Profile, pick_profile, split_batch

ranges = st.lists(st.integers(1, 40), min_size=3, max_size=3).map(sorted)
profiles = st.lists(ranges, min_size=1, max_size=4).map(
    lambda bounds: [Profile(index, *batches) for index, batches in enumerate(bounds)]
)


@given(st.integers(0, 200), profiles)
def test_chunks_cover_the_batch_in_accepted_sizes(count: int, profiles: list[Profile]) -> None:
    chunks = list(split_batch(count, profiles))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(count))
    for chunk in chunks:
        profile = profiles[chunk.profile]
        assert max(chunk.stop - chunk.start, profile.min_batch) == chunk.size <= profile.max_batch
    max_batch = max(profile.max_batch for profile in profiles)
    assert len(chunks) == -(-count // max_batch)


def test_remainder_is_padded_to_min_batch() -> None:
    assert list(split_batch(11, [Profile(0, 4, 8, 8)])) == [Chunk(0, 8, 8, 0), Chunk(8, 11, 4, 0)]


def test_profile_with_least_padding_is_picked() -> None:
    small, large = Profile(0, 1, 1, 8), Profile(1, 4, 32, 64)
    assert pick_profile(2, [large, small]) == small
    assert pick_profile(7, [small, large]) == small
    assert pick_profile(8, [Profile(0, 1, 1, 8), Profile(1, 4, 9, 64)]).index == 1
    assert pick_profile(9, [small, large]) == large
    own = Profile(2, 8, 8, 8)
    assert pick_profile(8, [Profile(0, 1, 8, 32), own]) == own
    assert pick_profile(7, [Profile(0, 1, 8, 32), own]).index == 0
