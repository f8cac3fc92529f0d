from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experiments.demo.toolkit_comparison import (
    FLOAT,
    LIGHTLY,
    OURS,
    MeasuredGraph,
    check_shape,
    compare_peers,
    export_with_lightly,
    peer_figures,
)
from experiments.figures import ROOT
from experiments.int8.tools import TrainedStudent, onnxruntime_forward
from experiments.venv_runner import run_in_venv
from student.config import StudentConfig
from student.model import Student
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.metrics import evaluate

_SHAPE = StudentConfig(image_size=32, patch_size=8, dim=128, depth=1, heads=2, mlp_dim=96, embedding_dim=8, stem="conv")


def _measured(correct: int, onnxruntime: float, openvino: float, cosine: float = 1.0) -> MeasuredGraph:
    """Return a graph with this number of correct results of ten queries."""
    gallery = np.eye(2, dtype=np.float32)
    queries = gallery[np.array([0] * correct + [1] * (10 - correct))]
    scores = evaluate(queries, np.array(["a"] * 10), gallery, np.array(["a", "b"]))
    return MeasuredGraph(scores, scores, cosine, cosine, openvino, onnxruntime, 1_000_000)


def test_int8_is_compared_with_best_and_fastest() -> None:
    graphs = {
        FLOAT: _measured(9, 0.5, 0.5),  # faster than the others, but of this toolkit
        "ours: FP16": _measured(9, 0.5, 0.5),
        OURS: _measured(8, 1.0, 2.0),
        "toolkit 1.0: FP32": _measured(9, 4.0, 3.0, cosine=0.5),
        f"{FLOAT} → quantiser: INT8, all": _measured(3, 1.5, 9.0),
        f"{FLOAT} → quantiser: INT8, some": _measured(7, 2.0, 8.0),
    }
    same, gain, onnxruntime, openvino = peer_figures(graphs, "make")
    assert (same.value, same.met) == (0.5, False)
    assert "some" in gain.name
    assert gain.value == pytest.approx(0.1)
    assert "all" in onnxruntime.name
    assert onnxruntime.value == 1.5
    assert "toolkit" in openvino.name
    assert openvino.value == 1.5


def test_shape_without_timm_equivalent_is_rejected() -> None:
    assert check_shape(asdict(_SHAPE)) == asdict(_SHAPE)
    with pytest.raises(UserError, match="support stem patch, registers 4, 3 heads of 64 in a width of 128. Choose"):
        check_shape(asdict(replace(_SHAPE, stem="patch", registers=4, heads=3)))
    with pytest.raises(UserError, match="support single head"):
        check_shape(asdict(replace(_SHAPE, heads=1, dim=64)))


def test_missing_input_names_its_command(tmp_path: Path) -> None:
    absent = TrainedStudent("sample", tmp_path / "student", tmp_path / "catalog", tmp_path)
    with pytest.raises(UserError, match=r'student: it does not exist. Run `make figures TOPIC=student PARTS="sizes"`'):
        compare_peers(absent, "make")
    problem = r"\.venv-absent: the environment of lightly_export\.py does not exist\. Run `make other-toolkits`"
    with pytest.raises(UserError, match=problem):
        run_in_venv(".venv-absent", "lightly_export.py", [], "other-toolkits")


def test_failing_program_is_one_error_line() -> None:
    with pytest.raises(
        UserError, match=r"^quantizers.py nothing: it failed \(KeyError: 'nothing'\). Run `make it` and try again.$"
    ):
        run_in_venv("", "quantizers.py", ["nothing", "a.onnx", str(ROOT / "none.npy"), "b.onnx"], "it")


def test_lightly_train_exports_same_network(tmp_path: Path) -> None:
    if not (ROOT / LIGHTLY).is_dir():
        pytest.skip("lightly-train is not installed: make other-toolkits")
    torch.manual_seed(0)
    model = Student(_SHAPE).eval()
    with write_artifact(tmp_path / "student", "student", {"model": asdict(_SHAPE)}) as draft:
        save_file(model.state_dict(), draft.path / "model.safetensors")
    student = TrainedStudent("tiny", tmp_path / "student", tmp_path / "none", tmp_path)
    graphs = export_with_lightly(student, asdict(_SHAPE))
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    assert [name.split(": ")[1] for name in graphs] == ["FP32", "FP16"]
    for path, tolerance in zip(graphs.values(), (1e-5, 1e-2), strict=True):
        np.testing.assert_allclose(l2_normalize(onnxruntime_forward(path, 1)(pixels)), expected, atol=tolerance)
