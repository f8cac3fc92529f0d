"""Schema of ``report.json``, to write, check and read it. Unknown keys are kept: a later version may measure more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from benchmarks.report.part import Interval, Part, SeenCounts
from benchmarks.report.storage_schema import Storage
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError

SCHEMA = 2
_MAX_BYTES = 1 << 26
LEAK_NOTE = "trained with a leak allowed"
SKEW_ERROR_RATE = 0.05
Stage = Literal["baseline", "teacher", "student", "onnx", "engine"]
Share = Annotated[float, Field(ge=0, le=1)] | None
Hits = Annotated[str, Field(pattern="^[01]+$")]
Batch = Annotated[str, Field(pattern="^[1-9][0-9]{0,8}$")]


class Latency(Part):
    """Milliseconds of one call; quantiles over the calls."""

    p50: float = Field(gt=0)
    p90: float = Field(gt=0)
    p99: float = Field(gt=0)
    max: float | None = None
    calls: float | None = Field(None, description="number of timed calls")
    ci95: dict[str, tuple[float | None, float | None]] = Field({}, description="95 % interval of each quantile")
    unstable: str | None = Field(None, description="reason not to rely on these latencies")


class OpenLoop(Part):
    """Milliseconds from the due time of a request to its answer, at a given rate of arrivals."""

    arrivals: str
    rate: float = Field(description="requests per second that were due")
    p50: float
    p90: float
    p99: float
    max: float
    calls: float
    service_p99: float = Field(description="p99 of the call alone")
    busy: float = Field(description="share of the time spent in calls")
    requests_per_s: float = Field(description="requests per second that were answered")


class Ceiling(Part):
    """Roofline that a model's latency is compared with."""

    dtype: str
    threads: int
    multiply_adds: float = Field(description="multiply-adds per second")
    bytes: float = Field(description="bytes per second")
    model_multiply_adds: int = Field(description="multiply-adds of one image")


class Gpu(Part):
    """GPU that ran a model, and its state after the timed calls, where the driver reports it."""

    name: str
    memory_mib: int
    sm_clock_mhz: int | None = Field(None, description="lowest clock read after a batch size")
    max_sm_clock_mhz: int | None = None
    power_limit_w: float | None = None
    throttled: list[str] = Field([], description="reasons for a reduced clock")


class Timing(Part):
    """Costs of one model on one backend: an entry of ``latency.json``. Unmeasured values are null."""

    cold_start_ms: float | None = None
    load_ms: float | None = None
    first_call_ms: float | None = None
    peak_memory_bytes: int | None = None
    gpu_memory_bytes: float | None = None
    gpu: Gpu | None = None
    threads: int | None = None
    cpus: list[int] | None = None
    latency_ms: dict[Batch, Latency] | None = None
    throughput: dict[Batch, float] | None = None
    device_ms: dict[Batch, dict[str, float]] | None = None
    ceiling: Ceiling | None = None
    of_ceiling: dict[Batch, float] | None = None
    preprocess_ms: Latency | None = None
    with_preprocess_ms: Latency | None = None
    open_loop: OpenLoop | None = None
    notes: str = ""


class Retrieval(Part):
    """Recall and mean average precision, with the interval of recall@1 by product."""

    recall_at_1: float = Field(ge=0, le=1)
    recall_at_5: float = Field(ge=0, le=1)
    recall_at_10: float = Field(ge=0, le=1)
    map: float = Field(ge=0, le=1)
    map_at_1000: float = Field(ge=0, le=1)
    ci95: Interval | None


class Category(Part):
    """Recall@1 of the queries of one category."""

    queries: int = Field(ge=1)
    products: int = Field(ge=1)
    recall_at_1: float = Field(ge=0, le=1)
    ci95: Interval | None = Field(description="95 % interval by product; null with fewer than 10 products")


class Changed(Part):
    """Number of queries whose first result differs from the FP32 student's, and the direction of the change."""

    queries: int = Field(ge=0)
    right: int = Field(ge=0, description="queries that this model corrects")
    wrong: int = Field(ge=0, description="queries that this model breaks")


class Row(Part):
    """A model on a backend. Unmeasured values are null, with the reason in ``notes``."""

    name: str
    stage: Stage
    backend: str | None
    precision: str | None
    reference: bool = Field(description="whether this is the FP32 student that differences are taken to")
    params: int | None
    size_bytes: int | None = Field(ge=0, le=1 << 62)
    recall_at_1: Share
    recall_at_5: Share
    recall_at_10: Share
    map: Share
    map_at_1000: Share
    queries: int | None
    query_products: int | None = Field(description="number of products of the queries")
    gallery: int | None
    ci95: Interval | None = Field(description="95 % interval of recall_at_1, bootstrap over products")
    hits: dict[str, Hits] | None = Field(description="by product: one digit per query, by image and box; 1 is right")
    by_category: dict[str, Category] | None
    reranked: Retrieval | None = Field(description="scores after the report's rerank steps")
    asymmetric: Retrieval | None = Field(description="scores of this model's queries in the teacher's gallery")
    retention: float | None
    recall_drop: float | None = Field(description="recall@1 lost against the reference on the same queries")
    recall_drop_ci95: Interval | None = Field(description="95 % interval of recall_drop, paired, by product")
    recall_drop_upper_bound: float | None = Field(description="one-sided 95 % upper bound of recall_drop, by product")
    first_changed: Changed | None
    cosine_mean: float | None
    cosine_min: float | None
    top10_overlap: Share
    latency_ms: dict[Batch, Latency] | None = Field(description="latency by images per call")
    throughput: dict[Batch, float] | None = Field(description="images per second, by images per call")
    cold_start_ms: float | None
    peak_memory_bytes: int | None
    seen: SeenCounts | None = Field(None, description="what the model has seen of the scored data")
    skipped_queries: int | None = Field(None, description="queries left out: no gallery image has their product")
    rival: bool = Field(False, description="whether it is a model without distillation, to compare the student with")
    licences: list[str] | None = Field(None, description="licences of the weights; empty if unknown")
    notes: str

    @classmethod
    def empty(cls, name: str, stage: str, backend: str | None, precision: str | None) -> Row:
        """Return a row in which nothing has been measured."""
        known = {
            "name": name,
            "stage": stage,
            "backend": backend,
            "precision": precision,
            "reference": False,
            "rival": False,
        }
        return cls.model_validate({**dict.fromkeys(cls.model_fields), **known, "notes": ""})

    def add_note(self, note: str) -> None:
        """Append a reason to ``notes``."""
        self.notes = "; ".join(filter(None, (self.notes, note)))

    def add_timing(self, timing: Timing) -> None:
        """Copy the measured costs into the row, and the note unless the row has it already."""
        for key in Timing.model_fields:
            if key in timing.model_fields_set and key != "notes":
                setattr(self, key, getattr(timing, key))
        if timing.notes and timing.notes not in self.notes:
            self.add_note(timing.notes)
        if self.latency_ms and self.peak_memory_bytes is None:
            self.add_note("peak memory: not measured")

    @property
    def title(self) -> str:
        """Name of the model and its backend."""
        return f"{self.name} on {self.backend}" if self.backend else self.name

    def milliseconds(self, batch: str, quantile: Literal["p50", "p90", "p99"] = "p50") -> float | None:
        """Return a quantile of the latency at a batch size, or None."""
        latency = (self.latency_ms or {}).get(batch)
        return None if latency is None else float(getattr(latency, quantile))

    def milliseconds_ci95(self, batch: str) -> Interval | None:
        """Return the 95 % interval of the p50 at a batch size; None without enough calls."""
        latency = (self.latency_ms or {}).get(batch)
        low, high = latency.ci95.get("p50", (None, None)) if latency else (None, None)
        return None if low is None or high is None else (low, high)

    @property
    def instabilities(self) -> dict[str, str]:
        """Reason not to rely on a latency, by batch size."""
        return {batch: latency.unstable for batch, latency in (self.latency_ms or {}).items() if latency.unstable}


class ScoredCatalog(Part):
    """Scored split, and the checksum of all rows of its catalogue."""

    sha256: str
    split: str
    sources: list[str]
    products: dict[str, int] = Field(description="number of products by split")


class Environment(Part):
    """Hardware and package versions of the machine."""

    cpu: dict[str, Any]
    gpus: list[dict[str, Any]]


class Hit(Part):
    """Gallery image that a query found; ``image`` is a data URI."""

    product: str
    image: str
    score: float
    right: bool


class ExampleQuery(Part):
    """Query image with the nearest gallery images of each model, by the model's heading."""

    product: str
    image: str
    results: dict[str, list[Hit]]


class ChangedExamples(Part):
    """Queries whose first result an INT8 model changed; ``changed`` counts all of them."""

    model: str
    changed: int
    sheet: list[ExampleQuery]


class TensorRange(Part):
    """Calibrated range of one tensor: the threshold of every method, and the largest magnitude seen."""

    name: str
    threshold: float
    method: str
    thresholds: dict[str, float]
    largest: float


class Calibration(Part):
    """Ranges of a ``ranges`` artifact."""

    name: str
    tensors: list[TensorRange]


class LayerTrial(Part):
    """Set of quantised layers that the search evaluated."""

    quantised: list[str]
    cosine: float
    drop: float


class TestedLayers(Part):
    """Set of quantised layers that was tested on the confirmation products."""

    quantised: list[str]
    products: int
    queries: int
    drop: float
    upper_bound: float = Field(description="upper bound of the drop at the decision's confidence")
    p_value: float
    confirmed: bool


class LayerDecision(Part):
    """``decision.json`` of a mixed-precision graph, with the name of its artifact."""

    name: str
    max_recall_drop: float
    confidence: float
    confirmed: bool
    outcome: str
    quantised: list[str]
    layers: dict[str, str]
    search_products: list[str]
    single_layer_trials: list[LayerTrial]
    trials: list[LayerTrial]
    sequence: list[TestedLayers]


class SkewRow(Part):
    """Recall of the queries by one pipeline. Differences are to the preprocessing of the card, on the same queries."""

    pipeline: str = Field(description="name, such as colour.bgr; card is the preprocessing of the card")
    description: str = Field(description="what the pipeline does")
    agrees: bool = Field(description="whether the pipeline is equivalent to the card's")
    inputs_changed: float = Field(ge=0, le=1, description="share of the queries with another input of the model")
    cosine_mean: float = Field(description="mean cosine of the queries' embeddings to those by the card")
    recall_at_1: float = Field(ge=0, le=1)
    ci95: Interval | None
    drop: float = Field(description="lost recall@1")
    drop_ci95: Interval | None = Field(description="95 % interval of the drop, paired, by product")
    p_value: float | None = Field(description="of no change of recall@1, adjusted for the number of pipelines (Holm)")

    @property
    def is_significant(self) -> bool:
        """Whether recall@1 changed, with an error rate of 5 % over all pipelines."""
        return self.p_value is not None and self.p_value <= SKEW_ERROR_RATE


class Skew(Part):
    """``skew.json``: queries that other pipelines preprocess, in a gallery by the preprocessing of the card."""

    name: str
    model: str
    split: str
    queries: int
    products: int
    skipped: int
    seen: SeenCounts | None = Field(None, description="what the model has seen of the scored data")
    rows: list[SkewRow]


class Candidate(Part):
    """Row that was tested for the recommendation, on products that the report does not score."""

    title: str
    drop: float
    upper_bound: float | None
    p_value: float | None = Field(description="of a drop above the report's; null for the reference itself")
    confirmed: bool


class Selection(Part):
    """Choice of the recommended row on the validation split, by fixed-sequence testing."""

    split: str
    products: int
    queries: int
    confidence: float
    sequence: list[Candidate] = Field(description="rows from the safest to the fastest, until a test fails")
    chosen: str | None = Field(description="title of the chosen row")
    confirmed: bool = Field(description="whether the drop of the chosen row is confirmed")
    reason: str = Field(description="result of the tests in words")


class Report(Part):
    """All of ``report.json``."""

    version: int = Field(alias="schema", ge=1)
    environment: Environment
    catalog: ScoredCatalog
    threads: int = Field(ge=1)
    drop: float = Field(description="recall@1 that the recommended model may lose against the reference")
    selection: Selection | None = Field(description="null if the catalogue has no validation split to choose on")
    command: str
    rerank: dict[str, Any]
    rows: list[Row]
    sheet: list[ExampleQuery]
    changed_sheet: ChangedExamples | None
    calibrations: list[Calibration]
    decisions: list[LayerDecision]
    skews: list[Skew] = Field([], description="recall of queries that other pipelines preprocess")
    storages: list[Storage] = Field([], description="recall, bytes and time of stored galleries")

    @property
    def reference(self) -> Row | None:
        """Row of the FP32 student."""
        return next((row for row in self.rows if row.reference), None)


def read_report(path: Path | str) -> Report:
    """Read a report from its file or artifact; :class:`UserError` if it is missing, invalid or of another schema."""
    file = Path(path)
    if (file / CARD_NAME).is_file():
        file = load_artifact(file, "report").file("report.json")
    if not file.is_file():
        raise UserError(f"{path}: found no report. Pass a report.json or an output folder of `vpr bench report`.")
    if file.stat().st_size > _MAX_BYTES:
        raise UserError(f"{file}: larger than {_MAX_BYTES} bytes, so not a report. Rerun `vpr bench report`.")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{file}: the file is not JSON. Rerun `vpr bench report`.") from None
    version = values.get("schema") if isinstance(values, dict) else None
    if isinstance(version, int) and version != SCHEMA:
        remedy = "Upgrade this package" if version > SCHEMA else "Rerun `vpr bench report`"
        raise UserError(f"{file}: expected schema {SCHEMA}, got {version}. {remedy}.")
    return parse_report(values, str(file))


def parse_report(values: Any, source: str) -> Report:
    """Return JSON values as a report; :class:`UserError` that names the source and the first invalid key."""
    try:
        return Report.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "report"
        raise UserError(f"{source}: key '{key}' is invalid ({first['msg']}). Rerun `vpr bench report`.") from None
