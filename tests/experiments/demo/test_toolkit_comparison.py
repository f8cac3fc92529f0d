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
    Measured,
    by_lightly,
    check_shape,
    compare_peers,
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

_FITS = StudentConfig(image_size=32, patch_size=8, dim=128, depth=1, heads=2, mlp_dim=96, embedding_dim=8, stem="conv")


def _measured(right: int, onnxruntime: float, openvino: float, cosine: float = 1.0) -> Measured:
    """Of ten queries, so many right."""
    gallery = np.eye(2, dtype=np.float32)
    queries = gallery[np.array([0] * right + [1] * (10 - right))]
    scores = evaluate(queries, np.array(["a"] * 10), gallery, np.array(["a", "b"]))
    return Measured(scores, scores, cosine, cosine, openvino, onnxruntime, 1_000_000)


def test_our_int8_is_held_against_the_best_and_the_fastest_of_the_others() -> None:
    found = {
        FLOAT: _measured(9, 0.5, 0.5),  # faster than all others, but ours
        "ours: FP16": _measured(9, 0.5, 0.5),
        OURS: _measured(8, 1.0, 2.0),
        "toolkit 1.0: FP32": _measured(9, 4.0, 3.0, cosine=0.5),
        f"{FLOAT} → quantiser: INT8, all": _measured(3, 1.5, 9.0),
        f"{FLOAT} → quantiser: INT8, some": _measured(7, 2.0, 8.0),
    }
    same, ahead, onnxruntime, openvino = peer_figures(found, "make")
    assert (same.value, same.met) == (0.5, False)
    assert "some" in ahead.name
    assert ahead.value == pytest.approx(0.1)
    assert "all" in onnxruntime.name
    assert onnxruntime.value == 1.5
    assert "toolkit" in openvino.name
    assert openvino.value == 1.5


def test_a_student_that_timm_has_not_is_refused() -> None:
    assert check_shape(asdict(_FITS)) == asdict(_FITS)
    with pytest.raises(UserError, match="no stem patch, no registers 4, no 3 heads of 64 in a width of 128: choose"):
        check_shape(asdict(replace(_FITS, stem="patch", registers=4, heads=3)))
    with pytest.raises(UserError, match="no single head"):
        check_shape(asdict(replace(_FITS, heads=1, dim=64)))


def test_what_is_missing_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    absent = TrainedStudent("sample", tmp_path / "student", tmp_path / "catalog", tmp_path)
    with pytest.raises(UserError, match=r'student: not there: make figures TOPIC=student PARTS="sizes"'):
        compare_peers(absent, "make")
    with pytest.raises(UserError, match=r"\.venv-absent: not there, lightly_train.py runs in it: make other-toolkits"):
        run_in_venv(".venv-absent", "lightly_train.py", [], "other-toolkits")


def test_a_program_that_fails_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^quantizers.py nothing: failed: KeyError: 'nothing': make it$"):
        run_in_venv("", "quantizers.py", ["nothing", "a.onnx", str(ROOT / "none.npy"), "b.onnx"], "it")


def test_lightly_train_exports_the_same_network(tmp_path: Path) -> None:
    if not (ROOT / LIGHTLY).is_dir():
        pytest.skip("lightly-train has an environment of its own: make other-toolkits")
    torch.manual_seed(0)
    model = Student(_FITS).eval()
    with write_artifact(tmp_path / "student", "student", {"model": asdict(_FITS)}) as draft:
        save_file(model.state_dict(), draft.path / "model.safetensors")
    student = TrainedStudent("tiny", tmp_path / "student", tmp_path / "none", tmp_path)
    graphs = by_lightly(student, asdict(_FITS))
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    assert [name.split(": ")[1] for name in graphs] == ["FP32", "FP16"]
    for path, tolerance in zip(graphs.values(), (1e-5, 1e-2), strict=True):
        np.testing.assert_allclose(l2_normalize(onnxruntime_forward(path, 1)(pixels)), expected, atol=tolerance)
