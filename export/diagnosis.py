"""Comparison of a client's embeddings with golden vectors: the steps in which its pipeline departs from the card."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.golden import Golden
from vpr.imaging.pipelines import Pipeline, departures, equivalent_pipelines, to_model_input
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import Forward

EQUAL = 1e-8  # mean of 1 - cosine over the images that rounding explains
AGREES = 1e-3  # of other decoders, and of runtimes in FP16 or INT8
_EXPLAINED = 0.01  # remaining share of the difference at which the search ends
# A change counts if it leaves at most this share of the difference: the first one, and one that joins others.
_NEARER, _NEARER_TOGETHER = 0.5, 0.8
_TIE = 2.0  # pipelines within this factor of the nearest one cannot be distinguished from it
_ROUNDING = 1e-9
_MAX_CHANGES = 4


@dataclass(frozen=True)
class Diagnosis:
    """Result of the comparison.

    Attributes:
        agrees: Whether the client's embeddings are those of the artifact.
        cosines: Cosine to the golden embedding, by image.
        pipeline: Nearest known pipeline.
        explained: Cosine to the embeddings of that pipeline, by image.
        alternatives: Names of the pipelines that the images cannot distinguish from it.
        order: Row of the client's file for each image, if the rows are in another order; else None.
    """

    agrees: bool
    cosines: dict[str, float]
    pipeline: Pipeline
    explained: dict[str, float]
    alternatives: tuple[str, ...] = ()
    order: tuple[int, ...] | None = None


class PipelineVectors:
    """Embeddings of the golden images by each pipeline, and what they have in common, computed once."""

    def __init__(self, golden: Golden, preprocess: Preprocess, forward: Forward) -> None:
        self._golden, self.preprocess, self._forward = golden, preprocess, forward
        self._by_input = {_key(row): vector for row, vector in zip(golden.inputs, golden.embeddings, strict=True)}
        self._by_pipeline: dict[Pipeline, NDArray[np.float32]] = {}
        self._decoded: dict[Pipeline, list[Image.Image]] = {}

    def embed(self, pipeline: Pipeline) -> NDArray[np.float32]:
        """Return (images, dim) float32, L2-normalised."""
        if pipeline not in self._by_pipeline:
            inputs = (pipeline.from_image(image, self.preprocess) for image in self._decode(pipeline))
            self._by_pipeline[pipeline] = np.stack([self._vector(row) for row in inputs])
        return self._by_pipeline[pipeline]

    def _decode(self, pipeline: Pipeline) -> list[Image.Image]:
        key, size = pipeline.decoding, self.preprocess.size
        if key not in self._decoded:
            self._decoded[key] = [key.decode(data, name, size) for name, data in self._golden.images.items()]
        return self._decoded[key]

    def _vector(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        key = _key(row)
        if key not in self._by_input:
            values = self._forward(to_model_input(row[None], self.preprocess))[0].astype(np.float64)
            length = np.linalg.norm(values)
            # Values that no normalisation brings into range may overflow in FP16. No client's vector is near zero.
            is_usable = bool(np.isfinite(length)) and length > 0
            self._by_input[key] = (values / length if is_usable else np.zeros_like(values)).astype(np.float32)
        return self._by_input[key]


def _key(row: NDArray[np.float32]) -> bytes:
    return hashlib.sha256(row.tobytes()).digest()


def diagnose(golden: Golden, client: NDArray[np.float32], vectors: PipelineVectors | None) -> Diagnosis:
    """Compare a client's (images, dim) float32 L2-normalised embeddings with the golden ones.

    Changes of steps are searched greedily, the one that explains most first. Without ``vectors`` no pipeline is tried.
    """
    names = list(golden.images)
    order = _find_order(golden.embeddings, client)
    rows = client if order is None else client[list(order)]
    cosines = _by_name(names, golden.embeddings, client)
    first = distance(golden.embeddings, rows)
    best, ties = _Match(Pipeline(), golden.embeddings, first), list[str]()
    if vectors is not None and first > EQUAL:
        best, ties = _search(vectors, rows)
    departs = bool(best.pipeline.departures) or order is not None
    return Diagnosis(
        agrees=not departs and best.distance <= AGREES,
        cosines=cosines,
        pipeline=best.pipeline,
        explained=_by_name(names, best.vectors, rows),
        alternatives=tuple(ties),
        order=order,
    )


def distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the mean of 1 - cosine of (n, dim) L2-normalised rows, exact also for almost equal rows."""
    difference = a.astype(np.float64) - b
    return float((difference**2).sum(axis=1).mean() / 2)


@dataclass(frozen=True)
class _Match:
    """A pipeline with its embeddings, and their distance to the client's."""

    pipeline: Pipeline
    vectors: NDArray[np.float32]
    distance: float


def _search(vectors: PipelineVectors, client: NDArray[np.float32]) -> tuple[_Match, list[str]]:
    """Return the nearest pipeline, and the names of changes that the images cannot distinguish from its last one."""

    def match(pipelines: list[Pipeline]) -> _Match:
        embedded = [(pipeline, vectors.embed(pipeline)) for pipeline in pipelines]
        matches = [_Match(pipeline, rows, distance(rows, client)) for pipeline, rows in embedded]
        return min(matches, key=lambda match: match.distance)

    best, ties = match(equivalent_pipelines()), list[str]()
    first = best.distance
    for _ in range(_MAX_CHANGES):
        if best.distance <= max(EQUAL, _EXPLAINED * first):
            break
        trials = departures(vectors.preprocess, Pipeline(**best.pipeline.departures))
        matches = {name: match(_with_full_decoding(trial)) for name, trial in trials.items()}
        name = min(matches, key=lambda name: matches[name].distance)
        if matches[name].distance > (_NEARER_TOGETHER if best.pipeline.departures else _NEARER) * best.distance:
            break
        best = matches[name]
        limit = _TIE * best.distance + _ROUNDING
        ties = [other for other in matches if other != name and matches[other].distance <= limit]
    return best, ties


def _with_full_decoding(pipeline: Pipeline) -> list[Pipeline]:
    """Return a pipeline, and with full decoding too: other libraries rarely decode a JPEG at a reduced scale.

    Without antialiasing the scale matters.
    """
    return [pipeline] if "decoder" in pipeline.changes else [pipeline, replace(pipeline, decoder="full")]


def _find_order(golden: NDArray[np.float32], client: NDArray[np.float32]) -> tuple[int, ...] | None:
    """Return the client's row of each image if its rows are the golden ones in another order, else None."""
    order = (golden.astype(np.float64) @ client.T).argmax(axis=1)
    if len(set(order.tolist())) < len(order) or (order == np.arange(len(order))).all():
        return None
    before, after = distance(golden, client), distance(golden, client[order])
    return tuple(order.tolist()) if after <= max(EQUAL, _EXPLAINED * before) else None


def _by_name(names: list[str], a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, float]:
    cosines = (a.astype(np.float64) * b).sum(axis=1)
    return dict(zip(names, cosines.tolist(), strict=True))
