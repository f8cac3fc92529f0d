"""Averages of weights, and which of them is chosen on the validation split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from safetensors.torch import load_file

from teacher.scorer import Scorer, Weights
from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.log import get_logger
from vpr.retrieval.metrics import RetrievalScores

log = get_logger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class SoupResult:
    """What a method came to.

    Attributes:
        weights: of the soup, float32 on the CPU.
        what: ``alpha`` or ``models`` of it.
        scores: its validation scores.
        rows: one per candidate: ``alpha`` or ``models``, ``val_recall_at_1``, ``val_map``.
    """

    weights: Weights
    what: Row
    scores: RetrievalScores
    rows: list[Row]


def read_weights(teacher: Artifact) -> Weights:
    """A teacher's weights on the CPU."""
    with reraise_as_artifact_error(teacher):
        return load_file(teacher.file("model.safetensors"))


def average(parts: Iterable[Weights], shares: Sequence[float]) -> Weights:
    """Weighted sum of weights in float64; what is not floating point (counters) is the first's.

    Args:
        parts: of the same names and shapes; read one after the other, so that two are in memory at a time.
        shares: one per part, together 1.
    """
    total: Weights = {}
    for weights, share in zip(parts, shares, strict=True):
        if not total:
            total = {n: v.double() * share if v.is_floating_point() else v.clone() for n, v in weights.items()}
            continue
        for name, value in total.items():
            if value.is_floating_point():
                value.add_(weights[name].double(), alpha=share)
    return total


def wise_ft(alphas: Sequence[float], zero_shot: Weights, tuned: Weights, scorer: Scorer) -> SoupResult:
    """(1 - alpha) zero-shot + alpha fine-tuned, for the alpha of best validation recall@1.

    Equal recalls are told apart by mAP, then by the smaller alpha, which keeps more of the zero-shot model's
    robustness. What was added to the tower has no zero-shot twin and stays fine-tuned.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, eq. 1.
    """
    start = tuned | zero_shot
    rows: list[Row] = []
    best: tuple[float, RetrievalScores, Weights] | None = None
    for alpha in sorted(set(alphas)):
        norms: Literal["kept", "added", "all"] = "kept" if alpha == 1 else "added" if alpha == 0 else "all"
        scores = scorer.score(average([tuned, start], [alpha, 1 - alpha]), norms)
        rows.append({"alpha": alpha} | _said(f"alpha {alpha:.3g}", scores))
        if best is None or (scores.recall_at_1, scores.map) > (best[1].recall_at_1, best[1].map):
            best = alpha, scores, scorer.weights()
    assert best is not None  # the configuration has at least one alpha
    return SoupResult(best[2], {"alpha": best[0]}, best[1], rows)


def uniform(names: Sequence[str], teachers: Sequence[Artifact], scorer: Scorer) -> SoupResult:
    """The mean of all (Wortsman et al., "Model soups", ICML 2022); its members are scored beside it."""
    rows = [row for row, _ in _score_members(names, teachers, scorer)]
    shares = [1 / len(teachers)] * len(teachers)
    scores = scorer.score(average((read_weights(teacher) for teacher in teachers), shares), "all")
    what = {"models": list(names)}
    return SoupResult(scorer.weights(), what, scores, [*rows, what | _said("all", scores)])


def greedy(names: Sequence[str], teachers: Sequence[Artifact], scorer: Scorer) -> SoupResult:
    """Best first, each is added if the mean's validation recall@1 does not fall (a tie adds it).

    So the soup is never below its best member on validation. Wortsman et al., "Model soups", ICML 2022, recipe 1.
    """
    members = _score_members(names, teachers, scorer)
    order = sorted(range(len(names)), key=lambda i: (-members[i][1].recall_at_1, -members[i][1].map, i))
    rows, kept, scores = [row for row, _ in members], [order[0]], members[order[0]][1]
    mean = read_weights(teachers[order[0]])
    weights = mean
    for index in order[1:]:
        share = 1 / (len(kept) + 1)
        candidate = average([mean, read_weights(teachers[index])], [1 - share, share])
        found = scorer.score(candidate, "all")
        added = found.recall_at_1 >= scores.recall_at_1
        row = _said(f"+ {names[index]}", found, "kept" if added else "left out")
        rows.append({"models": [names[i] for i in [*kept, index]]} | row)
        if added:
            mean, weights, scores = candidate, scorer.weights(), found
            kept.append(index)
    return SoupResult(weights, {"models": [names[i] for i in kept]}, scores, rows)


def _score_members(
    names: Sequence[str], teachers: Sequence[Artifact], scorer: Scorer
) -> list[tuple[Row, RetrievalScores]]:
    """Each alone, in the same precision as the soups (a card's recall may be of bf16)."""
    found = []
    for name, teacher in zip(names, teachers, strict=True):
        with reraise_as_artifact_error(teacher):
            scores = scorer.score(read_weights(teacher), "kept")
        found.append(({"models": [name]} | _said(name, scores), scores))
    return found


def _said(label: str, scores: RetrievalScores, verdict: str = "") -> Row:
    end = f": {verdict}" if verdict else ""
    log.info(f"  {label}: validation recall@1 {scores.recall_at_1:.4f}, mAP {scores.map:.4f}{end}")
    return {"val_recall_at_1": scores.recall_at_1, "val_map": scores.map}
