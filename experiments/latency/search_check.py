"""Check metrics against ranx, recall against faiss, and the cost of search over faiss alone."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from experiments.figures import Figure, Row
from experiments.venv_runner import run_in_venv
from export.backends.registry import default_threads
from student.model import load_student
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.retrieval.embeddings import embed, torch_forward
from vpr.retrieval.metrics import evaluate, evaluate_similarities
from vpr.retrieval.search import search

log = get_logger(__name__)

RANX = ".venv-ranx"
_CUTS = (1, 5, 10)


def measure_recall_code(student: Path, catalog: Path, command: str) -> tuple[list[Figure], list[Row]]:
    """Compare metrics with ranx, and recall and speed of search with faiss.

    Args:
        student: Student artifact that embeds the test split.
        catalog: Catalogue artifact.
        command: Command that repeats the measurement.
    """
    part = load_catalog(catalog).select(split="test")
    model, artifact = load_student(student)
    assert artifact.card.preprocess is not None
    vectors = embed(part, artifact.card.preprocess, torch_forward(model))
    vpr_seconds, faiss_seconds = time_search(gallery=1_000_000, queries=1000, dim=256, rounds=5)
    ratio = float(np.median(vpr_seconds) / np.median(faiss_seconds))
    named = (("vpr.retrieval.search", vpr_seconds), ("faiss.IndexFlatIP, built before", faiss_seconds))
    rows = [
        {
            "search of 1,000 queries in 1M x 256": name,
            "s, median": f"{np.median(times):.2f}",
            "min": f"{times.min():.2f}",
            "max": f"{times.max():.2f}",
            "threads": default_threads(),
        }
        for name, times in named
    ]
    return [
        Figure("metrics against ranx, 100 rankings, largest difference", difference_to_ranx(), "", 1e-9, "<=", command),
        Figure(
            "recall@1, 5, 10 against faiss, largest difference",
            difference_to_faiss(part, vectors),
            "",
            0,
            "<=",
            command,
        ),
        Figure("exact search of 1M x 256 over faiss alone", ratio, "times", 1.1, "<=", command),
    ], rows


def difference_to_ranx(rankings: int = 100, gallery: int = 1500, seed: int = 0) -> float:
    """Return the largest difference to ranx of any metric and ranking (needs ``make other-metrics``).

    Raises:
        UserError: The environment does not exist, or ranx failed.
    """
    relevant = random_rankings(rankings, gallery, seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "relevant.npy"
        np.save(file, relevant)
        printed = run_in_venv(RANX, "ranx_check.py", [str(file)], "other-metrics")
    expected = json.loads(printed.strip().splitlines()[-1])
    return max(
        abs(metrics[name] - expected[name][query])
        for query, metrics in enumerate(compute_metrics(relevant))
        for name in expected
    )


def random_rankings(rankings: int, gallery: int, seed: int) -> NDArray[np.bool_]:
    """Return (rankings, gallery) bool: about 2 % are relevant, at least one in each, maybe after rank 1000."""
    rng = np.random.default_rng(seed)
    relevant = rng.random((rankings, gallery)) < rng.choice([0.001, 0.02, 0.1], size=(rankings, 1))
    relevant[np.arange(rankings), rng.integers(0, gallery, rankings)] = True
    return relevant


def compute_metrics(relevant: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Score each ranking with :func:`vpr.retrieval.metrics.evaluate_similarities`."""
    metrics = []
    for row in relevant:
        similarities = -np.arange(len(row), dtype=np.float32)[None]
        products = np.where(row, "wanted", "other")
        scores = evaluate_similarities(similarities, np.array(["wanted"]), products)
        names = ("recall_at_1", "recall_at_5", "recall_at_10", "map", "map_at_1000")
        metrics.append({name: float(getattr(scores, name)) for name in names})
    return metrics


def difference_to_faiss(part: Catalog, vectors: NDArray[np.float32]) -> float:
    """Return the largest difference of recall@1, @5 and @10 to a faiss index, on embeddings of a split."""
    query, gallery = part.roles == "query", part.roles == "gallery"
    scores = evaluate(vectors[query], part.products[query], vectors[gallery], part.products[gallery])
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors[gallery])
    neighbours = index.search(vectors[query], max(_CUTS))[1]
    is_correct = part.products[gallery][neighbours] == part.products[query][:, None]
    expected = {k: float(is_correct[:, :k].any(axis=1).mean()) for k in _CUTS}
    return max(abs(getattr(scores, f"recall_at_{k}") - value) for k, value in expected.items())


def time_search(
    gallery: int, queries: int, dim: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the seconds of exact top-10 search by vpr and by a prebuilt faiss index, in turns.

    The first comparison warms up. The order changes from round to round.

    Raises:
        UserError: The two results differ.
    """
    rng = np.random.default_rng(0)
    gallery_vectors, query_vectors = (
        rng.standard_normal((count, dim), dtype=np.float32) for count in (gallery, queries)
    )
    index = faiss.IndexFlatIP(dim)
    index.add(gallery_vectors)
    faiss.omp_set_num_threads(default_threads())
    calls = {
        "vpr": lambda: search(query_vectors, gallery_vectors, 10)[1],
        "faiss": lambda: index.search(query_vectors, 10)[1],
    }
    if not np.array_equal(calls["vpr"](), calls["faiss"]()):
        raise UserError("search: its results differ from faiss. Report this as a bug of vpr/retrieval/search.py.")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in sorted(calls, reverse=bool(number % 2)):
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
        log.info(
            f"  round {number + 1}/{rounds}: "
            + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        )
    return np.array(seconds["vpr"]), np.array(seconds["faiss"])
