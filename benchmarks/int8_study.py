"""What the pictures, the ranges and the float weights' adjustments are worth, one at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Row
from benchmarks.int8_tools import Student
from calibration.calibrate import CalibrateConfig, calibrate
from calibration.ranges import METHODS
from export.cpu import openvino_forward
from export.int8 import Int8Config, export_int8
from export.onnx_graph import OnnxConfig, export_onnx, load_onnx
from export.parity import parity
from vpr.artifact import load_artifact
from vpr.catalog import load_catalog
from vpr.console import say
from vpr.embeddings import embed, score_split
from vpr.metrics import bootstrap_interval

COUNTS = (16, 32, 64, 128, 256, 512, 1024)
SEEDS = (0, 1)


def study(student: Student) -> list[Row]:
    """Mean and least cosine to FP32 and the drop of recall@1, by OpenVINO on the test split, of one change each.

    The cosines are means over two draws of pictures; the interval of the drop is paired over the queries of both.
    """
    base = CalibrateConfig("", str(student.catalog), "", method="mse")
    changes: dict[str, dict[str, Any]] = {f"{count} pictures": {"count": count} for count in COUNTS}
    changes |= {f"drawn {rule}": {"selection": rule} for rule in ("random", "k-centre")}
    changes |= {f"range by {method}": {"method": method} for method in (*METHODS, "auto") if method != "mse"}
    changes |= {
        "smoothed": {"smooth": True},
        "biases corrected": {"correct": True},
        "smoothed, biases corrected": {"smooth": True, "correct": True},
        "smoothed, corrected, range by auto": {"smooth": True, "correct": True, "method": "auto"},
    }
    floats = export_onnx(OnnxConfig(str(student.artifact), str(student.folder / "fp32")))
    preprocess = load_artifact(floats, "onnx").card.preprocess
    assert preprocess is not None
    test = load_catalog(student.catalog).select(split="test")
    expected = embed(test, preprocess, openvino_forward(load_onnx(floats)[0]))
    hits = score_split(test, expected).hits
    rows = []
    for name, change in changes.items():
        cosines, least, lost = [], [], []
        for seed in SEEDS:
            place = student.folder / "study" / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            config = replace(base, onnx=str(floats), output=f"{place}-ranges", seed=seed, **change)
            graph = export_int8(Int8Config(str(floats), str(calibrate(config)), str(place), base="fp32", recipe="full"))
            found = embed(test, preprocess, openvino_forward(Path(graph) / "model.onnx"))
            against = parity(expected, found)
            cosines.append(against["cosine_mean"])
            least.append(against["cosine_min"])
            lost.append(hits.astype(float) - score_split(test, found).hits)
        drop = np.mean(lost, axis=0)
        low, high = bootstrap_interval(drop)
        say(f"  {student.name}, {name}: cosine {sum(cosines) / len(cosines):.6f}, drop {drop.mean():+.4f}")
        rows.append(
            {
                "student": student.name,
                "change": name,
                "cosine mean": f"{sum(cosines) / len(cosines):.6f}",
                "cosine min": f"{min(least):.5f}",
                "drop of recall@1, paired [95 %]": f"{drop.mean():+.4f} [{low:+.4f}, {high:+.4f}]",
            }
        )
    return rows
