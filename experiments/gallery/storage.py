"""The smallest stored gallery of a million vectors within a recall budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.config import StorageConfig
from benchmarks.report.storage_schema import Storage
from benchmarks.storage.command import measure_storage
from experiments.figures import Figure, Row, command_of, record
from experiments.gallery.synthetic_embeddings import (
    SyntheticProducts,
    write_synthetic_distractors,
    write_synthetic_embeddings,
)
from vpr.artifacts.store import load_artifact
from vpr.common.errors import CheckFailed
from vpr.common.log import get_logger
from vpr.retrieval.config import IndexTuning
from vpr.retrieval.confirmed_storage import FILE

log = get_logger(__name__)

_FOLDER = Path("runs/figures-gallery")
_BUDGET, _CONFIDENCE, _MAX_MS = 0.01, 0.95, 5.0
_SHARE = 1 / 8  # of float32's bytes
_FLOAT_BYTES = 4
_SIZES = (10_000, 100_000, 1_000_000)
_TUNING = IndexTuning(nprobe=512, shortlist=1000)  # found on the synthetic products of seed 0; those of seed 1 confirm
_SEED = 1


def storage_figures(storage: Storage, dim: int, command: str) -> tuple[list[Figure], list[Row]]:
    """Return the figures of the cheapest confirmed setting of the largest gallery, and the table of measured settings.

    Of the smallest gallery, the table has the tested settings only. Without a limit of time there is no goal for it.
    """
    decision = storage.decisions[-1]
    limit = "" if decision.max_ms is not None else " without a limit of time"
    chosen, title = storage.chosen(decision.size), f"{decision.size:,} vectors, cheapest confirmed setting{limit}"
    share = None if chosen is None or chosen.bytes_per_vector is None else chosen.bytes_per_vector / _FLOAT_BYTES / dim
    level = f"{100 * decision.confidence:g} % confidence"
    figures = [
        Figure(f"{title}: bytes over float32's", share, "", _SHARE, "<=", command),
        Figure(
            f"{title}: upper bound of the drop of recall@1 ({level})",
            decision.drop_upper_bound,
            "",
            decision.max_recall_drop,
            "<=",
            command,
        ),
        Figure(
            f"{title}: p50 of a query",
            None if chosen is None else chosen.single_ms,
            "ms",
            decision.max_ms,
            "<=",
            command,
        ),
        Figure(
            f"{title}: drop of recall@1, test products",
            None if chosen is None else chosen.drop,
            "",
            None,
            "<=",
            command,
        ),
    ]
    smallest = storage.decisions[0]
    tested = {step.name for step in smallest.sequence}
    shown = [row for row in storage.rows if row.recall_at_1 is not None]
    shown = [row for row in shown if row.size != smallest.size or row.name in tested]
    return figures, [table_row(storage, row.size, row.name) for row in shown]


def table_row(storage: Storage, size: int, name: str) -> Row:
    """Return a row of the table; the confirmed setting of the size is marked."""
    row = next(row for row in storage.rows if (row.size, row.name) == (size, name))
    tests = {step.name: step for decision in storage.decisions if decision.size == size for step in decision.sequence}
    mark = " (**chosen**)" if storage.chosen(size) is row else ""
    head: Row = {"vectors": f"{size:,}", "setting": f"{name}{mark}"}
    names = ("bytes per vector", "build s", "ms per query (p50)", "recall@1 [95 %]", "neighbours kept")
    assert row.recall_at_1 is not None
    assert row.ci95 is not None
    test = tests.get(name)
    bound = "not tested" if test is None else f"{test.upper_bound:.4f}{'' if test.confirmed else ' (not confirmed)'}"
    values = (
        f"{row.bytes_per_vector:.1f}",
        f"{row.build_seconds:.1f}",
        f"{row.single_ms:.3f}",
        f"{row.recall_at_1:.3f} [{row.ci95[0]:.3f}, {row.ci95[1]:.3f}]",
        f"{row.neighbours:.3f}",
    )
    return {**head, **dict(zip(names, values, strict=True)), "upper bound of the drop": bound}


def storage_config(vectors: Path, distractors: Path, output: Path, sizes: tuple[int, ...] = _SIZES) -> StorageConfig:
    """Return the settings of the measurement.

    All are measured in the smallest gallery, and ``narrow`` leaves out of the larger ones what the search rules out.
    112 dimensions in int8, and 256 in 3 bits, take less than an eighth of float32's bytes at 256, with lists too. Half
    of the lists are searched, because the queries of noisy images are far from their products. HNSW is left out: its
    links alone take more bytes, and it takes long to build.
    """
    return StorageConfig(
        str(vectors),
        str(output),
        sizes=sizes,
        dims=(256, 112, 64),
        formats=("int8", "rabitq3", "rabitq2", "pq", "binary"),
        indexes=("flat", "ivf", "shortlist"),
        distractors=str(distractors),
        max_recall_drop=_BUDGET,
        confidence=_CONFIDENCE,
        max_ms=_MAX_MS,
        narrow=True,
        queries=8000,
        batch=1000,
        tuning=_TUNING,
        seconds=0.5,
        build_seconds=3600.0,  # fitting does not grow with the gallery, so the estimate from a small one is too high
    )


def unlimited_config(config: StorageConfig) -> StorageConfig:
    """Return the measurement of the largest gallery without a limit of time, of RaBitQ with lists at full width only.

    ``config`` measures all other settings.
    """
    return replace(
        config,
        output=f"{config.output}-unlimited",
        sizes=config.sizes[-1:],
        dims=(256,),
        formats=("rabitq4", "rabitq3", "rabitq2"),
        indexes=("ivf",),
        max_ms=None,
        narrow=False,
    )


def measure_stored() -> None:
    """Record the settings of galleries up to a million vectors; distractors are other synthetic products."""
    products, sizes, folder = SyntheticProducts(seed=_SEED), _SIZES, _FOLDER / "storage-data"
    vectors = write_synthetic_embeddings(folder, products)
    count = sizes[-1] - 2 * (products.validation + products.test)  # two gallery images of each
    distractors = write_synthetic_distractors(folder / "distractors.npy", products, count)
    limited = storage_config(vectors, distractors, _FOLDER / "storage", sizes)
    figures: list[Figure] = []
    tables: list[Row] = []
    for config in (limited, unlimited_config(limited)):
        try:
            measure_storage(config)
        except CheckFailed as failure:  # nothing is confirmed: the figures are recorded as missed
            log.warning(failure)
        report = load_artifact(config.output, "report")
        storage = Storage.model_validate_json(report.file(FILE).read_bytes())
        found, table = storage_figures(storage, products.dim, command_of("gallery", "storage"))
        figures += found
        tables += [{**row, "limit ms": "–" if config.max_ms is None else f"{config.max_ms:g}"} for row in table]
    record("gallery", figures, {"storage": tables})
