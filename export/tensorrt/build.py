"""``vpr export engine``: build an ONNX graph as an engine with TensorRT or TensorRT-RTX.

Both builders have the same Python API. TensorRT-RTX builds ahead of time on machines without a GPU, from wheels on
PyPI. TensorRT builds for the GPU of the machine. Networks are strongly typed: the graph alone sets the precision, in
TensorRT 10.12+ and in 11.
"""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import onnx

from export.config import CURRENT_TARGET, TARGETS, UNSUPPORTED_TARGETS, EngineConfig
from export.golden import copy_golden
from export.multiply_adds import multiply_adds
from export.tensorrt.bindings import Builder, choose_builder, error_logger, import_tensorrt, this_gpu
from export.tensorrt.inspector import count_layers, inspect_engine
from export.tensorrt.timing_cache import TimingCache
from export.to_onnx import fill_graph_card, load_onnx
from vpr.artifacts.stage import Stage
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError
from vpr.common.gpus import list_gpus
from vpr.common.log import get_logger
from vpr.data.seen import record_seen
from vpr.inference.onnx_file import MODEL_FILE, is_large, save_graph
from vpr.inference.onnx_session import INPUT

log = get_logger(__name__)


def build_engine(config: EngineConfig) -> Path:
    """Build an engine and write it as an artifact; :class:`UserError` without a builder, or for a rejected graph."""
    backend = choose_builder(config.backend)
    if backend == "tensorrt-rtx" and config.target == CURRENT_TARGET:
        config = replace(config, target=_current_target())
    targets = list(config.targets) if backend == "tensorrt-rtx" else [this_gpu()]
    graph, artifact = load_onnx(config.onnx)
    trt = import_tensorrt(backend)
    # What was built for another GPU is not up to date here.
    values = {**_values(config), "target": ",".join(targets), "backend": backend, "builder_version": trt.__version__}
    parents = [artifact.as_parent("onnx"), *artifact.networks()]
    stage = Stage(config.output, "engine", values, parents)
    if stage.find():
        return stage.path
    if unsupported := [target for target in targets if backend == "tensorrt-rtx" and target in UNSUPPORTED_TARGETS]:
        log.warning(f"engine: TensorRT-RTX builds for {', '.join(unsupported)}, but its support matrix has no such GPU")
    log.info(f"engine: {artifact.card.name} by {backend} {trt.__version__} for {', '.join(targets)}")
    start = time.monotonic()
    plan, layers = build_plan(trt, backend, graph, config)
    seconds = round(time.monotonic() - start, 2)
    with stage.write() as draft:
        (draft.path / "engine.plan").write_bytes(plan)
        fill_graph_card(draft, artifact, graph)
        copy_golden(artifact, draft.path)
        record_seen(draft.path, [artifact])
        draft.metrics = {
            "precision": artifact.card.metrics.get("precision") or artifact.card.config.get("precision", "fp32"),
            "builder": f"{backend} {trt.__version__}",
            "targets": targets,
            "profile": [config.min_batch, config.opt_batch, config.max_batch],
            **({"profiles": profiles_of(config)} if config.batches else {}),
            "size_bytes": len(plan),
            "build_seconds": seconds,
            "multiply_adds": multiply_adds(graph),
            **layers,
        }
    log.info(f"{config.output}: engine {len(plan) / 1e6:.1f} MB, built in {seconds:.1f} s")
    return stage.path


def build_plan(
    trt: ModuleType, backend: Builder, graph: onnx.ModelProto, config: EngineConfig
) -> tuple[bytes, dict[str, Any]]:
    """Build a graph as a serialised engine; also count the network's layers by type and by precision."""
    errors: list[str] = []
    logger = error_logger(trt, errors)
    builder = trt.Builder(logger)
    network = _parse(trt, builder, logger, graph)
    build = builder.create_builder_config()
    shape = tuple(network.get_input(0).shape)[1:]
    for batches in profiles_of(config):
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, *[(batch, *shape) for batch in batches])
        build.add_optimization_profile(profile)
    _set_options(trt, backend, build, config)
    timings = TimingCache.find(config, backend, trt.__version__)
    if timings is not None:
        earlier = len(errors)
        timings.load(build)
        del errors[earlier:]  # those of a rejected file are no reason of a failed build
    plan = builder.build_serialized_network(network, build)
    if plan is None:
        reason = " ".join(errors[0][:400].split()) if errors else "no reason given"
        raise UserError(f"engine: the build failed ({reason}). {_remedy(config)}")
    if timings is not None:
        timings.save(build)
    plan = bytes(plan)
    return plan, count_layers(network) | inspect_engine(trt, plan, logger)


def profiles_of(config: EngineConfig) -> list[list[int]]:
    """Return the smallest, tuned and largest batch of each optimisation profile.

    The first one covers the range. Triton and a remainder of a batch use it.
    """
    return [[config.min_batch, config.opt_batch, config.max_batch], *([batch] * 3 for batch in config.batches)]


def _values(config: EngineConfig) -> dict[str, Any]:
    """Return the values that determine an engine, as older cards have them where nothing changed."""
    values = config_to_json(config)
    if not config.batches:
        del values["batches"]
    return {**values, "weight_stripped": False}  # a former option


def _current_target() -> str:
    """Return the TensorRT-RTX target of this machine's GPU.

    The card thus names the architecture, and the engine is the one of ``--target`` with that name. TensorRT-RTX's own
    ``ComputeCapability.CURRENT`` would not name it.
    """
    listing = list_gpus()
    if not listing.gpus:
        problem = f"{CURRENT_TARGET} needs an NVIDIA GPU; this machine {listing.problem.rstrip('.')}"
        raise UserError(f"target: {problem}. Name the architectures, such as --target sm89.")
    gpu = listing.gpus[0]
    if gpu.architecture not in TARGETS:
        problem = f"TensorRT-RTX has no target for {gpu.name} ({gpu.architecture})"
        raise UserError(f"target: {problem}. Build with --backend tensorrt.")
    return gpu.architecture


def _parse(trt: ModuleType, builder: Any, logger: Any, graph: onnx.ModelProto) -> Any:
    """Return a graph as a strongly typed network."""
    # TensorRT 11 has only strongly typed networks, and no flag for them.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if is_large(graph):
        with TemporaryDirectory() as folder:
            save_graph(graph, Path(folder))
            is_parsed = parser.parse_from_file(str(Path(folder) / MODEL_FILE))
    else:
        is_parsed = parser.parse(graph.SerializeToString())
    if not is_parsed:
        raise UserError(f"engine: the parser rejects the graph ({_parser_error(parser)}). Export the model again.")
    _decompose_fp32_attention(trt, network)
    return network


def _decompose_fp32_attention(trt: ModuleType, network: Any) -> None:
    """Allow TensorRT to split FP32 attention, which has no fused kernel on any GPU."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT" and layer.get_input(0).dtype.name == "FLOAT":
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as an ILayer
            layer.attention.decomposable = True


def _set_options(trt: ModuleType, backend: Builder, build: Any, config: EngineConfig) -> None:
    if backend == "tensorrt-rtx":
        build.num_compute_capabilities = len(config.targets)
        for index, target in enumerate(config.targets):
            build.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)
    build.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if config.optimisation_level is not None:
        build.builder_optimization_level = config.optimisation_level
    if config.workspace_mb is not None:
        build.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mb << 20)
    if config.version_compatible:
        build.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def _remedy(config: EngineConfig) -> str:
    if config.workspace_mb is not None:
        return "Raise or remove --workspace-mb."
    if config.version_compatible:
        return "Remove --version-compatible, or build with TensorRT on a machine with a GPU."
    return "Build from the FP16 or INT8 graph, or export with --opset 20."


def _parser_error(parser: Any) -> str:
    if not parser.num_errors:
        return "no reason given"
    error = parser.get_error(0)
    return f"node '{error.node_name()}' ({error.node_operator()}): {error.desc()}"
