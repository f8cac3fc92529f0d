"""Ablation of losses, initial weights and assistants, for a student of under half the teacher's multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.figures import Figure, Row
from experiments.intervals import gain_text, interval_text, mean_text
from student.config import DistillConfig, LossConfig, StudentConfig, TargetsConfig
from student.distill import distill
from student.model import load_student
from teacher.fused import FusedTeacher
from teacher.model import Teacher, load_teacher
from vpr.artifacts.store import Artifact
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import LoaderConfig
from vpr.retrieval.embeddings import embed, score_split, torch_forward
from vpr.retrieval.intervals import Interval, mean_interval, ratio_interval
from vpr.retrieval.metrics import RetrievalScores
from vpr.training.config import RunConfig

log = get_logger(__name__)

SEEDS = (0, 1)
# Patches of 16 at the teacher's 96 pixels: the fewest multiply-adds that keep the detail of a convolutional stem.
SMALL = StudentConfig(image_size=96, patch_size=16, stem="conv")
LARGER = replace(SMALL, dim=256, heads=4, mlp_dim=512)
BASE = "cosine + queue-KL"
LABELS, LOGITS = "labels only", "logits by DistillWrapper"


@dataclass(frozen=True)
class Variant:
    """Variant of the student's training.

    Attributes:
        losses: Weights and settings of the losses.
        times: Factor of the number of epochs.
        start: Whether the student is initialised with weights selected from the larger student.
        assistant: Whether the larger student replaces the teacher.
    """

    losses: LossConfig
    times: int = 1
    start: bool = False
    assistant: bool = False


# Each of the first four adds a loss. RKD's distance and angle are weighted 1 : 2, as in its paper. The second one is
# the base of the others.
_BASE = LossConfig(contrastive=0.0)
_RELATIONS = replace(_BASE, affinity=1.0, rkd_distance=1.0, rkd_angle=2.0)
_LABELLED = LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, margin=1.0)
VARIANTS = {
    "cosine": Variant(LossConfig(similarity_kl=0.0, contrastive=0.0)),
    BASE: Variant(_BASE),
    "cosine + queue-KL + relations": Variant(_RELATIONS),
    "cosine + queue-KL + relations + contrastive": Variant(replace(_RELATIONS, contrastive=1.0)),
    "cosine + queue-KL + labels": Variant(replace(_BASE, margin=0.1)),
    LOGITS: Variant(LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, logits=1.0)),
    LABELS: Variant(_LABELLED),
    f"{LABELS}, 3 times as long": Variant(_LABELLED, times=3),
    f"{BASE}, weights selected from a larger student": Variant(_BASE, start=True),
    f"{BASE}, a larger student as assistant": Variant(_BASE, assistant=True),
}


@dataclass(frozen=True)
class Setting:
    """Teacher, data and budget of a distillation.

    Attributes:
        name: Name of the data set.
        teacher: Teacher artifact.
        catalog: Catalogue artifact with train, validation and test splits.
        folder: Folder of the artifacts; finished ones are reused.
        epochs: Number of epochs of each training.
        views: Number of cached views of each image.
        command: Command that repeats the measurement.
        batch: Images per step.
    """

    name: str
    teacher: Path
    catalog: Path
    folder: Path
    epochs: int
    views: int
    command: str
    batch: int = 128


@dataclass(frozen=True)
class Scores:
    """Scores of a variant on the same queries, one entry for each seed, and the mean seconds of training."""

    by_seed: list[RetrievalScores]
    seconds: float

    @property
    def products(self) -> NDArray[np.str_]:
        """(queries,) products of the queries."""
        return self.by_seed[0].products

    @property
    def hits(self) -> NDArray[Any]:
        """(queries,) share of the seeds with a correct first result."""
        return np.mean([score.hits for score in self.by_seed], axis=0)

    @property
    def precisions(self) -> NDArray[Any]:
        """(queries,) average precision, mean over the seeds."""
        return np.mean([score.precisions for score in self.by_seed], axis=0)


def ablate_students(setting: Setting, seeds: tuple[int, ...] = SEEDS) -> tuple[list[Figure], list[Row]]:
    """Train every variant with every seed and score all on the same test queries.

    Returns:
        Figures of the base against labels and logits, and the table.
    """
    test = load_catalog(setting.catalog).select(split="test")
    _, artifact, teacher = score_teacher(setting, test)
    trained = {(name, seed): _train(setting, name, seed) for seed in seeds for name in VARIANTS}
    scores = {name: score_students([trained[name, seed] for seed in seeds], test) for name in VARIANTS}
    rows = [_row(name, of_variant, teacher, scores[BASE]) for name, of_variant in scores.items()]
    figures = [
        _paired_gain(setting, scores[BASE], scores[name], name, seeds)
        for name in (LABELS, f"{LABELS}, 3 times as long", LOGITS)
    ]
    return figures, [_teacher_row(teacher, artifact.card.metrics["seconds"]), *rows]


def score_teacher(setting: Setting, test: Catalog) -> tuple[Teacher | FusedTeacher, Artifact, RetrievalScores]:
    """Return the teacher, its artifact, and its scores on the test split."""
    model, artifact = load_teacher(setting.teacher)
    assert artifact.card.preprocess is not None
    return model, artifact, score_split(test, embed(test, artifact.card.preprocess, torch_forward(model)))


def score_students(paths: list[Path], test: Catalog) -> Scores:
    """Score the same student of several seeds."""
    scores, seconds = [], []
    for path in paths:
        student, artifact = load_student(path)
        assert artifact.card.preprocess is not None
        log.info(f"  scoring {path.name}")
        scores.append(score_split(test, embed(test, artifact.card.preprocess, torch_forward(student))))
        seconds.append(artifact.card.metrics["seconds"])
    return Scores(scores, float(np.mean(seconds)))


def compute_retention(hits: NDArray[Any], teacher: RetrievalScores) -> tuple[float, Interval | None]:
    """Return recall@1 over the teacher's, with its 95 % paired interval by product."""
    interval = ratio_interval(hits, teacher.hits, teacher.products)
    return float(hits.mean() / teacher.recall_at_1), interval


def distillation(setting: Setting, output: Path, model: StudentConfig, seed: int) -> DistillConfig:
    """Return the default distillation of a student; trainings with the same seed share a cache."""
    return DistillConfig(
        teacher=(str(setting.teacher),),
        catalog=str(setting.catalog),
        output=str(output),
        cache=str(setting.folder / f"views-{seed}"),
        model=model,
        targets=TargetsConfig(views=setting.views),
        epochs=setting.epochs,
        loader=LoaderConfig(batch_size=setting.batch, keep_in_memory=True),
        run=RunConfig(validate_every=4),
        seed=seed,
    )


def _train(setting: Setting, name: str, seed: int) -> Path:
    variant, file = VARIANTS[name], name.replace(" + ", "-").replace(", ", "-").replace(" ", "-").lower()
    config = distillation(setting, setting.folder / f"{file}-seed{seed}", SMALL, seed)
    config = replace(config, losses=variant.losses, epochs=variant.times * setting.epochs)
    if variant.start or variant.assistant:
        larger = train_student(replace(distillation(setting, setting.folder / "larger", LARGER, 0), losses=_BASE))
        if variant.start:
            config = replace(config, start=str(larger))
        else:
            config = replace(config, assistant=str(larger), cache=str(setting.folder / f"views-assistant-{seed}"))
    return train_student(config)


def train_student(config: DistillConfig) -> Path:
    """Distil a student; a finished one is reused."""
    path = distill(config)
    assert path is not None
    return path


def _paired_gain(setting: Setting, base: Scores, other: Scores, name: str, seeds: tuple[int, ...]) -> Figure:
    """Return a figure of the lower end of the paired interval, with the goal to exceed 0."""
    low, high = mean_interval(base.hits - other.hits, base.products, lowest=-1) or (float("nan"), float("nan"))
    title = f"{setting.name}: {BASE} over {name}, recall@1, lower end of the paired interval"
    goal = 0.0 if VARIANTS[name].times == 1 else None  # a longer training is a comparison without a goal
    return Figure(title, low, "", goal, ">=", setting.command, (low, high), seeds)


def score_row(column: str, name: str, scores: Scores, teacher: RetrievalScores) -> Row:
    """Return the scores of a student under its name, which is in ``column``, with its retention."""
    kept, interval = compute_retention(scores.hits, teacher)
    return {
        column: name,
        "recall@1 [95 %]": mean_text(scores.hits, scores.products),
        "mAP [95 %]": mean_text(scores.precisions, scores.products),
        "retention [95 %]": f"{kept:.2f}{interval_text(interval, '.2f')}",
        "recall@1 of each seed": ", ".join(f"{score.recall_at_1:.3f}" for score in scores.by_seed),
    }


def _row(name: str, scores: Scores, teacher: RetrievalScores, base: Scores) -> Row:
    ahead = "" if scores is base else gain_text(base.hits - scores.hits, scores.products, "+.3f")
    row = score_row("variant", name, scores, teacher)
    return row | {"base ahead by": ahead, "seconds": f"{scores.seconds:.0f}"}


def _teacher_row(teacher: RetrievalScores, seconds: float) -> Row:
    row = _row("the teacher", Scores([teacher], seconds), teacher, Scores([teacher], seconds))
    return {**row, "base ahead by": ""}
