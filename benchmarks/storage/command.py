"""``vpr bench storage``: recall, bytes and time of stored galleries, and the smallest within a recall budget."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.config import StorageConfig
from benchmarks.recall.seen_marks import log_seen, seen_notes, to_counts
from benchmarks.report.part import SeenCounts
from benchmarks.report.storage_schema import Storage, StorageDecision, StorageRow, StoredGallery
from benchmarks.report.tables import STORAGE_HEADINGS, describe_storage, storage_cells
from benchmarks.storage.choose import choose_setting, rule_out
from benchmarks.storage.distractor_folder import embed_distractors
from benchmarks.storage.gallery import StorageData, find_file, find_rows, grow_gallery, read_data
from benchmarks.storage.measure import Measured, list_settings, measure_settings, search_exactly
from export.backends.registry import default_threads
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import file_sha256
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import CheckFailed, printable
from vpr.common.log import get_logger
from vpr.data.seen import count_seen, hash_products, read_seen
from vpr.retrieval.confirmed_storage import FILE
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.self_search import self_search_values
from vpr.retrieval.vector_index import StorageSetting

log = get_logger(__name__)


@dataclass(frozen=True)
class SizeResult:
    """Settings of one size of gallery, and the decision if there is a budget."""

    gallery: StoredGallery
    rows: list[StorageRow]
    decision: StorageDecision | None
    chosen: StorageSetting | None


def measure_storage(config: StorageConfig) -> Path:
    """Measure every setting at every size, and write an artifact of kind ``report`` with ``storage.json``.

    Raises:
        UserError: The embeddings, the distractors or the reference do not fit, or a setting is not possible.
        CheckFailed: No setting is confirmed for the largest gallery. The artifact is still written.
    """
    embeddings = load_embeddings(config.embeddings)
    reference = load_embeddings(config.reference) if config.reference else embeddings
    parents = [embeddings.artifact.as_parent("embeddings"), embeddings.model]
    parents += [reference.artifact.as_parent("reference")] if config.reference else []
    values = config_to_json(config) | self_search_values(find_rows(config, embeddings))
    config = embed_distractors(config, embeddings, reference)
    for key in ("distractors", "reference_distractors"):
        if path := getattr(config, key):
            values[f"{key}_sha256"] = file_sha256(find_file(path, key))
    stage = Stage(config.output, "report", values, parents, FILE)
    if artifact := stage.find():
        storage = Storage.model_validate_json(artifact.file(FILE).read_bytes())
        return _finish(stage.path, storage)
    data = read_data(config, embeddings, reference)
    width, training = embeddings.vectors.shape[1], len(data.model.training)
    settings = list_settings(config, width, training, data.own is not None)
    seen = count_seen(read_seen(embeddings.artifact), hash_products(data.query_products.tolist()))
    log_seen(embeddings.model.name, seen)
    if data.left_out:
        log.info(f"{data.left_out} distractors are of scored products or images and were left out")
    results = list(measure_sizes(config, settings, data))
    storage = _to_storage(config, data, results, embeddings, reference, to_counts(seen))
    from benchmarks.report.charts import draw_storage  # loads matplotlib, so only after the timing
    from benchmarks.report.render import draw_storage_table

    with stage.write() as draft:
        draft.metrics = {"seen": asdict(seen), "statements": [decision.outcome for decision in storage.decisions]}
        draft.preprocess, draft.embedding = embeddings.artifact.card.preprocess, embeddings.artifact.card.embedding
        (draft.path / FILE).write_text(json.dumps(storage.to_json(), indent=1), encoding="utf-8")
        (draft.path / "storage.md").write_text(
            "\n".join([f"# {describe_storage(storage)}", "", *draw_storage_table(storage), ""]), encoding="utf-8"
        )
        for size in config.sizes:
            (draft.path / f"storage-{size}.svg").write_text(draw_storage(storage, size), encoding="utf-8")
    print_rows(storage)
    return _finish(stage.path, storage)


def measure_sizes(config: StorageConfig, settings: list[StorageSetting], data: StorageData) -> Iterator[SizeResult]:
    """Yield the result of each size."""
    smaller: dict[str, StorageRow] = {}
    ruled_out: dict[str, str] = {}
    for size, larger in zip(config.sizes, (*config.sizes[1:], 0), strict=True):
        gallery = grow_gallery(data, size, config.seed)
        exact = search_exactly(data, gallery)
        measured, rows = [], []
        for result in measure_settings(config, settings, data, gallery, exact, smaller, ruled_out):
            row = result.row if isinstance(result, Measured) else result
            rows.append(row)
            log_row(row)
            if isinstance(result, Measured):
                measured.append(result)
                smaller[row.name] = row
        stored = StoredGallery(
            size=size,
            real_images=len(data.gallery_codes),
            real_distractors=gallery.real_distractors,
            synthetic_distractors=gallery.synthetic,
        )
        decision = chosen = None
        if config.max_recall_drop is not None:
            decision = choose_setting(measured, exact, data.query_products, data.is_choice, config)
            chosen = next((one.setting for one in measured if one.row.name == decision.chosen), None)
            (log.info if chosen else log.warning)(f"{size:,} vectors: {decision.outcome}")
        if config.narrow and larger:
            ruled_out |= rule_out(measured, exact, data.query_products, data.is_choice, config, larger / size)
        yield SizeResult(stored, sorted(rows, key=_by_bytes), decision, chosen)


def _by_bytes(row: StorageRow) -> tuple[float, str]:
    return -(row.bytes_per_vector or 0.0), row.name


def _to_storage(
    config: StorageConfig,
    data: StorageData,
    results: list[SizeResult],
    embeddings: Embeddings,
    reference: Embeddings,
    seen: SeenCounts,
) -> Storage:
    products = data.query_products[~data.is_choice]
    return Storage(
        name=Path(config.output).name,
        model=embeddings.model.name,
        reference=reference.model.name,
        split=config.split,
        queries=len(products),
        products=len(np.unique(products)),
        seen=seen,
        leave_one_out=data.own is not None,
        threads=config.threads or default_threads(),
        galleries=[result.gallery for result in results],
        rows=[row for result in results for row in result.rows],
        decisions=[result.decision for result in results if result.decision],
    )


def print_rows(storage: Storage) -> None:
    """Print the table and what the model has seen; the setting that is chosen for a size is marked."""
    table = Table(*map(escape, STORAGE_HEADINGS), box=None)
    for row in storage.rows:
        chosen = storage.chosen(row.size) is row
        table.add_row(*map(escape, storage_cells(row)), style="bold" if chosen else "")
    console = Console(width=max(140, Console().width))
    console.print(table)
    for note in seen_notes(storage.seen):
        console.print(escape(printable(note)), soft_wrap=True)


def log_row(row: StorageRow) -> None:
    """Log a row as soon as it is measured."""
    if row.bytes_per_vector is None or row.recall_at_1 is None:
        log.info(f"  {row.size:>9,}  {row.name:<52} {row.notes}")
        return
    costs = f"{row.bytes_per_vector:8.1f} bytes  p50 {row.single_ms:8.3f} ms"
    log.info(f"  {row.size:>9,}  {row.name:<52} {costs}  recall@1 {row.recall_at_1:.3f}  drop {row.drop:+.4f}")


def _finish(path: Path, storage: Storage) -> Path:
    """Return the path; raise :class:`CheckFailed` if nothing is confirmed for the largest gallery."""
    if storage.decisions and storage.decisions[-1].chosen is None:
        decision = storage.decisions[-1]
        raise CheckFailed(f"{path}: {decision.size:,} vectors: {decision.outcome}")
    log.info(f"{path}: {len(storage.rows)} settings")
    return path
