"""``make figures TOPIC=reliability``: what faults, load and time do, into ``benchmarks/results/reliability.json``.

Parts can be named (``make figures TOPIC=reliability PARTS="kills"``); without any, all are measured.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.figures import measure, record
from benchmarks.hostile import HostileConfig, attack, summarise


def measure_hostile() -> None:
    """Input that attacks, on every road that reads it."""
    figures, rows = summarise(attack(HostileConfig()), _command("hostile"))
    record("reliability", figures, {"hostile": rows})


PARTS: dict[str, Callable[[], None]] = {"hostile": measure_hostile}


def _command(part: str) -> str:
    return f'make figures TOPIC=reliability PARTS="{part}"'


if __name__ == "__main__":
    measure(PARTS)
