"""The machine's own ceiling: what it multiplies and moves at best, and the milliseconds that a model needs at least."""

from __future__ import annotations

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
_COPIED = 1 << 28  # bytes
_FLOAT = 4


@dataclass(frozen=True)
class Roofline:
    """What a machine does at best.

    Attributes:
        dtype: of the products.
        threads: that computed them.
        multiply_adds: per second, of the best of some square matrix products.
        bytes: per second, read and written by a copy of 256 MiB.
    """

    dtype: Dtype
    threads: int
    multiply_adds: float
    bytes: float

    def milliseconds(self, multiply_adds: float, size: float) -> float:
        """The roofline (Williams, Waterman and Patterson, CACM 52(4), 2009): products and memory at best overlap.

        Args:
            multiply_adds: of the call.
            size: bytes that must come from memory at least once.
        """
        return 1000 * max(multiply_adds / self.multiply_adds, size / self.bytes)


def roofline_ms(ceiling: Roofline, model: Model, multiply_adds: int, batch: int) -> float:
    """Milliseconds of a batch at the ceiling: its multiply-adds; weights, images and embeddings moved once.

    What lies between the layers is taken to stay in the caches.
    """
    entries, embedding = model.artifact.card.files.items(), model.artifact.card.embedding
    weights = sum(entry.size for name, entry in entries if name.startswith(("model.", "engine.")))
    moved = 3 * model.preprocess.size**2 + (embedding.dim if embedding else 0)
    return ceiling.milliseconds(batch * multiply_adds, weights + batch * _FLOAT * moved)


def count_work(artifact: Artifact) -> int | None:
    """Multiply-adds of one image, from the card, the graph or the network; None where none of them tells."""
    if artifact.card.kind == "engine" or "multiply_adds" in artifact.card.metrics:
        return artifact.card.metrics.get("multiply_adds")
    if artifact.card.kind == "onnx":
        from export.multiply_adds import multiply_adds
        from export.to_onnx import load_onnx

        return multiply_adds(load_onnx(artifact.path)[0])
    from student.model import count_multiply_adds

    assert artifact.card.preprocess is not None
    return count_multiply_adds(load_module(artifact), artifact.card.preprocess.size)


def arithmetic(model: Model) -> tuple[Dtype, str] | None:
    """In which numbers, and on which device, a model's products are computed; None where none can be measured.

    CPU runtimes compute FP16 graphs in FP32. PyTorch has no products of FP8 to measure, and for processors without VNNI
    none of INT8 that come near the runtimes' own.
    """
    on_cpu = model.backend in ("torch", "torch-compile", "onnxruntime-cpu", "openvino")
    if model.precision.startswith("fp8") or (model.precision.startswith("int8") and on_cpu and lacks_vnni()):
        return None
    if model.precision.startswith("int8"):
        return "int8", "cpu" if on_cpu else "cuda"
    return ("fp16", "cuda") if model.precision == "fp16" and not on_cpu else ("fp32", "cpu" if on_cpu else "cuda")


def measure_roofline(dtype: Dtype, device: str, threads: int) -> Roofline:
    """Measure by PyTorch: the best of several square products, 8 times each, and of 8 copies."""
    import torch

    torch.set_num_threads(threads)
    rate = max(side**3 / _best(_product(dtype, device, side), device) for side in _SIDES)
    source = torch.ones(_COPIED // _FLOAT, device=device)
    target = torch.empty_like(source)
    return Roofline(dtype, threads, rate, 2 * _COPIED / _best(lambda: target.copy_(source), device))


def _product(dtype: Dtype, device: str, side: int) -> Callable[[], Any]:
    import torch

    # Random: a GPU multiplies zeros faster, at less power.
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    if dtype == "int8":
        eight = [(32 * one).clamp(-127, 127).to(torch.int8) for one in (left, right)]
        return lambda: torch._int_mm(eight[0], eight[1].t())  # the layout that CUDA takes
    kind = torch.float16 if dtype == "fp16" else torch.float32
    left, right = left.to(kind), right.to(kind)
    return lambda: left @ right


def _best(call: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest call after one to warm up: others only show what disturbed them."""
    import torch

    seconds = []
    for _ in range(_REPEATS + 1):
        begun = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])
