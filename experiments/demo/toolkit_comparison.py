"""The same student by other toolkits' roads to a served graph and by ours: same weights, images and queries."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.external.lightly_train import PRECISIONS
from experiments.figures import Figure, Row
from experiments.int8 import tools as int8_tools
from experiments.int8.tools import Measured, TrainedStudent, measure_graphs, own_graphs, run_tool
from experiments.intervals import drop_text, recall_text
from experiments.venv_runner import run_in_venv
from export.config import OnnxConfig
from export.to_onnx import export_onnx
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.retrieval.metrics import bootstrap_interval

log = get_logger(__name__)

FLOAT, OURS = "ours: FP32", "ours: INT8"
LIGHTLY, ONNXRUNTIME = ".venv-lightly", ".venv-onnxruntime"
_TARGET = "other-toolkits"
# ONNX Runtime's default is every operator that it can quantise.
_QUANTISERS = {"onnxruntime-minmax": "all operators", "onnxruntime-linears": "linears"}
_SAME = 0.9999
# A student of this kind is a timm ViT under other names; another is not.
_FITS: dict[str, Any] = {"family": "vit", "stem": "conv", "pool": "mean", "registers": 0}


def compare_peers(student: TrainedStudent, command: str) -> tuple[list[Figure], list[Row]]:
    """Take a student through every road, score all graphs on the same queries and time them in interleaved rounds.

    Raises:
        UserError: the student or an environment is not there, or a road fails.
    """
    for path in (student.artifact, student.catalog):
        if not (path / "card.json").is_file():
            raise UserError(f'{path}: not there: make figures TOPIC=student PARTS="sizes"')
    found = measure_graphs(student, peer_graphs(student))
    return peer_figures(found, command), [_row(name, one, found[FLOAT]) for name, one in found.items()]


def peer_graphs(student: TrainedStudent) -> dict[str, Path]:
    """ONNX files by road, our FP32 graph first.

    Those of the other toolkits are made anew each time, which takes a minute: their files have no checksums.
    """
    shape = check_shape(load_artifact(student.artifact, "student").card.config["model"])
    own, pixels = own_graphs(student)
    fp16 = export_onnx(OnnxConfig(str(student.artifact), str(student.folder / "fp16"), precision="fp16"))
    found = {FLOAT: own[int8_tools.FLOAT], "ours: FP16": fp16 / "model.onnx", OURS: own[int8_tools.OURS]}
    log.info("  lightly-train: export_onnx")
    lightly = by_lightly(student, shape)
    found |= lightly
    for source in (FLOAT, next(iter(lightly))):
        for tool, scope in _QUANTISERS.items():
            log.info(f"  {tool} of {source}")
            output = student.folder / f"{tool}-{'ours' if source == FLOAT else 'lightly-train'}.onnx"
            run_tool(tool, ONNXRUNTIME, found[source], pixels, output, _TARGET)
            found[f"{source} → onnxruntime: INT8, {scope}"] = output
    return found


def check_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """The shape of a student, from its card, if timm's ViT has one like it.

    Raises:
        UserError: it has not.
    """
    others = [f"{key} {shape[key]}" for key, value in _FITS.items() if shape[key] != value]
    if shape["heads"] * shape["dim_head"] != shape["dim"]:
        others.append(f"{shape['heads']} heads of {shape['dim_head']} in a width of {shape['dim']}")
    if shape["heads"] == 1:  # vit-pytorch leaves out the projection after a single head
        others.append("single head")
    if others:
        raise UserError(
            f"peers: timm's ViT, which lightly-train exports, has no {', no '.join(others)}: choose another"
        )
    return shape


def by_lightly(student: TrainedStudent, shape: dict[str, Any]) -> dict[str, Path]:
    """The student by lightly-train's own export, FP32 first; the names tell its version."""
    weights = student.artifact / "model.safetensors"
    found = {}
    with tempfile.TemporaryDirectory(dir=student.folder) as made:
        described = Path(made) / "shape.json"
        described.write_text(json.dumps(shape), encoding="utf-8")
        printed = run_in_venv(LIGHTLY, "lightly_train.py", [str(described), str(weights), made], _TARGET)
        version = printed.strip().splitlines()[-1]  # after what lightly-train says
        for precision in PRECISIONS:
            output = student.folder / f"lightly-train-{precision}.onnx"
            found[f"lightly-train {version}: {precision.upper()}"] = (Path(made) / f"{precision}.onnx").replace(output)
    return found


def peer_figures(found: Mapping[str, Measured], command: str) -> list[Figure]:
    """That the peer's graph is the same network; our INT8 against the best and the fastest graphs of the others."""
    ours = found[OURS]
    others = {name: one for name, one in found.items() if not name.startswith("ours: ") or "→" in name}
    lightly = next(name for name in others if name.endswith(": FP32"))
    best = max((name for name in others if "INT8" in name), key=lambda name: others[name].scores.recall_at_1)
    ahead = ours.scores.hits.astype(float) - others[best].scores.hits
    interval = bootstrap_interval(ahead)
    what = f"peers: our INT8 less the best other INT8 ({best}), recall@1"
    figures = [
        Figure(f"peers: {lightly}, mean cosine to ours", found[lightly].cosine_mean, "", _SAME, ">=", command),
        Figure(what, float(ahead.mean()), "", None, ">=", command, interval),
    ]
    for runtime in ("onnxruntime", "openvino"):
        times = {name: getattr(one, runtime) for name, one in others.items()}
        fastest = min(times, key=lambda name: times[name])
        what = f"peers: fastest other ({fastest}) over our INT8, {runtime} ms"
        figures.append(Figure(what, times[fastest] / getattr(ours, runtime), "", None, ">=", command))
    return figures


def _row(name: str, one: Measured, floats: Measured) -> Row:
    least, most = bootstrap_interval(one.scores.precisions)
    return {
        "road: graph": name,
        "recall@1 [95 %]": recall_text(one.scores),
        "drop, paired [95 %]": drop_text(floats.scores, one.scores),
        "mAP [95 %]": f"{one.scores.map:.4f} [{least:.3f}, {most:.3f}]",
        "cosine mean": f"{one.cosine_mean:.5f}",
        "cosine min": f"{one.cosine_min:.5f}",
        "recall@1, OpenVINO": f"{one.openvino_scores.recall_at_1:.4f}",
        "ms, ONNX Runtime": f"{one.onnxruntime:.2f}",
        "ms, OpenVINO": f"{one.openvino:.2f}",
        "MB": f"{one.size / 1e6:.1f}",
    }
