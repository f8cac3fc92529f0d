"""``vpr catalog check``: suspicious images and products of a catalogue, and the catalogue that decisions leave."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from vpr.artifacts.stage import Stage
from vpr.artifacts.store import reraise_as_artifact_error
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog, load_catalog
from vpr.data.decisions import write_cleaned_catalog
from vpr.retrieval.catalog_check import KINDS, CheckResult, Finding, Thresholds, check_labels
from vpr.retrieval.check_page import draw_page
from vpr.retrieval.config import CatalogCheckConfig
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.label_scores import LabelledVectors

log = get_logger(__name__)

_COLUMNS = ("kind", "image", "product", "split", "other_image", "other_product", "score", "decision")


def check_catalog(config: CatalogCheckConfig) -> Path:
    """Write the findings of a catalogue, or with ``apply`` the cleaned catalogue.

    Raises:
        UserError: The embeddings are of another catalogue, there is one product only, or a decision is broken.
    """
    embeddings = load_embeddings(config.embeddings)
    catalog = _load_catalog(config, embeddings)
    if config.apply:
        return write_cleaned_catalog(catalog, Path(config.apply), config.output)
    part = _embedded_part(config, catalog, embeddings)
    values = {key: value for key, value in config_to_json(config).items() if key not in ("catalog", "apply")}
    parents = [embeddings.artifact.as_parent("embeddings"), *catalog.as_parents()]
    stage = Stage(config.output, "report", values, parents, "findings.csv")
    if stage.find():
        return stage.path
    images, products = _label(part, embeddings)
    result = _check(config, part, images)
    decisions = suggest_decisions(result.findings, part)
    counts = Counter(finding.kind for finding in result.findings)
    with stage.write() as draft:
        _write_csv(draft.path / "findings.csv", result.findings, decisions, part, products)
        page = draw_page(result, decisions, part, images, config.shown)
        (draft.path / "findings.html").write_text(page, encoding="utf-8")
        draft.catalog = part.summary()
        draft.metrics = {
            "findings": {kind: counts[kind] for kind in KINDS},
            "suggested_changes": sum(decision != "keep" for decision in decisions),
            "outlier_below": result.outlier_below,
            "duplicate_from": result.duplicate_from,
        }
    log.info(f"{config.output}: {len(part)} images of {len(products)} products")
    for kind in KINDS:
        log.info(f"  {kind:12} {counts[kind]:6}")
    return stage.path


def suggest_decisions(findings: list[Finding], part: Catalog) -> list[str]:
    """Return a decision for each finding; decisions about the same image or product agree.

    Only changes between training products are suggested: a model must not choose the images that it is scored on. A
    training image that repeats a scored one is dropped.
    """
    names, is_train = part.products, part.table["split"].to_numpy() == "train"
    merges: dict[str, str] = {}
    for finding in (finding for finding in findings if finding.kind == "merge"):
        product, target = str(names[finding.row]), str(names[finding.other])
        both_train = is_train[finding.row] and is_train[finding.other]
        if both_train and product not in merges and product not in merges.values() and target not in merges:
            merges[product] = target
    images: dict[int, str] = {}
    for finding in (finding for finding in findings if finding.confident and is_train[finding.row]):
        product = str(names[finding.row])
        target = str(names[finding.other]) if finding.other >= 0 else ""
        if target and merges.get(product, product) == merges.get(target, target):
            continue  # the merge settles it
        if finding.kind == "wrong-label" and is_train[finding.other]:
            images.setdefault(finding.row, f"move {target}")
        elif finding.kind in ("outlier", "duplicate"):
            images.setdefault(finding.row, "drop")
    decisions = []
    for finding in findings:
        product, target = str(names[finding.row]), str(names[finding.other]) if finding.other >= 0 else ""
        if finding.kind == "merge":
            decisions.append(f"merge {target}" if merges.get(product) == target else "keep")
        else:
            decisions.append("keep" if finding.kind == "confusable" else images.get(finding.row, "keep"))
    return decisions


def _load_catalog(config: CatalogCheckConfig, embeddings: Embeddings) -> Catalog:
    """Load the catalogue of the embeddings; raise :class:`UserError` if it is not there or another one."""
    recorded = embeddings.artifact.card.config.get("catalog")
    path = config.catalog or (recorded if isinstance(recorded, str) else "")
    if not path:
        raise UserError(f"catalog: {config.embeddings} does not record its catalogue. Give it with --catalog.")
    try:
        catalog = load_catalog(path)
    except UserError as error:
        if config.catalog:
            raise
        raise UserError(f"catalog: {error} It is recorded in the embeddings: give its place with --catalog.") from None
    assert catalog.artifact is not None
    parents = embeddings.artifact.parents("catalog")
    if [parent.sha256 for parent in parents] != [catalog.artifact.sha256]:
        hint = "Give the catalogue of the embeddings with --catalog, or embed this one."
        raise UserError(f"embeddings: {config.embeddings} is of another catalogue than {path}. {hint}")
    return catalog


def _embedded_part(config: CatalogCheckConfig, catalog: Catalog, embeddings: Embeddings) -> Catalog:
    """Return the rows of the catalogue that are embedded; raise :class:`UserError` if the rows differ."""
    split = embeddings.artifact.card.config.get("split")
    part = catalog.select(split=split if isinstance(split, str) and split else None)
    with reraise_as_artifact_error(embeddings.artifact):
        rows = pq.read_table(embeddings.artifact.file("rows.parquet")).cast(SCHEMA)
    if not rows.equals(part.table):
        raise UserError(f"embeddings: the rows of {config.embeddings} differ from those of its catalogue. Embed again.")
    return part


def _label(part: Catalog, embeddings: Embeddings) -> tuple[LabelledVectors, list[str]]:
    """Return the vectors with product indices, and the product of each index."""
    products, labels = np.unique(part.products, return_inverse=True)
    return LabelledVectors(embeddings.vectors, labels), products.tolist()


def _check(config: CatalogCheckConfig, part: Catalog, images: LabelledVectors) -> CheckResult:
    thresholds = Thresholds(config.outlier, config.duplicate, config.merge, config.confusable)
    contents = np.array(part.table["sha256"].fill_null("").to_pylist(), dtype=np.str_)
    is_scored = part.table["split"].to_numpy() != "train"
    return check_labels(images, thresholds, None if (contents == "").any() else contents, is_scored)


def _write_csv(path: Path, findings: list[Finding], decisions: list[str], part: Catalog, products: list[str]) -> None:
    images, splits = part.table["image"].to_pylist(), part.table["split"].to_pylist()
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for finding, decision in zip(findings, decisions, strict=True):
            row = finding.row
            other_image = images[finding.other] if finding.other >= 0 else ""
            other_product = products[finding.product] if finding.product >= 0 else ""
            values = [finding.kind, images[row], part.products[row], splits[row], other_image, other_product]
            writer.writerow([*values, f"{finding.score:.4f}", decision])
