"""Seeded mutations of bytes: flips, cuts and moves. No I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator
NUMBERS = (0, -1, 1, 7, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63))
TEXTS = ("", "x", "pixels", "embedding", "../../etc/passwd", "\x1b[31m\n", "n" * 100_000)


def pick(rng: Rng, options: Any) -> Any:
    """Return a uniformly drawn option."""
    return options[int(rng.integers(len(options)))]


def describe(change: Callable[..., Any]) -> str:
    """Return the name of a change in words."""
    return change.__name__.strip("_").replace("_", " ")


def _draw_offset(data: bytes, rng: Rng) -> int:
    """Return an offset in a file; half of them are near the start, where headers are."""
    return int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 256)))


def _flip_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        changed[_draw_offset(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut_off(data: bytes, rng: Rng) -> bytes:
    return data[: pick(rng, (0, 1, 8, _draw_offset(data, rng), len(data) - 1))]


def _insert(data: bytes, rng: Rng) -> bytes:
    offset = _draw_offset(data, rng)
    return data[:offset] + rng.bytes(int(rng.integers(1, 64))) + data[offset:]


def _repeat_a_piece(data: bytes, rng: Rng) -> bytes:
    offset = _draw_offset(data, rng)
    return data[:offset] + data[offset : offset + int(rng.integers(1, 4096))] * int(rng.integers(2, 5)) + data[offset:]


def _remove_a_piece(data: bytes, rng: Rng) -> bytes:
    offset = _draw_offset(data, rng)
    return data[:offset] + data[offset + int(rng.integers(1, 256)) :]


def _zero_a_piece(data: bytes, rng: Rng) -> bytes:
    offset, size = _draw_offset(data, rng), int(rng.integers(1, 64))
    return data[:offset] + bytes(len(data[offset : offset + size])) + data[offset + size :]


def _replace_a_length(data: bytes, rng: Rng) -> bytes:
    """Overwrite bytes by a number of 4 or 8 bytes, or by a protobuf varint."""
    offset, number = _draw_offset(data, rng), int(pick(rng, NUMBERS))
    encodings = (
        struct.pack("<q", number),
        struct.pack("<q", number)[:4],
        b"\xff" * 9 + b"\x01",
        b"\xff\xff\xff\xff\x07",
    )
    encoded = pick(rng, encodings)
    return data[:offset] + encoded + data[offset + len(encoded) :]


def _change_digits(data: bytes, rng: Rng) -> bytes:
    """Replace a decimal number in the first kilobytes, where headers are."""
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
    _replace_a_length,
    _change_digits,
)
