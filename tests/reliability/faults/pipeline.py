"""The stages as commands that something happens to (:mod:`tests.reliability.faults.injection`), and their unbroken results.

A process is forked from one that has imported the libraries and has no threads of its own, so that what is killed is
the work and not its imports. From there on it is what ``python -m vpr`` is: a process with its own verb and files.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

import numpy as np

from tests.reliability.faults.stages import STAGES, Stage, difference, leftovers, write_inputs
from vpr.artifacts.paths import CARD_NAME
from vpr.cli import COMMANDS
from vpr.common.errors import UserError

# What can be imported without starting a thread.
_PRELOADED = [
    *("torch", "torchvision", "lightning", "open_clip", "vit_pytorch", "onnx", "torch.onnx", "torch._dynamo"),
    *("torch.utils.tensorboard", "matplotlib", "jsonargparse", "pydantic", "rich.console"),
]
# More threads would change the order of sums, and with it the last bits.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
OLDER = {"older": True}  # configuration of an artifact that lies at an output before
_LOOK = 0.002
_JITTER = 0.05  # seconds: a process that waits for its disk uses no processor time
_PARTING = 10.0  # seconds that what a killed process had started may take to end

Prepare = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: exit status; minus the signal that ended it.
        seconds: of processor time, imports aside.
        output: what it printed.
        orphans: processes that it had started and that were still there a while after a kill.
    """

    code: int
    seconds: float
    output: str
    orphans: tuple[str, ...] = ()

    @property
    def killed(self) -> bool:
        """Whether it was killed before it had finished."""
        return self.code == -signal.SIGKILL


class Pipeline:
    """The stages' unbroken results, and the processes that make them again.

    Args:
        folder: for everything.
        last: name of the last stage that is wanted; those before it are run too.
    """

    def __init__(self, folder: Path, last: str = STAGES[-1].name) -> None:
        self.folder = folder
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
        return Running(
            command, COMMANDS[stage.verb].target.partition(":")[0], self.folder / f"{self._runs}.log", prepare
        )

    def departures(self, stage: Stage, output: Path) -> list[str]:
        """What a result, and what lies beside it, has otherwise than the unbroken run's."""
        unbroken = self.unbroken(stage)
        return [*difference(stage, unbroken, output), *leftovers(unbroken.parent, output.parent)]

    def lay_older(self, stage: Stage, output: Path) -> None:
        """An artifact of the same kind and another configuration, as an earlier training leaves it."""
        shutil.copytree(self.unbroken(stage), output)
        card = json.loads((output / CARD_NAME).read_bytes())
        card["config"] = OLDER
        (output / CARD_NAME).write_text(json.dumps(card), encoding="utf-8")


@cache
def _server() -> forkserver.ForkServer:
    """What processes are forked from: it has the libraries, and one thread."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    os.environ.update(_ONE_THREAD)  # read by the libraries when they are loaded
    try:
        server.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server


class _Process(ForkServerProcess):
    """Forked from that server: the usual one of this process may have been started for a training's images."""

    @staticmethod
    def _Popen(process: Any) -> Any:  # noqa: N802
        usual = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = _server().connect_to_new_process
        try:
            return ForkServerProcess._Popen(process)  # type: ignore[attr-defined]
        finally:
            forkserver.connect_to_new_process = usual


class Running:
    """A command that has been started.

    Args:
        command: words behind ``vpr``.
        module: of the verb; imported before anything is counted.
        log: of what it prints.
        prepare: called in it first.
    """

    def __init__(self, command: list[str], module: str, log: Path, prepare: Prepare | None) -> None:
        self._log = log
        self._process = _Process(target=_run, args=(command, module, log, prepare))
        self._process.start()
        self._pid = cast(int, self._process.pid)
        while not _begun(log).exists() and self._process.is_alive():
            time.sleep(_LOOK)
        self._before = self._seconds()

    @property
    def alive(self) -> bool:
        """Whether it is still at work."""
        return self._process.is_alive()

    def wait(self, until: float = np.inf) -> Ended:
        """Until it ends, or has used so many seconds of processor time: then it is killed."""
        spent = 0.0
        while self.alive and spent < until:
            spent = max(spent, self._seconds() - self._before)
            time.sleep(_LOOK)
        if self.alive:
            time.sleep(np.random.default_rng(int(spent * 1e9)).uniform(0, _JITTER))
            self.kill()
        self._process.join()
        output = self._log.read_text(encoding="utf-8", errors="replace")
        return Ended(cast(int, self._process.exitcode), spent, output, survivors(partial(_members, self._pid)))

    def kill(self) -> None:
        """``kill -9``; nothing if it has ended."""
        self._process.kill()
        self._process.join()

    def _seconds(self) -> float:
        try:
            return time.clock_gettime(~self._pid << 3 | 2)  # what clock_getcpuclockid(3) gives for a process
        except OSError:  # it has ended
            return 0.0


def survivors(alive: Callable[[], tuple[str, ...]], seconds: float = _PARTING) -> tuple[str, ...]:
    """Processes that are still alive a while after what had started them has ended."""
    until = time.monotonic() + seconds
    while (left := alive()) and time.monotonic() < until:
        time.sleep(_LOOK)
    return left


def _members(session: int) -> tuple[str, ...]:
    return processes(lambda folder: int(_state(folder)[3]) == session)


def processes(wanted: Callable[[Path], bool]) -> tuple[str, ...]:
    """Living processes by what their folder in ``/proc`` tells: ``process 123``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if _state(folder)[0] not in "ZX" and wanted(folder):
                found.append(f"process {folder.name}")
    return tuple(found)


def _state(folder: Path) -> list[str]:
    """State, parent, group and session."""
    return (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]


def _begun(log: Path) -> Path:
    return log.with_suffix(".begun")


def _run(command: list[str], module: str, log: Path, prepare: Prepare | None) -> None:
    if len(os.listdir(f"/proc/{os.getppid()}/task")) != 1:
        raise RuntimeError("the process that this one was forked from has threads: preload less")
    os.setsid()  # so that what it starts can be told
    with log.open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    importlib.import_module(module)
    from vpr.cli import main

    _begun(log).touch()
    if prepare is not None:
        prepare()
    main(command)
