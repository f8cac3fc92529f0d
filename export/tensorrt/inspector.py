"""What a built engine is made of: the builder's layers, and the inspector's where there is a GPU."""

from __future__ import annotations

import json
from collections import Counter
from types import ModuleType
from typing import Any

from vpr.common.hardware import read_gpus


def count_layers(network: Any) -> dict[str, Any]:
    """Layers by type, and by the precision of their first output, as the builder sees them."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    types = Counter(layer.type.name for layer in layers)
    precisions = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    return {"layers": dict(sorted(types.items())), "precisions": dict(sorted(precisions.items()))}


def inspect(trt: ModuleType, plan: bytes, logger: Any) -> dict[str, Any]:
    """What the engine's inspector says, where there is a GPU to load it on: ``inspector`` of the card, else nothing."""
    gpus, _ = read_gpus()
    if not gpus:
        return {}
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return {}
    found = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"inspector": summarise_inspection(found)}


def summarise_inspection(found: str) -> dict[str, Any]:
    """Layers of a built engine by type and by the format of their first output, and whether attention is fused.

    Args:
        found: JSON of TensorRT's engine inspector, with detailed verbosity.

    Returns:
        ``layers``, ``formats`` (counts) and ``fused_attention`` (the number of such layers).
    """
    layers = [layer for layer in json.loads(found)["Layers"] if isinstance(layer, dict)]
    outputs = [layer["Outputs"][0] for layer in layers if layer.get("Outputs")]
    names = [f"{layer.get('Name', '')} {layer.get('TacticName', '')}".lower() for layer in layers]
    return {
        "layers": dict(sorted(Counter(str(layer.get("LayerType")) for layer in layers).items())),
        "formats": dict(sorted(Counter(str(output.get("Format/Datatype")) for output in outputs).items())),
        "fused_attention": sum("mha" in name or "fused_attention" in name for name in names),
    }
