"""Students that lightly-train distils from the same teacher and images, beside those of this toolkit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.demo.toolkit_comparison import LIGHTLY
from experiments.figures import Figure, Row
from experiments.student.ablation import SMALL, Scores, score_teacher
from experiments.student.candidates import DEFAULT, SELECTED, Trial, candidate_row, gain_figure, score_candidates
from experiments.venv_runner import run_in_venv
from teacher.model import Teacher
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import read_batches, score_split
from vpr.training.loop import best_precision

log = get_logger(__name__)

METHODS = ("distillationv3",)  # the default of lightly-train 0.18
# The rate is this toolkit's. lightly-train multiplies its own by sqrt(batch / 1536), which suits longer trainings.
_RATE, _REFERENCE = 1e-3, 1536
# lightly-train crops at least this share of an image by default, .14. Products are photographed as a subject, and this
# toolkit's views keep .69 (a zoom of 1.2) or more.
_TRANSFORM = {"random_resize": {"min_scale": 0.69, "max_scale": 1.0}}
# Embeddings of lightly-train's student: its pooled features, and their projection to the teacher's embedding.
_KINDS = ("features", "projected")
_BATCH = 64


class TeacherGrid(nn.Module):
    """The teacher's embedding before its pooling: (batch, 3, size, size) to (batch, dim, rows, columns).

    The mean over rows and columns is the embedding, up to its length, because the projection is linear.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        visual: Any = teacher.visual
        self.trunk, self.project = visual.trunk, visual.head

    def forward(self, x: Tensor) -> Tensor:
        """Return the projected features of each position."""
        features: Tensor = self.trunk.forward_features(x)
        return self.project(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def compare_lightly(trial: Trial) -> tuple[list[Figure], list[Row]]:
    """Distil by both of lightly-train's methods and score on the queries of the candidates.

    Returns:
        Figures of this toolkit's default, and of its start from a larger student, over the better method of
        lightly-train, and the table.
    """
    test = load_catalog(trial.setting.catalog).select(split="test")
    teacher, artifact, of_teacher = score_teacher(trial.setting, test)
    assert artifact.card.preprocess is not None
    inputs = _write_inputs(trial, teacher, artifact.card.preprocess, test)
    ours = score_candidates(trial, (DEFAULT, SELECTED), test)
    lightly = {}
    for method in METHODS:
        of_seeds = [_distil(trial, method, seed, inputs) for seed in trial.seeds]
        for kind in _KINDS:
            scores = [score_split(test, vectors[kind]) for vectors, _ in of_seeds]
            seconds = float(np.mean([seconds for _, seconds in of_seeds]))
            lightly[f"lightly-train {method}, {kind}"] = Scores(scores, seconds)
    rows = [candidate_row(name, scores, of_teacher, ours[DEFAULT]) for name, scores in {**ours, **lightly}.items()]
    columns = dict.fromkeys(column for row in rows for column in row)
    best = max(lightly, key=lambda name: float(lightly[name].hits.mean()))
    figures = [gain_figure(trial, f"{name} over {best}", ours[name], lightly[best]) for name in ours]
    return figures, [{column: row.get(column, "") for column in columns} for row in rows]


def write_grid(teacher: Teacher, size: int, path: Path) -> None:
    """Write the teacher's embeddings of each position as TorchScript.

    Raises:
        UserError: The teacher's embedding is no mean over positions.
    """
    grid, pixels = TeacherGrid(teacher).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        pooled = nn.functional.normalize(grid(pixels).mean((2, 3)), dim=1)
        if not torch.allclose(pooled, teacher(pixels), atol=1e-5):
            raise UserError(f"{path}: the teacher's embedding is no mean over positions. Use the sample's tower.")
        # lightly-train's environment has no open_clip.
        torch.jit.trace(grid, pixels).save(str(path))


def _write_inputs(trial: Trial, teacher: Any, preprocess: Preprocess, test: Catalog) -> dict[str, Any]:
    """Write the teacher and the test images for ``lightly_distill.py``, and return the settings of all trainings."""
    setting = trial.setting
    training = load_catalog(setting.catalog).select(split="train")
    setting.folder.mkdir(parents=True, exist_ok=True)
    grid, pixels = setting.folder / "teacher-grid.pt", setting.folder / "test-pixels.npy"
    write_grid(teacher, preprocess.size, grid)
    own_size = preprocess.model_copy(update={"size": SMALL.image_size})
    np.save(pixels, np.concatenate(list(read_batches(test, own_size, _BATCH))), allow_pickle=False)
    return {
        "images": [str(training.path(row).resolve()) for row in range(len(training))],
        "teacher": str(grid),
        "teacher_dim": teacher.embedding_dim,
        "pixels": str(pixels),
        "shape": asdict(SMALL),
        "epochs": setting.epochs,
        "batch": setting.batch,
        "lr": _RATE / (setting.batch / _REFERENCE) ** 0.5,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "precision": best_precision(),
        "transform": _TRANSFORM,
    }


def _distil(
    trial: Trial, method: str, seed: int, inputs: dict[str, Any]
) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Return the embeddings of the test images by a student of lightly-train, and the seconds of its training.

    Finished students are read.
    """
    folder = trial.setting.folder / f"lightly-{method}-seed{seed}"
    result = folder / "result.json"
    if not result.is_file():
        log.info(f"  {folder.name}")
        settings = folder.with_name(f"{folder.name}.json")
        content = {**inputs, "method": method, "seed": seed, "folder": str(folder)}
        settings.write_text(json.dumps(content), encoding="utf-8")
        printed = run_in_venv(LIGHTLY, "lightly_distill.py", [str(settings)], "other-toolkits")
        result.write_text(printed.strip().splitlines()[-1], encoding="utf-8")
    vectors = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _KINDS}
    return vectors, float(json.loads(result.read_text(encoding="utf-8"))["seconds"])
