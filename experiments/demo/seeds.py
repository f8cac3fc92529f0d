"""Teacher, student and INT8 of the demo with three seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from app.demo import steps
from benchmarks.config import RecallConfig
from benchmarks.recall.measure import measure_recall
from experiments.figures import Row
from experiments.intervals import gain_text, interval_text, mean_text
from vpr.cli import run
from vpr.common.log import get_logger
from vpr.retrieval.intervals import ratio_interval

log = get_logger(__name__)

SEEDS = (0, 1, 2)
_STEPS = ("catalogue", "teacher", "student", "ONNX FP32", "calibration", "INT8 over FP32")
_MODELS = {"teacher": "torch", "student": "torch", "fp32": "openvino", "int8-cpu": "openvino"}


def measure_seeds(demo_folder: Path) -> list[Row]:
    """Train with each seed, and return recall, retention and drop averaged over the seeds.

    The intervals are by product, for the mean of these seeds; the last column shows how much the seeds differ.
    """
    by_seed = [_hits(demo_folder if seed == 0 else demo_folder.with_name(f"demo-seed-{seed}"), seed) for seed in SEEDS]
    names = list(by_seed[0]["teacher"])
    products = np.repeat(names, [len(by_seed[0]["teacher"][name]) for name in names])
    hits = {
        model: np.mean([[int(digit) for name in names for digit in seed[model][name]] for seed in by_seed], axis=0)
        for model in _MODELS
    }
    rows: list[Row] = []
    for model, backend in _MODELS.items():
        seeds = [np.mean([int(digit) for digits in seed[model].values() for digit in digits]) for seed in by_seed]
        kept = hits[model].mean() / hits["teacher"].mean()
        retention = interval_text(ratio_interval(hits[model], hits["teacher"], products), ".2f")
        rows.append(
            {
                "model": model,
                "backend": backend,
                "recall@1 [95 %]": mean_text(hits[model], products),
                "retention [95 %]": "1.00" if model == "teacher" else f"{kept:.2f}{retention}",
                "drop to student [95 %]": ""
                if model == "student"
                else gain_text(hits["student"] - hits[model], products, "+.3f", hits["student"]),
                "recall@1 of each seed": ", ".join(f"{recall:.3f}" for recall in seeds),
            }
        )
    return rows


def _hits(folder: Path, seed: int) -> dict[str, dict[str, str]]:
    """Train and export with a seed; return the hits by model and product. Finished steps are kept."""
    pipeline = {step.name: step for step in steps(str(folder), full=False)}
    for name in _STEPS:
        log.info(f"seed {seed}: {name}")
        extra = ("--seed", str(seed)) if name in ("teacher", "student") else ()
        run((*pipeline[name].arguments, *extra))
    models = tuple(str(folder / name) for name in _MODELS)
    table = measure_recall(RecallConfig(str(folder / "catalog"), models, str(folder / "recall")))
    rows = json.loads((table / "recall.json").read_text(encoding="utf-8"))
    return {row["name"]: row["hits"] for row in rows if _MODELS.get(row["name"]) == row["backend"]}
