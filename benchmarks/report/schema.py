"""The form of ``report.json``: what is written is checked by it, what is read too, and its JSON schema lies beside it.

Keys that are not named here are kept: a later version may measure more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError

SCHEMA = 1
Share = Annotated[float, Field(ge=0, le=1)] | None
Interval = tuple[float, float] | None
Batch = Annotated[str, Field(pattern="^[1-9][0-9]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Latency(_Part):
    """Milliseconds of one call; quantiles over the calls."""

    p50: float = Field(gt=0)
    p90: float = Field(gt=0)
    p99: float = Field(gt=0)
    ci95: dict[str, tuple[float | None, float | None]] = Field({}, description="of the quantiles, by name")
    unstable: str | None = Field(None, description="why these are not to be relied on")


class Retrieval(_Part):
    """Recall and mean average precision, with the bootstrap interval of recall@1."""

    recall_at_1: float = Field(ge=0, le=1)
    recall_at_5: float = Field(ge=0, le=1)
    recall_at_10: float = Field(ge=0, le=1)
    map: float = Field(ge=0, le=1)
    map_at_1000: float = Field(ge=0, le=1)
    ci95: tuple[float, float]


class Category(_Part):
    """Recall@1 of the queries of one category."""

    queries: int = Field(ge=1)
    recall_at_1: float = Field(ge=0, le=1)
    ci95: tuple[float, float]


class Changed(_Part):
    """Queries with another first result than the FP32 student's, and how many of them that put right or wrong."""

    queries: int = Field(ge=0)
    right: int = Field(ge=0)
    wrong: int = Field(ge=0)


class Row(_Part):
    """A model on a backend; what was not measured is null, with the reason in ``notes``."""

    name: str
    stage: Literal["baseline", "teacher", "student", "onnx", "engine"]
    backend: str | None
    precision: str | None
    reference: bool = Field(description="whether this is the FP32 student that differences are taken to")
    params: int | None
    size_bytes: int | None
    recall_at_1: Share
    recall_at_5: Share
    recall_at_10: Share
    map: Share
    map_at_1000: Share
    queries: int | None
    gallery: int | None
    ci95: Interval = Field(description="95 % bootstrap interval of recall_at_1 over the queries")
    hits: str | None = Field(
        pattern="^[01]+$", description="for each query, by image and box, whether its first result is right"
    )
    by_category: dict[str, Category] | None
    reranked: Retrieval | None = Field(description="after the report's rerank steps")
    asymmetric: Retrieval | None = Field(description="this model's queries in the teacher's gallery")
    retention: float | None
    recall_drop: float | None = Field(description="recall@1 lost against the reference on the same queries")
    recall_drop_ci95: Interval = Field(description="of the paired bootstrap")
    first_changed: Changed | None
    cosine_mean: float | None
    cosine_min: float | None
    top10_overlap: Share
    latency_ms: dict[Batch, Latency] | None = Field(description="by images per call")
    throughput: dict[Batch, float] | None = Field(description="images per second, by images per call")
    cold_start_ms: float | None
    peak_memory_bytes: int | None
    notes: str


class Catalog(_Part):
    """What was scored: the checksum of the whole catalogue's rows, and which split of it."""

    sha256: str
    split: str
    sources: list[str]
    products: dict[str, int] = Field(description="by split")


class Environment(_Part):
    """The machine and the versions of what ran on it."""

    cpu: dict[str, Any]
    gpus: list[dict[str, Any]]


class Report(_Part):
    """The whole of ``report.json``."""

    version: int = Field(alias="schema", ge=1)
    environment: Environment
    catalog: Catalog
    threads: int = Field(ge=1)
    drop: float = Field(description="recall@1 that the recommended model may lose against the reference")
    command: str
    rerank: dict[str, Any]
    rows: list[Row]
    sheet: list[dict[str, Any]]
    changed_sheet: dict[str, Any] | None
    calibrations: list[dict[str, Any]]
    decisions: list[dict[str, Any]]


def json_schema() -> dict[str, Any]:
    """The JSON schema of ``report.json``."""
    return Report.model_json_schema(by_alias=True)


def read_report(path: Path | str) -> dict[str, Any]:
    """A report, by its file or the artifact that holds it, as JSON values.

    Raises:
        UserError: no report, of a newer form, or not of the form.
    """
    file = Path(path)
    if (file / CARD_NAME).is_file():
        file = load_artifact(file, "report").file("report.json")
    if not file.is_file():
        raise UserError(f"{path}: no report here: give a report.json, or the folder that 'vpr bench report' wrote")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{file}: not JSON: make the report again") from None
    version = values.get("schema") if isinstance(values, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise UserError(
            f"{file}: form {version}, this version reads up to {SCHEMA}: upgrade visual-product-recognition"
        )
    check(values, str(file))
    return values


def check(values: Any, where: str) -> None:
    """Refuse what is not of the form, naming the first key that is wrong."""
    try:
        Report.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "report"
        raise UserError(f"{where}: key '{key}': {first['msg']}: make it again by 'vpr bench report'") from None
