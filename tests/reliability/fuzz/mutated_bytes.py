"""Bytes that are flipped, cut and moved, whatever they mean: seeded. Pure, no I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
NUMBERS = (0, -1, 1, 7, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))
TEXTS = ("", "x", "pixels", "embedding", "../../etc/passwd", "\x1b[31m\n", "n" * 100_000)


def pick(rng: Rng, options: Any) -> Any:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def words(change: Callable[..., Any]) -> str:
    """What a change does, by the name of its function."""
    return change.__name__.strip("_").replace("_", " ")


def _place(data: bytes, rng: Rng) -> int:
    """Somewhere in a file; as often as not near its beginning, where headers are."""
    return int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 256)))


def _flip_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        changed[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut_off(data: bytes, rng: Rng) -> bytes:
    return data[: pick(rng, (0, 1, 8, _place(data, rng), len(data) - 1))]


def _insert(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


def _repeat_a_piece(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at : at + int(rng.integers(1, 4096))] * int(rng.integers(2, 5)) + data[at:]


def _remove_a_piece(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + int(rng.integers(1, 256)) :]


def _zero_a_piece(data: bytes, rng: Rng) -> bytes:
    at, size = _place(data, rng), int(rng.integers(1, 64))
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def _lie_about_a_length(data: bytes, rng: Rng) -> bytes:
    """A number, as 4 or 8 bytes or as protobuf's varint, in place of what stands there."""
    at, number = _place(data, rng), int(pick(rng, NUMBERS))
    lies = (struct.pack("<q", number), struct.pack("<q", number)[:4], b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x07")
    lie = pick(rng, lies)
    return data[:at] + lie + data[at + len(lie) :]


def _change_digits(data: bytes, rng: Rng) -> bytes:
    """A number that is json_bytes out in the first kilobytes, as headers do, becomes another."""
    runs = [i for i in range(min(len(data), 4096)) if data[i : i + 1].isdigit() and not data[i - 1 : i].isdigit()]
    if not runs:
        return _flip_bits(data, rng)
    start = end = pick(rng, runs)
    while data[end : end + 1].isdigit():
        end += 1
    return data[:start] + str(pick(rng, NUMBERS)).encode() + data[end:]


CHANGES = (
    _flip_bits,
    _cut_off,
    _insert,
    _repeat_a_piece,
    _remove_a_piece,
    _zero_a_piece,
    _lie_about_a_length,
    _change_digits,
)
