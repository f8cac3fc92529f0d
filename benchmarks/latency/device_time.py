"""Milliseconds on the GPU alone: CUDA graphs between CUDA events, without copies and without the host."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from export.backends.pytorch import load_module
from export.backends.registry import Model
from vpr.inference.timing import summarise

_WARMUP, _REPLAYS = 5, 100


def measure_device_times(model: Model, batches: Sequence[int]) -> dict[str, dict[str, float]] | None:
    """Return p50, p90, p99 and max by batch for ``torch-cuda``, None for other backends.

    ``latency_ms`` in the same row is measured from host array to host array; engines replay CUDA graphs there too.
    """
    if model.backend != "torch-cuda":
        return None
    module = load_module(model.artifact).cuda()
    return {str(batch): summarise(_replay(module, model, batch)) for batch in batches}


def _replay(module: Any, model: Model, batch: int) -> Any:
    """Capture the forward pass of a batch and replay it: (100,) float64 milliseconds."""
    import torch

    pixels = torch.from_numpy(model.random_input(batch)).cuda()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.inference_mode():
        # Libraries choose their kernels at first use, which cannot be captured.
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                module(pixels)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            module(pixels)
    times = []
    for _ in range(_REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return np.array(times)
