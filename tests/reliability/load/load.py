"""Load test of the search page with two hundred clients: answers, times, memory, leftovers."""

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

_POLL_SECONDS = 0.05  # interval between measurements of the page's memory
_MAX_SETTLE = 15.0  # seconds for connections to end
_MAX_MEMORY_GROWTH = 512.0  # MiB: twice eight full uploads, and a large decoded image
_MAX_START = 300.0  # seconds


@dataclass(frozen=True)
class LoadConfig:
    """Page and its load.

    Attributes:
        models: Model, as for ``vpr search serve``.
        catalog: Catalogue artifact.
        embeddings: Artifact of the gallery's vectors; written if it is missing.
        clients: Number of concurrent clients.
        uploads: Number of uploads of each client, one after another.
        rounds: Number of rounds of all clients; memory is compared after the first and the last.
        seed: Seed of the uploads.
    """

    models: tuple[str, ...]
    catalog: str
    embeddings: str
    clients: int = 200
    uploads: int = 8
    rounds: int = 2
    seed: int = 0


@dataclass
class LoadResult:
    """Result of a load test.

    Attributes:
        idle: Footprint before the first round.
        outcomes: Outcomes of all uploads.
        after: Footprints after each round, once its connections had ended.
        loaded: Footprints under load.
        leftovers: Names of files in the page's temporary folder.
        output: Output of the process after its address.
        code: Exit status.
    """

    idle: Footprint
    outcomes: list[Outcome] = field(default_factory=list)
    after: list[Footprint] = field(default_factory=list)
    loaded: list[Footprint] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    output: str = ""
    code: int = 0


def put_under_load(config: LoadConfig) -> LoadResult:
    """Serve the page, run the clients, and stop it."""
    searchers, _ = load_searchers(config.models, config.catalog, "test", (config.embeddings,))
    images = load_catalog(config.catalog).select(split="test", role="query")
    uploads = Uploads(searchers[0], images, config.seed)
    with tempfile.TemporaryDirectory(prefix="load-") as name, _serving(config, Path(name)) as (process, port):
        asyncio.run(run_clients(port, [[uploads.draw("good")]]))  # the first call allocates buffers
        result = LoadResult(_wait_until_settled(process.pid, measure_footprint(process.pid)))
        for number in range(config.rounds):
            plans = [[uploads.draw() for _ in range(config.uploads)] for _ in range(config.clients)]
            asyncio.run(_run_watched(process.pid, port, plans, result))
            result.after.append(_wait_until_settled(process.pid, result.idle))
            log.info(f"  round {number + 1} of {config.rounds}: {len(result.outcomes)} uploads so far")
        process.send_signal(signal.SIGINT)
        result.code = process.wait(60)
        result.leftovers = sorted(path.name for path in (Path(name) / "tmp").iterdir())
        text = (Path(name) / "output").read_text(encoding="utf-8")
        result.output = re.split(r"http://127\.0\.0\.1:\d+.*\n", text, maxsplit=1)[-1]
    return result


def summarise(config: LoadConfig, result: LoadResult, command: str) -> tuple[list[Figure], list[Row]]:
    """Return figures of faults, of times of uploads sent at once and of memory, and a table by kind of upload."""
    verdicts = Counter(outcome.verdict for outcome in result.outcomes)
    quick = [1000 * outcome.seconds for outcome in result.outcomes if outcome.kind == "good"]
    peak, last = max(footprint.resident for footprint in result.loaded), result.after[-1]

    def figure(name: str, value: float, goal: float | None, unit: str = "") -> Figure:
        return Figure(f"load: {name}", value, unit, goal, "<=", command, seeds=(config.seed,))

    figures = [
        Figure("load: clients at once", config.clients, "", 200, ">=", command, seeds=(config.seed,)),
        figure("uploads", len(result.outcomes), None),
        figure("answers lost", verdicts["lost"], 0),
        figure("answers mixed up", verdicts["mixed up"], 0),
        figure("answers wrong in another way", verdicts["wrong"], 0),
        figure("p50 of good images sent at once", float(np.percentile(quick, 50)), None, "ms"),
        figure("p99 of good images sent at once", float(np.percentile(quick, 99)), None, "ms"),
        figure("memory before", result.idle.resident / 2**20, None, "MiB"),
        figure("largest growth of memory under load", (peak - result.idle.resident) / 2**20, _MAX_MEMORY_GROWTH, "MiB"),
        figure("growth of memory from the first to the last round", _growth(result.after), None, "MiB"),
        figure("more open files at the end", last.files - result.idle.files, 0),
        figure("more threads at the end", last.threads - result.idle.threads, 0),
        figure("files left in the temporary folder", len(result.leftovers), 0),
        figure("exit status when interrupted", result.code, 0),
        figure("lines of error output", len(result.output.removesuffix("server stopped\n").splitlines()), 0),
    ]
    return figures, [_by_kind(kind, result.outcomes) for kind in SHARES]


def _growth(after: list[Footprint]) -> float:
    return (after[-1].resident - after[0].resident) / 2**20


def _by_kind(kind: str, outcomes: list[Outcome]) -> Row:
    of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
    times = [outcome.seconds for outcome in of_kind]
    quantiles = [f"{value:.2f}" for value in np.percentile(times, [50, 99])] if times else ["", ""]
    return {
        "upload": kind,
        "sent": len(of_kind),
        "answered correctly": sum(outcome.verdict == "right" for outcome in of_kind),
        "s, p50": quantiles[0],
        "p99": quantiles[1],
    }


@contextmanager
def _serving(config: LoadConfig, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    arguments = ["--models", *config.models, "--embeddings", config.embeddings]
    arguments += ["--catalog", config.catalog, "--top", str(TOP), "--port", "0"]
    (folder / "tmp").mkdir()
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vpr", "search", "serve", *arguments],
            stderr=output,
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
        )
    try:
        yield process, _port(process, folder / "output")
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen[bytes], output: Path) -> int:
    end = time.monotonic() + _MAX_START
    while not (address := re.search(r"http://127\.0\.0\.1:(\d+)", output.read_text(encoding="utf-8"))):
        if process.poll() is not None or time.monotonic() > end:
            text = output.read_text(encoding="utf-8")[-300:]
            raise UserError(f"load: the page does not start ({text}). Fix this error and rerun.")
        time.sleep(_POLL_SECONDS)
    return int(address[1])


async def _run_watched(process: int, port: int, plans: list[list[Upload]], result: LoadResult) -> None:
    clients = asyncio.create_task(run_clients(port, plans))
    while not clients.done():
        result.loaded.append(measure_footprint(process))
        await asyncio.wait([clients], timeout=_POLL_SECONDS)
    result.outcomes += clients.result()


def _wait_until_settled(process: int, idle: Footprint) -> Footprint:
    """Return the page's footprint once it has no more open files than ``idle``, or after 15 s."""
    end = time.monotonic() + _MAX_SETTLE
    while (now := measure_footprint(process)).files > idle.files and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return now
