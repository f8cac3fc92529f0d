"""One run of a stage that is killed, looked at, and let go on to its end."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tests.reliability.faults.injection import die_at
from tests.reliability.faults.pipeline import OLDER, Pipeline
from tests.reliability.faults.stages import Stage, difference, leftovers
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError

_AGAIN = 0.25  # share of the runs that are killed once more when they go on


@dataclass
class KilledRun:
    """What became of one run that was killed, and went on.

    Attributes:
        stage: name.
        kills: that it took.
        found: by a look at the folder after the first kill: ``nothing`` new, ``work`` to go on with or to remove, or
            the new ``artifact``.
        damaged: artifacts that could be seen after a kill and were not whole, in words.
        stuck: why the run that followed did not finish; empty if it did.
        differs: what its result has otherwise than the unbroken one's.
        left: files that are no part of the result, and processes that outlived a kill.
        again: processor time of the last run, over the unbroken one's.
    """

    stage: str
    kills: int = 0
    found: str = ""
    damaged: list[str] = field(default_factory=list)
    stuck: str = ""
    differs: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    again: float = 0.0

    @property
    def faulty(self) -> bool:
        """Whether anything is as it must not be."""
        return bool(self.damaged or self.stuck or self.differs or self.left)


def kill_at_random(pipeline: Pipeline, stage: Stage, rng: np.random.Generator, folder: Path) -> KilledRun:
    """Kill a run at a random moment, look at what it leaves, and let it go on to its end.

    A quarter of the runs are killed again when they go on, and before half of them an older artifact lies at
    the output.
    """
    run, output = KilledRun(stage.name), folder / stage.name
    older = rng.random() < 0.5
    while not run.kills and not run.stuck:  # a run that was quicker than its end is not counted
        shutil.rmtree(folder, ignore_errors=True)
        if older:
            pipeline.lay_older(stage, output)
        _kill(pipeline, stage, output, rng, run)
    if rng.random() < _AGAIN:
        _kill(pipeline, stage, output, rng, run)
    _finish(pipeline, stage, output, run)
    return run


def kill_at_step(pipeline: Pipeline, stage: Stage, step: int, folder: Path) -> KilledRun:
    """Kill a run at its n-th change of a file or folder, over an older artifact; no kill if it has fewer."""
    run, output = KilledRun(stage.name), folder / stage.name
    pipeline.lay_older(stage, output)
    done = pipeline.run(stage, output, prepare=partial(die_at, step, str(folder)))
    run.kills += done.killed
    run.left += done.orphans
    _look(output, run)
    _finish(pipeline, stage, output, run)
    return run


def _kill(pipeline: Pipeline, stage: Stage, output: Path, rng: np.random.Generator, run: KilledRun) -> None:
    done = pipeline.run(stage, output, float(rng.random()) * pipeline.work[stage.name])
    if done.killed:
        run.kills += 1
        run.left += done.orphans
        _look(output, run)
    elif done.code:
        run.stuck = f"exit status {done.code}: {done.output[-300:]}"


def _finish(pipeline: Pipeline, stage: Stage, output: Path, run: KilledRun) -> None:
    done = pipeline.run(stage, output)
    run.again = done.seconds / pipeline.work[stage.name]
    if done.code:
        run.stuck = f"exit status {done.code}: {done.output[-300:]}"
    else:
        _check(pipeline, stage, output, run)


def _check(pipeline: Pipeline, stage: Stage, output: Path, run: KilledRun) -> None:
    """Compare a result, and what lies beside it, with the unbroken run's."""
    try:
        run.differs = difference(stage, pipeline.unbroken(stage), output)
    except UserError as error:
        run.damaged.append(str(error))
    run.left += leftovers(pipeline.unbroken(stage).parent, output.parent)


def _look(output: Path, run: KilledRun) -> None:
    """What a kill left: an artifact that can be seen is whole."""
    if output.exists():
        try:
            load_artifact(output)
        except UserError as error:
            run.damaged.append(str(error))
    if run.found:
        return
    beside = [path for path in output.parent.iterdir() if path != output and path.suffix != ".lock"]
    new = output.exists() and json.loads((output / CARD_NAME).read_bytes())["config"] != OLDER
    run.found = "work" if beside else "artifact" if new else "nothing"
