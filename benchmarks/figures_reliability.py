"""``make figures TOPIC=reliability``: what faults, load and time do, into ``benchmarks/results/reliability.json``.

Parts can be named (``make figures TOPIC=reliability PARTS="kills"``); without any, all are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import load, soak
from benchmarks.demo import DemoConfig, demo
from benchmarks.figures import measure, record
from benchmarks.many_threads import hand_off
from vpr.catalog import load_catalog


def measure_soak() -> None:
    """Two hours, or whatever ``python -m benchmarks.soak`` left; its samples are read again rather than made again."""
    config = soak.SoakConfig()
    path = Path(config.output) / soak.SAMPLES
    if not path.is_file():
        soak.soak(config)
    figures, table = soak.summarise(soak.read_samples(path), config.warmup, _command("soak"))
    record("reliability", figures, {"soak": table})


def measure_load() -> None:
    """The demo's student behind the search page, and its hand-off to Triton; nothing else should run meanwhile."""
    demo(DemoConfig())
    demo_folder, folder = Path("runs/demo"), Path("runs/load")
    config = load.LoadConfig((str(demo_folder / "student"),), str(demo_folder / "catalog"), str(folder / "gallery"))
    figures, table = load.summarise(config, load.put_under_load(config), _command("load"))
    record("reliability", figures, {"load": table})
    queries = load_catalog(config.catalog).select(split="test", role="query")
    figures, table = hand_off(demo_folder / "fp32", folder / "gallery", queries, folder, _command("load"))
    record("reliability", figures, {"hand-off": table})


PARTS: dict[str, Callable[[], None]] = {"load": measure_load, "soak": measure_soak}


def _command(part: str) -> str:
    return f'make figures TOPIC=reliability PARTS="{part}"'


if __name__ == "__main__":
    measure(PARTS)
