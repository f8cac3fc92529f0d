"""Candidates for the defaults of a distillation: starts, losses of other toolkits and more images.

Every training processes the same number of images with the same student, and is compared with the default by product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.figures import Figure, Row
from experiments.intervals import gain_text
from experiments.student.ablation import (
    LARGER,
    SMALL,
    Scores,
    Setting,
    distillation,
    score_row,
    score_students,
    score_teacher,
    train_student,
)
from student.config import DistillConfig, LossConfig, StudentConfig
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.retrieval.intervals import mean_interval
from vpr.retrieval.metrics import RetrievalScores

log = get_logger(__name__)

SEEDS = (0, 1, 2)
DEFAULT, SELECTED = "default", "weights selected from a larger student"
FORMER = "without the contrastive loss"  # the default until it was measured here
_LARGER, _GENERAL = "larger", "general"
_GOAL = 0.05  # of the default with a start over the former default, on the sample


@dataclass(frozen=True)
class Candidate:
    """What a training changes of the default.

    Attributes:
        losses: Weights and settings of the losses; losses of tokens run the teacher next to the student.
        start: Student that initialises this one: the ``larger`` one, a ``general`` one of images without labels, or
            none.
        mixup: Parameter of the Beta distribution of mixed images, as in :class:`student.config.TargetsConfig`; above 0
            the teacher runs next to the student.
        unlabelled: Whether other images without labels are added.
        model: Shape of the student.
    """

    losses: LossConfig = field(default_factory=LossConfig)
    start: str = ""
    mixup: float = 0.0
    unlabelled: bool = False
    model: StudentConfig = SMALL


# lightly-train 0.18, method "distillationv1": similarities to a queue at temperature .07, images mixed by a share
# that is drawn uniformly.
_LIGHTLY = LossConfig(cosine=0.0, contrastive=0.0, temperature=0.07)
CANDIDATES: Mapping[str, Candidate] = {
    DEFAULT: Candidate(),
    FORMER: Candidate(LossConfig(contrastive=0.0)),
    SELECTED: Candidate(start=_LARGER),
    "losses of lightly-train v1": Candidate(_LIGHTLY, mixup=1.0),
    "affinity only": Candidate(LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, affinity=1.0)),
}
# On the smaller data set, which trains faster. lightly-train's method "distillationv3" adds similarities among tokens;
# EUPE's training code is not public, its paper describes cosines of the embedding and AM-RADIO's loss of tokens. The
# images without labels are a folder of the trial.
MORE_CANDIDATES: Mapping[str, Candidate] = {
    "losses of lightly-train v3": Candidate(replace(_LIGHTLY, token_similarity=1.0), mixup=1.0),
    "losses of EUPE": Candidate(LossConfig(similarity_kl=0.0, contrastive=0.0, token_feature=1.0)),
    "images without labels added": Candidate(unlabelled=True),
    "start from a student of images without labels": Candidate(start=_GENERAL),
}
# Students of vit-pytorch's networks at about the multiply-adds of the default, which has a convolutional stem.
NETWORKS: Mapping[str, Candidate] = {
    DEFAULT: Candidate(),
    "linear patches, 7 blocks": Candidate(model=replace(SMALL, stem="patch", depth=7)),
    "ViT for small data sets": Candidate(model=replace(SMALL, stem="patch", family="small-data", mlp_dim=320)),
    "stem of EfficientNet-Lite0, random weights": Candidate(
        model=replace(SMALL, stem="timm/efficientnet_lite0", patch_size=32, depth=5)
    ),
}


@dataclass(frozen=True)
class Trial:
    """Candidates in a setting.

    Attributes:
        setting: Teacher, data and budget.
        candidates: Candidates by name, the default first.
        unlabelled: Folder of other images.
        seeds: Seeds of each candidate.
    """

    setting: Setting
    candidates: Mapping[str, Candidate] = field(default_factory=lambda: CANDIDATES)
    unlabelled: Path | None = None
    seeds: tuple[int, ...] = SEEDS

    def train(self, name: str, seed: int) -> Path:
        """Distil a candidate with a seed; a finished student is reused."""
        candidate = self.candidates[name]
        config = self._config(_file(name), seed, candidate.model, start=self._start(candidate))
        if candidate.mixup or candidate.losses.tokens:
            # The teacher runs as often as for the cache, once for each image of each epoch.
            targets = replace(config.targets, mode="online", mixup=candidate.mixup)
            config = replace(config, targets=targets, cache="")
        config = replace(config, losses=candidate.losses)
        if candidate.unlabelled:
            config = self._add_unlabelled(config)
        return train_student(config)

    def _config(self, name: str, seed: int, model: StudentConfig, **changes: Any) -> DistillConfig:
        """Return a distillation; all seeds see the same views, so that one cache serves all."""
        folder = self.setting.folder
        config = distillation(self.setting, folder / f"{name}-seed{seed}", model, seed)
        return replace(config, cache=str(folder / "views"), **changes)

    def _start(self, candidate: Candidate) -> str:
        """Return the student that initialises a candidate, distilled with one seed; empty without one."""
        if candidate.start == _LARGER:
            return str(train_student(self._config(_LARGER, 0, LARGER)))
        if candidate.start == _GENERAL:
            return str(train_student(self._add_unlabelled(self._config(_GENERAL, 0, SMALL))))
        return ""

    def _add_unlabelled(self, config: DistillConfig) -> DistillConfig:
        """Add the other images and shorten the training, so that it processes as many images."""
        assert self.unlabelled is not None
        own = len(load_catalog(self.setting.catalog).select(split="train"))
        others = len(list(self.unlabelled.rglob("*.jpg")))
        epochs = max(1, round(config.epochs * own / (own + others)))
        cache = str(self.setting.folder / "views-unlabelled")
        targets = replace(config.targets, views=epochs)
        return replace(config, unlabelled=(str(self.unlabelled),), epochs=epochs, targets=targets, cache=cache)


def candidate_figures(trial: Trial) -> tuple[list[Figure], list[Row]]:
    """Train all candidates with all seeds and score them on the test split.

    Returns:
        Figures of the gains over the default, and the table.
    """
    test = load_catalog(trial.setting.catalog).select(split="test")
    _, _, teacher = score_teacher(trial.setting, test)
    scores = score_candidates(trial, tuple(trial.candidates), test)
    rows = [score_row("candidate", "teacher", Scores([teacher], 0.0), teacher)]
    rows += [candidate_row(name, of_seeds, teacher, scores[DEFAULT]) for name, of_seeds in scores.items()]
    columns = dict.fromkeys(column for row in rows for column in row)
    figures = [
        gain_figure(trial, f"{name} over the default", scores[name], scores[DEFAULT])
        for name in scores
        if name != DEFAULT
    ]
    if SELECTED in scores and FORMER in scores:
        figures.append(gain_figure(trial, f"{SELECTED} over the former default", scores[SELECTED], scores[FORMER]))
    return figures, [{column: row.get(column, "") for column in columns} for row in rows]


def score_candidates(trial: Trial, names: Sequence[str], test: Catalog) -> dict[str, Scores]:
    """Train candidates with all seeds and score them on the same queries."""
    paths = {name: [trial.train(name, seed) for seed in trial.seeds] for name in names}
    return {name: score_students(of_seeds, test) for name, of_seeds in paths.items()}


def gain_figure(trial: Trial, title: str, scores: Scores, rival: Scores) -> Figure:
    """Return the mean gain of recall@1 over a rival, with its interval by product."""
    gains = scores.hits - rival.hits
    interval = mean_interval(gains, scores.products, lowest=-1)
    name = f"{trial.setting.name}: {title}, recall@1"
    goal = _GOAL if name == f"sample: {SELECTED} over the former default, recall@1" else None
    return Figure(name, float(gains.mean()), "", goal, ">=", trial.setting.command, interval, trial.seeds)


def candidate_row(name: str, scores: Scores, teacher: RetrievalScores, default: Scores) -> Row:
    """Return the table row of a candidate, with its paired gains over the default."""
    row = score_row("candidate", name, scores, teacher) | {"seconds": f"{scores.seconds:.0f}"}
    if scores is not default:
        row["recall@1 over the default [95 %]"] = gain_text(scores.hits - default.hits, scores.products, "+.3f")
        gains = scores.precisions - default.precisions
        row["mAP over the default [95 %]"] = gain_text(gains, scores.products, "+.3f")
    return row


def _file(name: str) -> str:
    return name.replace(" ", "-").lower()
