"""Averages of weights, selected by recall on the validation split."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file

from teacher.scorer import Scorer, Weights
from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.common.log import get_logger
from vpr.retrieval.metrics import RetrievalScores

log = get_logger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class SoupResult:
    """Selected soup: float32 weights on the CPU, its ``members`` for the card, and its validation scores.

    ``rows`` has one row per candidate with ``alpha`` or ``models``, ``val_recall_at_1`` and ``val_map``.
    """

    weights: Weights
    members: Row
    scores: RetrievalScores
    rows: list[Row]


def read_weights(teacher: Artifact) -> Weights:
    """Load a teacher's weights on the CPU."""
    with reraise_as_artifact_error(teacher):
        return load_file(teacher.file("model.safetensors"))


def average(models: Iterable[Weights], shares: Sequence[float]) -> Weights:
    """Return the weighted sum in float64; integer tensors (counters) are copied from the first model.

    The models have equal names and shapes, their shares sum to 1. They are read in turn: two are in memory at a time.
    """
    total: Weights = {}
    for weights, share in zip(models, shares, strict=True):
        if not total:
            total = {n: v.double() * share if v.is_floating_point() else v.clone() for n, v in weights.items()}
            continue
        for name, value in total.items():
            if value.is_floating_point():
                value.add_(weights[name].double(), alpha=share)
    return total


def wise_ft(alphas: Sequence[float], zero_shot: Weights, tuned: Weights, scorer: Scorer) -> SoupResult:
    """Return (1 - alpha) zero-shot + alpha fine-tuned for the alpha with the best validation recall@1.

    Ties are broken by mAP, then by the smaller alpha, which keeps more of the zero-shot model's robustness. Layers
    added to the tower have no zero-shot weights and stay fine-tuned.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, eq. 1.
    """
    start = tuned | zero_shot
    rows: list[Row] = []
    best: tuple[float, RetrievalScores, Weights] | None = None
    for alpha in sorted(set(alphas)):
        weights = average([tuned, start], [alpha, 1 - alpha])
        scores = scorer.evaluate(weights, recalibrate_bn="none" if alpha == 1 else "head" if alpha == 0 else "all")
        rows.append({"alpha": alpha} | _log_scores(f"alpha {alpha:.3g}", scores))
        if best is None or (scores.recall_at_1, scores.map) > (best[1].recall_at_1, best[1].map):
            best = alpha, scores, scorer.weights()
    assert best is not None  # the configuration has at least one alpha
    return SoupResult(best[2], {"alpha": best[0]}, best[1], rows)


def uniform(names: Sequence[str], teachers: Sequence[Artifact], scorer: Scorer) -> SoupResult:
    """Return the mean of all teachers (Wortsman et al., "Model soups", ICML 2022); its rows include the members."""
    rows = [row for row, _ in _score_members(names, teachers, scorer)]
    shares = [1 / len(teachers)] * len(teachers)
    weights = average((read_weights(teacher) for teacher in teachers), shares)
    scores = scorer.evaluate(weights, recalibrate_bn="all")
    members = {"models": list(names)}
    return SoupResult(scorer.weights(), members, scores, [*rows, members | _log_scores("all", scores)])


def greedy(names: Sequence[str], teachers: Sequence[Artifact], scorer: Scorer) -> SoupResult:
    """Add teachers, best first, and keep each that does not lower the soup's validation recall@1.

    The soup is therefore never below its best member on validation. Wortsman et al., "Model soups", ICML 2022,
    recipe 1.
    """
    members = _score_members(names, teachers, scorer)
    order = sorted(range(len(names)), key=lambda i: (-members[i][1].recall_at_1, -members[i][1].map, i))
    rows, selected, scores = [row for row, _ in members], [order[0]], members[order[0]][1]
    mean = read_weights(teachers[order[0]])
    weights = mean
    for index in order[1:]:
        share = 1 / (len(selected) + 1)
        candidate = average([mean, read_weights(teachers[index])], [1 - share, share])
        candidate_scores = scorer.evaluate(candidate, recalibrate_bn="all")
        is_kept = candidate_scores.recall_at_1 >= scores.recall_at_1
        row = _log_scores(f"+ {names[index]}", candidate_scores, "kept" if is_kept else "left out")
        rows.append({"models": [names[i] for i in [*selected, index]]} | row)
        if is_kept:
            mean, weights, scores = candidate, scorer.weights(), candidate_scores
            selected.append(index)
    return SoupResult(weights, {"models": [names[i] for i in selected]}, scores, rows)


def _score_members(
    names: Sequence[str], teachers: Sequence[Artifact], scorer: Scorer
) -> list[tuple[Row, RetrievalScores]]:
    """Score each teacher alone, in float32 like the soups; a card's recall may be from bf16."""
    members = []
    for name, teacher in zip(names, teachers, strict=True):
        with reraise_as_artifact_error(teacher):
            scores = scorer.evaluate(read_weights(teacher), recalibrate_bn="none")
        members.append(({"models": [name]} | _log_scores(name, scores), scores))
    return members


def _log_scores(label: str, scores: RetrievalScores, verdict: str = "") -> Row:
    """Log a candidate's validation scores and return them as a row."""
    log.info(f"  recall@1 {scores.recall_at_1:.4f}  mAP {scores.map:.4f}  {label}{f': {verdict}' if verdict else ''}")
    return {"val_recall_at_1": scores.recall_at_1, "val_map": scores.map}
