"""``vpr bench latency``: milliseconds of models on this machine, measured in interleaved rounds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.config import LatencyConfig
from benchmarks.latency.cold_start import measure_cold_starts
from benchmarks.latency.device_time import measure_device_times
from benchmarks.latency.open_loop import Load, measure_under_load
from benchmarks.latency.preprocessing import make_image_reader
from benchmarks.latency.roofline import Dtype, Roofline, compute_dtype, count_work, measure_roofline, roofline_ms
from benchmarks.latency.statistics import summarize_latency
from benchmarks.models import load_models
from benchmarks.report.schema import Ceiling, Gpu, Latency, Timing
from export.backends.base import RunFailed
from export.backends.registry import BackendUnavailable, Model, default_threads, models_of
from export.config import DEFAULT_BACKENDS
from vpr.artifacts.names import with_distinct_names
from vpr.artifacts.store import Artifact
from vpr.artifacts.writer import check_output, config_to_json, write_artifact
from vpr.common.errors import UserError, explain_system_error
from vpr.common.gpus import list_gpus, read_clocks
from vpr.common.hardware import available_cpus
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog
from vpr.inference.timing import measure_rounds
from vpr.retrieval.embeddings import Forward

log = get_logger(__name__)


class OpenedModel(NamedTuple):
    """A model and the function that runs it."""

    model: Model
    forward: Forward

    def make_call(self, batch: int) -> Callable[[], object]:
        """Return a function that runs the model on a batch of random pixels."""
        return partial(self.forward, self.model.random_input(batch))


def measure_latency(config: LatencyConfig) -> Path:
    """Time every model on every backend and write an artifact of kind ``report`` with ``latency.json``."""
    check_output(config.output, "report", "latency.json")
    artifacts = load_models(config.models)
    threads = config.threads or default_threads()
    load = None if config.arrivals == "none" else Load(config.arrivals, config.rate, config.seed)
    options = (config.backends, config.starts, config.catalog, load)
    timings = time_models(with_distinct_names(artifacts), config.batches, config.seconds, threads, *options)
    parents = [artifact.as_parent("model") for artifact in artifacts]
    with write_artifact(config.output, "report", {**config_to_json(config), "threads": threads}, parents) as draft:
        values = {name: timing.to_json() for name, timing in timings.items()}
        (draft.path / "latency.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    count = sum(timing.latency_ms is not None for timing in timings.values())
    log.info(f"{config.output}: latency of {count} models, {len(timings) - count} not run, {threads} threads each")
    return Path(config.output)


def time_models(
    sources: Sequence[Artifact | Path | str],
    batches: Sequence[int],
    seconds: float,
    threads: int,
    backends: Sequence[str] = DEFAULT_BACKENDS,
    starts: int = 1,
    catalog: str = "",
    load: Load | None = None,
) -> dict[str, Timing]:
    """Time every artifact on each backend with the same number of threads; return timings by ``artifact (backend)``.

    ``seconds`` are those for each model and batch, after warm-up. 0 ``starts`` skip cold starts, no ``catalog`` skips
    preprocessing, no ``load`` skips the open loop. A backend that cannot run, or not at a batch size, has the reason in
    ``notes``.
    """
    opened, timings = open_models(sources, threads, backends)
    _drop_failing(opened, timings)
    for name, (model, _) in opened.items():
        start = measure_cold_starts(model, threads, starts)
        timings[name] = Timing(**asdict(start), threads=threads, cpus=available_cpus())
    _add_latencies(timings, opened, batches, seconds)
    _add_ceilings(timings, opened, batches, threads)
    for name, (model, _) in opened.items():
        timings[name].device_ms = _device_times(model, timings[name])
    _add_preprocessing(timings, opened, catalog, seconds)
    for name, opened_model in opened.items():
        timings[name].open_loop = measure_under_load(opened_model.make_call(1), load, seconds) if load else None
    for name in opened:
        _log_timing(name, timings[name])
    return timings


def open_models(
    sources: Sequence[Artifact | Path | str], threads: int, backends: Sequence[str] = DEFAULT_BACKENDS
) -> tuple[dict[str, OpenedModel], dict[str, Timing]]:
    """Load the models that can run here; also return a timing for each, with the reason for those that cannot run."""
    opened: dict[str, OpenedModel] = {}
    timings: dict[str, Timing] = {}
    for model in (model for source in sources for model in models_of(source, backends)):
        try:
            opened[model.name], timings[model.name] = OpenedModel(model, model.open(threads)), Timing()
        except BackendUnavailable as reason:
            log.info(f"  {model.name:<32} not run: {reason}")
            timings[model.name] = Timing(latency_ms=None, throughput=None, notes=f"not run: {reason}")
    return opened, timings


def _drop_failing(opened: dict[str, OpenedModel], timings: dict[str, Timing]) -> None:
    """Remove models that were loaded and cannot embed one image, and note the reason."""
    for name in list(opened):
        if reason := _failure(opened[name].make_call(1)):
            log.warning(f"{name}: not run: {reason}")
            timings[name] = Timing(latency_ms=None, throughput=None, notes=f"not run: {reason}")
            del opened[name]


def _failure(call: Callable[[], object]) -> str | None:
    """Call once; return the reason if the backend cannot run the model, or has too little memory for it."""
    try:
        call()
    except RunFailed as error:
        return str(error)
    except Exception as error:
        if message := explain_system_error(error):
            return message
        raise
    return None


def _add_latencies(
    timings: dict[str, Timing], opened: dict[str, OpenedModel], batches: Sequence[int], seconds: float
) -> None:
    """Add latencies and throughputs. A batch size that a backend cannot run is a note, with the reason."""
    latencies: dict[str, dict[str, Latency]] = {name: {} for name in opened}
    throughputs: dict[str, dict[str, float]] = {name: {} for name in opened}
    clocks: list[dict[str, Any]] = []
    for batch in batches:
        calls = {name: model.make_call(batch) for name, model in opened.items()}
        for name in list(calls):
            if reason := _failure(calls[name]):
                log.warning(f"{name}, batch {batch}: not run: {reason}")
                _add_note(timings[name], f"batch {batch} not run: {reason}")
                del calls[name]
        for name, measurement in measure_rounds(calls, seconds).items():
            latencies[name][str(batch)] = summarize_latency(measurement)
            throughputs[name][str(batch)] = 1000 * batch / float(measurement.milliseconds.mean())
        clocks.append(read_clocks())
    for name, (model, _) in opened.items():
        timings[name].latency_ms, timings[name].throughput = latencies[name] or None, throughputs[name] or None
        timings[name].gpu = _describe_gpu(clocks) if model.runs_on_gpu else None


def _describe_gpu(clocks: Sequence[dict[str, Any]]) -> Gpu | None:
    """Return the GPU that ran the models, with its lowest clock and all slowdowns, which were read after each batch."""
    gpu = next(iter(list_gpus().gpus), None)
    if gpu is None:
        return None
    values: dict[str, Any] = {key: value for state in clocks for key, value in state.items()}
    if "sm_clock_mhz" in values:
        values["sm_clock_mhz"] = min(state["sm_clock_mhz"] for state in clocks if "sm_clock_mhz" in state)
    values["throttled"] = list(dict.fromkeys(name for state in clocks for name in state.get("throttled", ())))
    return Gpu(name=gpu.name, memory_mib=gpu.memory_bytes >> 20, **values)


def _device_times(model: Model, timing: Timing) -> dict[str, dict[str, float]] | None:
    """Return the times on the GPU of the batch sizes that ran; note the reason if they cannot be measured."""
    batches = [int(batch) for batch in timing.latency_ms or {}]
    try:
        return measure_device_times(model, batches)
    except (UserError, RuntimeError, MemoryError) as error:  # such as an operator that cannot be captured
        _add_note(timing, f"time on the GPU: not measured ({' '.join(str(error).split())[:200]})")
        return None


def _add_note(timing: Timing, note: str) -> None:
    timing.notes = "; ".join(filter(None, (timing.notes, note)))


def _add_ceilings(
    timings: dict[str, Timing], opened: dict[str, OpenedModel], batches: Sequence[int], threads: int
) -> None:
    """Add the roofline and the share of it that p50 reaches: None where the work or the roofline is unknown."""
    rooflines: dict[tuple[str, str], Roofline | None] = {}
    work: dict[str, int | None] = {}
    for name, (model, _) in opened.items():
        timing = timings[name]
        timing.ceiling = timing.of_ceiling = None
        dtype = compute_dtype(model)
        path = str(model.artifact.path)
        work[path] = multiply_adds = work[path] if path in work else count_work(model.artifact)
        if dtype is None or multiply_adds is None:
            continue
        if dtype not in rooflines:
            rooflines[dtype] = _measure_roofline(*dtype, threads)
        roofline = rooflines[dtype]
        if roofline is None:
            continue
        timing.ceiling = Ceiling(**asdict(roofline), model_multiply_adds=multiply_adds)
        timing.of_ceiling = {}
        for batch, latency in (timing.latency_ms or {}).items():
            timing.of_ceiling[batch] = roofline_ms(roofline, model, multiply_adds, int(batch)) / latency.p50


def _measure_roofline(dtype: Dtype, device: str, threads: int) -> Roofline | None:
    """Return the roofline; None and a warning if PyTorch cannot measure it, such as one without CUDA."""
    try:
        return measure_roofline(dtype, device, threads)
    except (RuntimeError, AssertionError, ImportError) as error:
        log.warning(f"roofline of {dtype} on {device}: not measured ({' '.join(str(error).split())[:200]})")
        return None


def _add_preprocessing(
    timings: dict[str, Timing], opened: dict[str, OpenedModel], catalog: str, seconds: float
) -> None:
    """Add the milliseconds of one image from file to model input, and from file to embedding."""
    for name in opened:
        timings[name].preprocess_ms = timings[name].with_preprocess_ms = None
    if not catalog:
        return
    calls: dict[str, Callable[[], object]] = {}
    images = load_catalog(catalog)
    for name, (model, forward) in opened.items():
        read = make_image_reader(images, model.preprocess)
        calls[f"{model.preprocess}"] = read
        calls[name] = _chain(read, forward)
    measurements = measure_rounds(calls, seconds)
    for name, (model, _) in opened.items():
        timings[name].preprocess_ms = summarize_latency(measurements[f"{model.preprocess}"])
        timings[name].with_preprocess_ms = summarize_latency(measurements[name])


def _chain(read: Callable[[], NDArray[np.float32]], forward: Forward) -> Callable[[], object]:
    return lambda: forward(read())


def _log_timing(name: str, timing: Timing) -> None:
    name = f"{name:<32}"
    for batch, latency in (timing.latency_ms or {}).items():
        low, high = (f"{end:.2f}" if end is not None else "?" for end in latency.ci95["p50"])
        throughput = f"{(timing.throughput or {})[batch]:.0f} images/s"
        share = f"  {timing.of_ceiling[batch]:.0%} of the roofline" if timing.of_ceiling else ""
        quantiles = f"p50 {latency.p50:.2f} ms [{low}, {high}]  p99 {latency.p99:.2f} ms"
        log.info(f"  {name} batch {batch:<3} {quantiles}  {throughput}{share}")
        if latency.unstable:
            log.warning(f"{name.strip()}, batch {batch}: unstable latency: {latency.unstable}")
    if timing.cold_start_ms is not None and timing.peak_memory_bytes is not None:
        memory = timing.peak_memory_bytes / 1e6
        log.info(f"  {name} cold start {timing.cold_start_ms:.0f} ms  peak memory {memory:.0f} MB")
    if timing.preprocess_ms and timing.with_preprocess_ms:
        alone, together = timing.preprocess_ms.p50, timing.with_preprocess_ms.p50
        log.info(f"  {name} decode + preprocess p50 {alone:.2f} ms  with the model {together:.2f} ms")
    if load := timing.open_loop:
        log.info(
            f"  {name} {load.arrivals} arrivals {load.rate:.1f} requests/s  p50 {load.p50:.2f} ms  "
            f"p99 {load.p99:.2f} ms from the due time  p99 {load.service_p99:.2f} ms of the call alone"
        )
