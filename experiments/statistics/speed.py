"""Time and memory of :func:`vpr.retrieval.metrics.evaluate` next to the matrix product that it needs.

``python -m experiments.statistics.speed QUERIES GALLERY DIM`` prints seconds of both and the peak memory as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

from experiments.figures import ROOT
from vpr.retrieval.metrics import evaluate

_PER_PRODUCT = 10  # gallery images of a product
_BLOCK = 256  # queries of the plain product


def measure_speed(queries: int, gallery: int, dim: int) -> dict[str, float]:
    """Measure in a process of its own, so that the peak memory is that of this measurement."""
    words = [sys.executable, "-m", "experiments.statistics.speed", *map(str, (queries, gallery, dim))]
    return json.loads(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def _vectors(count: int, dim: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _main(queries: int, gallery: int, dim: int) -> None:
    query_vectors, gallery_vectors = _vectors(queries, dim, 0), _vectors(gallery, dim, 1)
    gallery_products = (np.arange(gallery) // _PER_PRODUCT).astype(np.str_)
    query_products = gallery_products[:: max(1, gallery // queries)][:queries]
    query_vectors[:8] @ gallery_vectors.T  # starts the threads
    start = time.perf_counter()
    for first in range(0, queries, _BLOCK):
        query_vectors[first : first + _BLOCK] @ gallery_vectors.T
    product = time.perf_counter() - start
    start = time.perf_counter()
    evaluate(query_vectors, query_products, gallery_vectors, gallery_products)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"product": product, "evaluate": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
