"""Small artifacts, and the cases in which a command reads one of them after a file was changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.random_student import write_random_student
from export.backends.registry import models_of
from export.tensorrt.compatibility import check_compatible, engine_load_error, load_engine
from export.tensorrt.cuda_driver import Gpu
from student.config import StudentConfig
from student.model import load_student
from student.qat import insert_fake_quant, read_thresholds
from tests.reliability.commands import run_in, write_images
from vpr.artifacts.store import load_artifact, reraise_as_artifact_error
from vpr.inference.config import DEFAULT_EXCLUDED_LAYERS

# Each artifact comes after those that its card names as parents.
ARTIFACTS = (
    *("catalog", "student", "fp32", "ranges", "plain-ranges"),
    *("int8", "engine", "embeddings", "parity", "recall"),
)
RESULT = "out/result"
CSV = "csv"
_SHAPE = StudentConfig(
    image_size=32, patch_size=8, dim=32, depth=1, heads=2, dim_head=16, mlp_dim=64, embedding_dim=16, stem="conv"
)
_GPU = Gpu("NVIDIA A40", "sm86")


@dataclass(frozen=True)
class Case:
    """A function that reads the artifacts of a folder.

    Attributes:
        run: Function of the folder; its output is ``out/result`` there.
        older: Artifact whose copy is the older result at the output. ``csv`` means an older table; empty for a
            function without an output.
    """

    run: Callable[[Path], object]
    older: str = ""


@dataclass(frozen=True)
class Route:
    """A file that a mutation changes, and the case that then reads its artifact."""

    artifact: str
    file: str
    verb: str


def make_student(folder: Path, images: Path) -> None:
    """Write images, a catalogue, a student with random weights, and its FP32 graph."""
    write_images(images)
    run_in(folder, "catalog", images=str(images))
    write_random_student(folder / "student", _SHAPE)
    run_in(folder, "fp32")


def make_artifacts(folder: Path) -> None:
    """Write each of :data:`ARTIFACTS`."""
    make_student(folder, folder / "images")
    for name in ARTIFACTS[3:]:
        run_in(folder, name)


def sign(folder: Path, name: str, file: str) -> None:
    """Update the card of an artifact to a changed file, and the cards of all artifacts made from it."""
    if file != "card.json":
        data = (folder / name / file).read_bytes()
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _edit_card(folder / name, lambda card: card["files"].update({file: entry}))
    signed = {name}
    for child in ARTIFACTS[ARTIFACTS.index(name) + 1 :]:
        if not (folder / child).is_dir():
            continue
        sums = {parent: hashlib.sha256((folder / parent / "card.json").read_bytes()).hexdigest() for parent in signed}

        def update_parents(card: dict[str, Any], sums: dict[str, str] = sums) -> None:
            for parent in card["parents"]:
                parent["sha256"] = sums.get(parent["name"], parent["sha256"])

        _edit_card(folder / child, update_parents)
        signed.add(child)


def _edit_card(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads((artifact / "card.json").read_bytes())
    change(card)
    (artifact / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def run_graphs(backend: str, names: tuple[str, ...], folder: Path) -> object:
    """Embed two random images with each of the graphs."""
    outputs = []
    for name in names:
        model = next(model for model in models_of(folder / name) if model.backend == backend)
        outputs.append(model.open(1)(model.random_input(2)))
    return outputs


def _check_engine(folder: Path) -> object:
    """Check what needs no GPU about an engine, and build the error of a plan that TensorRT rejects."""
    artifact = load_engine(folder / "engine")
    with reraise_as_artifact_error(artifact):
        check_compatible(artifact, str(artifact.card.config["builder_version"]), _GPU)
        return engine_load_error(artifact, "1.7", "CUDA 13.0", ["error: 35"])


def _insert_fake_quant(folder: Path) -> object:
    """Read ranges as QAT does before it trains."""
    model, _ = load_student(folder / "student")
    return insert_fake_quant(
        model, read_thresholds(load_artifact(folder / "plain-ranges", "ranges")), DEFAULT_EXCLUDED_LAYERS
    )


def _command(name: str, older: str = "") -> Case:
    """Return the case of a command with this output in :data:`tests.reliability.commands.COMMANDS`."""
    return Case(lambda folder: run_in(folder, name, folder / RESULT), older or name)


CASES = {
    "calibrate": _command("ranges"),
    "export int8": _command("int8-full", "int8"),
    "export int8 to FP8": _command("fp8", "int8"),
    "export parity": _command("parity"),
    "bench recall": _command("recall"),
    "export engine": _command("engine"),
    "ONNX Runtime": Case(partial(run_graphs, "onnxruntime-cpu", ("fp32", "int8"))),
    "OpenVINO": Case(partial(run_graphs, "openvino", ("fp32", "int8"))),
    "open an engine": Case(_check_engine),
    "QAT": Case(_insert_fake_quant),
    "search": Case(lambda folder: run_in(folder, "neighbours.csv", folder / f"{RESULT}.csv"), CSV),
    "student embed": _command("embeddings"),
    "export onnx": _command("fp16", "fp32"),
}
_READERS = ("calibrate", "export int8", "export parity", "bench recall")
_RUNTIMES = ("ONNX Runtime", "OpenVINO")
_ENGINE_READERS = ("open an engine", "bench recall")
ROUTES = (
    *(Route("fp32", "model.onnx", verb) for verb in (*_READERS, *_RUNTIMES)),
    *(Route("int8", "model.onnx", verb) for verb in ("export engine", "export engine", "export parity", *_RUNTIMES)),
    *(Route("fp32", "card.json", verb) for verb in _READERS),
    *(Route("int8", "card.json", verb) for verb in ("export engine", *_RUNTIMES)),
    *(Route("ranges", "ranges.json", verb) for verb in ("export int8", "export int8 to FP8")),
    *(Route("ranges", file, "export int8") for file in ("adjustments.safetensors", "card.json")),
    *(Route("plain-ranges", file, "QAT") for file in ("ranges.json", "adjustments.safetensors", "card.json")),
    *(Route("engine", file, verb) for file in ("engine.plan", "card.json") for verb in _ENGINE_READERS),
    *(Route("embeddings", file, "search") for file in ("vectors.npy", "rows.parquet", "card.json")),
    *(Route("student", file, "student embed") for file in ("model.safetensors", "card.json", "seen.parquet")),
    Route("student", "card.json", "export onnx"),
    *(Route("catalog", file, "student embed") for file in ("catalog.parquet", "card.json")),
)
