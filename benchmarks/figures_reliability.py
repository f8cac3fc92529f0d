"""``make figures TOPIC=reliability``: what faults, load and time do, into ``benchmarks/results/reliability.json``.

Parts can be named (``make figures TOPIC=reliability PARTS="fuzz"``); without any, all are measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import measure, record
from benchmarks.guided_fuzz import GuidedFuzzConfig, guided_fuzz, summarise
from benchmarks.offline import offline


def measure_fuzz() -> None:
    """The coverage-guided fuzzer on every target; each is recorded when it is done."""
    found = []
    for one in guided_fuzz(GuidedFuzzConfig()):
        found.append(one)
        figures, rows = summarise(found, _command("fuzz"))
        record("reliability", figures, {"fuzz": rows})


def measure_offline() -> None:
    """Every verb, with sockets blocked."""
    figures, rows = offline(Path("runs/figures-reliability/offline").resolve(), _command("offline"))
    record("reliability", figures, {"offline": rows})


PARTS: dict[str, Callable[[], None]] = {
    "fuzz": measure_fuzz,
    "offline": measure_offline,
}


def _command(part: str) -> str:
    return f'make figures TOPIC=reliability PARTS="{part}"'


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
