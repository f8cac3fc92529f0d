"""A gallery of any size: real images of the scored products, and distractors of other products."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.config import StorageConfig
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import load_artifact, reraise_as_artifact_error
from vpr.common.arrays import read_array
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import Embeddings, l2_normalize, load_embeddings
from vpr.retrieval.intervals import Ids
from vpr.retrieval.search import search
from vpr.retrieval.self_search import SearchRows, find_search_rows
from vpr.retrieval.vector_index import check_vectors

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Codes = NDArray[np.int32]
DISTRACTOR = -1  # product number of a distractor; no query has it
CHOICE_SPLIT = "validation"
_BLOCK = 1 << 16  # synthetic vectors per block


@dataclass(frozen=True)
class ModelVectors:
    """Vectors of one model, L2-normalised float32.

    Attributes:
        training: (t, dim), images of the training split, of any role.
        gallery: (n, dim), gallery images of the validation and the scored split.
        queries: (q, dim), query images of both splits.
        distractors: (r, dim), real images of other products.
    """

    training: Vectors
    gallery: Vectors
    queries: Vectors
    distractors: Vectors


@dataclass(frozen=True)
class StorageData:
    """Vectors of a model and of its reference, which is the same model or another one with the same images.

    Attributes:
        model: Vectors to store.
        reference: Vectors of the exact search that the drop is measured against.
        gallery_rows: (n,) rows of the gallery images in the embeddings.
        gallery_codes: (n,) int32, number of the product.
        query_codes: (q,) int32, number of the product.
        query_products: (q,) product ids.
        is_choice: (q,) bool, whether a query is of the validation split.
        left_out: Distractors that were left out, because their product or an image of the same bytes is scored.
        own: (q,) row of each query's own image among the gallery images, which is no result, or -1 if it is not one of
            them; None if no query is.
    """

    model: ModelVectors
    reference: ModelVectors
    gallery_rows: Rows
    gallery_codes: Codes
    query_codes: Codes
    query_products: Ids
    is_choice: NDArray[np.bool_]
    left_out: int
    own: Rows | None = None


@dataclass(frozen=True)
class Gallery:
    """Stored vectors of both models, (size, dim) each, and their (size,) product numbers; real images come first."""

    vectors: Vectors
    reference: Vectors
    codes: Codes
    real_distractors: int
    synthetic: int


def find_rows(config: StorageConfig, embeddings: Embeddings) -> SearchRows:
    """Return the rows of the queries and of the gallery, of the scored split and with a budget of the validation split.

    Raises:
        UserError: A split is missing, or its queries are its gallery and no product has two images.
    """
    used = {config.split, *([CHOICE_SPLIT] if config.max_recall_drop is not None else [])}
    rows = embeddings.read_rows()
    splits = np.array([split or "" for split in rows.table["split"].to_pylist()], dtype=np.str_)
    is_query = rows.roles == "query"
    for split in sorted(used - set(splits[is_query].tolist())):
        available = ", ".join(sorted(set(splits[is_query].tolist()))) or "none"
        raise UserError(f"split: {config.embeddings} has no queries in split '{split}', but in: {available}.")
    return find_search_rows(rows, used, used)


def read_data(config: StorageConfig, embeddings: Embeddings, reference: Embeddings) -> StorageData:
    """Select the vectors of both models, and at most ``config.queries`` random queries of each split.

    Raises:
        UserError: A split or role is missing, the reference has other images, or distractors do not fit.
    """
    splits = _read_column(embeddings, "split")
    training = np.flatnonzero(splits == "train")
    found = find_rows(config, embeddings)
    drawn = _draw_queries(config, splits[found.queries])
    gallery, queries = found.gallery, found.queries[drawn]
    path = embeddings.artifact.path
    if not len(training):
        raise UserError(f"{path}: no images of the training split, which formats are fitted on. Embed all splits.")
    if not len(gallery):
        raise UserError(f"{path}: no gallery images in split '{config.split}'. Embed a catalogue with both roles.")
    lacking = np.setdiff1d(embeddings.products[queries], embeddings.products[gallery])
    if len(lacking):
        raise UserError(f"{path}: product '{lacking[0]}' has queries and no gallery image. Rebuild the catalogue.")
    _check_same_images(embeddings, reference)
    rows = (training, gallery, queries)
    images = _read_column(embeddings, "sha256")[np.concatenate([gallery, queries])]
    scored = np.unique(embeddings.products[gallery]), np.unique(images[images != ""])
    distractors, kept = _read_distractors(config.distractors, "distractors", embeddings, scored)
    model = _take(embeddings, rows, distractors[kept])
    other = model
    if reference is not embeddings:
        paired, _ = _read_distractors(config.reference_distractors, "reference_distractors", reference, scored)
        if len(paired) != len(distractors):
            problem = f"expected {len(distractors)} vectors, as in distractors, got {len(paired)}"
            raise UserError(f"reference_distractors: {problem}. Embed the same images with both models.")
        other = _take(reference, rows, paired[kept])
    codes = np.unique(embeddings.products, return_inverse=True)[1].astype(np.int32)
    return StorageData(
        model,
        other,
        gallery,
        codes[gallery],
        codes[queries],
        embeddings.products[queries],
        splits[queries] == CHOICE_SPLIT,
        int((~kept).sum()),
        None if found.own is None else found.own[drawn],
    )


def grow_gallery(data: StorageData, size: int, seed: int) -> Gallery:
    """Return a gallery of a size: real images, real distractors, then synthetic ones. A smaller one is a prefix.

    A synthetic distractor is a training vector plus or minus the offset of another training vector to its nearest
    neighbour, scaled by 0.5 to 1.5. So distances and directions are those of real images. Both models take the same
    training images, neighbours and scales.

    Raises:
        UserError: The size is below that of the real gallery, or there are fewer than two training vectors.
    """
    count = len(data.gallery_codes)
    if size < count:
        raise UserError(f"sizes: expected {count} or more, the size of the real gallery, got {size}. Change --sizes.")
    real = min(len(data.model.distractors), size - count)
    synthetic = size - count - real
    codes = np.concatenate([data.gallery_codes, np.full(size - count, DISTRACTOR, dtype=np.int32)])
    if synthetic and len(data.model.training) < 2:
        raise UserError("sizes: synthetic distractors need two training images. Reduce --sizes to the real gallery.")
    neighbours = search(data.reference.training, data.reference.training, 2)[1][:, 1] if synthetic else np.empty(0, int)

    def stored(model: ModelVectors) -> Vectors:
        synthesised = _synthesise(model.training, neighbours, synthetic, seed)
        return np.concatenate([model.gallery, model.distractors[:real], synthesised])

    vectors = stored(data.model)
    reference = vectors if data.reference is data.model else stored(data.reference)
    return Gallery(vectors, reference, codes, real, synthetic)


def _take(embeddings: Embeddings, rows: tuple[Rows, Rows, Rows], distractors: Vectors) -> ModelVectors:
    training, gallery, queries = (embeddings.vectors[part] for part in rows)
    return ModelVectors(training, gallery, queries, distractors)


def _synthesise(training: Vectors, neighbours: Rows, count: int, seed: int) -> Vectors:
    vectors = np.empty((count, training.shape[1]), dtype=np.float32)
    for block, start in enumerate(range(0, count, _BLOCK)):
        rng = np.random.default_rng([seed, block])
        sources, moved = rng.integers(0, len(training), (2, _BLOCK))
        scales = (rng.uniform(0.5, 1.5, (_BLOCK, 1)) * rng.choice([-1, 1], (_BLOCK, 1))).astype(np.float32)
        used = slice(0, min(_BLOCK, count - start))
        offsets = training[neighbours[moved[used]]] - training[moved[used]]
        vectors[start : start + _BLOCK] = l2_normalize(training[sources[used]] + scales[used] * offsets)
    return vectors


def _read_column(embeddings: Embeddings, name: str) -> NDArray[np.str_]:
    """Return (n,) values of a column of the catalogue, empty where there is none."""
    with reraise_as_artifact_error(embeddings.artifact):
        column = pq.read_table(embeddings.artifact.file("rows.parquet"), columns=[name])[name]
        return np.array([value or "" for value in column.to_pylist()], dtype=np.str_)


def _draw_queries(config: StorageConfig, splits: NDArray[np.str_]) -> Rows:
    """Return which queries search, at most ``config.queries`` of each split; ``splits`` are those of all queries."""
    rng, drawn = np.random.default_rng(config.seed), []
    for split in (config.split, *([CHOICE_SPLIT] if config.max_recall_drop is not None else [])):
        drawn.append(rng.permutation(np.flatnonzero(splits == split))[: config.queries])
    return np.sort(np.concatenate(drawn))


def _check_same_images(embeddings: Embeddings, reference: Embeddings) -> None:
    same = all(
        np.array_equal(getattr(embeddings, name), getattr(reference, name)) for name in ("images", "products", "roles")
    )
    if not same:
        problem = f"{reference.artifact.path} has other images than {embeddings.artifact.path}"
        raise UserError(f"reference: {problem}. Embed the same catalogue with both models.")


def _read_distractors(
    path: str, key: str, embeddings: Embeddings, scored: tuple[Ids, Ids]
) -> tuple[Vectors, NDArray[np.bool_]]:
    """Return vectors, and which of them may be distractors: (n, dim) float32 and (n,) bool.

    ``scored`` are ids of products and sha256 of images that are scored.
    """
    width = embeddings.vectors.shape[1]
    if not path:
        return np.empty((0, width), dtype=np.float32), np.ones(0, dtype=bool)
    if path.endswith(".npy"):
        vectors = _read_array(path, key)
        check_vectors(vectors, f"{key}: {path}", width)
        return vectors, np.ones(len(vectors), dtype=bool)
    other = load_embeddings(path)
    if other.model.sha256 != embeddings.model.sha256:
        names = f"embedded with '{other.model.name}', expected '{embeddings.model.name}'"
        raise UserError(f"{key}: {path} is {names}. Embed both with one model.")
    check_vectors(other.vectors, f"{key}: {path}", width)
    is_scored = np.isin(other.products, scored[0]) | np.isin(_read_column(other, "sha256"), scored[1])
    return other.vectors, ~is_scored


def find_file(path: str, key: str) -> Path:
    """Return the file that identifies distractors: the array, or the card of the artifact."""
    if not path.endswith(".npy"):
        return load_artifact(path, "embeddings").path / CARD_NAME
    if not Path(path).is_file():
        raise UserError(f"{key}: {path} is not a file. Pass an embeddings artifact or a .npy file.")
    return Path(path)


def _read_array(path: str, key: str) -> Vectors:
    try:
        return read_array(find_file(path, key), mmap_mode="r")
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{key}: {path} is not an array ({reason}). Write it with numpy.save.") from None
