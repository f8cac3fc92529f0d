"""Configuration of the export commands. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vpr.artifacts.paths import check_file
from vpr.common.errors import UserError, check_numbers
from vpr.common.hardware import MAX_THREADS

# Every backend, in the order of the report; ``export.backends.registry`` has the code that runs them.
BACKEND_NAMES = (
    "torch",
    "torch-compile",
    "torch-cuda",
    "torch-compile-cuda",
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
)
# What models are compared on unless others are named: torch.compile takes minutes at the first call, and the
# providers of ONNX Runtime on a GPU build engines of their own.
USUAL_BACKENDS = ("torch", "onnxruntime-cpu", "openvino", "tensorrt", "tensorrt-rtx")


def check_backends(names: Sequence[str]) -> None:
    """Raise :class:`UserError` if a backend of this name does not exist; ``all`` stands for every one."""
    if unknown := [name for name in names if name not in (*BACKEND_NAMES, "all")]:
        raise UserError(f"backends: no '{unknown[0]}': choose from all, {', '.join(BACKEND_NAMES)}")


MAX_BATCH = 1024


@dataclass(frozen=True)
class OnnxConfig:
    """An export.

    Attributes:
        student: student artifact.
        output: where the graph is written.
        precision: ``fp16`` computes in half precision between FP32 input and output.
        opset: 23 has one ``Attention`` per layer, which TensorRT fuses since 10.14; 20 spells it out
            for older runtimes. ONNX Runtime 1.31 and OpenVINO 2026.4 run both rightly and equally fast.
        catalog: catalogue whose first images the graph is checked on; random pixels if empty.
        split: of that catalogue; checking trains nothing, so the test images may be used.
        images: how many images are checked.
    """

    student: str
    output: str
    precision: Literal["fp32", "fp16"] = "fp32"
    opset: Literal[20, 23] = 23
    catalog: str = ""
    split: str = "test"
    images: int = 64


Recipe = Literal["linear", "full-mha", "full"]

Format = Literal["int8", "fp8"]

TimedBy = Literal["auto", "openvino", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Int8Config:
    """A graph of eight-bit products.

    Attributes:
        onnx: FP32 ``onnx`` artifact.
        ranges: ``ranges`` artifact measured on it.
        output: where the graph is written.
        base: precision of what is not quantised; ``fp16`` for TensorRT, ``fp32`` for CPU engines: OpenVINO
            computes the linears in INT8 over either, ONNX Runtime fuses them over ``fp32`` alone and is
            slower than without quantisation over ``fp16``.
        keep: layers whose names begin with one of these stay in the base precision. None keeps the first and the
            last product with weights, or what a student's finishing kept.
        scope: ``linear`` leaves attention and convolutions in the base precision, ``full-mha`` quantises attention's
            products too, ``full`` also a stem's convolutions. None is ``linear``, and ``full`` where a budget decides.
        number: of eight bits; ``fp8`` (E4M3) is for Ada and Hopper GPUs.
        max_recall_drop: of recall@1 on the catalogue's validation split, such as 0.005; None quantises all layers
            that ``keep`` does not name.
        catalog: catalogue artifact for ``max_recall_drop``; its ``test`` split is never looked at.
        timing_backend: what candidates are timed by: ``auto`` is the engine they become where there is an NVIDIA GPU,
            else OpenVINO on this CPU.
        batch: images per call when candidates are timed.
        seconds: of timing each candidate.
        threads: of OpenVINO when it times; 0 leaves their number to it.
    """

    onnx: str
    ranges: str
    output: str
    base: Literal["fp16", "fp32"] = "fp16"
    keep: tuple[str, ...] | None = None
    scope: Recipe | None = None
    number: Format = "int8"
    max_recall_drop: float | None = None
    catalog: str = ""
    timing_backend: TimedBy = "auto"
    batch: int = 1
    seconds: float = 2.0
    threads: int = 0

    def __post_init__(self) -> None:
        if self.max_recall_drop is not None and not -1 <= self.max_recall_drop <= 1:
            raise UserError(f"max_recall_drop: {self.max_recall_drop}: it is a share of queries, such as 0.005")
        if (self.max_recall_drop is None) != (not self.catalog):
            raise UserError("max_recall_drop: give it together with catalog, whose validation split decides")
        if not (1 <= self.batch <= MAX_BATCH and 0 < self.seconds <= 600 and 0 <= self.threads <= MAX_THREADS):
            raise UserError(f"batch: 1 to {MAX_BATCH}; seconds: above 0, at most 600; threads: 0 to {MAX_THREADS}")


# TensorRT-RTX's ahead-of-time targets on a CPU; sm90 (H100, H200) is not one of them.
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

_MOST_WORKSPACE = 1 << 20


@dataclass(frozen=True)
class EngineConfig:
    """A build.

    Attributes:
        onnx: ``onnx`` artifact; its precision is the engine's.
        output: where the engine is written.
        backend: ``auto`` takes TensorRT where it is installed, else TensorRT-RTX.
        target: GPU architectures of a TensorRT-RTX build, with commas between; one engine runs on all of them,
            and is the smaller the fewer they are (TensorRT builds for the GPU at hand).
        min_batch: smallest batch of the optimisation profile.
        opt_batch: batch it is tuned for.
        max_batch: largest batch.
        optimisation_level: 0 (quick build) to 5 (fast engine); None leaves it to the builder.
        workspace_mb: most memory of a layer's scratch space; None is all there is.
        timing_cache: file of TensorRT's measured kernels, read where it exists and written after the build; a
            cache belongs to one GPU and TensorRT version. TensorRT-RTX measures nothing and has none.
        version_compatible: the engine runs on later versions too, by the lean runtime it carries.
        weight_stripped: the engine has no weights; they are put in from the graph where it runs. Needs a GPU.
    """

    onnx: str
    output: str
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    target: str = "sm80,sm86,sm89,sm120"
    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 32
    optimisation_level: int | None = None
    workspace_mb: int | None = None
    timing_cache: str = ""
    version_compatible: bool = False
    weight_stripped: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """The architectures one by one."""
        return tuple(name for name in self.target.split(",") if name)

    def __post_init__(self) -> None:
        check_file("timing_cache", self.timing_cache)
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise UserError(f"target: {', '.join(unknown) or 'none, or one twice'}: choose from {', '.join(TARGETS)}")
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch <= MAX_BATCH:
            raise UserError(
                f"min_batch {self.min_batch}, opt_batch {self.opt_batch}, max_batch {self.max_batch}: "
                f"they must rise from at least 1 to at most {MAX_BATCH}"
            )
        if self.optimisation_level is not None and not 0 <= self.optimisation_level <= 5:
            raise UserError(f"optimisation_level: {self.optimisation_level}: give 0 (quick build) to 5 (fast engine)")
        if self.workspace_mb is not None:
            check_numbers(self, workspace_mb=(1, _MOST_WORKSPACE))


# Of what Triton takes: a folder's name, a part of its URLs, and no hidden file.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class ServingConfig:
    """A hand-off.

    Attributes:
        model: ``onnx`` artifact, or an ``engine`` artifact that TensorRT built. For ONNX Runtime on CPUs with VNNI
            give an INT8 graph of ``--base fp32``; on GPUs INT8 is for the engine.
        gallery: embeddings artifact of the same student; its ``gallery`` images are searched (all of it, if it
            has none).
        output: where the repository, the gallery and their README are written.
        name: of the model in Triton; empty is that of the artifact.
        max_batch: most images at once; None is the most of the engine's profile, or 32 for a graph.
        preferred_batches: sizes sent off before the delay is over; None is the batch that an engine is tuned for
            and ``max_batch``, and none for a graph, which has no such sizes.
        queue_delay_us: longest wait for a fuller batch, microseconds.
        instances: of the model on each device.
        device: that computes; engines need ``gpu``.
        index: ``flat`` is exact; ``hnsw`` is not, and stays quick for millions of images.
    """

    model: str
    gallery: str
    output: str
    name: str = ""
    max_batch: int | None = None
    preferred_batches: tuple[int, ...] | None = None
    queue_delay_us: int = 500
    instances: int = 1
    device: Literal["gpu", "cpu"] = "gpu"
    index: Literal["flat", "hnsw"] = "flat"

    def __post_init__(self) -> None:
        if self.name and not _NAME.fullmatch(self.name):
            raise UserError(f"name: {self.name!r}: give letters, digits, '_', '-' and '.', the first no '-' or '.'")
        if self.max_batch is not None:
            check_numbers(self, max_batch=(1, MAX_BATCH))
        if not 0 <= self.queue_delay_us <= 1_000_000:
            raise UserError(f"queue_delay_us: {self.queue_delay_us}: give 0 to 1000000 microseconds")
        check_numbers(self, instances=(1, 64))


@dataclass(frozen=True)
class ParityConfig:
    """A comparison.

    Attributes:
        student: student artifact, computed by PyTorch.
        models: ``onnx`` artifacts, computed by ONNX Runtime on the CPU.
        catalog: catalogue artifact; its images are compared on, nothing is trained.
        output: where the table is written.
        split: of the catalogue.
        layers: compare the output of every layer too, on 8 of the images.
        departs: cosine of a layer below which it is said to depart.
    """

    student: str
    models: tuple[str, ...]
    catalog: str
    output: str
    split: str = "test"
    layers: bool = False
    min_layer_cosine: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.min_layer_cosine <= 1:
            raise UserError(f"departs: {self.min_layer_cosine}: it is a cosine, above 0 and at most 1")
