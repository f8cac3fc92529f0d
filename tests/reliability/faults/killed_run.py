"""A stage that is killed, inspected, and run again to its end."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tests.reliability.commands import Command
from tests.reliability.faults.injection import kill_at_change
from tests.reliability.faults.pipeline import OLDER_CONFIG, EndedProcess, Pipeline
from tests.reliability.faults.stages import differences, leftovers
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError

_SHARE_KILLED_TWICE = 0.25


@dataclass
class KilledRun:
    """Result of a stage that was killed and then run to its end.

    Attributes:
        stage: Name of the stage.
        kills: Number of kills.
        state: What the first kill left: ``nothing`` new, unfinished ``work``, or the new ``artifact``.
        damaged: Error messages of artifacts that a reader could see after a kill and that were damaged.
        failure: Reason why the run after the kill did not finish; empty if it did.
        differences: Names of entries that differ from the uninterrupted run.
        leftovers: Files that do not belong to the result, and processes that outlived a kill.
        share_of_work: Processor time of the last run over that of the uninterrupted run.
    """

    stage: str
    kills: int = 0
    state: str = ""
    damaged: list[str] = field(default_factory=list)
    failure: str = ""
    differences: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    share_of_work: float = 0.0

    @property
    def is_faulty(self) -> bool:
        """Whether the kill did any harm."""
        return bool(self.damaged or self.failure or self.differences or self.leftovers)


def kill_at_random(pipeline: Pipeline, stage: Command, rng: np.random.Generator, folder: Path) -> KilledRun:
    """Kill a stage at a random moment, inspect what is left, and run it to its end.

    A quarter of the runs are killed a second time. Half of them start with an older artifact at the output.
    """
    run, output = KilledRun(stage.output), folder / stage.output
    has_older = rng.random() < 0.5
    while not run.kills and not run.failure:  # a run that ended before its kill is not counted
        shutil.rmtree(folder, ignore_errors=True)
        if has_older:
            pipeline.write_older(stage, output)
        _kill(pipeline, stage, output, rng, run)
    if rng.random() < _SHARE_KILLED_TWICE:
        _kill(pipeline, stage, output, rng, run)
    _finish(pipeline, stage, output, run)
    return run


def kill_at_step(pipeline: Pipeline, stage: Command, step: int, folder: Path) -> KilledRun:
    """Kill a stage at its n-th change of a file or folder, over an older artifact; no kill if it has fewer."""
    run, output = KilledRun(stage.output), folder / stage.output
    pipeline.write_older(stage, output)
    process = pipeline.run(stage, output, prepare=partial(kill_at_change, step, str(folder)))
    run.kills += process.was_killed
    run.leftovers += process.orphans
    _inspect(output, run)
    _finish(pipeline, stage, output, run)
    return run


def _kill(pipeline: Pipeline, stage: Command, output: Path, rng: np.random.Generator, run: KilledRun) -> None:
    process = pipeline.run(stage, output, float(rng.random()) * pipeline.seconds[stage.output])
    if process.was_killed:
        run.kills += 1
        run.leftovers += process.orphans
        _inspect(output, run)
    elif process.code:
        run.failure = _failure(process)


def _finish(pipeline: Pipeline, stage: Command, output: Path, run: KilledRun) -> None:
    process = pipeline.run(stage, output)
    run.share_of_work = process.seconds / pipeline.seconds[stage.output]
    if process.code:
        run.failure = _failure(process)
        return
    try:
        run.differences = differences(stage, pipeline.expected(stage), output)
    except UserError as error:
        run.damaged.append(str(error))
    run.leftovers += leftovers(pipeline.expected(stage).parent, output.parent)


def _failure(process: EndedProcess) -> str:
    return f"exit status {process.code}: {process.output[-300:]}"


def _inspect(output: Path, run: KilledRun) -> None:
    """Record what a kill left; an artifact that a reader can see must be complete."""
    if output.exists():
        try:
            load_artifact(output)
        except UserError as error:
            run.damaged.append(str(error))
    if run.state:
        return
    has_work = any(path != output and path.suffix != ".lock" for path in output.parent.iterdir())
    is_new = output.exists() and json.loads((output / CARD_NAME).read_bytes())["config"] != OLDER_CONFIG
    run.state = "work" if has_work else "artifact" if is_new else "nothing"
