"""Milliseconds on the GPU alone, between CUDA events: without copies and without the host."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from export.backends.pytorch import TorchBackend
from export.backends.registry import Model
from export.backends.tensorrt_engine import EngineBackend
from vpr.inference.timing import summarise

_WARMUP, _REPLAYS = 5, 100


def measure_device_times(model: Model, batches: Sequence[int]) -> dict[str, dict[str, float]] | None:
    """Return p50, p90, p99 and max by batch for engines and for uncompiled PyTorch on a GPU, else None.

    ``latency_ms`` in the same row is measured from host array to host array. Both replay CUDA graphs, except that
    ``latency_ms`` of PyTorch starts each kernel from Python.
    """
    if isinstance(model.runner, EngineBackend):
        from export.tensorrt.kernel_cache import AUTO
        from export.tensorrt.runner import start_engine

        with start_engine(model.artifact, eager=True, kernel_cache=AUTO) as engine:
            return {str(batch): summarise(engine.measure_on_device(batch, _REPLAYS)) for batch in batches}
    if isinstance(model.runner, TorchBackend) and model.runner.device == "cuda" and not model.runner.compiled:
        network = model.runner.load(model.artifact)
        return {str(batch): summarise(_replay(network, model, batch)) for batch in batches}
    return None


def _replay(network: Callable[[Any], Any], model: Model, batch: int) -> Any:
    """Capture the forward pass of a batch and replay it: (100,) float64 milliseconds."""
    import torch

    pixels = torch.from_numpy(model.random_input(batch)).cuda()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Libraries choose their kernels at first use, which cannot be captured.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            network(pixels)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        network(pixels)
    times = []
    for _ in range(_REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return np.array(times)
