"""``vpr teacher choose``: recall of untrained towers on one's own validation split, to choose the tower to train.

The best encoder differs by domain, so published scores do not decide.
"""

import csv
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from teacher.candidates import Candidate, name_tower, read_candidates
from teacher.choose_config import ChooseConfig
from vpr.artifacts.run_folder import atomic_write
from vpr.common.distributed import compute_device
from vpr.common.errors import UserError, printable
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.seen import count_seen, hash_catalog, read_seen
from vpr.inference.model_size import count_multiply_adds, count_parameters
from vpr.retrieval.drop_test import drop_test
from vpr.retrieval.embeddings import Forward, embed, score_split, torch_forward
from vpr.retrieval.intervals import MIN_PRODUCTS, TOO_FEW, Interval
from vpr.retrieval.metrics import RetrievalScores

log = get_logger(__name__)

_ERROR_RATE = 0.05
_FILE_WIDTH = 160  # characters, for output that is not a terminal


@dataclass(frozen=True)
class TowerScore:
    """Untrained tower, its recall and its costs.

    Attributes:
        tower: Name of the tower.
        weights: Tag, file or teacher artifact; empty for random weights.
        recall_at_1: Share of validation queries with the same product at rank 1.
        ci95: 95 % interval of ``recall_at_1`` by product; None with fewer than 10 products.
        parameters: Number of parameters.
        multiply_adds: Multiply-adds of one image.
        images_per_s: Images per second of the network on this machine, without decoding.
        p_value: Of the hypothesis that the first tower has no higher recall, adjusted for all pairs; None for the first
            tower and with fewer than 10 products.
        flags: Flags of ``vpr teacher train`` that build the tower.
    """

    tower: str
    weights: str
    recall_at_1: float
    ci95: Interval | None
    parameters: int
    multiply_adds: int
    images_per_s: float
    p_value: float | None
    flags: str

    @property
    def is_worse(self) -> bool:
        """Whether the test shows that the first tower has a higher recall."""
        return self.p_value is not None and self.p_value <= _ERROR_RATE

    @property
    def title(self) -> str:
        """Name and weights."""
        return f"{self.tower}:{self.weights}" if self.weights else f"{self.tower} (random weights)"


@dataclass(frozen=True)
class _Measured:
    """Tower and its measurements."""

    candidate: Candidate
    scores: RetrievalScores
    parameters: int
    multiply_adds: int
    images_per_s: float


class _TimedForward:
    """Network on arrays that adds up its time; the first batch warms up, and counts only if it is the only one."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._batches: list[tuple[int, float]] = []

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        start = time.perf_counter()
        vectors = self._forward(batch)  # copies to the CPU, so it waits for a GPU
        self._batches.append((len(batch), time.perf_counter() - start))
        return vectors

    @property
    def images_per_s(self) -> float:
        timed = self._batches[1:] or self._batches
        return sum(images for images, _ in timed) / sum(seconds for _, seconds in timed)


def choose(config: ChooseConfig) -> list[TowerScore]:
    """Score towers on the validation split, print the table, best first, and return its rows.

    Raises:
        UserError: A tower is unknown, given twice or has weights of another tower, or the split has no queries.
    """
    candidates = read_candidates(config.towers)
    catalog = load_catalog(config.catalog)
    validation = _validation_queries(catalog, config.catalog)
    _warn_trained(candidates, catalog)
    measured = [_measure(candidate, validation, config) for candidate in candidates]
    measured.sort(key=lambda one: (-one.scores.recall_at_1, one.multiply_adds))
    rows = [_to_row(one, p_value) for one, p_value in zip(measured, p_values(measured), strict=True)]
    _print(rows, measured[0].scores)
    if config.output:
        _write(rows, Path(config.output))
        log.info(f"{config.output}: {len(rows)} towers")
    return rows


def p_values(measured: Sequence[_Measured]) -> list[float | None]:
    """Return the p-value that each tower is no worse than the first, which has the highest recall.

    The test is paired on the same queries, one-sided, and by product. The data chose the first tower, so the
    comparisons are corrected for all ordered pairs of towers (Bonferroni), not only for those with the first.
    """
    best = measured[0].scores
    count = len(measured)
    if best.query_products < MIN_PRODUCTS:
        return [None] * count
    # Rejecting a drop above 0 from a tower to the first shows that the tower is worse.
    values = [drop_test(one.scores.hits, best.hits, best.products).p_value(0.0) for one in measured[1:]]
    return [None, *(min(1.0, value * count * (count - 1)) for value in values)]


def _validation_queries(catalog: Catalog, path: str) -> Catalog:
    """Return the validation split; raise :class:`UserError` if it cannot be scored."""
    validation = catalog.select(split="validation")
    if not len(validation):
        raise UserError(f"{path}: a validation split is required. Build it with --validation 0.1.")
    for role in ("gallery", "query"):
        if role not in validation.roles:
            problem = f"its validation split has {len(validation)} images and none with the role {role}"
            raise UserError(f"{path}: {problem}. Set the roles of its images in its table.")
    score_split(validation, np.ones((len(validation), 1), np.float32))  # raises before the first tower is built
    return validation


def _warn_trained(candidates: Sequence[Candidate], catalog: Catalog) -> None:
    """Warn of teachers, which are not untrained: their recall here may be too high."""
    for candidate in candidates:
        if candidate.artifact is None:
            continue
        seen = count_seen(read_seen(candidate.artifact), hash_catalog(catalog.select(split="validation")))
        reasons = [seen.learned, seen.selected]
        if seen.unknown:
            is_same = (candidate.artifact.card.catalog or {}).get("sha256") == catalog.sha256
            other = "it was trained on another catalogue and may have seen these images"
            reasons.append("its epoch was chosen on this validation split" if is_same else other)
        if reason := ", ".join(filter(None, reasons)):
            log.warning(f"{candidate.given}: {reason}, so its recall may be too high")


def _measure(candidate: Candidate, validation: Catalog, config: ChooseConfig) -> _Measured:
    """Build a tower, embed the split and score it; only one tower is in memory at a time."""
    try:
        model, preprocess = candidate.build(config.seed)
    except UserError as error:
        raise name_tower(candidate.given, error) from None
    model = model.to(compute_device())
    multiply_adds = count_multiply_adds(model, preprocess.size)
    forward = _TimedForward(torch_forward(model))
    scores = score_split(validation, embed(validation, preprocess, forward, config.batch_size, config.threads))
    log.info(f"  {candidate.given:<40} recall@1 {scores.recall_at_1:.3f}")
    return _Measured(candidate, scores, count_parameters(model), multiply_adds, forward.images_per_s)


def _to_row(measured: _Measured, p_value: float | None) -> TowerScore:
    config, scores = measured.candidate.config, measured.scores
    return TowerScore(
        tower=config.name,
        weights=config.pretrained,
        recall_at_1=scores.recall_at_1,
        ci95=scores.ci95,
        parameters=measured.parameters,
        multiply_adds=measured.multiply_adds,
        images_per_s=round(measured.images_per_s, 1),
        p_value=p_value,
        flags=shlex.join(measured.candidate.flags),
    )


def _print(rows: Sequence[TowerScore], best: RetrievalScores) -> None:
    """Print the table, the towers that are not shown to be worse, and last the flags of the first tower."""
    table = Table(box=SIMPLE, padding=0)
    for name in ("tower", "weights"):
        table.add_column(name, overflow="fold", min_width=8)
    for name in ("recall@1", "95 % interval", "parameters, M", "multiply-adds, G", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        interval = f"[{row.ci95[0]:.3f}, {row.ci95[1]:.3f}]" if row.ci95 else "–"
        costs = (f"{row.parameters / 1e6:.2f}", f"{row.multiply_adds / 1e9:.3f}", f"{row.images_per_s:.0f}")
        cells = (row.tower, row.weights or "random", f"{row.recall_at_1:.3f}", interval, *costs)
        table.add_row(*[Text(printable(cell)) for cell in cells])  # `Text` shows markup in names as it is
    console = Console() if Console().is_terminal else Console(width=_FILE_WIDTH)
    console.print(table)
    if best.query_products < MIN_PRODUCTS:
        console.print(f"{TOO_FEW}, and no test", highlight=False)
    if alike := [printable(row.title) for row in rows[1:] if not row.is_worse]:
        console.print(Text(f"not shown to be worse than the first: {', '.join(alike)}"), soft_wrap=True)
    console.print(Text(printable(rows[0].flags)), soft_wrap=True)


def _write(rows: Sequence[TowerScore], path: Path) -> None:
    names = ("tower", "weights", "recall_at_1", "ci95_low", "ci95_high", "parameters", "multiply_adds")
    with atomic_write(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*names, "images_per_s", "p_value", "flags"])
        for row in rows:
            low, high = row.ci95 or (None, None)
            costs = (row.parameters, row.multiply_adds, row.images_per_s, row.p_value, row.flags)
            writer.writerow([row.tower, row.weights, row.recall_at_1, low, high, *costs])
