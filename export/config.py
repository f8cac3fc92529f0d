"""Configuration of the export commands. Imports no heavy library, so help and errors in arguments are instant."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vpr.artifacts.paths import check_file
from vpr.common.errors import UserError, check_numbers
from vpr.common.hardware import MAX_THREADS
from vpr.gallery.config import read_columns
from vpr.retrieval import config as retrieval

# Every backend, in the order of the report; ``export.backends.registry`` has the code that runs them.
BACKEND_NAMES = (
    *("torch", "torch-compile", "torch-cuda", "torch-cuda-tf32", "torch-cuda-bf16", "torch-cuda-fp16"),
    *("torch-compile-cuda", "torch-compile-cuda-tf32", "torch-compile-cuda-bf16", "torch-compile-cuda-fp16"),
    *("onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"),
    *("openvino", "tensorrt", "tensorrt-rtx"),
)
CPU_BACKENDS = ("torch", "torch-compile", "onnxruntime-cpu", "openvino")
# The others are slow to start: torch.compile takes minutes at the first call, and ONNX Runtime's GPU providers build
# engines of their own.
DEFAULT_BACKENDS = ("torch", "onnxruntime-cpu", "openvino", "tensorrt", "tensorrt-rtx")


def check_backends(names: Sequence[str]) -> None:
    """Raise :class:`UserError` if a name is neither a backend nor ``all``."""
    if unknown := [name for name in names if name not in (*BACKEND_NAMES, "all")]:
        raise UserError(f"backends: unknown backend '{unknown[0]}'. Choose from all, {', '.join(BACKEND_NAMES)}.")


def check_backend(name: str) -> None:
    """Raise :class:`UserError` if a name is neither a backend nor ``auto``."""
    if name not in ("auto", *BACKEND_NAMES):
        known = ", ".join(("auto", *BACKEND_NAMES))
        raise UserError(f"backend: unknown backend '{name}'. Choose from {known}.")


def check_drop(name: str, drop: float | None, lowest: int = 0) -> None:
    """Raise :class:`UserError` if a limit on the drop of recall@1 is set and is not ``lowest`` to 1."""
    if drop is not None and not lowest <= drop <= 1:
        raise UserError(f"{name}: expected {lowest} to 1, a share of queries such as 0.005, got {drop}.")


def check_confidence(name: str, confidence: float) -> None:
    """Raise :class:`UserError` if a confidence is not a probability to rely on."""
    if not 0.5 <= confidence < 1:
        raise UserError(f"{name}: expected 0.5 or more and less than 1, such as 0.95, got {confidence}.")


MAX_BATCH = 1024


@dataclass(frozen=True)
class OnnxConfig:
    """Options of ``vpr export onnx``.

    Attributes:
        model: Teacher or student artifact. The flag ``--student`` means the same.
        output: Output folder of the graph.
        precision: Precision of the arithmetic. ``fp16`` keeps an FP32 output, and an FP32 input unless it is uint8.
        opset: ONNX opset. 23 has one ``Attention`` node per layer, which TensorRT fuses since 10.14. 20 spells
            attention out for older runtimes. ONNX Runtime 1.31 and OpenVINO 2026.4 run both equally fast.
        catalog: Catalogue whose images the graph is checked on. Random pixels if empty.
        split: Split of that catalogue. The check trains nothing, so the test images are allowed.
        images: Number of images to check.
        input: Data type of the input. ``uint8`` takes pixels and normalises inside the graph, a quarter of the bytes.
        layout: Order of the axes of a ``uint8`` input: ``NCHW``, or ``NHWC`` as decoders return images.
        dimensions: Keep the first N dimensions of the embedding, renormalised inside the graph, as nested students are
            trained for. 0 keeps all.
    """

    model: str
    output: str
    precision: Literal["fp32", "fp16"] = "fp32"
    opset: Literal[20, 23] = 23
    catalog: str = ""
    split: str = "test"
    images: int = 64
    input: Literal["float32", "uint8"] = "float32"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dimensions: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, images=(1, 1 << 16), dimensions=(0, 1 << 16))
        if self.layout == "NHWC" and self.input == "float32":
            raise UserError("layout: NHWC needs a uint8 input, got float32. Add --input uint8.")

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Keys that cards did not have at first, see :func:`vpr.common.config_values.config_values`."""
        return ("input", "layout", "dimensions")


Recipe = Literal["linear", "full-mha", "full"]
QuantDtype = Literal["int8", "fp8"]
TimingBackend = Literal["auto", "openvino", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Int8Config:
    """Options of ``vpr export int8``.

    Attributes:
        onnx: FP32 ``onnx`` artifact.
        ranges: ``ranges`` artifact that was measured on this graph.
        output: Output folder of the quantised graph.
        base: Precision of the layers that are not quantised. Use ``fp16`` for TensorRT and ``fp32`` for CPUs. ONNX
            Runtime fuses INT8 linears over ``fp32`` only; over ``fp16`` it is slower than without quantisation.
        exclude_layers: Name prefixes of layers to leave in the base precision. None excludes the first and the last
            layer with weights, or the layers that QAT fine-tuning excluded.
        scope: ``linear`` quantises linears, ``full-mha`` also the products of attention, ``full`` also the convolutions
            of a stem. None means ``full`` with ``max_recall_drop``, else ``linear``.
        dtype: Eight-bit type. ``fp8`` (E4M3) needs an Ada or Hopper GPU.
        max_recall_drop: Largest drop of recall@1, such as 0.005. Layers are searched on a third of the products of the
            validation split, and the drop is confirmed on the others. None sets no limit.
        confidence: Confidence that the true drop of a confirmed graph is within ``max_recall_drop``.
        catalog: Catalogue for ``max_recall_drop``. Its test split is never read.
        timing_backend: Backend that times the candidates. ``auto`` means TensorRT with an NVIDIA GPU, else OpenVINO.
        batch: Images per call when candidates are timed.
        seconds: Seconds of timing per candidate.
        threads: CPU threads of OpenVINO when it times. 0 lets OpenVINO choose.
    """

    onnx: str
    ranges: str
    output: str
    base: Literal["fp16", "fp32"] = "fp16"
    exclude_layers: tuple[str, ...] | None = None
    scope: Recipe | None = None
    dtype: QuantDtype = "int8"
    max_recall_drop: float | None = None
    confidence: float = 0.95
    catalog: str = ""
    timing_backend: TimingBackend = "auto"
    batch: int = 1
    seconds: float = 2.0
    threads: int = 0

    def __post_init__(self) -> None:
        check_drop("max_recall_drop", self.max_recall_drop)
        check_confidence("confidence", self.confidence)
        if (self.max_recall_drop is None) != (not self.catalog):
            raise UserError("--max-recall-drop and --catalog go together: give both or neither.")
        check_numbers(self, batch=(1, MAX_BATCH), threads=(0, MAX_THREADS))
        if not 0 < self.seconds <= 600:
            raise UserError(f"seconds: expected more than 0 and at most 600, got {self.seconds}.")


# TensorRT-RTX's ahead-of-time targets on a CPU; sm90 (H100, H200) is not one of them.
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
# Targets of the builder that the support matrix of TensorRT-RTX (1.0 to 1.5) lacks: A100.
UNSUPPORTED_TARGETS = ("sm80",)
CURRENT_TARGET = "current"  # the GPU of this machine
NO_TIMING_CACHE = "none"

_MAX_WORKSPACE_MB = 1 << 20


@dataclass(frozen=True)
class EngineConfig:
    """Options of ``vpr export engine``.

    Attributes:
        onnx: ``onnx`` artifact. Its precision is the engine's.
        output: Output folder of the engine.
        backend: Builder of the engine. ``auto`` means TensorRT if it is installed, else TensorRT-RTX.
        target: GPU architectures of a TensorRT-RTX engine, separated by commas; fewer targets make it smaller.
            ``current`` means the GPU of this machine. TensorRT ignores this key and always builds for that GPU.
        min_batch: Smallest batch of the optimisation profile.
        opt_batch: Batch size that the engine is tuned for.
        max_batch: Largest batch of the optimisation profile.
        batches: Batch sizes with a profile of their own, tuned for exactly that size. Each one takes build time.
        optimisation_level: Builder effort from 0 (quick build) to 5 (fast engine). None uses the builder's default.
        workspace_mb: Largest scratch memory of a layer, in MiB. None sets no limit.
        timing_cache: File of kernel timings of one GPU and TensorRT version, read if it exists and then updated. Empty
            uses a file next to the output, named after both. ``none`` times every kernel again. TensorRT-RTX times no
            kernels.
        version_compatible: Build an engine that later TensorRT versions load too, such as Triton's. It contains a lean
            runtime, code that `vpr` does not run.
    """

    onnx: str
    output: str
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    target: str = "sm86,sm89,sm120"
    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 32
    batches: tuple[int, ...] = ()
    optimisation_level: int | None = None
    workspace_mb: int | None = None
    timing_cache: str = ""
    version_compatible: bool = False

    @property
    def targets(self) -> tuple[str, ...]:
        """Architectures of ``target`` as a tuple."""
        return tuple(name for name in self.target.split(",") if name)

    def __post_init__(self) -> None:
        if self.timing_cache != NO_TIMING_CACHE:
            check_file("timing_cache", self.timing_cache)
        is_known = bool(self.targets) and all(name in TARGETS for name in self.targets)
        if self.target != CURRENT_TARGET and (not is_known or len(set(self.targets)) != len(self.targets)):
            names = ", ".join(TARGETS)
            raise UserError(
                f"target: expected {CURRENT_TARGET}, or different names out of {names}, got '{self.target}'."
            )
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch <= MAX_BATCH:
            raise UserError(
                f"min_batch, opt_batch, max_batch: expected 1 <= min <= opt <= max <= {MAX_BATCH}, "
                f"got {self.min_batch}, {self.opt_batch}, {self.max_batch}."
            )
        if len(set(self.batches)) != len(self.batches) or not all(1 <= batch <= MAX_BATCH for batch in self.batches):
            raise UserError(f"batches: expected different numbers of 1 to {MAX_BATCH}, got {list(self.batches)}.")
        if self.optimisation_level is not None:
            check_numbers(self, optimisation_level=(0, 5))
        if self.workspace_mb is not None:
            check_numbers(self, workspace_mb=(1, _MAX_WORKSPACE_MB))


# Triton uses the name as a folder and in URLs; a leading dot would hide the folder.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def check_model_name(name: str) -> None:
    """Raise :class:`UserError` if Triton does not accept a model of this name."""
    if not _NAME.fullmatch(name):
        raise UserError(f"name: expected 1 to 128 of A-Za-z0-9_.- without a leading . or -, got {name!r}. Set --name.")


@dataclass(frozen=True)
class ServingConfig:
    """Options of ``vpr export serving``.

    Attributes:
        model: ``onnx`` artifact, or an ``engine`` artifact that TensorRT built. For INT8, use an engine on GPUs and a
            graph of ``--base fp32`` on CPUs with VNNI.
        gallery: Embeddings artifact of this model, or of the teacher or student that it was exported from. Its
            ``gallery`` images are searched, or all without that role.
        output: Output folder of the model repository, the gallery and their README.
        name: Name of the model in Triton. Empty uses the artifact's name.
        max_batch: Largest batch. None uses the engine's largest batch, or 32 for a graph.
        preferred_batches: Batch sizes that Triton runs without further delay. None uses the engine's tuned batch and
            ``max_batch``, and no size for a graph.
        queue_delay_us: Longest wait for a fuller batch, in microseconds.
        instances: Model instances per device.
        device: Device that runs the model. Engines need ``gpu``.
        index: Search index. ``flat`` is exact, ``hnsw`` is approximate and stays fast for millions of images.
        accept_images: Add an ensemble that takes image files. Triton's Python backend preprocesses them with numpy and
            Pillow.
        threshold: Artifact of ``vpr gallery threshold`` for "no match". Empty takes the one of a gallery that
            ``vpr gallery export`` wrote, if it has one.
        metadata: Table (CSV, JSON lines or Parquet) with a column ``product``, optionally ``image``, and ``columns``.
            Empty takes the metadata of a gallery that ``vpr gallery export`` wrote, if it has some.
        columns: Metadata columns as ``NAME:text`` or ``NAME:number``, such as ``price:number``.
        storage: Artifact of ``vpr bench storage``. The index has the setting that it confirmed for a gallery as large
            as this one.
        training: Embeddings that ``vpr bench storage`` measured. Formats and principal directions are fitted on their
            training images. Empty takes ``gallery``.
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
    accept_images: bool = False
    threshold: str = ""
    metadata: str = ""
    columns: tuple[str, ...] = ()
    storage: str = ""
    training: str = ""

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("accept_images", "threshold", "metadata", "columns", "storage", "training")

    def __post_init__(self) -> None:
        if self.name:
            check_model_name(self.name)
        read_columns(self.columns)
        if bool(self.metadata) != bool(self.columns):
            raise UserError("columns: --metadata and --columns need each other. Set both, or leave out both.")
        if self.storage and self.index != "flat":
            raise UserError(f"index: --storage sets the index, got {self.index}. Leave out --index.")
        if self.training and not self.storage:
            raise UserError("training: only --storage fits an index. Set --storage, or leave out --training.")
        if self.max_batch is not None:
            check_numbers(self, max_batch=(1, MAX_BATCH))
        if not all(1 <= batch <= MAX_BATCH for batch in self.preferred_batches or ()):
            raise UserError(f"preferred_batches: expected 1 to {MAX_BATCH}, got {list(self.preferred_batches or ())}.")
        check_numbers(self, queue_delay_us=(0, 1_000_000), instances=(1, 64))


@dataclass(frozen=True)
class ParityConfig:
    """Options of ``vpr export parity``.

    Attributes:
        reference: Teacher or student artifact. PyTorch computes its embeddings. ``--student`` means the same.
        models: ``onnx`` artifacts. ONNX Runtime computes their embeddings on the CPU.
        catalog: Catalogue of the images to compare. Nothing is trained on them.
        output: Output folder of the comparison.
        split: Split of that catalogue.
        layers: Compare the output of every layer too, on 8 of the images.
        min_layer_cosine: Cosine below which a layer counts as departing from PyTorch.
    """

    reference: str
    models: tuple[str, ...]
    catalog: str
    output: str
    split: str = "test"
    layers: bool = False
    min_layer_cosine: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.min_layer_cosine <= 1:
            raise UserError(f"min_layer_cosine: expected more than 0 and at most 1, got {self.min_layer_cosine}.")


@dataclass(frozen=True)
class EmbedConfig(retrieval.EmbedConfig):
    """Embedding of a catalogue with any model.

    Attributes:
        model: Model artifact: a teacher, a student, a graph or an engine.
        catalog: Catalogue artifact.
        output: Path of the embeddings artifact to write.
        split: Split to embed; empty embeds all splits.
        batch_size: Images per batch.
        threads: Background decoding threads per process; 0 decodes in the calling thread.
        images_per_part: Images per part, rounded up to full batches. A killed job repeats at most its unfinished parts.
        ray: Workers of a Ray Data job (``requirements-scale.txt``); 0 embeds in this process, or in those of torchrun.
        dimensions: Keep the first N dimensions, renormalised, as nested students are trained for; 0 keeps all.
        backend: Backend that runs the model. ``auto`` means PyTorch for teachers and students, the builder's runtime
            for engines, and for graphs ONNX Runtime on an NVIDIA GPU, else OpenVINO or ONNX Runtime.
    """

    threads: int = 2
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_backend(self.backend)
