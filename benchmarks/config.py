"""Configuration of the benchmark commands. It imports no heavy library, so that help and argument errors are quick."""

from dataclasses import dataclass
from typing import Literal

from export.config import DEFAULT_BACKENDS, check_backends, check_confidence, check_drop
from vpr.common.errors import UserError, check_numbers
from vpr.common.hardware import MAX_THREADS
from vpr.retrieval.config import (
    IndexKind,
    IndexTuning,
    Reduction,
    RerankConfig,
    Rescoring,
    VectorFormat,
)

# Steps whose cost grows as search does; k-reciprocal re-ranking takes minutes on a large gallery.
RERANK = RerankConfig(centre=True, dba=5, qe=5)


@dataclass(frozen=True)
class RecallConfig:
    """Settings of ``vpr bench recall``.

    Attributes:
        catalog: Catalogue artifact with query and gallery images.
        models: Artifacts to score: teachers, students, ONNX graphs, engines.
        output: Folder of the recall table.
        split: Split to score.
        rerank: Re-ranking steps. Every model is scored with and without them, except when leaving one out.
        leave_one_out: Take every image of the split as a query that searches all others, whatever its role. This is
            automatic where the queries and the gallery are the same images.
        skip_unmatched: Leave out queries whose product has no other gallery image, with their count in the rows.
            Otherwise such a query is an error.
        dimensions: Score the first N dimensions of the embeddings, renormalised. Teachers, the reference of the
            retention, keep all of theirs; 0 scores all dimensions of every model.
        seed: Seed of the bootstrap.
    """

    catalog: str
    models: tuple[str, ...]
    output: str
    split: str = "test"
    rerank: RerankConfig = RERANK
    leave_one_out: bool = False
    skip_unmatched: bool = False
    dimensions: int = 0
    seed: int = 0

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("leave_one_out", "skip_unmatched", "dimensions")

    def __post_init__(self) -> None:
        check_numbers(self, dimensions=(0, 1 << 16), seed=(0, None))
        if self.leave_one_out and self.rerank not in (RERANK, RerankConfig()):
            problem = "its steps compare a query with the gallery, which holds the query's own image"
            raise UserError(f"rerank: {problem}. Leave out --rerank or --leave-one-out.")


@dataclass(frozen=True)
class LatencyConfig:
    """Settings of ``vpr bench latency``.

    Attributes:
        models: Artifacts to time, each on every backend that can run it on this machine.
        output: Folder of the latency table.
        batches: Batch sizes: images per call.
        seconds: Seconds for each model and batch, after warm-up.
        threads: Threads of every backend; 0 is one per processor.
        backends: Backends to try, or ``all``. Backends that cannot run here are listed with the reason.
        starts: Cold starts of each model, for start-up time and memory; 0 skips them.
        catalog: Catalogue whose images are decoded and resized, alone and before the model; empty skips this.
        arrivals: Arrivals of an open-loop load, random (``poisson``) or even (``fixed``); ``none`` skips it.
        rate: Requests per second of the open-loop load; 0 is 80 % of the closed-loop rate.
        seed: Seed of the arrivals.
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
            raise UserError("models: expected one or more artifacts, got none. Pass --models PATH.")
        _check_batches(self.batches)
        check_numbers(self, seconds=(0, None), starts=(0, None), rate=(0, None), seed=(0, None))
        check_numbers(self, threads=(0, MAX_THREADS))
        check_backends(self.backends)


@dataclass(frozen=True)
class SkewConfig:
    """Settings of ``vpr bench skew``.

    Attributes:
        catalog: Catalogue artifact with query and gallery images.
        model: Artifact to score: teacher, student, ONNX graph or engine. It runs on its first backend here.
        output: Folder of the table.
        split: Split to score.
        pipelines: Pipelines of the queries, such as ``colour.bgr`` or ``resize.bilinear-aliased``. Empty measures all
            known ones.
        leave_one_out: Take every image of the split as a query that searches all others, whatever its role.
        skip_unmatched: Leave out queries whose product has no other gallery image. Otherwise such a query is an error.
        seed: Seed of the bootstrap.
    """

    catalog: str
    model: str
    output: str
    split: str = "test"
    pipelines: tuple[str, ...] = ()
    leave_one_out: bool = False
    skip_unmatched: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, seed=(0, None))


_MAX_SIZE = 1 << 32


@dataclass(frozen=True)
class StorageConfig:
    """Settings of ``vpr bench storage``.

    Attributes:
        embeddings: Embeddings artifact of a catalogue with its training, validation and scored split.
        output: Folder of the table.
        sizes: Sizes of the galleries, rising. Distractors fill up the gallery images of validation and scored split.
        dims: Dimensions to keep. Empty takes all of them, a half, a quarter and an eighth.
        reductions: Ways to fewer dimensions: ``pca`` keeps the first principal directions of the training products,
            ``truncate`` the first dimensions, for students with nested embeddings.
        formats: Vector formats. Empty takes those that the training vectors suffice for. ``float32`` at full width in
            a ``flat`` index is always measured.
        indexes: Kinds of index. ``shortlist`` rescores results in ``pq`` or ``binary``, ``ivf-shortlist`` in ``pq``.
            Empty takes those that the training vectors suffice for.
        rescoring: Format of the vectors that rescore a short list. Their bytes count.
        distractors: Folder of images of other products, embeddings artifact of them by the same model, or NumPy file
            (``.npy``) of such vectors, (n, dim) float32. Synthetic vectors around training images fill the remaining
            places.
        model: Model artifact of ``embeddings``, which embeds a folder of distractors. Both the catalogue of the folder
            and its embeddings are written into ``OUTPUT.distractors``.
        reference: Embeddings artifact of the same images by another model, such as the teacher or the FP32 student. The
            drop is then that of model and storage together. Empty compares with the exact search of ``embeddings``.
        reference_distractors: Distractors by the model of ``reference``, in the same order. Not needed for a folder.
        reference_model: Model artifact of ``reference``, which embeds a folder of distractors too.
        split: Split that the table scores. Settings are chosen and confirmed on the validation split.
        max_recall_drop: Largest drop of recall@1, such as 0.01. Settings are chosen on a third of the products of the
            validation split, and the drop is confirmed on the others. None measures only.
        confidence: Confidence that the true drop of the confirmed setting is within ``max_recall_drop``.
        max_ms: Largest p50 of a query in milliseconds for a setting to be chosen. None sets no limit.
        narrow: Leave out of the larger galleries what the search rules out in a smaller one: settings that lose more
            than twice the budget there, or whose query takes longer than ``max_ms``.
        queries: Maximum number of queries of each split.
        batch: Queries per call; single queries are timed too.
        tuning: Search effort of approximate indexes.
        threads: Threads of the search; 0 is one per processor.
        seconds: Seconds of timing for each setting; at least one query is timed.
        build_seconds: Longest expected build of an index; slower settings are left out.
        seed: Seed of the synthetic vectors, of the choice of queries, and of the division of the validation products.
    """

    embeddings: str
    output: str
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    dims: tuple[int, ...] = ()
    reductions: tuple[Reduction, ...] = ("pca",)
    formats: tuple[VectorFormat, ...] = ()
    indexes: tuple[IndexKind, ...] = ()
    rescoring: Rescoring = "int8"
    distractors: str = ""
    model: str = ""
    reference: str = ""
    reference_distractors: str = ""
    reference_model: str = ""
    split: str = "test"
    max_recall_drop: float | None = None
    confidence: float = 0.95
    max_ms: float | None = None
    narrow: bool = False
    queries: int = 2000
    batch: int = 100
    tuning: IndexTuning = IndexTuning()
    threads: int = 0
    seconds: float = 1.0
    build_seconds: float = 300.0
    seed: int = 0

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("model", "reference_model", "narrow")

    def __post_init__(self) -> None:
        largest = (1 << 31) - 1  # faiss counts in 32 bits
        check_numbers(self, queries=(1, largest), batch=(1, largest), threads=(0, MAX_THREADS), seed=(0, None))
        check_numbers(self, seconds=(0, None), build_seconds=(0, None))
        check_drop("max_recall_drop", self.max_recall_drop)
        check_confidence("confidence", self.confidence)
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            raise UserError(f"sizes: expected rising numbers of vectors, got {list(self.sizes)}. Change --sizes.")
        if not 10 <= self.sizes[0] <= self.sizes[-1] <= _MAX_SIZE:  # ten neighbours are compared
            raise UserError(f"sizes: expected 10 to {_MAX_SIZE}, got {list(self.sizes)}. Change --sizes.")
        if any(dims < 1 for dims in self.dims):
            raise UserError(f"dims: expected numbers of 1 or more, got {list(self.dims)}. Change --dims.")
        if not self.reductions:
            raise UserError("reductions: expected one or more, got none. Leave out --reductions.")
        if self.max_ms is not None and not self.max_ms > 0:
            raise UserError(f"max_ms: expected more than 0, got {self.max_ms}.")
        if self.split == "validation":
            raise UserError("split: settings are chosen on the validation split. Score another one, such as test.")
        paired = self.reference_distractors or self.reference_model
        if bool(paired) != bool(self.reference and self.distractors):
            problem = "needs reference and distractors, and these two need it, or reference_model for a folder"
            raise UserError(f"reference_distractors: {problem}. Set all three, or leave one of the others out.")
        if self.max_recall_drop is None and self.max_ms is not None:
            raise UserError("max_ms: limits the settings of a budget. Set --max-recall-drop, or leave out --max-ms.")
        if self.max_recall_drop is None and self.narrow:
            raise UserError("narrow: compares settings with a budget. Set --max-recall-drop, or leave out --narrow.")


@dataclass(frozen=True)
class ReportConfig:
    """Settings of ``vpr bench report``.

    Attributes:
        catalog: Catalogue artifact with query and gallery images.
        models: Artifacts to compare: teacher, assistants, student, ONNX graphs, engines.
        output: Folder of the report.
        rivals: Models that need no distillation, such as an untrained tower, or a small tower that was fine-tuned
            directly. The report says whether the student is ahead of each.
        split: Split to score.
        batches: Batch sizes of the latency: images per call.
        seconds: Seconds for each model and batch, after warm-up.
        threads: Threads of every backend; 0 is one per processor.
        drop: Recall@1 that the recommended model may lose against the FP32 student.
        confidence: Confidence that its true drop is within ``drop``. The choice is made on the validation split.
        rerank: Re-ranking steps. Every model is scored with and without them.
        skip_unmatched: Leave out queries whose product has no gallery image, with their count in the rows. Otherwise
            such a query is an error.
        ranges: Artifacts of ``vpr calibrate`` to draw.
        skew: Artifacts of ``vpr bench skew`` to draw.
        storage: Artifacts of ``vpr bench storage`` to draw.
        sheet_queries: Number of example queries with their top five.
        seed: Seed of the bootstrap and of the example queries.
    """

    catalog: str
    models: tuple[str, ...]
    output: str
    rivals: tuple[str, ...] = ()
    split: str = "test"
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 1.5
    threads: int = 0
    drop: float = 0.02
    confidence: float = 0.95
    rerank: RerankConfig = RERANK
    skip_unmatched: bool = False
    ranges: tuple[str, ...] = ()
    skew: tuple[str, ...] = ()
    storage: tuple[str, ...] = ()
    sheet_queries: int = 12
    seed: int = 0

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("skip_unmatched", "rivals", "skew", "storage")

    def __post_init__(self) -> None:
        check_numbers(self, seconds=(0, None), threads=(0, MAX_THREADS), sheet_queries=(0, None), seed=(0, None))
        check_drop("drop", self.drop)
        check_confidence("confidence", self.confidence)
        _check_batches(self.batches)


@dataclass(frozen=True)
class CompareConfig:
    """Settings of ``vpr bench compare``: two reports of the same queries, and optional budgets.

    Attributes:
        before: First report: a report.json or the folder that contains it.
        after: Second report: a report.json or the folder that contains it.
        max_recall_drop: Largest drop of recall@1 of any model, such as 0.01.
        max_latency_ratio: Largest ratio of p50 after to p50 before, of any model and batch, such as 1.1.
        max_size_ratio: Largest ratio of bytes after to bytes before, of any model.
        latency_noise: Relative difference of p50 that counts as noise.
        seed: Seed of the bootstrap.
    """

    before: str
    after: str
    max_recall_drop: float | None = None
    max_latency_ratio: float | None = None
    max_size_ratio: float | None = None
    latency_noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_drop("max_recall_drop", self.max_recall_drop, lowest=-1)
        for name in ("max_latency_ratio", "max_size_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not ratio > 0:
                raise UserError(f"{name}: expected a ratio above 0, such as 1.1, got {ratio}.")
        check_numbers(self, latency_noise=(0, None), seed=(0, None))


def _check_batches(batches: tuple[int, ...]) -> None:
    if not batches or min(batches) < 1:
        raise UserError(f"batches: expected batch sizes of 1 or more, got {list(batches)}. Change --batches.")
