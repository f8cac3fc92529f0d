"""A serving hand-off as a server with many threads uses it: the same answers as one thread gets."""

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


def hand_off(graph: Path, gallery: Path, images: Catalog, folder: Path, command: str) -> tuple[list[Figure], list[Row]]:
    """Answers of 32 threads that differ from a single thread's, for both indices and both runtimes of this CPU.

    Args:
        graph: ``onnx`` artifact.
        gallery: embeddings artifact of the same student.
        images: queries.
        folder: where the hand-offs are written.
        command: makes the figures again.
    """
    figures, rows = [], []
    for kind in ("flat", "hnsw"):
        path = export_serving(ServingConfig(str(graph), str(gallery), str(folder / kind), name="model", index=kind))  # type: ignore[arg-type]
        for name, ask in open_hand_off(path).items():
            batches = _batches(path, images)
            differing = count_differing(ask, batches, _THREADS, _ROUNDS)
            told = f"hand-off, {name}, {kind} index"
            figures.append(
                Figure(f"{told}: answers that differ from a single thread's", differing, "", 0, "<=", command)
            )
            total = _THREADS * _ROUNDS * len(batches)
            rows.append(
                {"model by": name, "index": kind, "threads": _THREADS, "answers": total, "differing": differing}
            )
    return figures, rows


def open_hand_off(path: Path) -> dict[str, Callable[[NDArray[np.float32]], Answer]]:
    """By runtime: a batch to the bytes of its embedding, and of the scores and rows that the index gives."""
    import faiss

    graph = path / "model_repository" / "model" / "1" / "model.onnx"
    index = faiss.read_index(str(path / "gallery" / "index.faiss"))
    session = open_session(graph.read_bytes(), threads=1)

    def asking(forward: Forward) -> Callable[[NDArray[np.float32]], Answer]:
        def ask(batch: NDArray[np.float32]) -> Answer:
            vectors = forward(batch)
            scores, rows = index.search(vectors, _TOP)
            return vectors.tobytes(), scores.tobytes(), rows.tobytes()

        return ask

    return {
        "ONNX Runtime": asking(lambda batch: session.run([OUTPUT], {INPUT: batch})[0]),
        "OpenVINO": asking(openvino_forward(graph, 1)),
    }


def count_differing(
    ask: Callable[[NDArray[np.float32]], Answer], batches: list[NDArray[np.float32]], threads: int, rounds: int
) -> int:
    """How many answers differ, each thread asking for all batches in an order of its own."""
    alone = [ask(batch) for batch in batches]

    def one_thread(seed: int) -> int:
        orders = [np.random.default_rng([seed, turn]).permutation(len(batches)) for turn in range(rounds)]
        return sum(ask(batches[place]) != alone[place] for order in orders for place in order)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one_thread, range(threads)))


def _batches(path: Path, images: Catalog) -> list[NDArray[np.float32]]:
    """Single images, as requests of the page are."""
    preprocess = load_artifact(path, "serving").card.preprocess
    assert preprocess is not None
    pixels = read_pixels(images, preprocess, range(min(_IMAGES, len(images))))
    return list(preprocess.normalise(pixels)[:, None])
