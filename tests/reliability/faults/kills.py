"""What ``kill -9`` costs: every stage killed at random moments, and some at each single step of writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.figures import Figure, Row
from tests.reliability.faults.killed_run import KilledRun, kill_at_random, kill_at_step
from tests.reliability.faults.pipeline import Pipeline
from tests.reliability.faults.stages import STAGES, Stage
from vpr.common.log import get_logger

log = get_logger(__name__)


def kill_stages(
    pipeline: Pipeline, times: int, seed: int, steps: Sequence[str]
) -> tuple[list[KilledRun], list[KilledRun]]:
    """Kill every stage so many times at random moments, and some at each of their steps.

    Args:
        pipeline: the stages.
        times: runs of each that are killed.
        seed: of the moments.
        steps: stages that are killed at every single change of a file or folder.

    Returns:
        the runs killed at random moments, and those killed at each step.
    """
    drawn: list[KilledRun] = []
    stepped: list[KilledRun] = []
    for place, stage in enumerate(pipeline.stages.values()):
        for number in range(times):
            rng = np.random.default_rng([seed, place, number])
            drawn.append(kill_at_random(pipeline, stage, rng, pipeline.folder / f"kill-{len(drawn)}"))
            _say_fault(drawn[-1], f"kill-{len(drawn) - 1}")
        if stage.name in steps:
            stepped += every_step(pipeline, stage)
        log.info(f"  {stage.name}: {sum(one.kills for one in drawn if one.stage == stage.name)} kills")
    return drawn, stepped


def every_step(pipeline: Pipeline, stage: Stage) -> list[KilledRun]:
    """Runs of a stage, each killed at the next of its changes of a file or folder, until there are no more."""
    killed: list[KilledRun] = []
    while True:
        name = f"{stage.name}-step-{len(killed) + 1}"
        run = kill_at_step(pipeline, stage, len(killed) + 1, pipeline.folder / name)
        _say_fault(run, name)
        if not run.kills:
            return killed
        killed.append(run)


def kill_figures(
    folder: Path, command: str, times: int = 20, seed: int = 0, last: str = STAGES[-1].name
) -> tuple[list[Figure], list[Row]]:
    """What ``kill -9`` costs: figures over all stages, and the table by stage."""
    drawn, stepped = kill_stages(Pipeline(folder, last), times, seed, ("shard-embeddings", "int8"))

    def figure(name: str, value: float, goal: float | None) -> Figure:
        return Figure(name, value, "", goal, "<=", command, seeds=(seed,))

    figures = [Figure("random kills", sum(one.kills for one in drawn), "", 200, ">=", command, seeds=(seed,))]
    for what, killed in (("random kills", drawn), ("kills at every step of writing", stepped)):
        figures += [
            figure(f"{what}: damaged artifacts", sum(len(one.damaged) for one in killed), 0),
            figure(f"{what}: runs that cannot go on", sum(bool(one.stuck) for one in killed), 0),
            figure(
                f"{what}: results that are not the unbroken run's, bit for bit",
                sum(bool(one.differs) for one in killed),
                0,
            ),
            figure(f"{what}: runs that leave files or processes behind", sum(bool(one.left) for one in killed), 0),
        ]
    figures.append(Figure("kills at every step of writing", len(stepped), "", None, ">=", command))
    names = dict.fromkeys(one.stage for one in drawn)
    return figures, [_row(name, [one for one in drawn if one.stage == name]) for name in names]


def _row(name: str, killed: list[KilledRun]) -> Row:
    found = Counter(one.found for one in killed)
    return {
        "stage": name,
        "runs": len(killed),
        "kills": sum(one.kills for one in killed),
        "found nothing / work / the artifact": f"{found['nothing']} / {found['work']} / {found['artifact']}",
        "damaged": sum(len(one.damaged) for one in killed),
        "cannot go on": sum(bool(one.stuck) for one in killed),
        "another result": sum(bool(one.differs) for one in killed),
        "files or processes left": sum(bool(one.left) for one in killed),
        "work of the last run": f"{np.mean([one.again for one in killed]):.0%}",
    }


def _say_fault(run: KilledRun, name: str) -> None:
    if run.faulty:
        log.info(f"  {name}: {run}")
