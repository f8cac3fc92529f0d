"""Figures of ``kill -9``: every stage killed at random moments, and some stages at each step of writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from experiments.figures import Figure, Row
from tests.reliability.commands import Command
from tests.reliability.faults.killed_run import KilledRun, kill_at_random, kill_at_step
from tests.reliability.faults.pipeline import Pipeline
from tests.reliability.faults.stages import STAGES
from tests.reliability.progress import Progress
from vpr.common.log import get_logger

log = get_logger(__name__)


def kill_stages(
    pipeline: Pipeline, times: int, seed: int, stepped_stages: Sequence[str], progress: Progress | None = None
) -> tuple[list[KilledRun], list[KilledRun]]:
    """Kill every stage at random moments, and some stages at each of their steps.

    Args:
        pipeline: Stages to kill.
        times: Number of killed runs of each stage.
        seed: Seed of the moments.
        stepped_stages: Names of the stages to kill at every single change of a file or folder.
        progress: Stages that an interrupted measurement has finished; they are not killed again.

    Returns:
        Runs killed at random moments, and runs killed at each step.
    """
    random_runs: list[KilledRun] = []
    stepped_runs: list[KilledRun] = []
    progress = progress or Progress(None)
    for index, stage in enumerate(pipeline.stages.values()):
        if stage.output not in progress.known:
            rngs = [np.random.default_rng([seed, index, number]) for number in range(times)]
            random = [_kill_once(pipeline, stage, rng, f"kill-{index}-{number}") for number, rng in enumerate(rngs)]
            stepped = kill_every_step(pipeline, stage) if stage.output in stepped_stages else []
            progress.add(stage.output, [[asdict(run) for run in runs] for runs in (random, stepped)])
            log.info(f"  {stage.output}: {sum(run.kills for run in random)} kills")
        random, stepped = ([KilledRun(**run) for run in runs] for runs in progress.known[stage.output])
        random_runs += random
        stepped_runs += stepped
    return random_runs, stepped_runs


def _kill_once(pipeline: Pipeline, stage: Command, rng: np.random.Generator, name: str) -> KilledRun:
    run = kill_at_random(pipeline, stage, rng, pipeline.folder / name)
    _log_fault(run, name)
    return run


def kill_every_step(pipeline: Pipeline, stage: Command) -> list[KilledRun]:
    """Run a stage again and again, each time killed one change later, until it ends before its kill."""
    runs: list[KilledRun] = []
    while True:
        name = f"{stage.output}-step-{len(runs) + 1}"
        run = kill_at_step(pipeline, stage, len(runs) + 1, pipeline.folder / name)
        _log_fault(run, name)
        if not run.kills:
            return runs
        runs.append(run)


def kill_figures(
    folder: Path,
    command: str,
    times: int = 20,
    seed: int = 0,
    last: str = STAGES[-1].output,
    progress: Progress | None = None,
) -> tuple[list[Figure], list[Row]]:
    """Return figures over all stages, and a table by stage."""
    stepped = ("shard-embeddings", "int8")
    random_runs, stepped_runs = kill_stages(Pipeline(folder, last), times, seed, stepped, progress)

    def figure(name: str, value: float, goal: float | None) -> Figure:
        return Figure(name, value, "", goal, "<=", command, seeds=(seed,))

    kills = sum(run.kills for run in random_runs)
    figures = [Figure("random kills", kills, "", 300, ">=", command, seeds=(seed,))]
    for title, runs in (("random kills", random_runs), ("kills at every step of writing", stepped_runs)):
        figures += [
            figure(f"{title}: damaged artifacts", sum(len(run.damaged) for run in runs), 0),
            figure(f"{title}: runs that do not resume", sum(bool(run.failure) for run in runs), 0),
            figure(
                f"{title}: results that differ from the uninterrupted run",
                sum(bool(run.differences) for run in runs),
                0,
            ),
            figure(f"{title}: runs that leave files or processes", sum(bool(run.leftovers) for run in runs), 0),
        ]
    figures.append(Figure("kills at every step of writing", len(stepped_runs), "", None, ">=", command))
    names = dict.fromkeys(run.stage for run in random_runs)
    return figures, [_row(name, [run for run in random_runs if run.stage == name]) for name in names]


def _row(name: str, runs: list[KilledRun]) -> Row:
    states = Counter(run.state for run in runs)
    return {
        "stage": name,
        "runs": len(runs),
        "kills": sum(run.kills for run in runs),
        "left nothing / work / the artifact": f"{states['nothing']} / {states['work']} / {states['artifact']}",
        "damaged": sum(len(run.damaged) for run in runs),
        "not resumed": sum(bool(run.failure) for run in runs),
        "different result": sum(bool(run.differences) for run in runs),
        "files or processes left": sum(bool(run.leftovers) for run in runs),
        "work of the last run": f"{np.mean([run.share_of_work for run in runs]):.0%}",
    }


def _log_fault(run: KilledRun, name: str) -> None:
    if run.is_faulty:
        log.warning(f"  {name}: {run}")
