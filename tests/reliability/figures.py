"""``make figures TOPIC=reliability``: effects of faults, load and time, into ``docs/results/reliability.json``.

``PARTS="kills load"`` measures these parts only. Interrupted kills, hostile inputs and options continue where they
were: delete ``runs/figures-reliability`` after a change of the code.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from app.config import DemoConfig
from app.demo import demo
from experiments.figures import command_of, measure, record
from tests.reliability.faults.kills import kill_figures
from tests.reliability.fuzz import fuzz, guided
from tests.reliability.hostile import hostile
from tests.reliability.limits import sweep
from tests.reliability.load import load
from tests.reliability.load.many_threads import measure_hand_off
from tests.reliability.offline.offline import measure_offline
from tests.reliability.progress import Progress
from tests.reliability.soak import soak
from vpr.data.catalog import load_catalog

_PROGRESS = Path("runs/figures-reliability")


def record_kills() -> None:
    """Record every stage killed at random moments and resumed."""
    finished = Progress(_PROGRESS / "kills.jsonl")
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        figures, table = kill_figures(Path(folder), command_of("reliability", "kills"), progress=finished)
    record("reliability", figures, {"kills": table})
    finished.finish()


def record_hostile() -> None:
    """Record hostile input on every route that reads it."""
    finished = Progress(_PROGRESS / "hostile.jsonl")
    results = hostile.attack(hostile.HostileConfig(), finished)
    figures, table = hostile.summarise(results, command_of("reliability", "hostile"))
    record("reliability", figures, {"hostile": table})
    finished.finish()


def record_mutations() -> None:
    """Record mutated files, given to every command that reads them."""
    figures, table = fuzz.summarise(fuzz.fuzz(fuzz.FuzzConfig()), command_of("reliability", "mutations"))
    record("reliability", figures, {"mutations": table})


def record_fuzz() -> None:
    """Record the coverage-guided fuzzer, after each of its targets."""
    results = []
    for result in guided.guided_fuzz(guided.GuidedFuzzConfig()):
        results.append(result)
        figures, table = guided.summarise(results, command_of("reliability", "fuzz"))
        record("reliability", figures, {"fuzz": table})


def record_options() -> None:
    """Record every number option of every command at its limits, among the figures of data sets."""
    progress = Progress(_PROGRESS / "options.jsonl")
    figures, table = sweep.summarise(sweep.sweep(sweep.SweepConfig(), progress), command_of("reliability", "options"))
    record("data", figures, {"options": table})
    progress.finish()


def record_offline() -> None:
    """Record every command with blocked sockets."""
    folder = Path("runs/figures-reliability/offline").resolve()
    figures, table = measure_offline(folder, command_of("reliability", "offline"))
    record("reliability", figures, {"offline": table})


def record_load() -> None:
    """Record the search page with the demo's student, and its hand-off to Triton, on an otherwise idle machine."""
    demo(DemoConfig())
    demo_folder, folder = Path("runs/demo"), Path("runs/load")
    config = load.LoadConfig((str(demo_folder / "student"),), str(demo_folder / "catalog"), str(folder / "gallery"))
    command = command_of("reliability", "load")
    figures, table = load.summarise(config, load.put_under_load(config), command)
    record("reliability", figures, {"load": table})
    queries = load_catalog(config.catalog).select(split="test", role="query")
    figures, table = measure_hand_off(demo_folder / "fp32", folder / "gallery", queries, folder, command)
    record("reliability", figures, {"hand-off": table})


def record_soak() -> None:
    """Record a soak of two hours, or the samples of an earlier ``python -m tests.reliability.soak.soak``."""
    config = soak.SoakConfig()
    path = Path(config.output) / soak.SAMPLES
    if not path.is_file():
        soak.soak(config)
    figures, table = soak.summarise(soak.read_samples(path), config.warmup, command_of("reliability", "soak"))
    record("reliability", figures, {"soak": table})


PARTS = {
    "kills": record_kills,
    "hostile": record_hostile,
    "mutations": record_mutations,
    "fuzz": record_fuzz,
    "options": record_options,
    "offline": record_offline,
    "load": record_load,
    "soak": record_soak,
}


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
