"""``vpr bench latency``: milliseconds of models on this machine, measured in interleaved rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.backends import BackendUnavailable, default_threads, models_of
from vpr.artifact import Artifact, load_artifact, write_artifact
from vpr.console import say
from vpr.embeddings import Forward
from vpr.errors import UserError
from vpr.timing import measure, summarise


@dataclass(frozen=True)
class LatencyConfig:
    """What is timed.

    Attributes:
        models: artifacts; each is timed with every backend that can run it here.
        output: where the table is written.
        batches: pictures per call.
        seconds: time spent on each model and batch, after warm-up.
        threads: of every backend alike; 0 is one per processor.
    """

    models: tuple[str, ...]
    output: str
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 1.5
    threads: int = 0


def latency(config: LatencyConfig) -> Path:
    """Time every model on every backend and write an artifact of kind ``report`` with ``latency.json``."""
    threads = config.threads or default_threads()
    rows = time_models(config.models, config.batches, config.seconds, threads)
    parents = [load_artifact(path).as_parent("model") for path in config.models]
    settings = {"models": list(config.models), "batches": list(config.batches), "threads": threads}
    with write_artifact(config.output, "report", settings, parents) as draft:
        (draft.path / "latency.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    say(f"{config.output}: latency of {len(rows)} models with {threads} threads each")
    return Path(config.output)


def time_models(
    paths: tuple[str, ...], batches: tuple[int, ...], seconds: float, threads: int
) -> dict[str, dict[str, Any]]:
    """Time every backend of every artifact, all with the same number of threads.

    Returns:
        by ``artifact (backend)``: ``latency_ms`` and ``throughput`` (pictures per second) by batch and
        ``cold_start_ms`` (load and first call), or None and the reason in ``notes``.
    """
    opened: dict[str, tuple[Forward, Artifact]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for model in (model for path in paths for model in models_of(path)):
        begun = time.perf_counter()
        try:
            forward = model.open(threads)
        except BackendUnavailable as reason:
            rows[model.name] = {"latency_ms": None, "throughput": None, "notes": f"not run: {reason}"}
            continue
        forward(random_input(model.artifact, 1))
        cold = 1000 * (time.perf_counter() - begun)
        opened[model.name] = (forward, model.artifact)
        rows[model.name] = {"latency_ms": {}, "throughput": {}, "cold_start_ms": cold}
    for batch in batches:
        calls = {name: _call(forward, random_input(artifact, batch)) for name, (forward, artifact) in opened.items()}
        for name, times in measure(calls, seconds).items():
            rows[name]["latency_ms"][str(batch)] = summary = summarise(times)
            rows[name]["throughput"][str(batch)] = 1000 * batch / summary["p50"]
            say(f"  {name}, batch {batch}: p50 {summary['p50']:.2f} ms, p99 {summary['p99']:.2f} ms")
    return rows


def random_input(artifact: Artifact, batch: int) -> NDArray[np.float32]:
    """(batch, 3, size, size) float32 in the range of preprocessed pictures."""
    if artifact.card.preprocess is None:
        raise UserError(f"{artifact.path}: its card has no preprocessing: make the artifact again")
    size = artifact.card.preprocess.size
    return np.random.default_rng(0).normal(size=(batch, 3, size, size)).astype(np.float32)


def _call(forward: Forward, batch: NDArray[np.float32]) -> Callable[[], object]:
    return lambda: forward(batch)
