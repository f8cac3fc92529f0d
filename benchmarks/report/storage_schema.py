"""Schema of ``storage.json``: recall, bytes and time of stored galleries, and the settings within a recall budget."""

from __future__ import annotations

from pydantic import Field

from benchmarks.report.part import Interval, Part, SeenCounts
from vpr.retrieval.config import IndexKind, Reduction, Rescoring, VectorFormat


class StoredGallery(Part):
    """Vectors of a gallery by their origin."""

    size: int
    real_images: int = Field(description="gallery images of the scored and the validation split")
    real_distractors: int
    synthetic_distractors: int


class StorageRow(Part):
    """One setting in one gallery. Unmeasured values are null, with the reason in ``notes``."""

    size: int = Field(description="number of vectors in the gallery")
    name: str = Field(description="words that identify the setting")
    dims: int = Field(description="dimensions that are kept")
    reduction: Reduction | None = Field(description="way to fewer dimensions; null at full width")
    format: VectorFormat
    index: IndexKind
    rescoring: Rescoring | None = Field(description="format that rescores the short list; null without one")
    bytes_per_vector: float | None = Field(None, gt=0, description="bytes of the written index over its vectors")
    build_seconds: float | None = Field(None, description="seconds to fit and fill the index")
    single_ms: float | None = Field(None, gt=0, description="median milliseconds of a single query")
    batch_ms: float | None = Field(None, description="median milliseconds of a query in a batch")
    recall_at_1: float | None = Field(None, ge=0, le=1, description="on the scored split")
    ci95: Interval | None = Field(None, description="95 % interval of the recall by product")
    drop: float | None = Field(None, description="recall@1 lost on the scored split against the reference")
    neighbours: float | None = Field(None, description="share of the exact ten nearest images that are found")
    notes: str = ""


class TestedSetting(Part):
    """A setting in the order of the tests, on products that the search has not seen."""

    name: str
    bytes_per_vector: float
    search_drop: float = Field(description="drop of recall@1 on the products of the search")
    drop: float = Field(description="drop of recall@1 on the products of the confirmation")
    p_value: float
    upper_bound: float = Field(description="of the drop, valid for all tested settings together (Bonferroni)")
    confirmed: bool


class StorageDecision(Part):
    """Cheapest setting within the recall budget, for one size of gallery."""

    size: int
    max_recall_drop: float
    confidence: float
    max_ms: float | None = Field(description="largest p50 of a query; null without a limit")
    chosen: str | None = Field(description="name of the cheapest confirmed setting; null if none is confirmed")
    outcome: str = Field(description="statement, or what is missing to confirm one")
    drop_upper_bound: float | None
    smallest_confirmable_drop: float | None = Field(description="smallest budget that the products can confirm")
    search_products: int
    confirmation_products: int
    sequence: list[TestedSetting] = Field(description="from the safest to the cheapest, until a test fails")
    untested: int = Field(description="candidates after the failed one")


class Storage(Part):
    """``storage.json``."""

    name: str
    model: str = Field(description="model of the stored vectors")
    reference: str = Field(description="model of the exact float32 search that drops are measured against")
    split: str
    queries: int
    products: int
    leave_one_out: bool = Field(False, description="whether queries are gallery images and search all others")
    seen: SeenCounts | None = Field(None, description="what the model has seen of the scored and validation products")
    threads: int
    galleries: list[StoredGallery]
    rows: list[StorageRow]
    decisions: list[StorageDecision] = Field(description="one for each size; empty without a budget")

    def chosen(self, size: int) -> StorageRow | None:
        """Return the row of the cheapest confirmed setting of a size, if any."""
        names = {decision.chosen for decision in self.decisions if decision.size == size}
        return next((row for row in self.rows if row.size == size and row.name in names), None)
