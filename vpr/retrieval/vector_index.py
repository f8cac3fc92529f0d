"""Vector formats, dimensions and search indexes of a gallery, all built by faiss.

An index takes vectors of the model's full width: the reduction to fewer dimensions is part of it. Everything that is
fitted (principal directions, ranges, codebooks, lists) is fitted on training vectors and never on those that it stores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpr.common.errors import UserError
from vpr.retrieval.config import IndexKind, IndexTuning, Reduction, Rescoring, VectorFormat
from vpr.retrieval.projection import principal_directions

Vectors = NDArray[np.float32]
PQ_CODES = 256  # codes of a part of the vector; each needs a training vector
_PQ_PART = 4  # dimensions that share a byte
_PQ_POINTS, _PQ_ROUNDS = 64, 10  # training vectors of a code, rounds of k-means
_POINTS_PER_LIST = 39  # below this number of training vectors per list, faiss warns of poor lists
_HNSW_LINKS = 32
_TOP = 10  # results that the length of a short list is given for
_ROTATION_SEED = 0
_FACTORY: dict[str, str] = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}
# RaBitQ: Gao and Long, "Quantizing High-Dimensional Vectors with a Theoretical Error Bound", SIGMOD 2024, and with more
# bits, Gao et al., "Practical and Asymptotically Optimal Quantization", SIGMOD 2025. "fs": compared in SIMD registers.
_RABITQ: tuple[VectorFormat, ...] = ("rabitq4", "rabitq3", "rabitq2")
_FACTORY |= {name: f"RaBitQfs{name[-1]}" for name in _RABITQ}
_UNIT = 1e-3  # tolerated deviation of a length from 1
# Formats of each index. HNSW and IVF of faiss store no sign bits; only codes too coarse to rank by are rescored.
_FORMATS: dict[IndexKind, tuple[VectorFormat, ...]] = {
    "flat": ("float32", "float16", "int8", *_RABITQ, "pq", "binary"),
    "hnsw": ("float32", "float16", "int8", "pq"),
    "ivf": ("float32", "float16", "int8", *_RABITQ, "pq"),
    "shortlist": ("pq", "binary"),
    "ivf-shortlist": ("pq",),
}


@dataclass(frozen=True)
class StorageSetting:
    """How vectors are stored and searched.

    Attributes:
        dims: Dimensions that are kept.
        reduction: Way to fewer dimensions; None at full width.
        format: Format of the vectors. ``int8`` has a range for each dimension, ``pq`` has a byte for 4 dimensions,
            ``binary`` has a bit for each dimension. ``rabitq3`` has 3 bits, and 20 bytes for each vector.
        index: Search index. ``shortlist`` finds a short list with the format, and rescores it.
        rescoring: Format of the vectors that rescore a short list; None without one.
    """

    dims: int
    reduction: Reduction | None
    format: VectorFormat
    index: IndexKind
    rescoring: Rescoring | None = None

    @property
    def name(self) -> str:
        """Words that identify the setting."""
        reduced = f" ({self.reduction})" if self.reduction else ""
        rescored = f", rescored in {self.rescoring}" if self.rescoring else ""
        return f"{self.dims} dimensions{reduced} {self.format} {self.index}{rescored}"

    @property
    def is_rotated(self) -> bool:
        """Whether dimensions are mixed, as codes of equal size for all of them need equal variances."""
        return self.format in ("pq", "binary", *_RABITQ)

    @property
    def is_rescored(self) -> bool:
        """Whether the index finds a short list, and rescores it in the format ``rescoring``."""
        return "shortlist" in self.index


def is_possible(format_name: VectorFormat, index: IndexKind) -> bool:
    """Return whether faiss has an index of this kind with this format."""
    return format_name in _FORMATS[index]


def count_lists(size: int, training: int) -> int:
    """Return the number of IVF lists: the root of the gallery's size, with 39 training vectors or more for each."""
    return max(1, min(round(size**0.5), training // _POINTS_PER_LIST))


def find_problem(setting: StorageSetting, width: int, training: int) -> str:
    """Return why a setting cannot be fitted on ``training`` vectors of ``width`` dimensions; empty if it can.

    The problem starts with the key to change: ``dims``, ``indexes`` or ``formats``.
    """
    if setting.dims > width:
        return f"dims: expected at most {width}, the dimensions of the embeddings, got {setting.dims}. Change --dims."
    needs = {
        "dims": (f"{setting.dims} principal directions", setting.dims if setting.reduction == "pca" else 0),
        "indexes": (setting.index, _POINTS_PER_LIST if setting.index in ("ivf", "ivf-shortlist") else 0),
        "formats": (setting.format, PQ_CODES if setting.format == "pq" else 1),
    }
    for key, (use, needed) in needs.items():
        if training < needed:
            return f"{key}: {use} needs {needed} training vectors, got {training}. Add training images."
    return ""


def check_vectors(vectors: Vectors, name: str, width: int) -> None:
    """Raise :class:`UserError` unless vectors are (n, ``width``) float32, finite and of length 1."""
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise UserError(f"{name}: expected a (n, {width}) float32 array, got {vectors.shape} {vectors.dtype}.")
    if vectors.shape[1] != width:
        raise UserError(f"{name}: expected {width} dimensions, got {vectors.shape[1]}. Embed both with one model.")
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(lengths).all():
        raise UserError(f"{name}: the vectors contain NaN or infinity. Embed the images again.")
    if not (np.abs(lengths - 1) < _UNIT).all():
        raise UserError(f"{name}: the vectors are not of length 1. Normalise them.")


def fit_reduction(setting: StorageSetting, training: Vectors) -> list[Any]:
    """Return faiss transforms to the stored dimensions, fitted on (n, D) training vectors.

    The result has unit length again. Principal directions are nested: fewer of them are the first ones of more.
    """
    import faiss

    width = training.shape[1]
    transforms: list[Any] = []
    if setting.reduction == "pca":
        linear = faiss.LinearTransform(width, setting.dims, False)
        directions = principal_directions(training, setting.dims).numpy().T
        faiss.copy_array_to_vector(np.ascontiguousarray(directions).ravel(), linear.A)
        linear.is_trained = True
        transforms.append(linear)
    elif setting.reduction == "truncate":
        first: Any = faiss.RemapDimensionsTransform(width, setting.dims, False)  # type: ignore[arg-type]
        transforms.append(first)
    if setting.reduction:
        transforms.append(faiss.NormalizationTransform(setting.dims, 2.0))
    if setting.is_rotated:
        rotation = faiss.RandomRotationMatrix(setting.dims, setting.dims)
        rotation.init(_ROTATION_SEED)
        transforms.append(rotation)
    return transforms


def reduce_vectors(transforms: Sequence[Any], vectors: Vectors) -> Vectors:
    """Return (n, d) float32 vectors after the transforms."""
    for transform in transforms:
        vectors = transform.apply(vectors)
    return vectors


def build_reduced(setting: StorageSetting, training: Vectors, vectors: Vectors, tuning: IndexTuning) -> Any:
    """Return a faiss index of (n, d) reduced vectors, fitted on reduced training vectors."""
    import faiss

    index = _empty_index(setting, len(training), len(vectors), tuning)
    threads = faiss.omp_get_max_threads()
    if setting.format == "pq":
        # Its thousands of short parallel loops wait for each other on busy cores: 0.7 s of CPU time became 3.7 s.
        faiss.omp_set_num_threads(1)
    try:
        index.train(training)
    finally:
        faiss.omp_set_num_threads(threads)
    index.add(vectors)
    return index


def build_index(setting: StorageSetting, training: Vectors, vectors: Vectors, tuning: IndexTuning) -> Any:
    """Return a faiss index of (n, D) unit vectors, fitted on (m, D) training vectors; it takes queries of D dimensions.

    Raises:
        UserError: The training vectors are too few, or have fewer dimensions than are to be kept.
    """
    if problem := find_problem(setting, training.shape[1], len(training)):
        raise UserError(problem)
    transforms = fit_reduction(setting, training)
    fitted, stored = reduce_vectors(transforms, training), reduce_vectors(transforms, vectors)
    return join(transforms, build_reduced(setting, fitted, stored, tuning))


def join(transforms: Sequence[Any], index: Any) -> Any:
    """Return the index with the transforms before it; a query then has the model's full width."""
    import faiss

    if not transforms:
        return index
    joined = faiss.IndexPreTransform(index)
    for transform in reversed(transforms):
        joined.prepend_transform(transform)
    return joined


def measure_bytes(index: Any) -> int:
    """Return the bytes of the written index: codes, links, lists, codebooks and the reduction."""
    import faiss

    total = 0

    def count(data: bytes) -> None:
        nonlocal total
        total += len(data)

    writer = faiss.PyCallbackIOWriter(count)  # type: ignore[attr-defined]
    faiss.write_index(index, writer)
    del writer  # flushes its buffer
    return total


def _empty_index(setting: StorageSetting, training: int, size: int, tuning: IndexTuning) -> Any:
    import faiss

    metric, dims = faiss.METRIC_INNER_PRODUCT, setting.dims
    if setting.format == "binary":
        # The signs of the differences to the medians of the training vectors.
        index: Any = faiss.IndexLSH(dims, dims, False, True)
        index.metric_type = metric  # of the rescoring; the search itself counts bits
    else:
        # np: without the training for polysemous search, which takes seconds for each part and is not used here.
        codes = _FACTORY.get(setting.format) or f"PQ{_count_parts(dims)}np"
        lists = f"IVF{count_lists(size, training)}"
        prefix = {"hnsw": f"HNSW{_HNSW_LINKS},", "ivf": f"{lists},", "ivf-shortlist": f"{lists},"}
        index = faiss.index_factory(dims, f"{prefix.get(setting.index, '')}{codes}", metric)
    _tune(index, setting, tuning)
    if setting.rescoring is None:
        return index
    refined = faiss.IndexRefine(index, faiss.index_factory(dims, _FACTORY[setting.rescoring], metric))
    refined.k_factor = tuning.shortlist / _TOP
    return refined


def _tune(index: Any, setting: StorageSetting, tuning: IndexTuning) -> None:
    import faiss

    if setting.index in ("ivf", "ivf-shortlist"):
        index.nprobe = tuning.nprobe
    quantised = index
    if setting.index == "hnsw":
        index.hnsw.efSearch = max(tuning.ef_search, _TOP)
        quantised = faiss.downcast_index(index.storage)
    if setting.format == "pq":
        parameters = quantised.pq.cp
        parameters.min_points_per_centroid = 1  # faiss would warn for each part
        # faiss's 256 points of a code and 25 rounds take ten times as long.
        parameters.max_points_per_centroid, parameters.niter = _PQ_POINTS, _PQ_ROUNDS


def _count_parts(dims: int) -> int:
    """Return the number of equal parts of a vector, of 4 dimensions or more each."""
    return max(number for number in range(1, max(1, dims // _PQ_PART) + 1) if dims % number == 0)
