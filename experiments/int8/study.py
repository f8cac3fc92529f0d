"""Study of calibration: number and choice of images, range methods, smoothing and bias correction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from calibration.ranges import METHODS
from experiments.figures import Row
from experiments.int8.tools import TrainedStudent
from experiments.intervals import gain_text
from export.backends.openvino_runtime import openvino_forward
from export.config import Int8Config, OnnxConfig
from export.int8 import export_int8
from export.parity import parity
from export.to_onnx import export_onnx, load_onnx
from vpr.artifacts.store import load_artifact
from vpr.common.log import get_logger
from vpr.data.catalog import load_catalog
from vpr.retrieval.embeddings import embed, score_split

log = get_logger(__name__)

COUNTS = (16, 32, 64, 128, 256, 512, 1024)
SEEDS = (0, 1)
_BASE = CalibrateConfig("", "", "", method="mse")


def study(student: TrainedStudent) -> list[Row]:
    """Measure cosine to FP32 and the drop of recall@1 of single changes, by OpenVINO on the test split.

    Cosines are means over two draws of images. The interval of the drop is paired, by product.
    """
    fp32 = export_onnx(OnnxConfig(str(student.artifact), str(student.folder / "fp32")))
    preprocess = load_artifact(fp32, "onnx").card.preprocess
    assert preprocess is not None
    test = load_catalog(student.catalog).select(split="test")
    expected = embed(test, preprocess, openvino_forward(load_onnx(fp32)[0]))
    scores = score_split(test, expected)
    rows = []
    for name, change in _changes().items():
        graphs = [_quantise(student, fp32, name, change, seed) for seed in SEEDS]
        embeddings = [embed(test, preprocess, openvino_forward(graph / "model.onnx")) for graph in graphs]
        parities = [parity(expected, vectors) for vectors in embeddings]
        cosine = sum(result["cosine_mean"] for result in parities) / len(parities)
        drop = np.mean([scores.hits.astype(float) - score_split(test, vectors).hits for vectors in embeddings], axis=0)
        log.info(f"  {student.name}, {name}: cosine {cosine:.6f}, drop {drop.mean():+.4f}")
        rows.append(
            {
                "student": student.name,
                "change": name,
                "cosine mean": f"{cosine:.6f}",
                "cosine min": f"{min(result['cosine_min'] for result in parities):.5f}",
                "drop of recall@1, paired [95 %]": gain_text(drop, scores.products),
            }
        )
    return rows


def _changes() -> dict[str, dict[str, Any]]:
    """Return the changes to :data:`_BASE` by name."""
    changes: dict[str, dict[str, Any]] = {f"{count} images": {"count": count} for count in COUNTS}
    changes |= {f"drawn {rule}": {"selection": rule} for rule in ("random", "k-centre")}
    changes |= {f"range by {method}": {"method": method} for method in (*METHODS, "auto") if method != _BASE.method}
    return changes | {
        "smoothed": {"smooth": True},
        "biases corrected": {"correct": True},
        "smoothed, biases corrected": {"smooth": True, "correct": True},
        "smoothed, corrected, range by auto": {"smooth": True, "correct": True, "method": "auto"},
    }


def _quantise(student: TrainedStudent, fp32: Path, name: str, change: dict[str, Any], seed: int) -> Path:
    output = student.folder / "study" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    config = replace(_BASE, onnx=str(fp32), catalog=str(student.catalog), output=f"{output}-ranges", seed=seed)
    ranges = calibrate(replace(config, **change))
    return export_int8(Int8Config(str(fp32), str(ranges), str(output), base="fp32", scope="full"))
