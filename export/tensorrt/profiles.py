"""Optimisation profiles, and how a batch of any size is split to fit them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: batches from ``min_batch`` to ``max_batch`` images, tuned for ``opt_batch``."""

    index: int
    min_batch: int
    opt_batch: int
    max_batch: int


@dataclass(frozen=True)
class Chunk:
    """Images ``start`` to ``stop`` of a batch, padded to ``size`` images with copies of the last."""

    start: int
    stop: int
    size: int
    profile: int


def split_batch(count: int, profiles: Sequence[Profile]) -> Iterator[Chunk]:
    """Split ``count`` images into as few chunks as possible, in order; 0 images give none.

    Every chunk but the last has the largest batch of the engine. The last has the size of the remainder, or the
    next larger size that a profile accepts.
    """
    max_batch = max(profile.max_batch for profile in profiles)
    for start in range(0, count, max_batch):
        rows = min(max_batch, count - start)
        profile = pick_profile(rows, profiles)
        yield Chunk(start, start + rows, max(rows, profile.min_batch), profile.index)


def pick_profile(rows: int, profiles: Sequence[Profile]) -> Profile:
    """Return the profile of least padding for ``rows`` images; of several the closest tuned, then the narrowest."""

    def cost(profile: Profile) -> tuple[int, int, int, int]:
        width = profile.max_batch - profile.min_batch
        return max(rows, profile.min_batch), abs(profile.opt_batch - rows), width, profile.index

    return min((profile for profile in profiles if rows <= profile.max_batch), key=cost)
