"""``vpr export engine``: ONNX graph -> TensorRT engine, by TensorRT or TensorRT-RTX.

Both have the same Python API; one function drives either. TensorRT-RTX builds ahead of time on
machines without a GPU, from wheels that PyPI carries; TensorRT builds for the GPU it runs on. Networks
are strongly typed: precision is what the graph says, in TensorRT 10.12+ and 11 alike.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import onnx

from export.onnx_graph import INPUT, describe, load_onnx
from vpr.artifact import find_current, plain, write_artifact
from vpr.console import say
from vpr.errors import UserError

Backend = Literal["tensorrt", "tensorrt-rtx"]
# TensorRT-RTX's ahead-of-time targets on a CPU; sm90 (H100, H200) is not one of them.
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
_RTX_LIBRARIES = ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1")
_REMEDY = {
    "tensorrt-rtx": "pip install -r requirements.txt",
    "tensorrt": "pip install -r requirements-gpu.txt, on a machine with an NVIDIA GPU",
}


@dataclass(frozen=True)
class EngineConfig:
    """A build.

    Attributes:
        onnx: ``onnx`` artifact; its precision is the engine's.
        output: where the engine is written.
        backend: ``auto`` takes TensorRT where it is installed, else TensorRT-RTX.
        targets: GPU architectures of a TensorRT-RTX build (TensorRT builds for the GPU at hand).
        min_batch: smallest batch of the optimisation profile.
        opt_batch: batch it is tuned for.
        max_batch: largest batch.
    """

    onnx: str
    output: str
    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    targets: tuple[str, ...] = ("sm80", "sm86", "sm89", "sm120")
    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 32


def build_engine(config: EngineConfig) -> Path:
    """Build an engine and write it as an artifact of kind ``engine``.

    Raises:
        UserError: no builder, an unknown target, or a graph the builder refuses (with the layer's name).
    """
    graph, artifact = load_onnx(config.onnx)
    backend = choose_backend(config.backend)
    trt = load_builder(backend)
    values = {**plain(config), "backend": backend, "builder_version": trt.__version__}
    parents = [artifact.as_parent("onnx")]
    if find_current(config.output, "engine", values, parents):
        say(f"{config.output}: up to date")
        return Path(config.output)
    _check_config(config)
    say(f"engine: {artifact.card.name} by {backend} {trt.__version__} for {', '.join(config.targets)}")
    started = time.monotonic()
    plan, layers = build_plan(trt, backend, graph, config)
    seconds = round(time.monotonic() - started, 2)
    with write_artifact(config.output, "engine", values, parents) as draft:
        (draft.path / "engine.plan").write_bytes(plan)
        describe(draft, artifact, graph)
        draft.metrics = {
            "precision": artifact.card.config.get("precision", "int8"),
            "builder": f"{backend} {trt.__version__}",
            "targets": list(config.targets) if backend == "tensorrt-rtx" else ["this GPU"],
            "profile": [config.min_batch, config.opt_batch, config.max_batch],
            "size_bytes": len(plan),
            "build_seconds": seconds,
            **layers,
        }
    say(f"{config.output}: {len(plan) / 1e6:.1f} MB engine, built in {seconds:.1f} s")
    return Path(config.output)


def choose_backend(wanted: Literal["auto", "tensorrt", "tensorrt-rtx"]) -> Backend:
    """``auto`` is TensorRT where it imports, else TensorRT-RTX."""
    if wanted != "auto":
        return wanted
    try:
        importlib.import_module("tensorrt")
    except ImportError:
        return "tensorrt-rtx"
    return "tensorrt"


def load_builder(backend: Backend) -> ModuleType:
    """The builder's Python module.

    TensorRT-RTX's bindings carry no libraries; those lie in ONNX Runtime's provider wheel, whose import
    makes the links that the loader asks for.

    Raises:
        UserError: it is not installed, with the line that installs it.
    """
    try:
        if backend == "tensorrt":
            return importlib.import_module("tensorrt")
        carrier = importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
        folder = Path(str(carrier.__file__)).parent
        for name in _RTX_LIBRARIES:
            ctypes.CDLL(str(next(folder.rglob(name))), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("tensorrt_rtx_bindings")
    except (ImportError, OSError, StopIteration) as error:
        raise UserError(f"{backend}: cannot be loaded ({error}): {_REMEDY[backend]}") from None


def build_plan(
    trt: ModuleType, backend: Backend, graph: onnx.ModelProto, config: EngineConfig
) -> tuple[bytes, dict[str, Any]]:
    """Parse and build a graph.

    Returns:
        the serialised engine, and counts of the network's layers by type and of tensors by precision.
    """
    errors: list[str] = []
    logger = _logger(trt, errors)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 has strongly typed networks only and no flag for it.
    strongly = getattr(flags, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.SerializeToString()):
        raise UserError(f"engine: the graph is refused: {_parser_error(parser)}: export the student again")
    build = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    shape = tuple(network.get_input(0).shape)[1:]
    batches = (config.min_batch, config.opt_batch, config.max_batch)
    profile.set_shape(INPUT, *[(batch, *shape) for batch in batches])
    build.add_optimization_profile(profile)
    if backend == "tensorrt-rtx":
        build.num_compute_capabilities = len(config.targets)
        for index, target in enumerate(config.targets):
            build.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    plan = builder.build_serialized_network(network, build)
    if plan is None:
        reason = errors[0][:400] if errors else "no reason given"
        remedy = "build from the FP16 or INT8 graph (fused attention has no FP32 kernel), or export with --opset 20"
        raise UserError(f"engine: the build failed: {reason}: {remedy}")
    return bytes(plan), count_layers(network)


def count_layers(network: Any) -> dict[str, Any]:
    """Layers by type, and by the precision of their first output, as the builder sees them."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    types = Counter(layer.type.name for layer in layers)
    precisions = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    return {"layers": dict(sorted(types.items())), "precisions": dict(sorted(precisions.items()))}


def _check_config(config: EngineConfig) -> None:
    unknown = [target for target in config.targets if target not in TARGETS]
    if unknown or not config.targets or len(set(config.targets)) != len(config.targets):
        raise UserError(f"targets: {', '.join(unknown) or 'none, or one twice'}: choose from {', '.join(TARGETS)}")
    if not 1 <= config.min_batch <= config.opt_batch <= config.max_batch:
        raise UserError(
            f"min_batch {config.min_batch}, opt_batch {config.opt_batch}, max_batch {config.max_batch}: "
            "they must rise from at least 1"
        )


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    return f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"


def _logger(trt: ModuleType, errors: list[str]) -> Any:
    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors for the message; everything else is the builder's own business."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Called by the builder, from any of its threads."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(message)

    return Collector()
