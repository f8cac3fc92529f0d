"""The search page as a process of its own, under two hundred clients: answers, times, memory, and what is left over."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from app.search_page.lookup import load_searchers
from experiments.figures import Figure, Row
from tests.reliability.footprint import Footprint, measure_footprint
from tests.reliability.load.clients import Outcome, Upload, run_clients
from tests.reliability.load.uploads import SHARES, TOP, Uploads
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog

log = get_logger(__name__)

_LOOK = 0.05  # seconds between looks at the page's memory
_SETTLE = 15.0  # seconds for connections to end
_MORE_MEMORY = 512.0  # MiB: eight whole uploads twice over, and a large image decoded
_START = 300.0


@dataclass(frozen=True)
class LoadConfig:
    """What the page is put under.

    Attributes:
        models: as ``vpr search serve`` takes them, one.
        catalog: catalogue artifact.
        embeddings: artifact that keeps the gallery's vectors; made where it is not there.
        clients: at once.
        uploads: of each client, one after the other.
        rounds: of all clients; memory is compared after the first and the last.
        seed: of who sends what.
    """

    models: tuple[str, ...]
    catalog: str
    embeddings: str
    clients: int = 200
    uploads: int = 8
    rounds: int = 2
    seed: int = 0


@dataclass
class Seen:
    """What was seen of the page.

    Attributes:
        outcomes: of all uploads.
        idle: before the first round.
        after: of each round, once its connections had ended.
        most: largest of each number under load.
        left: names of files in the page's temporary folder.
        said: what the process wrote after its address.
        code: exit status.
    """

    idle: Footprint
    outcomes: list[Outcome] = field(default_factory=list)
    after: list[Footprint] = field(default_factory=list)
    most: list[Footprint] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    said: str = ""
    code: int = 0


def put_under_load(config: LoadConfig) -> Seen:
    """Serve the page, let the clients at it, and end it."""
    searchers, _ = load_searchers(config.models, config.catalog, "test", (config.embeddings,))
    images = load_catalog(config.catalog).select(split="test", role="query")
    uploads = Uploads(searchers[0], images, config.seed)
    with tempfile.TemporaryDirectory(prefix="load-") as name, _serving(config, Path(name)) as (process, port):
        asyncio.run(run_clients(port, [[uploads.draw("good")]]))  # what is made at the first call only
        seen = Seen(_settled(process.pid, measure_footprint(process.pid)))
        for number in range(config.rounds):
            plans = [[uploads.draw() for _ in range(config.uploads)] for _ in range(config.clients)]
            asyncio.run(_watched(process.pid, port, plans, seen))
            seen.after.append(_settled(process.pid, seen.idle))
            log.info(f"  round {number + 1} of {config.rounds}: {len(seen.outcomes)} uploads so far")
        process.send_signal(signal.SIGINT)
        seen.code = process.wait(60)
        seen.left = sorted(path.name for path in (Path(name) / "tmp").iterdir())
        seen.said = (Path(name) / "said").read_text(encoding="utf-8").partition("ends it\n")[2]
    return seen


def summarise(config: LoadConfig, seen: Seen, command: str) -> tuple[list[Figure], list[Row]]:
    """What must not be, the times of uploads that are sent at once, memory, and a table by kind of upload."""
    verdicts = Counter(outcome.verdict for outcome in seen.outcomes)
    quick = [1000 * outcome.seconds for outcome in seen.outcomes if outcome.kind == "good"]
    most, last = max(one.resident for one in seen.most), seen.after[-1]

    def figure(name: str, value: float, goal: float | None, unit: str = "") -> Figure:
        return Figure(f"load: {name}", value, unit, goal, "<=", command, seeds=(config.seed,))

    figures = [
        Figure("load: clients at once", config.clients, "", 200, ">=", command, seeds=(config.seed,)),
        figure("uploads", len(seen.outcomes), None),
        figure("answers lost", verdicts["lost"], 0),
        figure("answers mixed up", verdicts["mixed up"], 0),
        figure("answers wrong in another way", verdicts["wrong"], 0),
        figure("p50 of good images sent at once", float(np.percentile(quick, 50)), None, "ms"),
        figure("p99 of good images sent at once", float(np.percentile(quick, 99)), None, "ms"),
        figure("memory before", seen.idle.resident / 2**20, None, "MiB"),
        figure("most memory above that", (most - seen.idle.resident) / 2**20, _MORE_MEMORY, "MiB"),
        figure("memory after the last round above that after the first", _growth(seen.after), None, "MiB"),
        figure("more open files at the end", last.files - seen.idle.files, 0),
        figure("more threads at the end", last.threads - seen.idle.threads, 0),
        figure("files left in the temporary folder", len(seen.left), 0),
        figure("exit status when interrupted", seen.code, 0),
        figure("lines of error output", len(seen.said.removesuffix("ended\n").splitlines()), 0),
    ]
    return figures, [_by_kind(kind, seen.outcomes) for kind in SHARES]


def _growth(after: list[Footprint]) -> float:
    return (after[-1].resident - after[0].resident) / 2**20


def _by_kind(kind: str, outcomes: list[Outcome]) -> Row:
    some = [outcome for outcome in outcomes if outcome.kind == kind]
    times = [outcome.seconds for outcome in some]
    shown = [f"{value:.2f}" for value in np.percentile(times, [50, 99])] if times else ["", ""]
    return {
        "upload": kind,
        "sent": len(some),
        "answered right": sum(outcome.verdict == "right" for outcome in some),
        "s, p50": shown[0],
        "p99": shown[1],
    }


@contextmanager
def _serving(config: LoadConfig, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    arguments = ["--models", f"[{', '.join(config.models)}]", "--embeddings", f"[{config.embeddings}]"]
    arguments += ["--catalog", config.catalog, "--top", str(TOP), "--port", "0"]
    (folder / "tmp").mkdir()
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "vpr", "search", "serve", *arguments],
            stderr=said,
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
        )
    try:
        yield process, _port(process, folder / "said")
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen[bytes], said: Path) -> int:
    until = time.monotonic() + _START
    while not (found := re.search(r"http://127\.0\.0\.1:(\d+): open it", said.read_text(encoding="utf-8"))):
        if process.poll() is not None or time.monotonic() > until:
            raise UserError(
                f"load: the page does not start: {said.read_text(encoding='utf-8')[-300:]}: mend that first"
            )
        time.sleep(_LOOK)
    return int(found[1])


async def _watched(process: int, port: int, plans: list[list[Upload]], seen: Seen) -> None:
    clients = asyncio.create_task(run_clients(port, plans))
    while not clients.done():
        seen.most.append(measure_footprint(process))
        await asyncio.wait([clients], timeout=_LOOK)
    seen.outcomes += clients.result()


def _settled(process: int, idle: Footprint) -> Footprint:
    """The page's footprint once it has no more files open than ``idle`` had, or after 15 s."""
    until = time.monotonic() + _SETTLE
    while (now := measure_footprint(process)).files > idle.files and time.monotonic() < until:
        time.sleep(_LOOK)
    return now
