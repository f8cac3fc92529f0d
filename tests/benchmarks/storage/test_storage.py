from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.config import StorageConfig
from benchmarks.recall.seen_marks import LEARNED_REASON
from benchmarks.report.build import read_storage
from benchmarks.report.render import draw_html, draw_markdown, draw_storage_table
from benchmarks.report.schema import Report
from benchmarks.report.storage_schema import Storage
from benchmarks.storage.choose import choose_setting, order_candidates, rule_out
from benchmarks.storage.command import measure_storage
from benchmarks.storage.gallery import grow_gallery, read_data
from benchmarks.storage.measure import (
    Exact,
    Measured,
    StorageRow,
    list_settings,
    measure_settings,
    search_exactly,
)
from calibration.confirmation import split_products
from experiments.gallery.storage import storage_figures
from experiments.gallery.synthetic_embeddings import SyntheticProducts, write_synthetic_embeddings
from vpr.artifacts.store import load_artifact
from vpr.common.errors import CheckFailed, UserError
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.seen import seen_in
from vpr.retrieval.config import VECTOR_FORMATS
from vpr.retrieval.embeddings import load_embeddings, write_embeddings
from vpr.retrieval.vector_index import StorageSetting, build_index

PRODUCTS = SyntheticProducts(
    dim=16, training=60, validation=60, test=20, categories=10, common=0.0, category=0.1, query_noise=0.2, decay=0.2
)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Embeddings of well separated products; ``synthetic-0.3`` has the same images by a worse model."""
    folder = tmp_path_factory.mktemp("vectors")
    write_synthetic_embeddings(folder, PRODUCTS, 0.3)
    return str(write_synthetic_embeddings(folder, PRODUCTS))


@pytest.fixture(scope="module")
def doubled(vectors: str) -> str:
    """Worse embeddings in which each image of validation and test is a query and a gallery image, in mixed order."""
    worse = vectors.replace("synthetic-0", "synthetic-0.3")
    data = load_embeddings(worse)
    table = pq.read_table(data.artifact.file("rows.parquet"))
    scored = np.flatnonzero(~np.char.startswith(data.products, "train"))
    order = np.random.default_rng(0).permutation(np.concatenate([np.arange(len(table)), scored]))
    is_first = np.zeros(len(order), dtype=bool)
    is_first[np.unique(order, return_index=True)[1]] = True
    roles = np.where(is_first, "gallery", "query")
    column = SCHEMA.get_field_index("role")
    table = table.take(pa.array(order)).set_column(column, SCHEMA.field("role"), pa.array(roles.tolist(), pa.string()))
    model = load_artifact(worse + "-model")
    folder = Path(vectors).parent
    return str(write_embeddings(str(folder / "doubled"), data.vectors[order], Catalog(table, folder), model, {}))


def settings(vectors: str, output: Path, **values: object) -> StorageConfig:
    small: dict[str, object] = {"sizes": (400,), "dims": (16, 8), "formats": ("float16", "int8"), "indexes": ("flat",)}
    return StorageConfig(vectors, str(output), **{**small, "seconds": 0.0, **values})  # type: ignore[arg-type]


def read(path: Path) -> Storage:
    return Storage.model_validate_json(load_artifact(path, "report").file("storage.json").read_bytes())


def test_command_measures_what_a_matrix_product_finds(vectors: str, tmp_path: Path) -> None:
    path = measure_storage(settings(vectors, tmp_path / "storage"))
    storage, data = read(path), load_embeddings(vectors)
    assert (storage.queries, storage.products, storage.decisions) == (80, 20, [])
    exact = next(row for row in storage.rows if row.name == "16 dimensions float32 flat")
    is_test = np.char.startswith(data.products, "test")
    config = settings(vectors, tmp_path)
    gallery = grow_gallery(read_data(config, data, data), 400, 0)
    queries = is_test & (data.roles == "query")
    first = (data.vectors[queries] @ gallery.vectors.T).argmax(axis=1)
    names = np.full(400, "")
    names = np.concatenate([data.products[is_test & (data.roles == "gallery")], names[40:]])
    assert exact.recall_at_1 == pytest.approx((names[first] == data.products[queries]).mean())
    assert (exact.drop, exact.neighbours) == (0.0, 1.0)
    assert exact.bytes_per_vector == pytest.approx(64, abs=1)
    assert [row.bytes_per_vector for row in storage.rows] == sorted(
        (row.bytes_per_vector for row in storage.rows), key=lambda b: -b
    )
    assert (path / "storage-400.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "int8 flat" in (path / "storage.md").read_text(encoding="utf-8")


def test_no_image_finds_itself_in_any_format_or_index(doubled: str, tmp_path: Path) -> None:
    """Each setting finds the images that it finds in an index without the query's own image."""
    data = load_embeddings(doubled)
    indexes = ("flat", "ivf", "shortlist")
    config = settings(
        doubled, tmp_path, dims=(16,), formats=("int8", "binary"), indexes=indexes, max_recall_drop=0.2,
        queries=30,
    )  # fmt: skip
    part = read_data(config, data, data)
    assert part.own is not None
    assert np.array_equal(part.model.gallery[part.own], part.model.queries)
    gallery = grow_gallery(part, 500, 0)
    cosines = part.model.queries.astype(np.float64) @ gallery.vectors.T
    cosines[np.arange(60), part.own] = -2
    exact = search_exactly(part, gallery)
    assert np.array_equal(exact.hits, gallery.codes[cosines.argmax(axis=1)] == part.query_codes)
    assert exact.hits.mean() < 1
    np.testing.assert_allclose(exact.scores, -np.sort(-cosines, axis=1)[:, :10], atol=1e-6)
    possible = list_settings(config, 16, 240, is_self_search=True)
    measured = list(measure_settings(config, possible, part, gallery, exact, {}, {}))
    assert {(one.setting.format, one.setting.index) for one in measured if isinstance(one, Measured)} >= {
        ("int8", "flat"), ("int8", "ivf"), ("binary", "flat"), ("binary", "shortlist"),
    }  # fmt: skip
    for one in measured:
        assert isinstance(one, Measured)
        for number in range(0, 60, 20):
            kept = np.arange(500) != part.own[number]
            index = build_index(one.setting, part.model.training, gallery.vectors[kept], config.tuning)
            rows = index.search(part.model.queries[number][None], 10)[1][0]
            assert one.hits[number] == (gallery.codes[kept][rows[0]] == part.query_codes[number]), one.row.name
            near = cosines[number][kept][rows[rows >= 0]] >= exact.scores[number, -1] - 1e-5
            assert one.neighbours[number] == pytest.approx(near.sum() / 10), one.row.name


def test_images_in_both_roles_are_scored_without_themselves(
    doubled: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="vpr"):
        path = measure_storage(settings(doubled, tmp_path / "storage", sizes=(130,), dims=(16,), formats=("int8",)))
    storage = read(path)
    assert "each searches the others (leave-one-out)" in caplog.text
    assert (storage.queries, storage.products, storage.leave_one_out) == (120, 20, True)
    assert storage.galleries[0].real_images == 120  # each once
    exact = next(row for row in storage.rows if row.name == "16 dimensions float32 flat")
    assert exact.recall_at_1 is not None
    assert 0.5 < exact.recall_at_1 < 1
    assert load_artifact(path).card.config["queries_search"] == "leave-one-out"


def test_seen_products_are_marked_with_the_table(
    vectors: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note is printed, stored and in both Markdown tables; files without counts still load."""
    table = pq.read_table(load_artifact(vectors).file("rows.parquet"))
    rows = Catalog(table, Path())
    trained = rows.take(np.flatnonzero((rows.products == "test-0") | (rows.products == "test-1")))
    monkeypatch.setattr("benchmarks.storage.command.read_seen", lambda artifact: seen_in(trained, "training"))
    path = measure_storage(settings(vectors, tmp_path / "storage", dims=(16,), formats=("int8",)))
    storage, note = read(path), f"seen: 2 of 20 products in training: {LEARNED_REASON}"
    assert storage.seen is not None
    assert storage.seen.seen_products["training"] == 2
    assert note in capsys.readouterr().out
    assert note in (path / "storage.md").read_text(encoding="utf-8")
    older = storage.to_json()
    del older["seen"]
    assert not any("seen" in line for line in draw_storage_table(Storage.model_validate(older)))


def test_graphs_that_link_the_queries_are_rejected(doubled: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="indexes: hnsw links each query's own image .* Leave hnsw out of --indexes"):
        measure_storage(settings(doubled, tmp_path / "storage", sizes=(500,), indexes=("flat", "hnsw")))
    assert not (tmp_path / "storage").exists()
    found = list_settings(settings(doubled, tmp_path, indexes=()), 16, 240, is_self_search=True)
    assert {setting.index for setting in found} == {"flat", "ivf"}


@pytest.mark.slow
def test_report_draws_the_storage(report_values: dict, vectors: str, tmp_path: Path) -> None:
    """The table, the statement and a chart for each size are in both forms of the report."""
    config = settings(vectors, tmp_path / "storage", sizes=(200, 400), max_recall_drop=0.3, confidence=0.9)
    measure_storage(config)
    storage = read_storage(load_artifact(tmp_path / "storage", "report"))
    assert storage.seen is not None
    storage.seen.learned = "seen: 9 of 80 products in training"
    report = Report.model_validate({**report_values, "storages": [storage.to_json()]})
    page, text = draw_html(report), draw_markdown(report)
    plain = Report.model_validate({**report_values, "storages": []})
    assert page.count("<svg") == draw_html(plain).count("<svg") + 2
    for part in (page, text):
        assert "Storage of synthetic-0-model: 80 queries of 20 products" in part
        assert "400 vectors: " in part
        assert f"seen: 9 of 80 products in training: {LEARNED_REASON}" in part
        assert part.count("8 dimensions (pca) int8 flat") >= 2


def test_distractors_are_of_no_product_and_larger_galleries_keep_them(vectors: str, tmp_path: Path) -> None:
    data = load_embeddings(vectors)
    part = read_data(settings(vectors, tmp_path), data, data)
    small, large = grow_gallery(part, 300, 1), grow_gallery(part, 700, 1)
    assert np.array_equal(large.vectors[:300], small.vectors)
    assert (large.codes[40:] == -1).all()
    assert (large.codes[:40] >= 0).all()
    assert np.allclose(np.linalg.norm(large.vectors, axis=1), 1, atol=1e-5)
    training = data.vectors[np.char.startswith(data.products, "train")]
    nearest = (large.vectors[40:] @ training.T).max(axis=1)
    among = np.sort(training @ training.T, axis=1)[:, -2]
    assert abs(np.median(nearest) - np.median(among)) < 0.15
    with pytest.raises(UserError, match="sizes: expected 40 or more"):
        grow_gallery(part, 20, 0)


def test_budget_confirms_on_products_that_did_not_choose(vectors: str, tmp_path: Path) -> None:
    """The bound of the result holds for its drop, and the test products take no part."""
    config = settings(vectors, tmp_path / "storage", max_recall_drop=0.2, confidence=0.9)
    storage = read(measure_storage(config))
    (decision,) = storage.decisions
    assert (decision.search_products, decision.confirmation_products) == (20, 40)
    assert decision.drop_upper_bound is not None
    assert decision.chosen in {step.name for step in decision.sequence if step.confirmed}
    assert decision.sequence[-1 if decision.sequence[-1].confirmed else -2].name == decision.chosen
    costs = [step.bytes_per_vector for step in decision.sequence]
    assert costs == sorted(costs, reverse=True)
    assert "confirmed: drop at most 0.2" in decision.outcome
    figures, table = storage_figures(storage, 16, "make")
    assert figures[0].value == pytest.approx(storage.chosen(400).bytes_per_vector / 64)  # type: ignore[union-attr]
    assert sum("chosen" in row["setting"] for row in table) == 1


def test_reference_is_another_model(vectors: str, tmp_path: Path) -> None:
    """The worse model's own exact search already breaks the budget: model and storage have one bound."""
    worse = vectors.replace("synthetic-0", "synthetic-0.3")
    config = settings(worse, tmp_path / "storage", reference=vectors, max_recall_drop=0.001)
    with pytest.raises(CheckFailed, match="400 vectors: no setting|not confirmable"):
        measure_storage(config)
    storage = read(tmp_path / "storage")
    exact = next(row for row in storage.rows if row.name == "16 dimensions float32 flat")
    assert exact.drop is not None
    assert exact.drop > 0.05
    assert (storage.model, storage.reference) == ("synthetic-0.3-model", "synthetic-0-model")
    with pytest.raises(CheckFailed):
        measure_storage(config)  # up to date: the same result


def test_real_distractors_come_first_without_scored_products(vectors: str, tmp_path: Path) -> None:
    data = load_embeddings(vectors)
    config = settings(vectors, tmp_path, distractors=vectors)
    part = read_data(config, data, data)
    assert part.left_out == 120  # 20 test products of 6 images
    assert not np.isin(part.model.distractors[:, 0], part.model.queries[:, 0]).any()
    np.save(tmp_path / "others.npy", data.vectors[:50])
    part = read_data(settings(vectors, tmp_path, distractors=str(tmp_path / "others.npy")), data, data)
    gallery = grow_gallery(part, 200, 0)
    assert (gallery.real_distractors, gallery.synthetic) == (50, 110)
    assert np.array_equal(gallery.vectors[40:90], data.vectors[:50])


def rows(count: int) -> list[Measured]:
    """Return settings of falling bytes, of which the last loses every hit."""
    names = [StorageSetting(16, None, "int8", "flat")] * count
    hits = [np.arange(400) % 400 != number for number in range(count - 1)] + [np.zeros(400, bool)]
    return [
        Measured(
            setting,
            StorageRow(size=400, name=str(number), dims=16, reduction=None, format="int8", index="flat", rescoring=None,
                       bytes_per_vector=100.0 / 2**number, single_ms=1.0 + number),
            hits[number],
            np.full(400, 1 - number / 10),
        )
        for number, setting in enumerate(names)
    ]  # fmt: skip


def test_last_confirmed_setting_is_chosen() -> None:
    exact = Exact(np.ones(400, bool), np.empty((0, 10), np.float32))
    products = np.array([f"p{row // 2}" for row in range(400)])
    config = StorageConfig("e", "o", max_recall_drop=0.05)
    decision = choose_setting(rows(4), exact, products, np.ones(400, bool), config)
    assert decision.chosen == "2"  # the setting that loses every hit is out after the search
    assert [step.name for step in decision.sequence] == ["0", "1", "2"]
    limited = StorageConfig("e", "o", max_recall_drop=0.05, max_ms=2.5)
    assert choose_setting(rows(4), exact, products, np.ones(400, bool), limited).chosen == "1"
    strict = StorageConfig("e", "o", max_recall_drop=0.001)
    assert choose_setting(rows(4), exact, products, np.ones(400, bool), strict).chosen is None
    with pytest.raises(UserError, match="max_recall_drop: .* 14 products"):
        choose_setting(rows(4), exact, products, np.arange(400) < 28, config)


def test_search_alone_rules_out_settings_of_larger_galleries() -> None:
    exact = Exact(np.ones(400, bool), np.empty((0, 10), np.float32))
    products = np.array([f"p{row // 2}" for row in range(400)])
    config = StorageConfig("e", "o", max_recall_drop=0.05, max_ms=4.5)
    measured = rows(4)
    found = rule_out(measured, exact, products, np.ones(400, bool), config, 2.5)
    assert found == {
        "1": "not measured: expected 5 ms from 400 vectors",
        "2": "not measured: expected 8 ms from 400 vectors",
        "3": "not measured: drop +1.0000 in the search at 400 vectors",
    }
    searched, _ = split_products(products, config.seed)
    broken = measured[0].hits & np.isin(products, searched)  # right on the products of the search only
    other = [replace(measured[0], hits=broken), *measured[1:]]
    assert rule_out(other, exact, products, np.ones(400, bool), config, 2.5) == found
    for index in ("ivf", "shortlist"):  # the time of rescoring does not grow
        other_index = replace(measured[1], setting=replace(measured[1].setting, index=index))
        assert rule_out([other_index], exact, products, np.ones(400, bool), config, 2.5) == {}


def test_narrowed_galleries_have_the_reasons_in_the_table(vectors: str, tmp_path: Path) -> None:
    config = settings(
        vectors, tmp_path / "storage", sizes=(200, 400), dims=(16, 2), max_recall_drop=0.2, confidence=0.9, narrow=True
    )
    storage = read(measure_storage(config))
    left_out = [row for row in storage.rows if row.recall_at_1 is None]
    assert {(row.size, row.dims) for row in left_out} == {(400, 2)}
    assert all("in the search at 200 vectors" in row.notes for row in left_out)
    assert len(storage.decisions) == 2


def test_candidates_are_the_pareto_front_with_clear_steps() -> None:
    measured = rows(4)
    assert order_candidates(measured, [0, 0, 0, 0], [1.0, 0.9, 0.95, 0.5]) == [0, 2, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dims": (17,)}, "dims: expected at most 16, the dimensions of the embeddings, got 17"),
        ({"formats": ("pq",)}, "formats: pq needs 256 training vectors, got 240"),
        ({"formats": ("binary",), "indexes": ("hnsw",)}, "formats: no index of .*hnsw.* stores binary"),
    ],
)
def test_impossible_settings_are_rejected(vectors: str, tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure_storage(settings(vectors, tmp_path / "storage", **values))
    assert not (tmp_path / "storage").exists()


def test_default_settings_leave_out_what_cannot_be_fitted(vectors: str, tmp_path: Path) -> None:
    config = settings(vectors, tmp_path, dims=(), formats=(), indexes=())
    found = list_settings(config, 16, 240)
    assert {setting.format for setting in found} == set(VECTOR_FORMATS) - {"pq"}
    assert {setting.dims for setting in found} == {16, 8, 4, 2}
    assert found[0].name == "16 dimensions float32 flat"


def test_unusable_inputs_are_one_line(vectors: str, tmp_path: Path) -> None:
    others = tmp_path / "others.npy"
    for array, message in (
        (np.zeros((5, 16), np.float32), "distractors: .*not of length 1"),
        (np.eye(5, dtype=np.float32), "distractors: .*expected 16 dimensions, got 5"),
    ):
        np.save(others, array)
        with pytest.raises(UserError, match=message):
            measure_storage(settings(vectors, tmp_path / "storage", distractors=str(others)))
    others.write_bytes(b"x")
    with pytest.raises(UserError, match="distractors: .* is not an array"):
        measure_storage(settings(vectors, tmp_path / "storage", distractors=str(others)))
    with pytest.raises(UserError, match="distractors: .*is not a file"):
        measure_storage(settings(vectors, tmp_path / "storage", distractors="missing.npy"))
    worse = vectors.replace("synthetic-0", "synthetic-0.3")
    with pytest.raises(UserError, match="embedded with 'synthetic-0.3-model', expected"):
        measure_storage(settings(vectors, tmp_path / "storage", distractors=worse))
    with pytest.raises(UserError, match="no queries in split 'other', but in: test, validation"):
        measure_storage(settings(vectors, tmp_path / "storage", split="other"))
    folder = tmp_path / "small"
    smaller = write_synthetic_embeddings(folder, SyntheticProducts(dim=16, training=2, validation=2, test=2))
    with pytest.raises(UserError, match="reference: .*has other images"):
        measure_storage(settings(vectors, tmp_path / "storage", reference=str(smaller)))
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sizes": ()}, "sizes"),
        ({"sizes": (20, 10)}, "sizes"),
        ({"dims": (0,)}, "dims: "),
        ({"batch": 0}, "batch: "),
        ({"split": "validation"}, "split: settings are chosen"),
        ({"max_ms": 5.0}, "max_ms: "),
        ({"narrow": True}, "narrow: compares settings with a budget"),
        ({"max_ms": 0.0, "max_recall_drop": 0.1}, "max_ms: expected more than 0"),
        ({"reference_distractors": "x"}, "reference_distractors: "),
        ({"reductions": ()}, "reductions: "),
    ],
)
def test_config_out_of_range_is_rejected(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StorageConfig("e", "o", **values)


def test_slow_setting_is_left_out_with_the_reason(vectors: str, tmp_path: Path) -> None:
    config = settings(vectors, tmp_path / "storage", sizes=(100, 200), dims=(16,), build_seconds=0.0)
    storage = read(measure_storage(config))
    assert [row.recall_at_1 is None for row in storage.rows] == [False] * 4 + [True] * 2
    assert all("not built: expected" in row.notes for row in storage.rows[4:])
    assert json.loads((tmp_path / "storage/storage.json").read_text(encoding="utf-8"))["galleries"][1]["size"] == 200
