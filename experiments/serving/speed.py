"""Speed of what serves: uint8 graphs beside float graphs, bulk embedding beside its parts, and the allocator's setting.

Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.figures import Figure, Row
from export.backends.registry import default_threads, models_of
from export.config import EmbedConfig, Int8Config, OnnxConfig
from export.embed import choose_backend, embed_catalog
from export.int8 import export_int8
from export.to_onnx import export_onnx
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.pixels import read_pixels
from vpr.imaging.preprocess import ModelInput, Preprocess
from vpr.inference.timing import measure_rounds
from vpr.retrieval.embeddings import Forward, read_batches

CPU = ("onnxruntime-cpu", "openvino")
_FLOAT = "float32"
# Forms of the model's input by name.
INPUTS: dict[str, dict[str, str]] = {
    _FLOAT: {},
    "uint8, NCHW": {"input": "uint8", "layout": "NCHW"},
    "uint8, NHWC": {"input": "uint8", "layout": "NHWC"},
}
PRECISIONS = ("fp32", "int8")


def export_inputs(student: Path, catalog: str, folder: Path, count: int = 256) -> dict[tuple[str, str], Path]:
    """Export a student with each form of its input, in FP32 and INT8; return the graphs by precision and input.

    ``count`` training images calibrate.
    """
    graphs: dict[tuple[str, str], Path] = {}
    for number, (title, options) in enumerate(INPUTS.items()):
        fp32 = export_onnx(OnnxConfig(str(student), str(folder / f"fp32-{number}"), images=1, **options))  # type: ignore[arg-type]
        ranges = calibrate(CalibrateConfig(str(fp32), catalog, str(folder / f"ranges-{number}"), count))
        int8 = export_int8(Int8Config(str(fp32), str(ranges), str(folder / f"int8-{number}"), base="fp32"))
        graphs |= {("fp32", title): Path(fp32), ("int8", title): Path(int8)}
    return graphs


def compare_inputs(
    graphs: dict[tuple[str, str], Path],
    catalog: Catalog,
    batches: Sequence[int],
    seconds: float,
    command: str,
) -> tuple[list[Figure], list[Row]]:
    """Compare uint8 graphs with float graphs: cosines of the same images, and milliseconds in interleaved rounds.

    Two times are compared: those of the graphs alone, and those from pixels to embedding, in which the client of a
    float graph normalises. The interval of a ratio is its smallest and largest value over the rounds.
    """
    figures: list[Figure] = []
    rows: list[Row] = []
    for precision in PRECISIONS:
        for backend in CPU:
            clients = {title: Client.open(graphs[precision, title], backend, catalog) for title in INPUTS}
            vectors = {title: _unit(client.forward(client.inputs)) for title, client in clients.items()}
            for title in list(INPUTS)[1:]:
                cosine = float((vectors[title] * vectors[_FLOAT]).sum(axis=1).min())
                name = f"{precision} on {backend}, {title}: lowest cosine with the float graph"
                figures.append(Figure(name, cosine, "", 0.99999, ">=", command))
            for batch in batches:
                more_figures, more_rows = _time_inputs(clients, batch, seconds, command)
                figures += [replace(figure, name=f"{precision} on {backend}, {figure.name}") for figure in more_figures]
                rows += [{"precision": precision, "runtime": backend, **row} for row in more_rows]
    return figures, rows


@dataclass(frozen=True)
class Client:
    """A graph, its function, and images as uint8 pixels and as its input."""

    preprocess: Preprocess
    forward: Forward
    pixels: NDArray[np.uint8]
    inputs: ModelInput

    @classmethod
    def open(cls, graph: Path, backend: str, catalog: Catalog) -> Client:
        """Open a graph on a backend, with the first 64 images of a catalogue."""
        (model,) = models_of(graph, [backend])
        pixels = read_pixels(catalog, model.preprocess, range(64))
        forward = model.open(default_threads())
        return cls(model.preprocess, forward, pixels, model.preprocess.model_input(pixels))

    def embed(self, batch: int) -> object:
        """Embed pixels, normalised by the client where the graph takes floats."""
        return self.forward(self.preprocess.model_input(self.pixels[:batch]))


def _time_inputs(
    clients: dict[str, Client], batch: int, seconds: float, command: str
) -> tuple[list[Figure], list[Row]]:
    alone: dict[str, Callable[[], object]] = {
        title: partial(client.forward, client.inputs[:batch]) for title, client in clients.items()
    }
    from_pixels: dict[str, Callable[[], object]] = {
        title: partial(client.embed, batch) for title, client in clients.items()
    }
    graph, client = _round_medians(alone, seconds), _round_medians(from_pixels, seconds)
    figures: list[Figure] = []
    rows: list[Row] = []
    for title in clients:
        ratios = _ratio(graph[title], graph[_FLOAT]), _ratio(client[title], client[_FLOAT])
        rows.append(
            {
                "input": title,
                "batch": batch,
                "graph, p50 ms": f"{np.median(graph[title]):.2f}",
                "over float": _ratio_text(ratios[0]),
                "from pixels, p50 ms": f"{np.median(client[title]):.2f}",
                "from pixels over float": _ratio_text(ratios[1]),
            }
        )
        if title != _FLOAT:
            value, lowest, highest = ratios[0]
            name = f"{title}, batch {batch}: time over the float graph"
            figures.append(Figure(name, value, "", 1.02, "<=", command, (lowest, highest)))
    return figures, rows


def _round_medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Return the median milliseconds of each round of each call."""
    return {
        name: [float(np.median(part)) for part in measured.rounds]
        for name, measured in measure_rounds(calls, seconds).items()
    }


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _ratio(times: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Return the ratio of medians, and the smallest and largest ratio of a round."""
    by_round = [a / b for a, b in zip(times, reference, strict=True)]
    return float(np.median(times) / np.median(reference)), min(by_round), max(by_round)


def _ratio_text(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]"


def measure_bulk(
    graph: Path, catalog: Path, folder: Path, repeats: int, command: str, threads: Sequence[int] = (0, 1, 2)
) -> tuple[list[Figure], list[Row]]:
    """Compare ``vpr embed`` with decoding alone and the model alone, in images per second of the same processors.

    Decoding and the model share the processors. The highest possible rate is therefore the one at which the processor
    times of both add up: 1 / (1/decoding + 1/model).
    """
    artifact = load_artifact(graph)
    model = choose_backend(artifact)
    images = load_catalog(str(catalog))
    count, cpus = len(images), default_threads()
    forward = model.open(cpus)
    batch = next(read_batches(images.take(np.arange(64)), model.preprocess, 64))
    forward(batch)
    decoding, alone = [], []
    embedding: dict[int, list[float]] = {number: [] for number in threads}
    for repeat in range(repeats):
        start = time.perf_counter()
        for _ in read_batches(images, model.preprocess, 64, cpus):
            pass
        decoding.append(count / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(-(-count // 64)):
            forward(batch)
        alone.append(64 * -(-count // 64) / (time.perf_counter() - start))
        for number in threads:
            start = time.perf_counter()
            embed_catalog(EmbedConfig(str(graph), str(catalog), str(folder / f"{number}-{repeat}"), threads=number))
            embedding[number].append(count / (time.perf_counter() - start))
    rates = {number: float(np.median(values)) for number, values in embedding.items()}
    decoded, run = float(np.median(decoding)), float(np.median(alone))
    possible = 1 / (1 / decoded + 1 / run)
    best = max(rates, key=lambda number: rates[number])
    slower = min(decoded, run)
    interval = min(embedding[best]) / slower, max(embedding[best]) / slower
    title = f"bulk embedding, {cpus} processors, {count} images"
    named = f"{title}: rate over the slower of decoding and model"
    figures = [
        Figure(named, rates[best] / slower, "", 0.9, ">=", command, interval),
        Figure(f"{title}: rate over the highest possible one", rates[best] / possible, "", None, ">=", command),
    ]
    rows: list[Row] = [
        {"work": "decoding alone", "images/s": f"{decoded:.0f}"},
        {"work": f"{artifact.card.name} alone ({model.backend})", "images/s": f"{run:.0f}"},
        {"work": "highest possible rate of both on these processors", "images/s": f"{possible:.0f}"},
        *({"work": f"`vpr embed --threads {number}`", "images/s": f"{rate:.0f}"} for number, rate in rates.items()),
    ]
    return figures, rows


_EMBED = """
import sys, time
import numpy as np
from experiments.serving.speed import time_teacher
from vpr.common.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
print(time_teacher(sys.argv[2], int(sys.argv[3])))
"""


def time_teacher(path: str, batch: int) -> float:
    """Return images per second of a teacher in PyTorch on this machine, best of three runs of five batches."""
    model = models_of(path, ["torch"])[0]
    forward, pixels = model.open(default_threads()), model.random_input(batch)
    forward(pixels)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(5):
            forward(pixels)
        seconds.append(time.perf_counter() - start)
    return 5 * batch / min(seconds)


def compare_allocators(
    teachers: dict[str, Path], batch: int, command: str, repeats: int = 3
) -> tuple[list[Figure], list[Row]]:
    """Compare teachers with and without the allocator's setting, each run in a process of its own, in turn."""
    figures: list[Figure] = []
    rows: list[Row] = []
    for title, path in teachers.items():
        rates: dict[str, list[float]] = {"default": [], "keep": []}
        for _ in range(repeats):
            for setting in rates:
                arguments = [sys.executable, "-c", _EMBED, setting, str(path), str(batch)]
                done = subprocess.run(arguments, capture_output=True, text=True, check=True)
                rates[setting].append(float(done.stdout))
        gains = [kept / default for kept, default in zip(rates["keep"], rates["default"], strict=True)]
        gain = float(np.median(gains))
        name = f"allocator's setting, {title}: images/s over those without it"
        figures.append(Figure(name, gain, "", 2, ">=", command, (min(gains), max(gains))))
        rows.append(
            {
                "teacher": title,
                "without, images/s": f"{np.median(rates['default']):.1f}",
                "with, images/s": f"{np.median(rates['keep']):.1f}",
                "gain [lowest, highest]": f"{gain:.2f} [{min(gains):.2f}, {max(gains):.2f}]",
            }
        )
    return figures, rows
