"""Compare graphs of a student exported by this and other toolkits: same weights, images and queries."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.external.lightly_export import PRECISIONS
from experiments.figures import Figure, Row
from experiments.int8 import tools as int8_tools
from experiments.int8.tools import MeasuredGraph, TrainedStudent, export_graphs, measure_graphs, run_tool
from experiments.intervals import drop_text, mean_text, recall_text
from experiments.venv_runner import run_in_venv
from export.config import OnnxConfig
from export.to_onnx import export_onnx
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.retrieval.intervals import mean_interval

log = get_logger(__name__)

FLOAT, OURS = "ours: FP32", "ours: INT8"
LIGHTLY, ONNXRUNTIME = ".venv-lightly", ".venv-onnxruntime"
_TARGET = "other-toolkits"
# By default ONNX Runtime quantises every operator that it can.
_QUANTISERS = {"onnxruntime-minmax": "all operators", "onnxruntime-linears": "linears"}
_MIN_COSINE = 0.9999
# A student with this shape equals a timm ViT.
_TIMM_SHAPE: dict[str, Any] = {"family": "vit", "stem": "conv", "pool": "mean", "registers": 0}


def compare_peers(student: TrainedStudent, command: str) -> tuple[list[Figure], list[Row]]:
    """Export a student with every toolkit, score all graphs on the same queries, and time them interleaved.

    Raises:
        UserError: The student or an environment does not exist, or an export fails.
    """
    for path in (student.artifact, student.catalog):
        if not (path / "card.json").is_file():
            raise UserError(f'{path}: it does not exist. Run `make figures TOPIC=student PARTS="sizes"`.')
    graphs = measure_graphs(student, peer_graphs(student))
    return peer_figures(graphs, command), [_row(name, graph, graphs[FLOAT]) for name, graph in graphs.items()]


def peer_graphs(student: TrainedStudent) -> dict[str, Path]:
    """Export ONNX files with every toolkit, the FP32 reference first.

    Files of other toolkits are written each time, which takes a minute: they have no checksums.
    """
    shape = check_shape(load_artifact(student.artifact, "student").card.config["model"])
    vpr_graphs, pixels = export_graphs(student)
    fp16 = export_onnx(OnnxConfig(str(student.artifact), str(student.folder / "fp16"), precision="fp16"))
    graphs = {
        FLOAT: vpr_graphs[int8_tools.FLOAT],
        "ours: FP16": fp16 / "model.onnx",
        OURS: vpr_graphs[int8_tools.OURS],
    }
    log.info("  lightly-train: export_onnx")
    lightly = export_with_lightly(student, shape)
    graphs |= lightly
    for source in (FLOAT, next(iter(lightly))):
        for tool, scope in _QUANTISERS.items():
            log.info(f"  {tool} of {source}")
            output = student.folder / f"{tool}-{'ours' if source == FLOAT else 'lightly-train'}.onnx"
            run_tool(tool, ONNXRUNTIME, graphs[source], pixels, output, _TARGET)
            graphs[f"{source} → onnxruntime: INT8, {scope}"] = output
    return graphs


def check_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """Return the shape of a student if timm's ViT supports it.

    Raises:
        UserError: timm's ViT does not support the shape.
    """
    unsupported = [f"{key} {shape[key]}" for key, value in _TIMM_SHAPE.items() if shape[key] != value]
    if shape["heads"] * shape["dim_head"] != shape["dim"]:
        unsupported.append(f"{shape['heads']} heads of {shape['dim_head']} in a width of {shape['dim']}")
    if shape["heads"] == 1:  # vit-pytorch leaves out the projection after a single head
        unsupported.append("single head")
    if unsupported:
        message = f"peers: lightly-train exports timm's ViT, which does not support {', '.join(unsupported)}."
        raise UserError(f"{message} Choose another student.")
    return shape


def export_with_lightly(student: TrainedStudent, shape: dict[str, Any]) -> dict[str, Path]:
    """Export the student with lightly-train, FP32 first; the names contain its version."""
    weights = student.artifact / "model.safetensors"
    graphs = {}
    with tempfile.TemporaryDirectory(dir=student.folder) as temporary:
        shape_file = Path(temporary) / "shape.json"
        shape_file.write_text(json.dumps(shape), encoding="utf-8")
        printed = run_in_venv(LIGHTLY, "lightly_export.py", [str(shape_file), str(weights), temporary], _TARGET)
        version = printed.strip().splitlines()[-1]  # lightly-train prints other lines first
        for precision in PRECISIONS:
            output = student.folder / f"lightly-train-{precision}.onnx"
            exported = Path(temporary) / f"{precision}.onnx"
            graphs[f"lightly-train {version}: {precision.upper()}"] = exported.replace(output)
    return graphs


def peer_figures(graphs: Mapping[str, MeasuredGraph], command: str) -> list[Figure]:
    """Compare INT8 of this toolkit with the best and the fastest other graphs; check lightly-train's network."""
    int8 = graphs[OURS]
    others = {name: graph for name, graph in graphs.items() if not name.startswith("ours: ") or "→" in name}
    lightly = next(name for name in others if name.endswith(": FP32"))
    best = max((name for name in others if "INT8" in name), key=lambda name: others[name].scores.recall_at_1)
    gain = int8.scores.hits.astype(float) - others[best].scores.hits
    interval = mean_interval(gain, int8.scores.products, lowest=-1)
    title = f"peers: our INT8 less the best other INT8 ({best}), recall@1"
    figures = [
        Figure(f"peers: {lightly}, mean cosine to ours", graphs[lightly].cosine_mean, "", _MIN_COSINE, ">=", command),
        Figure(title, float(gain.mean()), "", None, ">=", command, interval),
    ]
    for runtime in ("onnxruntime", "openvino"):
        times = {name: getattr(graph, runtime) for name, graph in others.items()}
        fastest = min(times, key=lambda name: times[name])
        title = f"peers: fastest other ({fastest}) over our INT8, {runtime} ms"
        figures.append(Figure(title, times[fastest] / getattr(int8, runtime), "", None, ">=", command))
    return figures


def _row(name: str, graph: MeasuredGraph, fp32: MeasuredGraph) -> Row:
    return {
        "toolkit: graph": name,
        "recall@1 [95 %]": recall_text(graph.scores),
        "drop, paired [95 %]": drop_text(fp32.scores, graph.scores),
        "mAP [95 %]": mean_text(graph.scores.precisions, graph.scores.products),
        "cosine mean": f"{graph.cosine_mean:.5f}",
        "cosine min": f"{graph.cosine_min:.5f}",
        "recall@1, OpenVINO": f"{graph.openvino_scores.recall_at_1:.4f}",
        "ms, ONNX Runtime": f"{graph.onnxruntime:.2f}",
        "ms, OpenVINO": f"{graph.openvino:.2f}",
        "MB": f"{graph.size / 1e6:.1f}",
    }
