"""Configuration of embedding, search and re-ranking. Imports no heavy library, so help and errors are instant."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vpr.artifacts.paths import check_file
from vpr.common.distributed import rank_and_world
from vpr.common.errors import UserError, check_numbers
from vpr.common.hardware import MAX_THREADS


@dataclass(frozen=True)
class EmbedConfig:
    """Embedding of a catalogue.

    Attributes:
        model: Model artifact.
        catalog: Catalogue artifact.
        output: Path of the embeddings artifact to write.
        split: Split to embed; empty embeds all splits.
        batch_size: Images per batch.
        threads: Background decoding threads per process; 0 decodes in the calling thread.
        images_per_part: Images per part, rounded up to full batches. A killed job repeats at most its unfinished parts.
        ray: Workers of a Ray Data job (``requirements-scale.txt``); 0 embeds in this process, or in those of torchrun.
        dimensions: Keep the first N dimensions, renormalised, as nested students are trained for; 0 keeps all.
    """

    model: str
    catalog: str
    output: str
    split: str = ""
    batch_size: int = 64
    threads: int = 2
    images_per_part: int = 4096
    ray: int = 0
    dimensions: int = 0

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("dimensions",)

    def __post_init__(self) -> None:
        check_numbers(self, batch_size=(1, 1 << 16), threads=(0, MAX_THREADS), dimensions=(0, 1 << 16))
        check_numbers(self, images_per_part=(1, 1 << 24), ray=(0, 4096))
        if self.ray and rank_and_world()[1] > 1:
            raise UserError("ray: a Ray job starts its own workers. Run the command without torchrun.")


VectorFormat = Literal["float32", "float16", "int8", "rabitq4", "rabitq3", "rabitq2", "pq", "binary"]
IndexKind = Literal["flat", "hnsw", "ivf", "shortlist", "ivf-shortlist"]
Reduction = Literal["pca", "truncate"]
Rescoring = Literal["float32", "float16", "int8"]

VECTOR_FORMATS: tuple[VectorFormat, ...] = get_args(VectorFormat)
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


@dataclass(frozen=True)
class IndexTuning:
    """Search effort of approximate indexes.

    Attributes:
        nprobe: Lists that an IVF index searches for a query.
        ef_search: Candidates that HNSW keeps for a query.
        shortlist: Vectors of the short list that are rescored.
    """

    nprobe: int = 16
    ef_search: int = 128
    shortlist: int = 100

    def __post_init__(self) -> None:
        largest = (1 << 31) - 1  # faiss counts in 32 bits
        check_numbers(self, "tuning.", nprobe=(1, largest), ef_search=(1, largest), shortlist=(10, largest))


@dataclass(frozen=True)
class RerankConfig:
    """Steps between the embeddings and the ranking, in this order; all are off by default.

    Attributes:
        centre: Subtract the mean of the gallery.
        whiten: Principal directions of the gallery to keep, each scaled to unit variance; 0 does not whiten.
        dba: Neighbours that each gallery vector is averaged with (database augmentation); 0 does not augment.
        qe: Gallery neighbours that each query is averaged with (query expansion); 0 does not expand.
        alpha: Power of the similarity that weights a neighbour in ``dba`` and ``qe``.
        k_reciprocal: Re-rank by the overlap of reciprocal neighbourhoods.
        k1: Neighbours in a neighbourhood.
        k2: Neighbours whose neighbourhood encodings are averaged; 1 does not average.
        original_weight: Weight of the original distance in the final one, lambda in the paper.
    """

    centre: bool = False
    whiten: int = 0
    dba: int = 0
    qe: int = 0
    alpha: float = 3.0
    k_reciprocal: bool = False
    k1: int = 20
    k2: int = 6
    original_weight: float = 0.3

    def __post_init__(self) -> None:
        check_numbers(self, "rerank.", whiten=(0, None), dba=(0, None), qe=(0, None), k1=(1, None), k2=(1, None))
        check_numbers(self, "rerank.", original_weight=(0, 1))
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"rerank.alpha: expected a finite number of 0 or more, got {self.alpha}.")


@dataclass(frozen=True)
class SearchConfig:
    """Search of queries in a gallery.

    Attributes:
        queries: Embeddings artifact with the ``query`` images; without that role, all its images are queries.
        gallery: Embeddings artifact of the same model with the ``gallery`` images to search.
        output: CSV file for the results; empty prints the first queries only.
        k: Results per query.
        rerank: Steps between the embeddings and the ranking.
        submission: NumPy file (``.npy``) for the AIcrowd Visual Product Recognition challenge. Holds (queries, 1000)
            int64 gallery indices; both are numbered in the order of their tables.
        threshold: Artifact of ``vpr gallery threshold``. Queries below its threshold get no match; empty answers all.
    """

    queries: str
    gallery: str
    output: str = ""
    k: int = 5
    rerank: RerankConfig = RerankConfig()
    submission: str = ""
    threshold: str = ""

    def __post_init__(self) -> None:
        check_numbers(self, k=(1, None))
        if self.threshold and self.rerank != RerankConfig():
            raise UserError("threshold: re-ranking changes the scores that it limits. Leave out --rerank.")
        if self.threshold and self.submission:
            raise UserError("threshold: a submission has no 'no match'. Leave out --submission.")
        check_file("output", self.output)
        check_file("submission", self.submission)
        if self.submission and self.output and Path(self.submission).resolve() == Path(self.output).resolve():
            raise UserError(f"submission: {self.submission} is the output file too. Choose another file.")


ScoreName = Literal["similarity", "margin", "probability"]


@dataclass(frozen=True)
class ThresholdConfig:
    """Threshold below which a search answers "no match", with a bound on false accepts.

    Some products with queries are removed from the gallery, drawn at random. An answer to one of their queries is a
    false accept.

    Attributes:
        embeddings: Embeddings artifact with ``query`` and ``gallery`` images. All its gallery images are searched.
        output: Folder of the threshold.
        max_false_accept: Largest share of queries of absent products that may be answered.
        confidence: Probability that the true share is within ``max_false_accept``.
        split: Split of the queries; the model must not have learned from it. Empty takes all splits.
        score: Score of a query's best image: its cosine (``similarity``), its distance to the best image of another
            product (``margin``), or the ``probability`` that its product is right, fitted to both.
        absent: Share of the products to remove from the gallery.
        fit: Share of the products that fit the probability. The other products confirm the threshold.
        compare: Embeddings artifacts of the same images with other models, such as INT8, or with other formats. The
            result says how far their threshold is away.
        seed: Seed of the draw.
    """

    embeddings: str
    output: str
    max_false_accept: float = 0.01
    confidence: float = 0.95
    split: str = "validation"
    score: ScoreName = "probability"
    absent: float = 0.5
    fit: float = 0.2
    compare: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, seed=(0, None))
        for name in ("max_false_accept", "confidence", "absent", "fit"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class CatalogCheckConfig:
    """Suspicious images and products of an embedded catalogue, or a cleaned catalogue.

    Without ``apply`` the command writes ``findings.csv`` and ``findings.html``. With ``apply`` it writes a catalogue.
    Cosines are comparable for one model only. Embed with a model that was not trained on this catalogue.

    Attributes:
        embeddings: Embeddings artifact of the catalogue, or of one of its splits.
        output: Folder of the findings, or of the cleaned catalogue.
        catalog: Catalogue artifact of the embeddings. Empty takes the path that is recorded in the embeddings.
        apply: CSV file with the columns ``image`` and ``decision``: ``keep``, ``drop``, ``move PRODUCT`` or
            ``merge PRODUCT``. A column ``product`` distinguishes rows of the same image.
        outlier: Report images whose mean cosine to the other images of their product is below this. Empty takes the
            mean cosine of two images of different products.
        duplicate: Report images of different products with this cosine or more. Empty takes a distance of 5 % of that
            between images of different products.
        merge: Report products to merge with this overlap or more; 1 is as similar as one product is to itself.
        confusable: Report confusable products with this overlap or more.
        shown: Findings of each kind in ``findings.html``; ``findings.csv`` has all.
    """

    embeddings: str
    output: str
    catalog: str = ""
    apply: str = ""
    outlier: float | None = None
    duplicate: float | None = None
    merge: float = 0.5
    confusable: float = 0.2
    shown: int = 60

    def __post_init__(self) -> None:
        if self.outlier is not None:
            check_numbers(self, outlier=(-1, 1))
        if self.duplicate is not None:
            check_numbers(self, duplicate=(-1, 1))
        check_numbers(self, merge=(0, 1), confusable=(0, 1), shown=(0, 10000))
        if self.confusable > self.merge:
            raise UserError(f"confusable: expected at most the value of merge, {self.merge}, got {self.confusable}.")
