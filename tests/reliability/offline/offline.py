"""Every verb as a process that has no network: ``make figures TOPIC=reliability PARTS="offline"``.

Python's sockets reach this machine alone (:mod:`benchmarks.no_network`), and what tries otherwise is written down.
Where Linux lets a user have a network of their own (``unshare``), the processes have none but its loopback either, so
that libraries which open sockets past Python are held to it too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.figures import ROOT, Figure, Row
from tests.reliability.commands import write_images
from vpr.cli import COMMANDS
from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

_LONGEST = 4 * 3600.0  # seconds; the demo trains two models, on a machine that may have other work
_ALONE = ("unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
_TOGETHER = "import json; from vpr.cli import silence_libraries, run; silence_libraries(); [run(one) for one in json.load(open('road.json'))]"
_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
_SERVE = "search serve"
_LOADER = "--loader.batch-size 8 --run.precision 32-true"
_STAGES = "'{train: all, epochs: 1, lr_head: 1.0e-3, lr_tower: 1.0e-3}'"
_VIT = (
    "--model.image-size 32 --model.patch-size 8 --model.dim 32 --model.depth 1 --model.heads 2 --model.dim-head 16"
    " --model.mlp-dim 64"
)
# Every verb, in an order in which each finds what it needs in the folder it is run in.
ROAD = (
    "catalog --reader folder --root images --validation 0.25 --test 0.25 --output catalog",
    "teacher data --csv images.csv --validation 0.25 --output data",
    f"teacher train --tower.name sample --tower.pretrained '' --tower.image-size 32 --stages {_STAGES} {_LOADER}"
    " --catalog catalog --output teacher",
    f"teacher train --tower.name sample --tower.pretrained '' --tower.image-size 32 --stages {_STAGES} {_LOADER}"
    " --catalog catalog --output other --views.rotate 5",
    "teacher soup --models teacher other --catalog catalog --output soup",
    "teacher embed --model teacher --catalog catalog --output teacher-embeddings",
    "teacher runs --folder .",
    f"student distill {_VIT} --epochs 1 --targets.views 1 {_LOADER} --teacher teacher --catalog catalog"
    " --output student",
    "student embed --model student --catalog catalog --split test --output embeddings",
    "export onnx --student student --images 8 --output fp32",
    "calibrate --onnx fp32 --catalog catalog --count 8 --output ranges",
    "export int8 --onnx fp32 --ranges ranges --output int8",
    "export engine --onnx int8 --target sm86 --output engine",
    "export serving --model fp32 --gallery embeddings --device cpu --output serving",
    "export parity --student student --models fp32 int8 --catalog catalog --output parity",
    "bench recall --models student int8 --catalog catalog --output recall",
    "bench latency --models int8 --batches 1 --seconds 0.2 --starts 1 --output latency",
    "bench scale --embeddings embeddings --sizes 1000 --kinds flat --seconds 0.1 --output scale",
    "bench report --models teacher student int8 --catalog catalog --batches 1 --seconds 0.2 --output report",
    "bench compare report report",
    "search --queries embeddings --gallery embeddings --k 3 --output found.csv",
    f"{_SERVE} --models int8 --catalog catalog --port 0",
    "doctor",
    "recipes list",
    "recipes show teacher/sample",
    "recipes copy teacher/sample",
    "completion bash",
    "demo --output demo",
)
# A verb that is asked for weights of open_clip, which lie elsewhere.
DOWNLOAD = f"teacher train --tower.name RN50 --tower.pretrained openai {_LOADER} --catalog catalog --output asked"


@dataclass(frozen=True)
class VerbResult:
    """How a verb ended without a network.

    Attributes:
        verb: as in :data:`vpr.cli.COMMANDS`.
        code: its exit status.
        attempts: what it tried to reach, as far as Python's sockets tell.
        line: the last that it wrote.
    """

    verb: str
    code: int
    attempts: tuple[str, ...]
    line: str

    @property
    def passed(self) -> bool:
        """Whether it did its work and asked no one."""
        return self.code == 0 and not self.attempts


def prepare(folder: Path) -> None:
    """The images that :data:`ROAD` begins with, and a table of them."""
    write_images(folder / "images")
    names = sorted(path.relative_to(folder).as_posix() for path in (folder / "images").rglob("*.png"))
    rows = [f"{name},{Path(name).parent.name}\n" for name in names]
    (folder / "images.csv").write_text("".join(["image,product\n", *rows]), encoding="utf-8")


def verb_of(command: str) -> str:
    """The verb that a command line begins with."""
    return max((verb for verb in COMMANDS if f"{command} ".startswith(f"{verb} ")), key=len)


def run_each(commands: tuple[str, ...], folder: Path) -> Iterator[VerbResult]:
    """Run commands one after another in a folder, each as a process of its own without a network."""
    for command in commands:
        module = "tests.reliability.offline.offline" if verb_of(command) == _SERVE else "vpr"
        yield _ended(_start([sys.executable, "-m", module, *shlex.split(command)], folder), folder, verb_of(command))


def run_together(commands: tuple[str, ...], folder: Path) -> VerbResult:
    """Run commands in one process, which loads its libraries once."""
    (folder / "road.json").write_text(json.dumps([shlex.split(one) for one in commands]), encoding="utf-8")
    return _ended(_start([sys.executable, "-c", _TOGETHER], folder), folder, "all")


def has_network_of_its_own() -> bool:
    """Whether a process can be given a network without anything in it here."""
    if not shutil.which(_ALONE[0]):
        return False
    return subprocess.run([*_ALONE, "true"], capture_output=True, check=False).returncode == 0


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    (folder / "attempts.txt").write_text("", encoding="utf-8")
    paths = f"{Path(__file__).parent / 'no_network'}{os.pathsep}{ROOT}"
    # What an earlier download left on this machine is not to be had either.
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(folder / "hub")}
    environment["NO_NETWORK_LOG"] = str(folder / "attempts.txt")
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [*(_ALONE if has_network_of_its_own() else ()), *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def _ended(process: subprocess.Popen[bytes], folder: Path, verb: str) -> VerbResult:
    try:
        code = process.wait(_LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    attempts = (folder / "attempts.txt").read_text(encoding="utf-8").splitlines()
    return VerbResult(verb, code, tuple(dict.fromkeys(attempts)), lines[-1] if lines else "")


def visit(arguments: list[str]) -> int:
    """Start the page, look an image up on it and end it; its exit status. In a process beside it: it may be alone."""
    page = subprocess.Popen([sys.executable, "-m", "vpr", *arguments], stderr=subprocess.PIPE, text=True)
    assert page.stderr is not None
    address = None
    while address is None and (line := page.stderr.readline()):
        sys.stderr.write(line)
        address = _ADDRESS.search(line)
    if address is not None:
        image = next(Path("images").rglob("*.png")).read_bytes()
        for data in (None, image):
            path = "/search" if data else "/"
            with urllib.request.urlopen(f"{address[0]}{path}", data, timeout=60) as answer:
                assert b"int8" in answer.read()
        page.send_signal(signal.SIGINT)
    sys.stderr.write(page.communicate()[1])
    return page.returncode


def offline(folder: Path, command: str) -> tuple[list[Figure], list[Row]]:
    """Figures and a table of all verbs, in a folder that is emptied first.

    Raises:
        UserError: the guard does not see the verb that downloads.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare(folder)
    told = []
    for one in run_each(ROAD, folder):
        log.info(f"  {one.verb}: exit status {one.code}, tried to reach {', '.join(one.attempts) or 'nothing'}")
        told.append(one)
    (asked,) = run_each((DOWNLOAD,), folder)
    if asked.passed or not asked.attempts:
        raise UserError(f"offline: '{DOWNLOAD}' was not held back, so nothing was: mend {Path(__file__).name}")
    passed = {one.verb for one in told} - {one.verb for one in told if not one.passed}
    attempts = sum(len(one.attempts) for one in told)
    figures = [
        Figure("offline: verbs that pass with sockets blocked", len(passed), "verbs", len(COMMANDS), ">=", command),
        Figure("offline: attempts to reach another machine", attempts, "attempts", 0, "<=", command),
    ]
    network = "loopback of its own" if has_network_of_its_own() else "refused by Python"
    asked = replace(asked, verb="teacher train --tower.pretrained openai, which asks for it")
    rows = [
        {"verb": one.verb, "exit status": one.code, "attempts": len(one.attempts), "network": network}
        for one in (*told, asked)
    ]
    return figures, rows


if __name__ == "__main__":
    sys.exit(visit(sys.argv[1:]))
