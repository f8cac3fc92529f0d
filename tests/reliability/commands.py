"""One small artifact of each kind, and every verb that reads it: the roads that a file written wrong can take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.config import RecallConfig
from benchmarks.recall.measure import measure_recall
from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.random_student import write_random_student
from export.backends.registry import models_of
from export.config import EngineConfig, Int8Config, OnnxConfig, ParityConfig
from export.int8 import export_int8
from export.parity_report import compare_exports
from export.tensorrt.build import build_engine
from export.tensorrt.compatibility import check_compatible, engine_load_error, load_engine
from export.tensorrt.cuda_driver import Gpu
from export.to_onnx import export_onnx
from student.config import StudentConfig
from student.embed import embed_catalog
from student.model import load_student
from student.qat import insert_fake_quant, read_thresholds
from vpr.artifacts.store import load_artifact, reraise_as_artifact_error
from vpr.data.build_catalog import build_catalog
from vpr.data.config import CatalogConfig
from vpr.inference.config import DEFAULT_EXCLUDED_LAYERS
from vpr.retrieval.config import EmbedConfig, SearchConfig
from vpr.retrieval.search_command import search_gallery

# In the order in which they are made: the card of each names the sha256 of earlier ones.
ARTIFACTS = ("catalog", "student", "fp32", "ranges", "plain", "int8", "engine", "embeddings", "report", "recall")
RESULT = "out/result"
_PRODUCTS, _VIEWS, _SIDE = 8, 4, 32
_SHAPE = StudentConfig(
    image_size=32, patch_size=8, dim=32, depth=1, heads=2, dim_head=16, mlp_dim=64, embedding_dim=16, stem="conv"
)
_GPU = Gpu("NVIDIA A40", "sm86")


@dataclass(frozen=True)
class CommandCase:
    """A verb as it is run in a folder that holds the artifacts.

    Attributes:
        run: what is called; its output is the folder's ``out/result``.
        result: the artifact whose copy is the older output there; ``csv`` for a table, empty for none.
    """

    run: Callable[[Path], object]
    result: str = ""


@dataclass(frozen=True)
class Route:
    """A file that is mutated, and a verb that is then given its artifact."""

    artifact: str
    file: str
    verb: str


def make_student(folder: Path, images: Path) -> None:
    """Write images, and the first three of :data:`ARTIFACTS`, of a student with random weights."""
    write_images(images)
    build_catalog(CatalogConfig("folder", str(folder / "catalog"), str(images), validation=0.25, test=0.25))
    write_random_student(folder / "student", _SHAPE)
    export_onnx(OnnxConfig(str(folder / "student"), str(folder / "fp32"), images=8))


def make_artifacts(folder: Path) -> None:
    """Write one artifact of each of :data:`ARTIFACTS`."""
    make_student(folder, folder / "images")
    catalog, fp32, ranges = (str(folder / name) for name in ("catalog", "fp32", "ranges"))
    calibrate(CalibrateConfig(fp32, catalog, ranges, count=8, smooth=True, correct=True))
    calibrate(CalibrateConfig(fp32, catalog, str(folder / "plain"), count=8, correct=True))
    export_int8(Int8Config(fp32, ranges, str(folder / "int8")))
    build_engine(EngineConfig(str(folder / "int8"), str(folder / "engine"), "tensorrt-rtx", target="sm86"))
    embed_catalog(EmbedConfig(str(folder / "student"), catalog, str(folder / "embeddings"), split="test"))
    compare_exports(ParityConfig(str(folder / "student"), (fp32,), catalog, str(folder / "report")))
    measure_recall(RecallConfig(catalog, (fp32,), str(folder / "recall")))


def sign(folder: Path, name: str, file: str) -> None:
    """Make the cards fit a changed file: its own artifact's checksums, and those of all that were made from it."""
    if file != "card.json":
        data = (folder / name / file).read_bytes()
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _edit_card(folder / name, lambda card: card["files"].update({file: entry}))
    signed = {name}
    for later in ARTIFACTS[ARTIFACTS.index(name) + 1 :]:
        if not (folder / later).is_dir():
            continue
        sums = {one: hashlib.sha256((folder / one / "card.json").read_bytes()).hexdigest() for one in signed}

        def follow(card: dict[str, Any], sums: dict[str, str] = sums) -> None:
            for parent in card["parents"]:
                parent["sha256"] = sums.get(parent["name"], parent["sha256"])

        _edit_card(folder / later, follow)
        signed.add(later)


def _edit_card(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads((artifact / "card.json").read_bytes())
    change(card)
    (artifact / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def write_images(folder: Path) -> None:
    """A folder per product of noisy views of its own texture."""
    rng = np.random.default_rng(0)
    for product in range(_PRODUCTS):
        (folder / str(product)).mkdir(parents=True)
        texture = rng.integers(0, 200, (_SIDE, _SIDE, 3))
        for view in range(_VIEWS):
            noisy = texture + rng.integers(0, 50, texture.shape)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / str(product) / f"{view}.png")


def _calibrate(folder: Path) -> object:
    fp32, catalog = str(folder / "fp32"), str(folder / "catalog")
    return calibrate(CalibrateConfig(fp32, catalog, str(folder / RESULT), count=8, smooth=True, correct=True))


def _quantise(folder: Path) -> object:
    fp32, ranges = str(folder / "fp32"), str(folder / "ranges")
    return export_int8(Int8Config(fp32, ranges, str(folder / RESULT), scope="full"))


def _fp8(folder: Path) -> object:
    fp32, ranges = str(folder / "fp32"), str(folder / "ranges")
    return export_int8(Int8Config(fp32, ranges, str(folder / RESULT), base="fp32", dtype="fp8"))


def _parity(folder: Path) -> object:
    models = (str(folder / "fp32"), str(folder / "int8"))
    config = ParityConfig(str(folder / "student"), models, str(folder / "catalog"), str(folder / RESULT), layers=True)
    return compare_exports(config)


def _recall(folder: Path) -> object:
    """ONNX Runtime and OpenVINO on both graphs, and what can be said of the engine where there is no GPU."""
    models = tuple(str(folder / name) for name in ("fp32", "int8", "engine"))
    return measure_recall(RecallConfig(str(folder / "catalog"), models, str(folder / RESULT)))


def _onnxruntime(folder: Path) -> object:
    return [run_once(folder / name, "onnxruntime-cpu") for name in ("fp32", "int8")]


def _openvino(folder: Path) -> object:
    return [run_once(folder / name, "openvino") for name in ("fp32", "int8")]


def run_once(artifact: Path, backend: str) -> object:
    """Two random images through a graph."""
    model = next(one for one in models_of(artifact) if one.backend == backend)
    return model.open(1)(model.random_input(2))


def _build(folder: Path) -> object:
    config = EngineConfig(str(folder / "int8"), str(folder / RESULT), backend="tensorrt-rtx", target="sm86")
    return build_engine(config)


def _fit(folder: Path) -> object:
    """What loading an engine asks before it needs a GPU, and the refusal of a plan."""
    artifact = load_engine(folder / "engine")
    with reraise_as_artifact_error(artifact):
        check_compatible(artifact, str(artifact.card.config["builder_version"]), _GPU)
        return engine_load_error(artifact, "1.7", "CUDA 13.0", ["error: 35"])


def _finish(folder: Path) -> object:
    """What finishing a student in INT8 does with ranges before it trains."""
    model, _ = load_student(folder / "student")
    return insert_fake_quant(model, read_thresholds(load_artifact(folder / "plain", "ranges")), DEFAULT_EXCLUDED_LAYERS)


def _search(folder: Path) -> object:
    embeddings = str(folder / "embeddings")
    return search_gallery(SearchConfig(embeddings, embeddings, str(folder / f"{RESULT}.csv"), k=3))


def _embed(folder: Path) -> object:
    return embed_catalog(EmbedConfig(str(folder / "student"), str(folder / "catalog"), str(folder / RESULT)))


def _export(folder: Path) -> object:
    return export_onnx(OnnxConfig(str(folder / "student"), str(folder / RESULT), precision="fp16", images=8))


COMMAND_CASES = {
    "calibrate": CommandCase(_calibrate, "ranges"),
    "export int8": CommandCase(_quantise, "int8"),
    "export int8 --dtype fp8": CommandCase(_fp8, "int8"),
    "export parity": CommandCase(_parity, "report"),
    "bench recall": CommandCase(_recall, "recall"),
    "export engine": CommandCase(_build, "engine"),
    "run by ONNX Runtime": CommandCase(_onnxruntime),
    "run by OpenVINO": CommandCase(_openvino),
    "open an engine": CommandCase(_fit),
    "finish a student": CommandCase(_finish),
    "search": CommandCase(_search, "csv"),
    "student embed": CommandCase(_embed, "embeddings"),
    "export onnx": CommandCase(_export, "fp32"),
}
_READ = ("calibrate", "export int8", "export parity", "bench recall")
_RUN = ("run by ONNX Runtime", "run by OpenVINO")
_OPENED = ("open an engine", "bench recall")
ROUTES = (
    *(Route("fp32", "model.onnx", verb) for verb in (*_READ, *_RUN)),
    *(Route("int8", "model.onnx", verb) for verb in ("export engine", "export engine", "export parity", *_RUN)),
    *(Route("fp32", "card.json", verb) for verb in _READ),
    *(Route("int8", "card.json", verb) for verb in ("export engine", *_RUN)),
    *(Route("ranges", "ranges.json", verb) for verb in ("export int8", "export int8 --dtype fp8")),
    *(Route("ranges", file, "export int8") for file in ("adjustments.safetensors", "card.json")),
    *(Route("plain", file, "finish a student") for file in ("ranges.json", "adjustments.safetensors", "card.json")),
    *(Route("engine", file, verb) for file in ("engine.plan", "card.json") for verb in _OPENED),
    *(Route("embeddings", file, "search") for file in ("vectors.npy", "rows.parquet", "card.json")),
    *(Route("student", file, "student embed") for file in ("model.safetensors", "card.json")),
    Route("student", "card.json", "export onnx"),
    *(Route("catalog", file, "student embed") for file in ("catalog.parquet", "card.json")),
)
