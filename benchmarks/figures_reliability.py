"""``make figures TOPIC=reliability``: what faults, load and time do, into ``benchmarks/results/reliability.json``.

Parts can be named (``make figures TOPIC=reliability PARTS="kills"``); without any, all are measured.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.figures import measure

PARTS: dict[str, Callable[[], None]] = {}


def _command(part: str) -> str:
    return f'make figures TOPIC=reliability PARTS="{part}"'


if __name__ == "__main__":
    measure(PARTS)
