"""Our metrics against ranx, our recall against faiss, and what our search costs over faiss alone."""

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
    """The figures "recall code": equal to ranx and to faiss, and no slower than faiss.

    Args:
        student: artifact whose embeddings of the catalogue's test split are the real ones.
        catalog: catalogue artifact.
        command: makes the measurement again.
    """
    part = load_catalog(catalog).select(split="test")
    model, artifact = load_student(student)
    assert artifact.card.preprocess is not None
    vectors = embed(part, artifact.card.preprocess, torch_forward(model))
    ours, theirs = time_search(gallery=1_000_000, queries=1000, dim=256, rounds=5)
    ratio = float(np.median(ours) / np.median(theirs))
    named = (("vpr.retrieval.search", ours), ("faiss.IndexFlatIP, built before", theirs))
    rows = [
        {
            "search of 1,000 queries in 1M x 256": name,
            "s, median": f"{np.median(times):.2f}",
            "least": f"{times.min():.2f}",
            "largest": f"{times.max():.2f}",
            "threads": default_threads(),
        }
        for name, times in named
    ]
    return [
        Figure("metrics against ranx, 100 rankings, largest difference", against_ranx(), "", 1e-9, "<=", command),
        Figure("recall@1, 5, 10 against faiss, largest difference", against_faiss(part, vectors), "", 0, "<=", command),
        Figure("exact search of 1M x 256 over faiss alone", ratio, "times", 1.1, "<=", command),
    ], rows


def against_ranx(rankings: int = 100, gallery: int = 1500, seed: int = 0) -> float:
    """The largest difference of any metric of any of the rankings, by an own environment (``make other-metrics``).

    Raises:
        UserError: the environment is not there, or ranx failed.
    """
    relevant = random_rankings(rankings, gallery, seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "relevant.npy"
        np.save(file, relevant)
        printed = run_in_venv(RANX, "ranx_check.py", [str(file)], "other-metrics")
    theirs = json.loads(printed.strip().splitlines()[-1])
    return max(abs(one[name] - theirs[name][q]) for q, one in enumerate(our_metrics(relevant)) for name in theirs)


def random_rankings(rankings: int, gallery: int, seed: int) -> NDArray[np.bool_]:
    """(rankings, gallery) bool: about one in fifty is relevant, and one always, maybe beyond the cut at 1000."""
    rng = np.random.default_rng(seed)
    relevant = rng.random((rankings, gallery)) < rng.choice([0.001, 0.02, 0.1], size=(rankings, 1))
    relevant[np.arange(rankings), rng.integers(0, gallery, rankings)] = True
    return relevant


def our_metrics(relevant: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Each ranking scored alone by :func:`vpr.retrieval.metrics.evaluate_similarities`."""
    found = []
    for row in relevant:
        falling = -np.arange(len(row), dtype=np.float32)[None]
        products = np.where(row, "wanted", "other")
        scores = evaluate_similarities(falling, np.array(["wanted"]), products)
        names = ("recall_at_1", "recall_at_5", "recall_at_10", "map", "map_at_1000")
        found.append({name: float(getattr(scores, name)) for name in names})
    return found


def against_faiss(part: Catalog, vectors: NDArray[np.float32]) -> float:
    """The largest difference of recall@1, @5 and @10 to those of a faiss index, on given embeddings of a split."""
    query, gallery = part.roles == "query", part.roles == "gallery"
    ours = evaluate(vectors[query], part.products[query], vectors[gallery], part.products[gallery])
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors[gallery])
    found = index.search(vectors[query], max(_CUTS))[1]
    right = part.products[gallery][found] == part.products[query][:, None]
    theirs = {k: float(right[:, :k].any(axis=1).mean()) for k in _CUTS}
    return max(abs(getattr(ours, f"recall_at_{k}") - value) for k, value in theirs.items())


def time_search(
    gallery: int, queries: int, dim: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds of exact top-10 search by ours and by a faiss index that was built before, in turns.

    A call takes seconds, so one round warms up, and who begins changes from round to round.

    Raises:
        UserError: the two find different images.
    """
    rng = np.random.default_rng(0)
    shown, asked = (rng.standard_normal((count, dim), dtype=np.float32) for count in (gallery, queries))
    index = faiss.IndexFlatIP(dim)
    index.add(shown)
    faiss.omp_set_num_threads(default_threads())
    calls = {"ours": lambda: search(asked, shown, 10)[1], "faiss": lambda: index.search(asked, 10)[1]}
    if not np.array_equal(calls["ours"](), calls["faiss"]()):
        raise UserError("search: it finds other images than faiss does: vpr/retrieval/search.py is wrong")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in sorted(calls, reverse=bool(number % 2)):
            begun = clock()
            calls[name]()
            seconds[name].append(clock() - begun)
        log.info(
            f"  round {number + 1}/{rounds}: " + ", ".join(f"{name} {some[-1]:.2f} s" for name, some in seconds.items())
        )
    return np.array(seconds["ours"]), np.array(seconds["faiss"])
