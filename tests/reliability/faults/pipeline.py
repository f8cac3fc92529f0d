"""Stages as processes for faults (:mod:`tests.reliability.faults.injection`), and their uninterrupted results.

Each process is forked from a server that has imported the libraries and runs a single thread. A kill therefore falls
into the work of the command and not into its imports. Otherwise the process equals ``python -m vpr``.
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
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil

from tests.reliability.commands import Command, paths_in, write_inputs
from tests.reliability.faults.stages import STAGES, differences, leftovers
from vpr.artifacts.paths import CARD_NAME
from vpr.cli import COMMANDS
from vpr.common.errors import UserError

# Libraries that start no thread on import.
_PRELOADED = [
    *("torch", "torchvision", "lightning", "open_clip", "vit_pytorch", "onnx", "torch.onnx", "torch._dynamo"),
    *("torch.utils.tensorboard", "matplotlib", "jsonargparse", "pydantic", "rich.console"),
]
# More threads would change the order of sums, and with it the last bits.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
OLDER_CONFIG = {"older": True}
_POLL_SECONDS = 0.002
_MAX_DELAY = 0.05  # seconds; a process that waits for its disk uses no processor time
_MAX_SHUTDOWN = 10.0  # seconds for the children of a killed process to end

Prepare = Callable[[], None]


@dataclass(frozen=True)
class EndedProcess:
    """A process that has ended.

    Attributes:
        code: Exit status; minus the signal for a process that a signal ended.
        seconds: Processor time, imports aside.
        output: Standard output and errors.
        orphans: Child processes that were still alive some seconds later.
    """

    code: int
    seconds: float
    output: str
    orphans: tuple[str, ...] = ()

    @property
    def was_killed(self) -> bool:
        """Whether a kill ended the process before it had finished."""
        return self.code == -signal.SIGKILL


class Pipeline:
    """Uninterrupted results of the stages, and processes that repeat a stage.

    Args:
        folder: Folder for everything.
        last: Name of the last stage; the constructor runs all stages up to it.
    """

    def __init__(self, folder: Path, last: str = STAGES[-1].output) -> None:
        self.folder = folder
        self._starts = 0
        self.seconds: dict[str, float] = {}
        write_inputs(folder / "inputs")
        self._paths = paths_in(folder / "inputs")
        names = [stage.output for stage in STAGES]
        self.stages = {stage.output: stage for stage in STAGES[: names.index(last) + 1]}
        self._paths |= {name: str(self.expected(stage)) for name, stage in self.stages.items()}
        for stage in self.stages.values():
            process = self.run(stage, self.expected(stage))
            if process.code:
                raise UserError(f"faults: 'vpr {stage.verb}' failed ({process.output[-500:]}). Run it by hand.")
            self.seconds[stage.output] = process.seconds

    def expected(self, stage: Command) -> Path:
        """Return the artifact of the uninterrupted run."""
        return self.folder / "expected" / stage.output / stage.output

    def words(self, stage: Command, output: Path) -> list[str]:
        """Return the stage's words after ``vpr``."""
        return stage.words(self._paths, str(output))

    def run(
        self, stage: Command, output: Path, max_seconds: float = np.inf, prepare: Prepare | None = None
    ) -> EndedProcess:
        """Run a stage to its end, or kill it.

        Args:
            stage: Command to run.
            output: Path of its output; the parent folder is created.
            max_seconds: Processor time after which the process is killed, imports aside.
            prepare: Function that the process calls before the command.
        """
        return self.start(stage, output, prepare).wait(max_seconds)

    def start(self, stage: Command, output: Path, prepare: Prepare | None = None) -> RunningProcess:
        """Start a stage; for the arguments see :meth:`run`."""
        output.parent.mkdir(parents=True, exist_ok=True)
        self._starts += 1
        log = self.folder / f"{self._starts}.log"
        return RunningProcess(self.words(stage, output), COMMANDS[stage.verb].target.partition(":")[0], log, prepare)

    def differences(self, stage: Command, output: Path) -> list[str]:
        """Return what differs from the uninterrupted run, in the result and in the files next to it."""
        expected = self.expected(stage)
        return [*differences(stage, expected, output), *leftovers(expected.parent, output.parent)]

    def write_older(self, stage: Command, output: Path) -> None:
        """Write an artifact of the same kind and another configuration, as an earlier run leaves it."""
        shutil.copytree(self.expected(stage), output)
        card = json.loads((output / CARD_NAME).read_bytes())
        card["config"] = OLDER_CONFIG
        (output / CARD_NAME).write_text(json.dumps(card), encoding="utf-8")


@cache
def _fork_server() -> forkserver.ForkServer:
    """Return a server that has imported the libraries and runs one thread."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    os.environ.update(_ONE_THREAD)  # the libraries read these when they are loaded
    try:
        server.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server


class _Process(ForkServerProcess):
    """Process of that server: a training run may have started the default one for its data loader."""

    @staticmethod
    def _Popen(process: Any) -> Any:  # noqa: N802
        default = forkserver.connect_to_new_process
        forkserver.connect_to_new_process = _fork_server().connect_to_new_process
        try:
            return ForkServerProcess._Popen(process)  # type: ignore[attr-defined]
        finally:
            forkserver.connect_to_new_process = default


class RunningProcess:
    """A command that runs in a process.

    Args:
        words: Words after ``vpr``.
        module: Module of the command; the process imports it before the processor time counts.
        log: File for what the process prints.
        prepare: Function that the process calls before the command.
    """

    def __init__(self, words: list[str], module: str, log: Path, prepare: Prepare | None) -> None:
        self._log = log
        self._process = _Process(target=_run, args=(words, module, log, prepare))
        self._process.start()
        self._pid = cast(int, self._process.pid)
        while not _start_mark(log).exists() and self._process.is_alive():
            time.sleep(_POLL_SECONDS)
        self._seconds_at_start = self._processor_seconds()

    @property
    def is_alive(self) -> bool:
        """Whether the command still runs."""
        return self._process.is_alive()

    def wait(self, max_seconds: float = np.inf) -> EndedProcess:
        """Wait for the end, or kill the process after so many seconds of processor time."""
        spent = 0.0
        while self.is_alive and spent < max_seconds:
            spent = max(spent, self._processor_seconds() - self._seconds_at_start)
            time.sleep(_POLL_SECONDS)
        if self.is_alive:
            time.sleep(np.random.default_rng(int(spent * 1e9)).uniform(0, _MAX_DELAY))
            self._process.kill()
        self._process.join()
        output = self._log.read_text(encoding="utf-8", errors="replace")
        orphans = wait_for_orphans(lambda process: os.getsid(process.pid) == self._pid)
        return EndedProcess(cast(int, self._process.exitcode), spent, output, orphans)

    def _processor_seconds(self) -> float:
        # psutil counts in ticks of 10 ms, as long as some stages take; this clock counts in nanoseconds.
        try:
            return time.clock_gettime(~self._pid << 3 | 2)  # the process's clock, as of clock_getcpuclockid(3)
        except OSError:  # the process has ended
            return 0.0


def wait_for_orphans(is_child: Callable[[psutil.Process], bool], seconds: float = _MAX_SHUTDOWN) -> tuple[str, ...]:
    """Return the processes, as ``process 123``, that are still alive some seconds after their parent has ended."""
    end = time.monotonic() + seconds
    while (alive := _alive(is_child)) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return alive


def _alive(is_child: Callable[[psutil.Process], bool]) -> tuple[str, ...]:
    pids = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # the process has ended meanwhile, or belongs to another user
            if is_child(process) and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                pids.append(process.pid)
    return tuple(f"process {pid}" for pid in pids)


def _start_mark(log: Path) -> Path:
    return log.with_suffix(".started")


def _run(words: list[str], module: str, log: Path, prepare: Prepare | None) -> None:
    if psutil.Process(os.getppid()).num_threads() != 1:
        raise RuntimeError("the fork server runs threads. Remove the library that starts them from _PRELOADED.")
    os.setsid()  # the session identifies the children of this process
    with log.open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    importlib.import_module(module)
    from vpr.cli import main

    _start_mark(log).touch()
    if prepare is not None:
        prepare()
    main(words)
