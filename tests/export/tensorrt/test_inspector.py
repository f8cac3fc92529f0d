from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from export.backends.registry import BACKENDS
from export.tensorrt import inspector
from export.tensorrt.inspector import describe_precision, inspect_engine, summarise_inspection

# Tensors as TensorRT 10 documents them: data type and format in one text.
OLD = {
    "Layers": [
        {"Name": "conv", "LayerType": "CaskConvolution", "Outputs": [{"Format/Datatype": "Half"}]},
        {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Outputs": [{"Format/Datatype": "Half"}]},
        {
            "Name": "_gemm_mha_v2_myl0_9",
            "LayerType": "kgen",
            "Inputs": [{"Format/Datatype": "Int8"}],
            "Outputs": [{"Format/Datatype": "Int8"}],
        },
        "a layer of little verbosity",
    ],
    "Bindings": ["pixels", "embedding"],
}


def new_report(inputs: str) -> dict[str, Any]:
    """Return a report as TensorRT 11's migration guide describes it: ``I/O Tensors``, and ``DataType`` alone."""
    linear = "Row major linear format (kLINEAR)"
    layer = {
        "Name": "_gemm_myl0_3",
        "LayerType": "kgen",
        "Inputs": [{"Name": "a", "DataType": inputs, "Format": linear}],
        "Outputs": [{"Name": "b", "DataType": "Half", "Format": linear}],
    }
    tensors = [{"Name": "pixels", "IOMode": "Input", "DataType": "Float", "Dimensions": [-1, 3, 4, 4]}]
    return {"Layers": [layer, layer], "I/O Tensors": tensors}


def test_layers_of_tensorrt_10_are_counted() -> None:
    assert summarise_inspection(json.dumps(OLD)) == {
        "layers": {"CaskConvolution": 1, "Myelin": 1, "kgen": 1},
        "formats": {"Half": 2, "Int8": 1},
        "fused_attention": 1,
        "int8_inputs": 1,
        "fp8_inputs": 0,
    }


@pytest.mark.parametrize(("inputs", "int8", "fp8"), [("Int8", 2, 0), ("FP8", 0, 2), ("Half", 0, 0)])
def test_layers_of_tensorrt_11_are_counted(inputs: str, int8: int, fp8: int) -> None:
    summary = summarise_inspection(json.dumps(new_report(inputs)))
    assert summary["formats"] == {"Half": 2}
    assert (summary["int8_inputs"], summary["fp8_inputs"]) == (int8, fp8)


@pytest.mark.parametrize(
    ("precision", "report", "described"),
    [
        ("fp16", None, "fp16"),
        ("int8", None, "int8, kernels unknown"),
        ("int8-mixed", None, "int8-mixed, kernels unknown"),
        ("int8", new_report("Int8"), "int8"),
        ("int8-mixed", new_report("Int8"), "int8-mixed"),
        ("int8", new_report("Half"), "int8 weights only"),
        ("fp8", new_report("FP8"), "fp8"),
        ("fp8", new_report("Int8"), "fp8 weights only"),
        ("int8", {"Layers": ["little verbosity"]}, "int8, kernels unknown"),
    ],
)
def test_eight_bits_are_claimed_only_where_kernels_read_them(
    precision: str, report: dict[str, Any] | None, described: str
) -> None:
    summary = summarise_inspection(json.dumps(report)) if report else None
    assert describe_precision(precision, summary) == described
    metrics = {"precision": precision, **({"inspector": summary} if summary else {})}
    artifact: Any = SimpleNamespace(card=SimpleNamespace(metrics=metrics))
    backend = next(backend for backend in BACKENDS if backend.name == "tensorrt-rtx")
    assert backend.precision(artifact) == described


def test_older_inspection_is_unknown() -> None:
    assert describe_precision("int8", {"formats": {"Half": 3}, "fused_attention": 0}) == "int8, kernels unknown"


@pytest.mark.parametrize("report", ["{}", "not JSON", json.dumps({"Layers": 3})])
def test_new_form_of_the_report_does_not_lose_the_engine(
    report: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspector, "read_gpus", lambda: ([{"name": "NVIDIA L4"}], "580.1"))
    inspect = SimpleNamespace(get_engine_information=lambda format: report)
    engine = SimpleNamespace(create_engine_inspector=lambda: inspect)
    trt: Any = SimpleNamespace(
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
        LayerInformationFormat=SimpleNamespace(JSON=1),
    )
    assert inspect_engine(trt, b"plan", None) == {}
    assert "warning: engine: its layers are unknown" in capsys.readouterr().err
