"""Roofline of this machine: its best compute and memory rates, and the fewest milliseconds that a model needs."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from export.backends.pytorch import load_module
from export.backends.registry import Model
from vpr.artifacts.store import Artifact
from vpr.common.hardware import lacks_vnni

Dtype = Literal["fp32", "fp16", "int8"]
_SIDES = (512, 1024, 2048)
_REPEATS = 8
_COPIED_BYTES = 1 << 28
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Roofline:
    """Best measured rates of a machine."""

    dtype: Dtype  # number format of the matrix products
    threads: int  # number of threads that computed them
    multiply_adds: float  # multiply-adds per second of the fastest of several square matrix products
    bytes: float  # bytes per second, read and written by a copy of 256 MiB

    def milliseconds(self, multiply_adds: float, size: float) -> float:
        """Return the roofline time (Williams, Waterman and Patterson, CACM 52(4), 2009): compute and memory overlap.

        ``size`` is the number of bytes that must come from memory at least once.
        """
        return 1000 * max(multiply_adds / self.multiply_adds, size / self.bytes)


def roofline_ms(roofline: Roofline, model: Model, multiply_adds: int, batch: int) -> float:
    """Return the milliseconds of a batch at the roofline, from the multiply-adds of one image.

    Weights, images and embeddings are moved once; activations are assumed to stay in the caches.
    """
    entries, embedding = model.artifact.card.files.items(), model.artifact.card.embedding
    weights = sum(entry.size for name, entry in entries if name.startswith(("model.", "engine.")))
    image_bytes = math.prod(model.preprocess.input_shape) * (1 if model.preprocess.dtype == "uint8" else _FLOAT_BYTES)
    moved = image_bytes + _FLOAT_BYTES * (embedding.dim if embedding else 0)
    return roofline.milliseconds(batch * multiply_adds, weights + batch * moved)


def count_work(artifact: Artifact) -> int | None:
    """Return the multiply-adds of one image from the card, the graph or the network; None if they are unknown."""
    if artifact.card.kind == "engine" or "multiply_adds" in artifact.card.metrics:
        return artifact.card.metrics.get("multiply_adds")
    if artifact.card.kind == "onnx":
        from export.multiply_adds import multiply_adds
        from vpr.inference.onnx_graph import load_graph

        return multiply_adds(load_graph(artifact))
    from vpr.inference.model_size import count_multiply_adds

    assert artifact.card.preprocess is not None
    return count_multiply_adds(load_module(artifact), artifact.card.preprocess.size)


def compute_dtype(model: Model) -> tuple[Dtype, str] | None:
    """Return the dtype and the device of a model's products; None where the roofline cannot be measured.

    CPU runtimes compute FP16 graphs in FP32. PyTorch has no FP8 products to measure, and its INT8 products on
    processors without VNNI are far slower than the runtimes' own.
    """
    on_cpu = model.backend in ("torch", "torch-compile", "onnxruntime-cpu", "openvino")
    if model.precision.startswith("fp8") or (model.precision.startswith("int8") and on_cpu and lacks_vnni()):
        return None
    if model.precision.startswith("int8"):
        return "int8", "cpu" if on_cpu else "cuda"
    return ("fp16", "cuda") if model.precision == "fp16" and not on_cpu else ("fp32", "cpu" if on_cpu else "cuda")


def measure_roofline(dtype: Dtype, device: str, threads: int) -> Roofline:
    """Measure the rates with PyTorch: the fastest of 8 calls for each of several square products, and of 8 copies."""
    import torch

    torch.set_num_threads(threads)
    rate = max(side**3 / _fastest(_product(dtype, device, side), device) for side in _SIDES)
    source = torch.ones(_COPIED_BYTES // _FLOAT_BYTES, device=device)
    target = torch.empty_like(source)
    return Roofline(dtype, threads, rate, 2 * _COPIED_BYTES / _fastest(lambda: target.copy_(source), device))


def _product(dtype: Dtype, device: str, side: int) -> Callable[[], Any]:
    import torch

    # Random values: a GPU multiplies zeros faster, at less power.
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    if dtype == "int8":
        left, right = ((32 * matrix).clamp(-127, 127).to(torch.int8) for matrix in (left, right))
        return lambda: torch._int_mm(left, right.t())  # CUDA takes no other layout
    float_type = torch.float16 if dtype == "fp16" else torch.float32
    left, right = left.to(float_type), right.to(float_type)
    return lambda: left @ right


def _fastest(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest call after a warm-up; slower calls only measure disturbances."""
    import torch

    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
