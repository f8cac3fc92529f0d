"""Students of the teacher on photographs: starts and sizes, beside towers of the same cost without distillation.

The teacher is the fine-tuned EfficientNet-Lite2 of ``make figures TOPIC=teacher PARTS=photos``. All models are scored
on products that no training has seen. The last epoch is scored, and no setting was chosen on the scored products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.figures import Figure, Row, command_of
from experiments.intervals import interval_text
from experiments.teacher.imagenet_weights import imagenet_tower
from experiments.teacher.photo_scores import PhotoScores, photo_row, score_photos
from experiments.teacher.photos import SEEDS, Photos
from export.config import Int8Config, OnnxConfig
from export.int8 import export_int8
from export.to_onnx import export_onnx, load_onnx, run_graph
from student.config import DimensionConfig, DistillConfig, StudentConfig, TargetsConfig
from student.distill import distill
from student.model import load_student
from teacher.candidates import read_candidates
from teacher.model import load_teacher
from vpr.artifacts.store import load_artifact
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.inference.model_size import count_multiply_adds
from vpr.retrieval.embeddings import torch_forward
from vpr.retrieval.intervals import mean_interval, ratio_interval
from vpr.training.config import RunConfig

log = get_logger(__name__)

_COMMAND = command_of("student", "photos")
_DIM, _BATCH, _VIEWS, _EPOCHS = 256, 64, 6, 12
# ImageNet weights in the stem, one new block of 192 dimensions.
HYBRID = StudentConfig(preset="auto", pool="auto", dim=192, heads=3, mlp_dim=384, depth=1)
# The student that a user had before: random weights, a convolutional stem, 42 % of the teacher's multiply-adds.
RANDOM = StudentConfig(preset="sample", stem="conv", image_size=96)
# Image size, and the largest share of the teacher's multiply-adds, with the goal of the retention.
SIZES = {224: (0.5, 0.95), 160: (0.25, 0.90), 96: (0.125, None)}


@dataclass(frozen=True)
class Students:
    """Photographs, shop pictures, and the folder of the students."""

    photos: Photos
    shop: Catalog
    folder: Path

    def distil(self, name: str, seed: int, model: StudentConfig, start: str = "", **changes: Any) -> Path:
        """Distil the teacher of a seed; a finished student is reused."""
        weights = imagenet_tower(0, self.photos.folder / "weights")
        config = DistillConfig(
            teacher=(str(self.teacher(seed)),),
            catalog=str(self.photos.catalog),
            output=str(self.folder / f"{name}-seed{seed}"),
            cache=str(self.folder / f"views-seed{seed}"),
            model=replace(model, embedding_dim=_DIM),
            start=start or ("" if model.preset != "auto" else weights.name.rpartition(".")[0]),
            start_weights="" if start or model.preset != "auto" else weights.pretrained,
            dimension=DimensionConfig("cosine"),
            targets=TargetsConfig(views=_VIEWS),
            epochs=_EPOCHS,
            loader=LoaderConfig(_BATCH, keep_in_memory=True),
            run=RunConfig(validate_every=_EPOCHS),
            seed=seed,
        )
        path = distill(replace(config, **changes))
        assert path is not None
        return path

    def teacher(self, seed: int) -> Path:
        """Return the fine-tuned EfficientNet-Lite2 of a seed."""
        return self.photos.train("Lite2", seed, size=2)

    def score(self, path: Path) -> PhotoScores:
        """Score a student, a teacher or a graph."""
        kind = load_artifact(path).card.kind
        log.info(f"  scoring {path.name}")
        if kind == "onnx":
            graph = load_artifact(path, "onnx")
            assert graph.card.preprocess is not None
            loaded = load_onnx(path)[0]
            return self._score(graph.card.preprocess, lambda batch: run_graph(loaded, batch))
        model, artifact = load_student(path) if kind == "student" else load_teacher(path)
        assert artifact.card.preprocess is not None
        return self._score(artifact.card.preprocess, torch_forward(model))

    def score_untrained(self, image_size: int) -> PhotoScores:
        """Score EfficientNet-Lite0 with its ImageNet weights in an image size."""
        tower = imagenet_tower(0, self.photos.folder / "weights")
        (candidate,) = read_candidates([f"{tower.name}:{tower.pretrained}"])
        candidate = replace(candidate, config=replace(candidate.config, image_size=image_size))
        model, preprocess = candidate.build(0)
        return self._score(preprocess, torch_forward(model))

    def _score(self, preprocess: Any, forward: Any) -> PhotoScores:
        return score_photos(self.photos.test, self.shop, preprocess, forward)


def student_figures(students: Students) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Train and score all students and their rivals; return the figures and the tables."""
    teachers = [students.score(students.teacher(seed)) for seed in SEEDS]
    cost = _multiply_adds(students.teacher(SEEDS[0]))
    rows = [photo_row("teacher, Lite2 at 260 px", teachers) | {"multiply-adds": "1"}]
    figures: list[Figure] = []
    random = [students.distil("random", seed, RANDOM) for seed in SEEDS]
    rows.append(_row("student of random weights", students, random, teachers, cost))
    for size, (share, goal) in SIZES.items():
        model = replace(HYBRID, image_size=size)
        paths = [students.distil(f"stem-{size}", seed, model) for seed in SEEDS]
        scores = [students.score(path) for path in paths]
        untrained = [students.score_untrained(size)]
        direct = [students.score(_train_directly(students, size, seed)) for seed in SEEDS]
        rows.append(_row(f"student with the stem Lite0 at {size} px", students, paths, teachers, cost, scores))
        rows.append(photo_row(f"Lite0 at {size} px, fine-tuned directly", direct) | _retention(direct, teachers))
        rows.append(photo_row(f"Lite0 at {size} px, not fine-tuned", untrained) | _retention(untrained, teachers))
        for scope in ("linear", "full"):
            quantised = [students.score(_quantise(students, path, scope)) for path in paths]
            rows.append(
                photo_row(f"  INT8, scope {scope}, of the student at {size} px", quantised)
                | _retention(quantised, teachers)
            )
        figures += _figures(size, share, goal, scores, teachers, untrained, direct)
    return figures, {"photos": rows}


def _figures(
    size: int,
    share: float,
    goal: float | None,
    scores: list[PhotoScores],
    teachers: list[PhotoScores],
    untrained: list[PhotoScores],
    direct: list[PhotoScores],
) -> list[Figure]:
    hits, products = _mean(scores), teachers[0].photos.products
    interval = ratio_interval(hits, _mean(teachers), products)
    kept = float(hits.mean() / _mean(teachers).mean())
    name = f"photographs, student at {size} px"
    title = f"{name}: retention of recall@1 at no more than {share:g} of the teacher's multiply-adds"
    figures = [Figure(title, kept, "", goal, ">=", _COMMAND, interval, SEEDS)]
    for rival, of_rival in (("the same tower not fine-tuned", untrained), ("the same tower fine-tuned", direct)):
        for measure, key in (("recall@1", "hits"), ("mAP", "precisions")):
            gain = _mean(scores, key) - _mean(of_rival, key)
            interval = mean_interval(gain, products, lowest=-1)
            title = f"{name} against {rival}: {measure}"
            figures.append(Figure(title, float(gain.mean()), "", None, ">=", _COMMAND, interval, SEEDS))
    return figures


def _train_directly(students: Students, size: int, seed: int) -> Path:
    """Fine-tune EfficientNet-Lite0 in the student's image size, as the teachers of the photographs are."""
    tower = replace(imagenet_tower(0, students.photos.folder / "weights"), image_size=size)
    return students.photos.train(f"Lite0-{size}", seed, tower=tower)


def _quantise(students: Students, student: Path, scope: Any) -> Path:
    """Export a student as INT8 over FP32, with ranges of training images."""
    catalog = str(students.photos.catalog)
    onnx = str(export_onnx(OnnxConfig(str(student), f"{student}-fp32")))
    ranges = str(calibrate(CalibrateConfig(onnx, catalog, f"{student}-ranges")))
    return export_int8(
        Int8Config(onnx, ranges, f"{student}-int8-{scope}", base="fp32", scope=scope, exclude_layers=None)
    )


def _row(
    name: str,
    students: Students,
    paths: list[Path],
    teachers: list[PhotoScores],
    cost: int,
    scores: list[PhotoScores] | None = None,
) -> Row:
    scores = scores or [students.score(path) for path in paths]
    metrics = [load_artifact(path).card.metrics for path in paths]
    share = metrics[0]["multiply_adds"] / cost
    minutes = np.mean([metric["seconds"] for metric in metrics]) / 60
    return (
        photo_row(name, scores)
        | _retention(scores, teachers)
        | {"multiply-adds": f"{share:.2f}", "minutes of training": f"{minutes:.1f}"}
    )


def _retention(scores: list[PhotoScores], teachers: list[PhotoScores]) -> Row:
    """Return the shares of the teacher's scores that are kept, with intervals by product."""
    products = teachers[0].photos.products
    cells = {}
    for title, key in (("retention [95 %]", "hits"), ("retention of mAP [95 %]", "precisions")):
        kept, full = _mean(scores, key), _mean(teachers, key)
        interval = ratio_interval(kept, full, products)
        cells[title] = f"{kept.mean() / full.mean():.3f}{interval_text(interval, '.3f')}"
    return cells


def _mean(seeds: list[PhotoScores], key: str = "hits") -> Any:
    """Return a score of each query against the photographs, averaged over seeds."""
    return np.mean([getattr(seed.photos, key) for seed in seeds], axis=0)


def _multiply_adds(teacher: Path) -> int:
    model, artifact = load_teacher(teacher)
    assert artifact.card.preprocess is not None
    return count_multiply_adds(model, artifact.card.preprocess.size)
