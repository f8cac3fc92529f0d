"""``make figures TOPIC=gallery``: stored galleries and vector databases, into ``docs/results/gallery.json``.

Parts: ``embeddings``, ``migration`` and ``no-match`` (after ``make demo``; ``migration`` trains a second seed of it),
``storage``, ``databases``, ``database-kills``. The last two need ``make other-databases``. Run nothing else during
``storage`` and ``databases``.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from experiments.data.view_seeds import train_with
from experiments.figures import Figure, Row, command_of, measure, record
from experiments.gallery.migration import migration_figure, migration_rows, plan_between
from experiments.gallery.real_embeddings import demo_images, measure_embeddings, synthetic_images
from experiments.gallery.storage import measure_stored
from experiments.gallery.synthetic_embeddings import SyntheticProducts
from experiments.gallery.trial import STORES, kill_stores, time_stores
from experiments.statistics.open_set import OpenSetConfig, coverage_row, measure_divisions

_FOLDER, _DEMO = Path("runs/figures-gallery"), Path("runs/demo")
_OPEN_SET_PRODUCTS = 4000


def _measure_migration() -> None:
    command, other = command_of("gallery", "migration"), _DEMO.with_name("demo-seed-1")
    train_with(other, 1)
    figures: list[Figure] = []
    rows: list[Row] = []
    for name, old, new in (
        ("student and teacher trained again, seed 1 to seed 0", other / "student", _DEMO / "student"),
        ("student to its teacher", _DEMO / "student", _DEMO / "teacher"),
    ):
        folder = _FOLDER / f"migration-{old.parent.name}-{new.name}"
        plan = plan_between(old, new, _DEMO / "catalog", folder)
        figures.append(migration_figure(name, plan, command))
        rows += migration_rows(name, plan)
    record("gallery", figures, {"migration": rows})


def _measure_no_match() -> None:
    command, made = command_of("gallery", "no-match"), SyntheticProducts()
    synthetic = synthetic_images(made, _OPEN_SET_PRODUCTS, ("query",) * 3 + ("gallery",) * 2)
    config = OpenSetConfig("", max_false_accept=0.01)
    figures: list[Figure] = []
    rows: list[Row] = []
    for name, images, limit in (
        (f"synthetic, {_OPEN_SET_PRODUCTS:,} products", synthetic, 0.01),
        *((f"demo {model}, test split", demo_images(model), 0.1) for model in ("teacher", "student")),
    ):
        config = replace(config, max_false_accept=limit)
        results = measure_divisions(images.products, images.vectors, images.is_query, config)
        share = 1 - sum(result.broken for result in results) / len(results)
        title = f"no match, {name}: draws whose false accepts are within the bound of {limit:g}"
        figures.append(Figure(title, share, "", config.confidence, ">=", command))
        rows.append(coverage_row(name, limit, results))
    record("gallery", figures, {"no-match": rows})


def _measure_databases() -> None:
    figures, rows = time_stores(STORES, command_of("gallery", "databases"))
    record("gallery", figures, {"databases": rows})


def _measure_database_kills() -> None:
    figures, rows = kill_stores(STORES, command_of("gallery", "database-kills"))
    record("gallery", figures, {"database-kills": rows})


PARTS = {
    "embeddings": measure_embeddings,
    "migration": _measure_migration,
    "no-match": _measure_no_match,
    "storage": measure_stored,
    "databases": _measure_databases,
    "database-kills": _measure_database_kills,
}

if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
