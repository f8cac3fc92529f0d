from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data import seen
from vpr.data.catalog import Catalog
from vpr.data.seen import combine, count_seen, hash_catalog, read_seen, record_seen, seen_in, write_seen


def _model(path: Path, *parents: Artifact, **uses: Catalog) -> Artifact:
    with write_artifact(path, "student", {}) as draft:
        record_seen(draft.path, parents, uses)  # type: ignore[arg-type]
    return load_artifact(path)


def _without_record(path: Path) -> Artifact:
    with write_artifact(path, "teacher", {}):
        pass
    return load_artifact(path)


def test_file_has_salted_hashes_and_no_names(catalog: Catalog, tmp_path: Path) -> None:
    training = catalog.select(split="train")
    model = _model(tmp_path / "model", training=training)
    rows = pq.read_table(model.file("seen.parquet")).to_pylist()
    texts = [("product", product) for product in training.products.tolist()]
    texts += [("image", sha256) for sha256 in training.table["sha256"].to_pylist()]
    digests = {(k, hashlib.sha256(f"visual-product-recognition/{k}/{text}".encode()).digest()[:8]) for k, text in texts}
    assert {(row["kind"], row["hash"]) for row in rows} == {(k, int.from_bytes(d, "big")) for k, d in digests}
    assert all(row["training"] and not row["selection"] for row in rows)
    content = model.file("seen.parquet").read_bytes()
    assert not any(product.encode() in content for product in set(training.products.tolist()))


def test_children_inherit_all_uses(catalog: Catalog, tmp_path: Path) -> None:
    training, validation, test = (catalog.select(split=split) for split in ("train", "validation", "test"))
    teacher = _model(tmp_path / "teacher", training=training, selection=validation)
    student = _model(tmp_path / "student", teacher, distillation=training)
    ranges = _model(tmp_path / "ranges", student, calibration=training.take(np.arange(1)))
    counts = {
        part: count_seen(read_seen(ranges), hash_catalog(catalog.select(split=part))) for part in ("train", "test")
    }
    assert counts["train"].seen_products == {"training": 8, "distillation": 8, "calibration": 1, "selection": 0}
    assert counts["train"].seen_images == {"training": 64, "distillation": 64, "calibration": 1, "selection": 0}
    assert set(counts["test"].seen_products.values()) == set(counts["test"].seen_images.values()) == {0}
    expected = "seen: 8 of 8 products in training, 8 of 8 products in distillation, 1 of 8 products in calibration"
    assert counts["train"].learned == expected
    assert (counts["test"].learned, counts["test"].selected, counts["test"].unrecorded) == ("", "", "")
    selected = count_seen(read_seen(ranges), hash_catalog(validation))
    assert (selected.learned, selected.selected) == ("", "selected on: 4 of 4 products")


def test_relabelled_image_is_still_seen(catalog: Catalog) -> None:
    part = catalog.select(split="train")
    column = part.table.schema.get_field_index("product")
    renamed = Catalog(part.table.set_column(column, "product", pa.array(["new"] * len(part), pa.string())), part.root)
    assert count_seen(seen_in(part, "training"), hash_catalog(renamed)).learned == "seen: 64 of 64 images in training"


def test_model_of_an_earlier_version_is_unknown(catalog: Catalog, tmp_path: Path) -> None:
    old = _without_record(tmp_path / "old")
    child = _model(tmp_path / "child", old, distillation=catalog.select(split="train"))
    counts = count_seen(read_seen(child), hash_catalog(catalog.select(split="train")))
    assert counts.unknown == ("old",)
    assert counts.unrecorded == "seen products unknown: old has no record of them"
    assert counts.learned.startswith("seen: 8 of 8 products in distillation")


def test_images_without_labels_have_no_product(catalog: Catalog) -> None:
    part = catalog.select(split="train")
    column = part.table.schema.get_field_index("source")
    unlabelled = Catalog(
        part.table.set_column(column, "source", pa.array(["unlabelled"] * len(part), pa.string())), part.root
    )
    record = seen_in(unlabelled, "distillation")
    assert (len(record.products.values), len(record.images.values)) == (0, 64)


def test_record_of_other_columns_or_too_many_rows_is_rejected(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(tmp_path / "model", training=catalog.select(split="train"))
    monkeypatch.setattr(seen, "_MAX_ROWS", 71)  # the file has 8 products and 64 images
    with pytest.raises(UserError, match="more than 71 rows"):
        read_seen(model)
    monkeypatch.setattr(seen, "_MAX_BYTES", 10)
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_seen(model)
    monkeypatch.undo()
    with write_artifact(tmp_path / "other", "student", {}) as draft:
        pq.write_table(pa.table({"hash": [1]}), draft.path / "seen.parquet")
    with pytest.raises(UserError, match=r"other: not a usable student \(seen.parquet has other columns"):
        read_seen(load_artifact(tmp_path / "other"))


def test_union_of_no_records_has_seen_nothing(catalog: Catalog, tmp_path: Path) -> None:
    with write_artifact(tmp_path / "random", "student", {}) as draft:
        write_seen(draft.path, combine([]))
    counts = count_seen(read_seen(load_artifact(tmp_path / "random")), hash_catalog(catalog))
    assert (counts.learned, counts.selected, counts.unrecorded) == ("", "", "")
