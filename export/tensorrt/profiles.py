"""How a batch of any size is run by an engine that takes certain sizes: which pieces, under which profile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: batches from ``least`` to ``most`` images, tuned for ``best``."""

    index: int
    least: int
    best: int
    most: int


@dataclass(frozen=True)
class Chunk:
    """Images ``start`` to ``stop`` of a batch, run as ``size`` images: the last is repeated where that is more."""

    start: int
    stop: int
    size: int
    profile: int


def split_batch(count: int, profiles: Sequence[Profile]) -> Iterator[Chunk]:
    """The fewest pieces that hold ``count`` images, in order; none for 0.

    All but the last are as large as the engine takes. The last is as large as what is left, or the next larger
    size that a profile takes.
    """
    most = max(profile.most for profile in profiles)
    for start in range(0, count, most):
        rows = min(most, count - start)
        profile = pick_profile(rows, profiles)
        yield Chunk(start, start + rows, max(rows, profile.least), profile.index)


def pick_profile(rows: int, profiles: Sequence[Profile]) -> Profile:
    """The profile that ``rows`` images need the least padding for; of several, the one tuned nearest to them."""
    wide_enough = [profile for profile in profiles if rows <= profile.most]
    return min(wide_enough, key=lambda profile: (max(rows, profile.least), abs(profile.best - rows), profile.index))
