"""Configuration of the benchmark commands. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from export.config import DEFAULT_BACKENDS, check_backends
from vpr.common.errors import UserError, check_numbers
from vpr.common.hardware import MAX_THREADS
from vpr.retrieval.config import RerankConfig

# Those of the steps whose cost grows as search does; k-reciprocal re-ranking takes minutes on a large gallery.
RERANK = RerankConfig(centre=True, dba=5, qe=5)


@dataclass(frozen=True)
class RecallConfig:
    """What is scored.

    Attributes:
        catalog: catalogue artifact with query and gallery images.
        models: artifacts.
        output: where the table is written.
        split: the scored split.
        rerank: steps after the embedding that every model is scored with as well, besides being scored without.
        seed: of the bootstrap.
    """

    catalog: str
    models: tuple[str, ...]
    output: str
    split: str = "test"
    rerank: RerankConfig = RERANK
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, seed=(0, None))


@dataclass(frozen=True)
class LatencyConfig:
    """What is timed.

    Attributes:
        models: artifacts; each is timed with every backend that can run it here.
        output: where the table is written.
        batches: images per call.
        seconds: time spent on each model and batch, after warm-up.
        threads: of every backend alike; 0 is one per processor.
        backends: names of those tried, or ``all``; what cannot run here is listed with the reason.
        starts: processes in which each model is started alone, for cold start and memory; 0 leaves that out.
        catalog: whose images are decoded and resized, alone and before the model; empty leaves that out.
        arrivals: times each model on requests that come at a given rate, at random (``poisson``) or evenly (``fixed``).
        rate: of them, requests per second; 0 is 80 % of what the model answers one after another.
        seed: of the arrivals.
    """

    models: tuple[str, ...]
    output: str
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 1.5
    threads: int = 0
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    starts: int = 1
    catalog: str = ""
    arrivals: Literal["none", "poisson", "fixed"] = "none"
    rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("models: none given: name at least one artifact")
        if not self.batches or min(self.batches) < 1:
            raise UserError(f"batches: {list(self.batches)}: give one or more, each of 1 or more images")
        least = (0, None)
        check_numbers(self, threads=(0, MAX_THREADS), seconds=least, starts=least, rate=least, seed=least)
        check_backends(self.backends)


Kind = Literal["flat", "flat-fp16", "flat-int8", "ivf-flat", "ivf-int8", "ivf-pq", "hnsw"]

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ScaleConfig:
    """What is searched, how.

    Attributes:
        embeddings: artifact with ``query`` images; all others are the real part of the gallery.
        output: where the table is written.
        sizes: of the galleries, rising.
        kinds: of index; ``flat`` is exact, and the others are compared with it.
        queries: at most this many of the artifact's.
        batch: queries in a call, beside single ones.
        probes: lists that an IVF index looks through for a query.
        ef: candidates that HNSW keeps for a query.
        seconds: that each way of searching is timed for, at least one call.
        build_seconds: an index that would take longer, by its filling at the size before, is left out.
        seed: of the synthetic vectors and of the choice of queries.
    """

    embeddings: str
    output: str
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    kinds: tuple[Kind, ...] = KINDS
    queries: int = 1000
    batch: int = 100
    probes: int = 16
    ef: int = 128
    seconds: float = 3.0
    build_seconds: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = (1, None)
        check_numbers(self, queries=least, batch=least, probes=least, ef=least, seed=(0, None))
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            raise UserError(f"sizes: {list(self.sizes)}: give rising numbers of vectors")


@dataclass(frozen=True)
class ReportConfig:
    """What is compared.

    Attributes:
        catalog: catalogue artifact with query and gallery images.
        models: artifacts: teacher, assistants, student, ONNX graphs, engines.
        output: where the report is written.
        split: the scored split.
        batches: images per call, for latency.
        seconds: time spent on each model and batch.
        threads: of every backend alike; 0 is one per processor.
        drop: recall@1 that the recommended model may lose against the FP32 student.
        rerank: steps after the embedding that every model is scored with as well, besides being scored without.
        ranges: artifacts of ``vpr calibrate`` to draw.
        sheet_queries: queries shown with their top five.
        seed: of the bootstrap and of the queries shown.
    """

    catalog: str
    models: tuple[str, ...]
    output: str
    split: str = "test"
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 1.5
    threads: int = 0
    drop: float = 0.02
    rerank: RerankConfig = RERANK
    ranges: tuple[str, ...] = ()
    sheet_queries: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, seconds=(0, None), threads=(0, MAX_THREADS), sheet_queries=(0, None), seed=(0, None))
        if not -1 <= self.drop <= 1:
            raise UserError(f"drop: {self.drop}: it is a share of queries, such as 0.02")
        if not self.batches or min(self.batches) < 1:
            raise UserError(f"batches: {list(self.batches)}: give at least one number of images, 1 or more")


@dataclass(frozen=True)
class CompareConfig:
    """Two reports of the same queries, and what may not get worse by more. Without a budget nothing is broken.

    Attributes:
        before: report.json, or the folder that it lies in.
        after: the other one.
        max_recall_drop: of recall@1, of any model, such as 0.01.
        max_latency_ratio: p50 over that before, of any model and batch, such as 1.1.
        max_size_ratio: bytes over those before, of any model.
        latency_noise: p50s whose ratio departs from 1 by no more than this are equal.
        seed: of the bootstrap.
    """

    before: str
    after: str
    max_recall_drop: float | None = None
    max_latency_ratio: float | None = None
    max_size_ratio: float | None = None
    latency_noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_recall_drop is not None and not -1 <= self.max_recall_drop <= 1:
            raise UserError(f"max_recall_drop: {self.max_recall_drop}: it is a share of queries, such as 0.01")
        for name in ("max_latency_ratio", "max_size_ratio"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name}: {getattr(self, name)}: give a ratio above 0, such as 1.1")
        check_numbers(self, latency_noise=(0, None), seed=(0, None))
