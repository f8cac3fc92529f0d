"""Serving hand-off under many threads: each must get the answers of a single thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.figures import Figure, Row
from export.backends.openvino_runtime import openvino_forward
from export.config import ServingConfig
from export.serving import export_serving
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import Catalog
from vpr.data.pixels import read_pixels
from vpr.inference.onnx_session import INPUT, OUTPUT, open_session
from vpr.retrieval.embeddings import Forward

_THREADS, _IMAGES, _ROUNDS, _TOP = 32, 64, 4, 10

Answer = tuple[bytes, bytes, bytes]


def measure_hand_off(
    graph: Path, gallery: Path, images: Catalog, folder: Path, command: str
) -> tuple[list[Figure], list[Row]]:
    """Count answers of 32 threads that differ from a single thread's, for both indices and both CPU runtimes.

    Args:
        graph: ``onnx`` artifact.
        gallery: Embeddings artifact of the same student.
        images: Queries.
        folder: Folder for the hand-offs.
        command: Command that repeats the measurement.
    """
    figures, rows = [], []
    for kind in ("flat", "hnsw"):
        path = export_serving(ServingConfig(str(graph), str(gallery), str(folder / kind), name="model", index=kind))  # type: ignore[arg-type]
        for name, ask in open_hand_off(path).items():
            batches = _batches(path, images)
            differing = count_differing(ask, batches, _THREADS, _ROUNDS)
            title = f"hand-off, {name}, {kind} index"
            figures.append(
                Figure(f"{title}: answers that differ from a single thread's", differing, "", 0, "<=", command)
            )
            total = _THREADS * _ROUNDS * len(batches)
            rows.append({"runtime": name, "index": kind, "threads": _THREADS, "answers": total, "differing": differing})
    return figures, rows


def open_hand_off(path: Path) -> dict[str, Callable[[NDArray[np.float32]], Answer]]:
    """Return for each runtime a function from a batch to the bytes of embeddings, scores and rows."""
    import faiss

    graph = path / "model_repository" / "model" / "1" / "model.onnx"
    index = faiss.read_index(str(path / "gallery" / "index.faiss"))
    session = open_session(graph.read_bytes(), threads=1)

    def search_with(forward: Forward) -> Callable[[NDArray[np.float32]], Answer]:
        def ask(batch: NDArray[np.float32]) -> Answer:
            vectors = forward(batch)
            scores, rows = index.search(vectors, _TOP)
            return vectors.tobytes(), scores.tobytes(), rows.tobytes()

        return ask

    return {
        "ONNX Runtime": search_with(lambda batch: session.run([OUTPUT], {INPUT: batch})[0]),
        "OpenVINO": search_with(openvino_forward(graph, 1)),
    }


def count_differing(
    ask: Callable[[NDArray[np.float32]], Answer], batches: list[NDArray[np.float32]], threads: int, rounds: int
) -> int:
    """Return the number of answers that differ; each thread sends all batches in a different order."""
    expected = [ask(batch) for batch in batches]

    def run_thread(seed: int) -> int:
        orders = [np.random.default_rng([seed, turn]).permutation(len(batches)) for turn in range(rounds)]
        return sum(ask(batches[index]) != expected[index] for order in orders for index in order)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(run_thread, range(threads)))


def _batches(path: Path, images: Catalog) -> list[NDArray[np.float32]]:
    """Return batches of a single image, as the page's requests are."""
    preprocess = load_artifact(path, "serving").card.preprocess
    assert preprocess is not None
    pixels = read_pixels(images, preprocess, range(min(_IMAGES, len(images))))
    return list(preprocess.normalise(pixels)[:, None])
