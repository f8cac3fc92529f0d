"""Every command as a process without a network: ``make figures TOPIC=reliability PARTS=offline``.

Python's sockets reach this machine only (``no_network/sitecustomize.py``), which logs every other attempt. Where Linux
lets a user have a network namespace (``unshare``), the processes see nothing but its loopback. That also holds for
libraries that open sockets without Python.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.figures import ROOT, Figure, Row
from tests.reliability.commands import COMMANDS as ALL_COMMANDS
from tests.reliability.commands import Command, paths_in, write_inputs
from vpr.cli import COMMANDS
from vpr.common.errors import UserError
from vpr.common.log import get_logger

log = get_logger(__name__)

_MAX_SECONDS = 4 * 3600.0  # the demo trains two models, on a machine that may have other work
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
_RUN_ALL = """
import json
from vpr.cli import run, silence_libraries
silence_libraries()
for words in json.load(open("commands.json")):
    run(words)
"""
_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
SERVE = "search serve"
# This command downloads weights of open_clip.
DOWNLOAD = Command(
    "teacher train --tower.name RN50 --tower.pretrained openai --loader.batch-size 8 --catalog {catalog}", "download"
)


@dataclass(frozen=True)
class OfflineResult:
    """How a command ended without a network.

    Attributes:
        verb: Name in :data:`vpr.cli.COMMANDS`.
        code: Exit status.
        attempts: Hosts that it tried to reach through Python's sockets.
        line: Last line of its output.
    """

    verb: str
    code: int
    attempts: tuple[str, ...]
    line: str

    @property
    def has_passed(self) -> bool:
        """Whether the command succeeded and tried to reach no host."""
        return self.code == 0 and not self.attempts


def run_each(commands: Sequence[Command], folder: Path) -> Iterator[OfflineResult]:
    """Run commands one after another in a folder, each in its own process without a network."""
    for command in commands:
        module = "tests.reliability.offline.offline" if command.verb == SERVE else "vpr"
        process = _start([sys.executable, "-m", module, *_words(command)], folder)
        yield _wait(process, folder, command.verb)


def run_together(commands: Sequence[Command], folder: Path) -> OfflineResult:
    """Run commands in a single process, which loads its libraries once."""
    (folder / "commands.json").write_text(json.dumps([_words(command) for command in commands]), encoding="utf-8")
    return _wait(_start([sys.executable, "-c", _RUN_ALL], folder), folder, "all")


def _words(command: Command) -> list[str]:
    return command.words(paths_in(""), command.output)


def can_unshare_network() -> bool:
    """Return whether a process can have its own empty network here."""
    if not shutil.which(_UNSHARE[0]):
        return False
    return subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode == 0


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    (folder / "attempts.txt").write_text("", encoding="utf-8")
    paths = f"{Path(__file__).parent / 'no_network'}{os.pathsep}{ROOT}"
    # An empty cache: earlier downloads on this machine do not count.
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(folder / "hub")}
    environment["NO_NETWORK_LOG"] = str(folder / "attempts.txt")
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [*(_UNSHARE if can_unshare_network() else ()), *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def _wait(process: subprocess.Popen[bytes], folder: Path, verb: str) -> OfflineResult:
    try:
        code = process.wait(_MAX_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    lines = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    attempts = (folder / "attempts.txt").read_text(encoding="utf-8").splitlines()
    return OfflineResult(verb, code, tuple(dict.fromkeys(attempts)), lines[-1] if lines else "")


def visit_page(arguments: list[str]) -> int:
    """Start the search page, search for an image and stop the page; return its exit status.

    This runs in the network of the page, which may be empty.
    """
    page = subprocess.Popen([sys.executable, "-m", "vpr", *arguments], stderr=subprocess.PIPE, text=True)
    assert page.stderr is not None
    address = None
    while address is None and (line := page.stderr.readline()):
        sys.stderr.write(line)
        address = _ADDRESS.search(line)
    if address is not None:
        image = next(Path("images").rglob("*.png")).read_bytes()
        model = Path(arguments[arguments.index("--models") + 1]).name.encode()
        for data in (None, image):
            path = "/search" if data else "/"
            with urllib.request.urlopen(f"{address[0]}{path}", data, timeout=60) as answer:
                assert model in answer.read()
        page.send_signal(signal.SIGINT)
    sys.stderr.write(page.communicate()[1])
    return page.returncode


def measure_offline(folder: Path, command: str) -> tuple[list[Figure], list[Row]]:
    """Return figures and a table of all commands, run in a folder that is emptied first.

    Raises:
        UserError: The guard does not stop the command that downloads.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder)
    results = []
    for result in run_each(ALL_COMMANDS, folder):
        log.info(f"  {result.verb}: exit status {result.code}, attempts: {', '.join(result.attempts) or 'none'}")
        results.append(result)
    (download,) = run_each((DOWNLOAD,), folder)
    if download.has_passed or not download.attempts:
        raise UserError(
            f"offline: '{DOWNLOAD.line}' was not stopped, so the results mean nothing. Fix sitecustomize.py."
        )
    passed = {result.verb for result in results} - {result.verb for result in results if not result.has_passed}
    attempts = sum(len(result.attempts) for result in results)
    figures = [
        Figure("offline: verbs that pass with sockets blocked", len(passed), "verbs", len(COMMANDS), ">=", command),
        Figure("offline: attempts to reach another machine", attempts, "attempts", 0, "<=", command),
    ]
    network = "its own loopback" if can_unshare_network() else "blocked by Python"
    download = replace(download, verb="teacher train --tower.pretrained openai (downloads)")
    rows = [
        {
            "verb": result.verb,
            "exit status": result.code,
            "attempts": len(result.attempts),
            "network": network,
        }
        for result in (*results, download)
    ]
    return figures, rows


if __name__ == "__main__":
    sys.exit(visit_page(sys.argv[1:]))
