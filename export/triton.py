"""Triton's ``config.pbtxt`` of a model, in the text format of its protobuf message ``ModelConfig``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpr.artifacts.card import TensorSpec
from vpr.artifacts.store import Artifact
from vpr.imaging.preprocess import Preprocess

_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}
_PLATFORMS = {"onnx": ("onnxruntime_onnx", "onnxruntime"), "engine": ("tensorrt_plan", "tensorrt")}


class Enumerator(str):
    """An enumeration value, which the text format writes without quotes."""


# Input of image files: one in each row of the batch.
_IMAGE = {"name": "image", "data_type": Enumerator("TYPE_STRING"), "dims": [1]}


@dataclass(frozen=True)
class Scheduling:
    """How Triton batches requests and distributes them."""

    max_batch: int  # largest batch
    preferred: tuple[int, ...]  # batch sizes that run without further delay
    queue_delay_us: int  # longest wait for a fuller batch, in microseconds
    instances: int  # model instances per device
    device: str  # ``gpu`` or ``cpu``


def model_config(name: str, model: Artifact, preprocess: Preprocess, scheduling: Scheduling) -> dict[str, Any]:
    """Return the fields of Triton's ``ModelConfig`` for an ``onnx`` or ``engine`` artifact.

    The first dimension of its inputs and outputs is the batch. The preprocessing becomes parameters; a
    graph with uint8 input applies mean and standard deviation itself. Warm-up runs the
    smallest and the largest batch when the model loads, so too little memory shows at once.
    """
    platform, backend = _PLATFORMS[model.card.kind]
    batching: dict[str, Any] = {"max_queue_delay_microseconds": scheduling.queue_delay_us}
    if scheduling.preferred:
        batching = {"preferred_batch_size": list(scheduling.preferred), **batching}
    fields: dict[str, Any] = {
        "name": name,
        "platform": platform,
        "backend": backend,
        "max_batch_size": scheduling.max_batch,
        "input": [{**_tensor(spec), "format": Enumerator(f"FORMAT_{preprocess.layout}")} for spec in model.card.inputs],
        "output": [_tensor(spec) for spec in model.card.outputs],
        "instance_group": [{"kind": Enumerator(f"KIND_{scheduling.device.upper()}"), "count": scheduling.instances}],
        "dynamic_batching": batching,
        "model_warmup": [_warm_up(model.card.inputs, batch) for batch in sorted({1, scheduling.max_batch})],
        "parameters": _parameters(model, preprocess),
    }
    if model.card.kind == "engine":
        # Triton captures graphs for batches of 1, the preferred sizes and the largest size only.
        fields["optimization"] = {"cuda": {"graphs": True}}
    return fields


def _parameters(model: Artifact, preprocess: Preprocess) -> list[dict[str, Any]]:
    values = _client_parameters(model, preprocess)
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


def _client_parameters(model: Artifact, preprocess: Preprocess) -> dict[str, str]:
    """Return what a client needs; strings are written as they are, numbers and lists as JSON."""
    values: dict[str, Any] = {f"preprocess.{key}": value for key, value in preprocess.model_dump(mode="json").items()}
    value = "(pixel / 255 - mean) / std" if preprocess.dtype == "float32" else "pixel"
    values |= {"preprocess.colour": "RGB", "preprocess.value": value}
    if model.card.embedding is not None:
        values |= {f"embedding.{key}": value for key, value in model.card.embedding.model_dump(mode="json").items()}
    if model.card.kind == "engine":
        values["engine.builder"] = model.card.metrics["builder"]
        values["engine.targets"] = ",".join(model.card.metrics["targets"])
    values["artifact.card_sha256"] = model.sha256
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def to_text(fields: Mapping[str, Any], indent: int = 0) -> str:
    """Return fields in protobuf's text format: strings, numbers, booleans, enumerators, mappings and lists of these."""
    margin, lines = "  " * indent, []
    for key, value in fields.items():
        if isinstance(value, Mapping):
            lines.append(f"{margin}{key} {{\n{to_text(value, indent + 1)}{margin}}}\n")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [to_text({key: item}, indent) for item in value]
        elif isinstance(value, list):
            lines.append(f"{margin}{key}: [{', '.join(map(_scalar, value))}]\n")
        else:
            lines.append(f"{margin}{key}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    return str(value) if isinstance(value, Enumerator) else json.dumps(value)


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": Enumerator(_TYPES[spec.dtype]), "dims": spec.shape[1:]}


def _warm_up(inputs: list[TensorSpec], batch: int) -> dict[str, Any]:
    zeros: list[dict[str, Any]] = []
    for spec in inputs:
        value = {"data_type": Enumerator(_TYPES[spec.dtype]), "dims": spec.shape[1:], "zero_data": True}
        zeros.append({"key": spec.name, "value": value})
    return {"name": f"batch_{batch}", "batch_size": batch, "inputs": zeros}


def preprocess_config(name: str, model: Artifact, preprocess: Preprocess, scheduling: Scheduling) -> dict[str, Any]:
    """Return the fields of the model that turns image files into the inputs of ``model``, on the CPU.

    Each request is preprocessed alone; the model that follows batches the requests of all clients.
    """
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": scheduling.max_batch,
        "input": [_IMAGE],
        "output": [_tensor(spec) for spec in model.card.inputs],
        "instance_group": [{"kind": Enumerator("KIND_CPU"), "count": scheduling.instances}],
        "parameters": _parameters(model, preprocess),
    }


def ensemble_config(
    name: str, steps: tuple[str, str], model: Artifact, preprocess: Preprocess, scheduling: Scheduling
) -> dict[str, Any]:
    """Return the fields of the ensemble of the preprocessing and the model with the names of ``steps``."""
    (pixels,), (embedding,) = model.card.inputs, model.card.outputs
    tensors = (("image", pixels.name), (pixels.name, embedding.name))
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": scheduling.max_batch,
        "input": [_IMAGE],
        "output": [_tensor(embedding)],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": step,
                    "model_version": -1,
                    "input_map": [{"key": source, "value": source}],
                    "output_map": [{"key": result, "value": result}],
                }
                for step, (source, result) in zip(steps, tensors, strict=True)
            ]
        },
        "parameters": _parameters(model, preprocess),
    }
