"""Roofline of this machine: its best compute and memory rates, and the fewest milliseconds that a model needs."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from export.backends.base import is_older_than
from export.backends.pytorch import float32_products, load_module
from export.backends.registry import Model
from vpr.artifacts.store import Artifact
from vpr.common.hardware import lacks_vnni

Dtype = Literal["fp32", "tf32", "bf16", "fp16", "int8"]
_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
# A GPU product of this length shows the full rate; larger ones would only take time, on small GPUs minutes.
_LONG_ENOUGH = 0.02  # seconds
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

    CPU runtimes compute FP16 graphs in FP32. ONNX Runtime and TensorRT compute FP32 graphs in TF32 where the GPU has
    it. PyTorch has no FP8 products to measure, and its INT8 products on processors without VNNI are far slower than the
    runtimes' own. Where it is unknown whether a GPU multiplies in INT8, the roofline is unknown too.
    """
    precision = model.precision
    if not model.runs_on_gpu:
        if precision.startswith("fp8") or (precision.startswith("int8") and lacks_vnni()):
            return None
        return ("int8" if precision.startswith("int8") else "fp32"), "cpu"
    if precision in ("tf32", "bf16", "fp16"):
        return precision, "cuda"  # type: ignore[return-value]
    if precision.endswith("weights only"):
        return "fp16", "cuda"
    if precision in ("int8", "int8-mixed") and model.backend in ("tensorrt", "tensorrt-rtx"):
        return "int8", "cuda"
    if precision != "fp32":
        return None
    is_torch = model.backend.startswith("torch")
    return ("fp32" if is_torch or is_older_than("sm80") else "tf32"), "cuda"


def measure_roofline(dtype: Dtype, device: str, threads: int) -> Roofline:
    """Measure the rates with PyTorch: the fastest of 8 calls for each of several square products, and of 8 copies.

    GPU times are those between events around a call. The host's clock would include the start of the kernel, which
    takes as long as a small product.
    """
    import torch

    torch.set_num_threads(threads)
    precision: AbstractContextManager[None] = nullcontext()
    if device == "cuda" and dtype in ("fp32", "tf32"):
        precision = float32_products(dtype == "tf32")
    with precision:
        rate = _fastest_product(dtype, device)
    source = torch.ones(_COPIED_BYTES // _FLOAT_BYTES, device=device)
    target = torch.empty_like(source)
    return Roofline(dtype, threads, rate, 2 * _COPIED_BYTES / _fastest(lambda: target.copy_(source), device))


def _fastest_product(dtype: Dtype, device: str) -> float:
    """Return the multiply-adds per second of the fastest square product."""
    import torch

    rates: list[float] = []
    for side in _SIDES[device]:
        try:
            seconds = _fastest(_product(dtype, device, side), device)
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        rates.append(side**3 / seconds)
        if device == "cuda" and seconds > _LONG_ENOUGH:
            break
    return max(rates)


def _product(dtype: Dtype, device: str, side: int) -> Callable[[], Any]:
    import torch

    # Random values: a GPU multiplies zeros faster, at less power.
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    if dtype == "int8":
        left, right = ((32 * matrix).clamp(-127, 127).to(torch.int8) for matrix in (left, right))
        return lambda: torch._int_mm(left, right.t())  # CUDA takes no other layout
    float_type = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    left, right = left.to(float_type), right.to(float_type)
    return lambda: left @ right


def _fastest(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest call after a warm-up; slower calls only measure disturbances."""
    if device == "cuda":
        return _fastest_on_gpu(call)
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _fastest_on_gpu(call: Callable[[], Any]) -> float:
    """Return the seconds between the events around the fastest call. All calls are enqueued without waiting."""
    import torch

    for _ in range(2):
        call()
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(_REPEATS)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in pairs) / 1000
