"""``make figures TOPIC=reliability``: what faults, load and time do, into ``benchmarks/results/reliability.json``.

Parts can be named (``make figures TOPIC=reliability PARTS="kills"``); without any, all are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import soak
from benchmarks.figures import measure, record


def measure_soak() -> None:
    """Two hours, or whatever ``python -m benchmarks.soak`` left; its samples are read again rather than made again."""
    config = soak.SoakConfig()
    path = Path(config.output) / soak.SAMPLES
    if not path.is_file():
        soak.soak(config)
    figures, table = soak.summarise(soak.read_samples(path), config.warmup, _command("soak"))
    record("reliability", figures, {"soak": table})


PARTS: dict[str, Callable[[], None]] = {"soak": measure_soak}


def _command(part: str) -> str:
    return f'make figures TOPIC=reliability PARTS="{part}"'


if __name__ == "__main__":
    measure(PARTS)
