"""``make figures TOPIC=reliability``: what faults, load and time do, into ``benchmarks/results/reliability.json``.

Parts can be named (``make figures TOPIC=reliability PARTS="kills"``); without any, all are measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.figures import measure, record
from benchmarks.kills import kill_figures


def measure_kills() -> None:
    """Every stage, killed at random moments and started again."""
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        figures, table = kill_figures(Path(folder), _command("kills"))
    record("reliability", figures, {"kills": table})


PARTS: dict[str, Callable[[], None]] = {
    "kills": measure_kills,
}


def _command(part: str) -> str:
    return f'make figures TOPIC=reliability PARTS="{part}"'


if __name__ == "__main__":
    measure(PARTS)
