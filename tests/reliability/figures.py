"""``make figures TOPIC=reliability``: what faults, load and time do, into ``docs/results/reliability.json``.

Parts can be named (``make figures TOPIC=reliability PARTS="kills"``); without any, all are measured.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from app.config import DemoConfig
from app.demo import demo
from experiments.figures import command_of, measure, record
from tests.reliability.faults.kills import kill_figures
from tests.reliability.fuzz.guided import GuidedFuzzConfig, guided_fuzz, summarise
from tests.reliability.hostile import hostile
from tests.reliability.load import load
from tests.reliability.load.many_threads import hand_off
from tests.reliability.offline.offline import offline
from tests.reliability.soak import soak
from vpr.data.catalog import load_catalog


def measure_kills() -> None:
    """Every stage, killed at random moments and started again."""
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        figures, table = kill_figures(Path(folder), command_of("reliability", "kills"))
    record("reliability", figures, {"kills": table})


def measure_hostile() -> None:
    """Input that attacks, on every road that reads it."""
    figures, rows = hostile.summarise(hostile.attack(hostile.HostileConfig()), command_of("reliability", "hostile"))
    record("reliability", figures, {"hostile": rows})


def measure_fuzz() -> None:
    """The coverage-guided fuzzer on every target; each is recorded when it is done."""
    found = []
    for one in guided_fuzz(GuidedFuzzConfig()):
        found.append(one)
        figures, rows = summarise(found, command_of("reliability", "fuzz"))
        record("reliability", figures, {"fuzz": rows})


def measure_offline() -> None:
    """Every verb, with sockets blocked."""
    folder = Path("runs/figures-reliability/offline").resolve()
    figures, rows = offline(folder, command_of("reliability", "offline"))
    record("reliability", figures, {"offline": rows})


def measure_load() -> None:
    """The demo's student behind the search page, and its hand-off to Triton; nothing else should run meanwhile."""
    demo(DemoConfig())
    demo_folder, folder = Path("runs/demo"), Path("runs/load")
    config = load.LoadConfig((str(demo_folder / "student"),), str(demo_folder / "catalog"), str(folder / "gallery"))
    command = command_of("reliability", "load")
    figures, table = load.summarise(config, load.put_under_load(config), command)
    record("reliability", figures, {"load": table})
    queries = load_catalog(config.catalog).select(split="test", role="query")
    figures, table = hand_off(demo_folder / "fp32", folder / "gallery", queries, folder, command)
    record("reliability", figures, {"hand-off": table})


def measure_soak() -> None:
    """Two hours, or whatever ``python -m tests.reliability.soak.soak`` left; its samples are read again rather than made again."""
    config = soak.SoakConfig()
    path = Path(config.output) / soak.SAMPLES
    if not path.is_file():
        soak.soak(config)
    figures, table = soak.summarise(soak.read_samples(path), config.warmup, command_of("reliability", "soak"))
    record("reliability", figures, {"soak": table})


PARTS = {
    "kills": measure_kills,
    "hostile": measure_hostile,
    "fuzz": measure_fuzz,
    "offline": measure_offline,
    "load": measure_load,
    "soak": measure_soak,
}


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
