from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from experiments.student import nested
from experiments.student.nested import NESTED, PCA, PLAIN, Embedded, NestedSetting, nested_figures
from vpr.data.catalog import SCHEMA, Catalog
from vpr.retrieval.embeddings import l2_normalize

PRODUCTS, QUERIES, DIM = 30, 3, 16


def catalog() -> Catalog:
    rows = [
        {"image": f"{split}{row}.jpg", "product": f"{split}{row // (QUERIES + 1)}", "split": split, "role": role}
        for split in ("train", "test")
        for row, role in enumerate((["query"] * QUERIES + ["gallery"]) * PRODUCTS)
    ]
    return Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), Path())


def vectors(seed: int, signal: slice) -> np.ndarray:
    """Return unit vectors of products that differ in a few dimensions; the other ones hold less energy, all noise."""
    rng = np.random.default_rng(seed)
    values = 0.3 * rng.normal(size=(PRODUCTS, QUERIES + 1, DIM))
    values[:, :, signal] += 2 * rng.normal(size=(PRODUCTS, 1, len(range(DIM)[signal])))
    return l2_normalize(values.reshape(-1, DIM).astype(np.float32))


def test_prefixes_are_compared_with_pca_of_the_training_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plain student has its signal last, the nested one first: only the plain one needs PCA."""

    def embed(path: Path, test: Catalog, training: Catalog) -> Embedded:
        assert (set(test.table["split"].to_pylist()), set(training.table["split"].to_pylist())) == ({"test"}, {"train"})
        signal = slice(0, 4) if path.name == "nested" else slice(12, 16)
        return Embedded(vectors(0, signal), vectors(1, signal))

    monkeypatch.setattr(nested, "load_catalog", lambda _: catalog())
    monkeypatch.setattr(nested, "train_student", lambda _, is_nested, seed: Path("nested" if is_nested else "plain"))
    monkeypatch.setattr(nested, "_embed", embed)
    setting = NestedSetting("sample", tmp_path, tmp_path, tmp_path, "command", dimensions=(4, 8), seeds=(0, 1))
    figures, rows = nested_figures(setting)
    recall = {(row["student"], row["dimensions"]): float(row["recall@1 [95 %]"].split()[0]) for row in rows}
    assert recall[PLAIN, 4] < 0.3
    assert min(recall[PCA, 4], recall[NESTED, 4], recall[PLAIN, DIM]) > 0.8
    kept, gain, full = figures
    assert kept.value == pytest.approx(recall[NESTED, 4] / recall[NESTED, DIM], abs=1e-3)
    assert gain.interval is not None
    assert gain.interval[0] <= recall[NESTED, 4] - recall[PCA, 4] <= gain.interval[1]
    assert full.value == pytest.approx(recall[NESTED, DIM] - recall[PLAIN, DIM], abs=1e-3)
    assert (full.met, full.seeds) == (full.value >= 0, (0, 1))
    ahead = {(row["student"], row["dimensions"]): row["ahead of nested PCA by [95 %]"] for row in rows}
    assert ahead[PLAIN, 4].startswith("-")
    assert (ahead[PCA, 4], ahead[PLAIN, DIM]) == ("", "")
