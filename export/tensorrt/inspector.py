"""Layer counts of a network before the build, and of a built engine where there is a GPU."""

import json
from collections import Counter
from types import ModuleType
from typing import Any

from vpr.common.hardware import read_gpus


def count_layers(network: Any) -> dict[str, Any]:
    """Count the layers of a parsed network by type and by the precision of their first output."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    types = Counter(layer.type.name for layer in layers)
    precisions = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    return {"layers": dict(sorted(types.items())), "precisions": dict(sorted(precisions.items()))}


def inspect_engine(trt: ModuleType, plan: bytes, logger: Any) -> dict[str, Any]:
    """Return the card's ``inspector`` entry; empty without a GPU to load the engine on."""
    gpus, _ = read_gpus()
    if not gpus:
        return {}
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return {}
    report = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return {"inspector": summarise_inspection(report)}


def summarise_inspection(report: str) -> dict[str, Any]:
    """Count the layers in the JSON of TensorRT's inspector by type and output format, and those of fused attention."""
    layers = [layer for layer in json.loads(report)["Layers"] if isinstance(layer, dict)]
    outputs = [layer["Outputs"][0] for layer in layers if layer.get("Outputs")]
    names = [f"{layer.get('Name', '')} {layer.get('TacticName', '')}".lower() for layer in layers]
    return {
        "layers": dict(sorted(Counter(str(layer.get("LayerType")) for layer in layers).items())),
        "formats": dict(sorted(Counter(str(output.get("Format/Datatype")) for output in outputs).items())),
        "fused_attention": sum("mha" in name or "fused_attention" in name for name in names),
    }
