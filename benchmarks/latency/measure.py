"""``vpr bench latency``: milliseconds of models on this machine, measured in interleaved rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.config import LatencyConfig
from benchmarks.latency.cold_start import measure_cold_starts
from benchmarks.latency.device_time import device_times
from benchmarks.latency.open_loop import Load, answer_load
from benchmarks.latency.preprocessing import image_source
from benchmarks.latency.roofline import Roofline, arithmetic, count_work, measure_roofline, roofline_ms
from benchmarks.latency.statistics import summarize_latency
from export.backends.registry import DEFAULT_BACKENDS, BackendUnavailable, Model, default_threads, models_of
from vpr.artifacts.store import check_output, config_to_json, load_artifact, write_artifact
from vpr.common.hardware import available_cpus
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog
from vpr.inference.timing import measure_rounds
from vpr.retrieval.embeddings import Forward

log = get_logger(__name__)

Row = dict[str, Any]


def measure_latency(config: LatencyConfig) -> Path:
    """Time every model on every backend and write an artifact of kind ``report`` with ``latency.json``."""
    check_output(config.output, "report", "latency.json")
    threads = config.threads or default_threads()
    load = None if config.arrivals == "none" else Load(config.arrivals, config.rate, config.seed)
    rows = time_models(
        config.models, config.batches, config.seconds, threads, config.backends, config.starts, config.catalog, load
    )
    parents = [load_artifact(path).as_parent("model") for path in config.models]
    with write_artifact(config.output, "report", {**config_to_json(config), "threads": threads}, parents) as draft:
        (draft.path / "latency.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    timed = sum(row["latency_ms"] is not None for row in rows.values())
    log.info(
        f"{config.output}: latency of {timed} models with {threads} threads each, {len(rows) - timed} could not run"
    )
    return Path(config.output)


def time_models(
    paths: Sequence[str],
    batches: Sequence[int],
    seconds: float,
    threads: int,
    backends: Sequence[str] = DEFAULT_BACKENDS,
    starts: int = 1,
    catalog: str = "",
    load: Load | None = None,
) -> dict[str, Row]:
    """Time backends of every artifact, all with the same number of threads; the arguments are the config's.

    Returns:
        by ``artifact (backend)``: ``latency_ms`` by batch (see :func:`benchmarks.latency.statistics.summarize_latency`); ``throughput``
        (images per second, call after call), ``of_ceiling`` (see :func:`benchmarks.latency.roofline.roofline_ms`, over p50) and
        ``device_ms`` by batch; ``ceiling``; what :func:`benchmarks.latency.cold_start.measure_cold_starts` tells; ``preprocess_ms``
        and ``with_preprocess_ms`` of one image; ``open_loop`` (see :func:`benchmarks.latency.open_loop.answer_load`);
        ``threads`` and ``cpus``. What is not measured is None; a backend
        that cannot run has None for ``latency_ms`` and ``throughput``, and the reason in ``notes``.
    """
    opened, rows = open_models(paths, threads, backends)
    for name, (model, _) in opened.items():
        rows[name] |= {**measure_cold_starts(model, threads, starts), "threads": threads, "cpus": available_cpus()}
        rows[name] |= {"latency_ms": {}, "throughput": {}, "device_ms": None}
    for batch in batches:
        calls = {name: _call(forward, model, batch) for name, (model, forward) in opened.items()}
        for name, timed in measure_rounds(calls, seconds).items():
            rows[name]["latency_ms"][str(batch)] = summarize_latency(timed)
            rows[name]["throughput"][str(batch)] = 1000 * batch / float(timed.milliseconds.mean())
    _add_ceilings(rows, opened, batches, threads)
    for name, (model, _) in opened.items():
        rows[name]["device_ms"] = device_times(model, batches)
    _add_images(rows, opened, catalog, seconds)
    for name, (model, forward) in opened.items():
        rows[name]["open_loop"] = answer_load(_call(forward, model, 1), load, seconds) if load else None
    for name in opened:
        _say_row(name, rows[name])
    return rows


def open_models(
    paths: Sequence[str], threads: int, backends: Sequence[str] = DEFAULT_BACKENDS
) -> tuple[dict[str, tuple[Model, Forward]], dict[str, Row]]:
    """Load what can run here; by name the loaded models, and rows of which those that cannot run hold the reason."""
    opened: dict[str, tuple[Model, Forward]] = {}
    rows: dict[str, Row] = {}
    for model in (model for path in paths for model in models_of(path, backends)):
        try:
            opened[model.name], rows[model.name] = (model, model.open(threads)), {}
        except BackendUnavailable as reason:
            log.info(f"  {model.name}: not run: {reason}")
            rows[model.name] = {"latency_ms": None, "throughput": None, "notes": f"not run: {reason}"}
    return opened, rows


def _call(forward: Forward, model: Model, batch: int) -> Callable[[], object]:
    return partial(forward, model.random_input(batch))


def _after(read: Callable[[], NDArray[np.float32]], forward: Forward) -> Callable[[], object]:
    return lambda: forward(read())


def _add_ceilings(
    rows: dict[str, Row], opened: dict[str, tuple[Model, Forward]], batches: Sequence[int], threads: int
) -> None:
    """Add ``ceiling`` and ``of_ceiling``: None where the work, or the ceiling of its numbers, is not known."""
    measured: dict[tuple[str, str], Roofline] = {}
    work: dict[str, int | None] = {}
    for name, (model, _) in opened.items():
        rows[name] |= {"ceiling": None, "of_ceiling": None}
        kind = arithmetic(model)
        path = str(model.artifact.path)
        work[path] = counted = work[path] if path in work else count_work(model.artifact)
        if kind is None or counted is None:
            continue
        if kind not in measured:
            measured[kind] = measure_roofline(*kind, threads)
        ceiling = measured[kind]
        rows[name]["ceiling"] = {**vars(ceiling), "model_multiply_adds": counted}
        p50 = {batch: rows[name]["latency_ms"][str(batch)]["p50"] for batch in batches}
        rows[name]["of_ceiling"] = {str(b): roofline_ms(ceiling, model, counted, b) / p50[b] for b in batches}


def _add_images(rows: dict[str, Row], opened: dict[str, tuple[Model, Forward]], catalog: str, seconds: float) -> None:
    """Add what one image takes from file to input, and from file to embedding."""
    for name in opened:
        rows[name] |= {"preprocess_ms": None, "with_preprocess_ms": None}
    if not catalog:
        return
    calls: dict[str, Callable[[], object]] = {}
    images = load_catalog(catalog)
    for name, (model, forward) in opened.items():
        read = image_source(images, model.preprocess)
        calls[f"{model.preprocess}"] = read
        calls[name] = _after(read, forward)
    timed = measure_rounds(calls, seconds)
    for name, (model, _) in opened.items():
        rows[name]["preprocess_ms"] = summarize_latency(timed[f"{model.preprocess}"])
        rows[name]["with_preprocess_ms"] = summarize_latency(timed[name])


def _say_row(name: str, row: Row) -> None:
    for batch, found in row["latency_ms"].items():
        low, high = (f"{end:.2f}" if end is not None else "?" for end in found["ci95"]["p50"])
        share = "" if row["of_ceiling"] is None else f", {row['of_ceiling'][batch]:.0%} of the ceiling"
        mark = "" if found["unstable"] is None else f"  UNSTABLE: {found['unstable']}"
        log.info(
            f"  {name}, batch {batch}: p50 {found['p50']:.2f} ms [{low}, {high}], p99 {found['p99']:.2f} ms, "
            f"{row['throughput'][batch]:.0f}/s{share}{mark}"
        )
    if row["cold_start_ms"] is not None and row["peak_memory_bytes"] is not None:
        memory = row["peak_memory_bytes"] / 1e6
        log.info(f"  {name}: first embedding {row['cold_start_ms']:.0f} ms after a cold start, {memory:.0f} MB at most")
    if row["preprocess_ms"]:
        alone, both = row["preprocess_ms"]["p50"], row["with_preprocess_ms"]["p50"]
        log.info(f"  {name}: decode and resize {alone:.2f} ms, together with the model {both:.2f} ms")
    if found := row["open_loop"]:
        log.info(
            f"  {name}: {found['rate']:.1f} requests/s, {found['arrivals']}: p50 {found['p50']:.2f} ms, p99 "
            f"{found['p99']:.2f} ms from when they were due (the calls alone: p99 {found['service_p99']:.2f} ms)"
        )
