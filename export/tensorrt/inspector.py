"""Layer counts of a network before the build, and of a built engine where there is a GPU."""

import json
from collections import Counter
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from vpr.common.hardware import read_gpus
from vpr.common.log import get_logger

log = get_logger(__name__)

# Words in TensorRT's names of the eight-bit types, by the names of :class:`export.config.Int8Config`.
_EIGHT_BITS = {"int8": ("int8",), "fp8": ("fp8", "float8", "e4m3")}


def count_layers(network: Any) -> dict[str, Any]:
    """Count the layers of a parsed network by type and by the precision of their first output."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    types = Counter(layer.type.name for layer in layers)
    precisions = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    return {"layers": dict(sorted(types.items())), "precisions": dict(sorted(precisions.items()))}


def inspect_engine(trt: ModuleType, plan: bytes, logger: Any) -> dict[str, Any]:
    """Return the card's ``inspector`` entry; empty without a GPU that loads it, or if the layers are unknown."""
    gpus, _ = read_gpus()
    if not gpus:
        return {}
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return {}
    try:
        report = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return {"inspector": summarise_inspection(report)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # The engine is good; only the form of the report is new.
        log.warning(f"engine: its layers are unknown, because TensorRT's inspector gives another report ({error!r})")
        return {}


def summarise_inspection(report: str) -> dict[str, Any]:
    """Count the layers in the JSON of TensorRT's inspector.

    Returns:
        ``layers`` by type; ``formats`` by data type of the first output; ``fused_attention``, layers whose kernel's
        name contains "mha" or "fused_attention"; and ``int8_inputs`` and ``fp8_inputs``, layers that read a tensor of
        eight bits. Weights are no inputs, so a kernel that only stores its weights in eight bits is not counted.
    """
    layers = [layer for layer in json.loads(report)["Layers"] if isinstance(layer, dict)]
    formats = Counter(dtype for layer in layers for dtype in _dtypes(layer, "Outputs")[:1])
    names = [f"{layer.get('Name', '')} {layer.get('TacticName', '')}".lower() for layer in layers]
    summary = {
        "layers": dict(sorted(Counter(str(layer.get("LayerType")) for layer in layers).items())),
        "formats": dict(sorted(formats.items())),
        "fused_attention": sum("mha" in name or "fused_attention" in name for name in names),
    }
    for kind, words in _EIGHT_BITS.items():
        reads = [any(word in dtype.lower() for dtype in _dtypes(layer, "Inputs") for word in words) for layer in layers]
        summary[f"{kind}_inputs"] = sum(reads)
    return summary


def describe_precision(precision: str, inspection: Mapping[str, Any] | None) -> str:
    """Return an engine's precision; of an eight-bit graph with what its kernels compute, if that is known.

    TensorRT-RTX may store the weights in eight bits and compute in FP16 ("weight-only"). Only the inspector shows it,
    and it needs the GPU. ``inspection`` is the ``inspector`` entry of the card. Older cards do not have it, nor do
    those of engines that were built without a GPU.
    """
    kind = next((kind for kind in _EIGHT_BITS if precision.startswith(kind)), None)
    if kind is None:
        return precision
    if not inspection or not inspection.get("formats") or f"{kind}_inputs" not in inspection:
        return f"{precision}, kernels unknown"
    return precision if inspection[f"{kind}_inputs"] else f"{precision} weights only"


def _dtypes(layer: dict[str, Any], key: str) -> list[str]:
    """Return the data types of a layer's tensors: ``DataType`` in TensorRT 11, in ``Format/Datatype`` before."""
    tensors = [tensor for tensor in layer.get(key) or [] if isinstance(tensor, dict)]
    texts = (
        (tensor.get("DataType"), tensor.get("Format/Datatype"), tensor.get("Format/DataType")) for tensor in tensors
    )
    return [str(next(text for text in found if text is not None)) for found in texts if any(found)]
