"""Commands as processes that something happens to: killed at a random moment, out of room, with a wrong clock.

A process is forked from one that has imported the libraries and has no threads of its own, so that what is killed is
the work and not its imports. From there on it is what ``python -m vpr`` is: a process with its own verb and files.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.fault_stages import STAGES, Stage, difference, leftovers, write_inputs
from vpr import artifact
from vpr.artifact import CARD_NAME, load_artifact
from vpr.cli import VERBS
from vpr.errors import UserError

# What can be imported without starting a thread.
_PRELOADED = (
    *("torch", "torchvision", "lightning", "open_clip", "vit_pytorch", "onnx", "torch.onnx", "torch._dynamo"),
    *("torch.utils.tensorboard", "matplotlib", "jsonargparse", "pydantic", "rich.console"),
)
# More threads would change the order of sums, and with it the last bits.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_OLDER = {"older": True}
_LOOK = 0.002
_JITTER = 0.05  # seconds: a process that waits for its disk uses no processor time
_AGAIN = 0.25  # share of the runs that are killed once more when they go on
_WRITING = os.O_WRONLY | os.O_RDWR
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod")

Prepare = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: exit status; minus the signal that ended it.
        seconds: of processor time, imports aside.
        output: what it printed.
    """

    code: int
    seconds: float
    output: str

    @property
    def killed(self) -> bool:
        """Whether it was killed before it had finished."""
        return self.code == -signal.SIGKILL


@dataclass
class Struck:
    """What became of one run that was killed, and went on.

    Attributes:
        stage: name.
        kills: that it took.
        found: by a look at the folder after the first kill: ``nothing`` new, ``work`` to go on with or to remove, or
            the new ``artifact``.
        damaged: artifacts that could be seen after a kill and were not whole, in words.
        stuck: why the run that followed did not finish; empty if it did.
        differs: what its result has otherwise than the unbroken one's.
        left: files that are no part of the result.
        again: processor time of the last run, over the unbroken one's.
    """

    stage: str
    kills: int = 0
    found: str = ""
    damaged: list[str] = field(default_factory=list)
    stuck: str = ""
    differs: str = ""
    left: list[str] = field(default_factory=list)
    again: float = 0.0

    @property
    def faulty(self) -> bool:
        """Whether anything is as it must not be."""
        return bool(self.damaged or self.stuck or self.differs or self.left)


class Road:
    """The stages' unbroken results, and the processes that make them again.

    Args:
        folder: for everything.
        last: name of the last stage that is wanted; those before it are run too.
    """

    def __init__(self, folder: Path, last: str = STAGES[-1].name) -> None:
        self.folder = folder
        self._context = _one_threaded_processes()
        self._runs = 0
        self.work: dict[str, float] = {}
        self._paths = write_inputs(folder / "inputs")
        names = [stage.name for stage in STAGES]
        self.stages = {stage.name: stage for stage in STAGES[: names.index(last) + 1]}
        for stage in self.stages.values():
            done = self.run(stage, self.unbroken(stage))
            if done.code:
                raise UserError(f"faults: {stage.verb}: {done.output[-500:]}: run it by hand")
            self._paths[stage.name] = str(self.unbroken(stage))
            self.work[stage.name] = done.seconds

    def unbroken(self, stage: Stage) -> Path:
        """The artifact of the run that was left alone."""
        return self.folder / "unbroken" / stage.name / stage.name

    def command(self, stage: Stage, output: Path) -> list[str]:
        """Words behind ``vpr``."""
        return stage.command(self._paths, output)

    def run(self, stage: Stage, output: Path, until: float = np.inf, prepare: Prepare | None = None) -> Ended:
        """Run the stage's command; kill it after so many seconds of processor time, imports aside.

        Args:
            stage: whose command.
            output: of it; its folder is made.
            until: processor time.
            prepare: called in the process before the command is.
        """
        return self.start(stage, output, prepare).wait(until)

    def start(self, stage: Stage, output: Path, prepare: Prepare | None = None) -> Running:
        """Begin to run the stage's command; the arguments are those of :meth:`run`."""
        output.parent.mkdir(parents=True, exist_ok=True)
        self._runs += 1
        command = self.command(stage, output)
        return Running(self._context, command, VERBS[stage.verb].module, self.folder / f"{self._runs}.log", prepare)

    def strike(self, stage: Stage, rng: np.random.Generator, folder: Path) -> Struck:
        """Kill a run at a random moment, look at what it leaves, and let it go on to its end.

        A quarter of the runs are killed again when they go on, and before half of them an older artifact lies at
        the output.
        """
        told, output = Struck(stage.name), folder / stage.name
        older = rng.random() < 0.5
        while not told.kills and not told.stuck:  # a run that was quicker than its end is not counted
            shutil.rmtree(folder, ignore_errors=True)
            if older:
                self.lay_older(stage, output)
            self._kill(stage, output, rng, told)
        if rng.random() < _AGAIN:
            self._kill(stage, output, rng, told)
        self._finish(stage, output, told)
        return told

    def strike_at(self, stage: Stage, step: int, folder: Path) -> Struck:
        """Kill a run at its n-th change of a file or folder, over an older artifact; no kill if it has fewer."""
        told, output = Struck(stage.name), folder / stage.name
        self.lay_older(stage, output)
        done = self.run(stage, output, prepare=partial(die_at, step, str(folder)))
        told.kills += done.killed
        _look(output, told)
        self._finish(stage, output, told)
        return told

    def check(self, stage: Stage, output: Path, told: Struck) -> None:
        """Compare a result, and what lies beside it, with the unbroken run's."""
        try:
            told.differs = difference(stage, self.unbroken(stage), output)
        except UserError as error:
            told.damaged.append(str(error))
        told.left = leftovers(self.unbroken(stage).parent, output.parent)

    def _kill(self, stage: Stage, output: Path, rng: np.random.Generator, told: Struck) -> None:
        done = self.run(stage, output, float(rng.random()) * self.work[stage.name])
        if done.killed:
            told.kills += 1
            _look(output, told)
        elif done.code:
            told.stuck = f"exit status {done.code}: {done.output[-300:]}"

    def _finish(self, stage: Stage, output: Path, told: Struck) -> None:
        done = self.run(stage, output)
        told.again = done.seconds / self.work[stage.name]
        if done.code:
            told.stuck = f"exit status {done.code}: {done.output[-300:]}"
        else:
            self.check(stage, output, told)

    def lay_older(self, stage: Stage, output: Path) -> None:
        """An artifact of the same kind and another configuration, as an earlier training leaves it."""
        shutil.copytree(self.unbroken(stage), output)
        card = json.loads((output / CARD_NAME).read_bytes())
        card["config"] = _OLDER
        (output / CARD_NAME).write_text(json.dumps(card), encoding="utf-8")


def _one_threaded_processes() -> Any:
    """The context whose processes are forked from one that has the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    before = dict(os.environ)
    os.environ.update(_ONE_THREAD)  # read by the libraries when they are loaded
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Running:
    """A command that has been started.

    Args:
        context: of the process that it is forked from.
        command: words behind ``vpr``.
        module: of the verb; imported before anything is counted.
        log: of what it prints.
        prepare: called in it first.
    """

    def __init__(self, context: Any, command: list[str], module: str, log: Path, prepare: Prepare | None) -> None:
        self._log = log
        self._process = context.Process(target=_run, args=(command, module, log, prepare))
        self._process.start()
        while not _begun(log).exists() and self._process.is_alive():
            time.sleep(_LOOK)
        self._before = self._seconds()

    def wait(self, until: float = np.inf) -> Ended:
        """Until it ends, or has used so many seconds of processor time: then it is killed."""
        spent = 0.0
        while self._process.is_alive() and spent < until:
            spent = max(spent, self._seconds() - self._before)
            time.sleep(_LOOK)
        if self._process.is_alive():
            time.sleep(np.random.default_rng(int(spent * 1e9)).uniform(0, _JITTER))
            self.kill()
        self._process.join()
        return Ended(self._process.exitcode, spent, self._log.read_text(encoding="utf-8", errors="replace"))

    def kill(self) -> None:
        """``kill -9``; nothing if it has ended."""
        self._process.kill()
        self._process.join()

    def _seconds(self) -> float:
        try:
            return time.clock_gettime(~self._process.pid << 3 | 2)  # what clock_getcpuclockid(3) gives for a process
        except OSError:  # it has ended
            return 0.0


def _begun(log: Path) -> Path:
    return log.with_suffix(".begun")


def _run(command: list[str], module: str, log: Path, prepare: Prepare | None) -> None:
    if len(os.listdir(f"/proc/{os.getppid()}/task")) != 1:
        raise RuntimeError("the process that this one was forked from has threads: preload less")
    with log.open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    importlib.import_module(module)
    from vpr.cli import main

    _begun(log).touch()
    if prepare is not None:
        prepare()
    main(command)


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def set_clock_back() -> None:
    """Let the clock of this process stand years before, and run backwards from there."""
    seconds = itertools.count(1_000_000_000, -1)  # 2001

    class Past(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(next(seconds), tz)

    time.time = lambda: float(next(seconds))
    time.time_ns = lambda: next(seconds) * 10**9
    artifact.datetime = Past  # type: ignore[attr-defined, misc]


def die_at(step: int, folder: str) -> None:
    """Let this process kill itself just before its n-th change of a file or folder below ``folder``, from 1."""
    left = [step]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES and not (event == "open" and (arguments[2] or 0) & _WRITING):
            return
        # Where a folder is removed with all that it holds, names are relative to it.
        name = str(arguments[0])
        if name.startswith(folder) or not os.path.isabs(name):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _look(output: Path, told: Struck) -> None:
    """What a kill left: an artifact that can be seen is whole."""
    if output.exists():
        try:
            load_artifact(output)
        except UserError as error:
            told.damaged.append(str(error))
    if told.found:
        return
    beside = [path for path in output.parent.iterdir() if path != output and path.suffix != ".lock"]
    new = output.exists() and json.loads((output / CARD_NAME).read_bytes())["config"] != _OLDER
    told.found = "work" if beside else "artifact" if new else "nothing"
