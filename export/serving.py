"""``vpr export serving``: a graph or an engine, and its gallery -> what Triton and a faiss search load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from export.config import _NAME, MAX_BATCH, ServingConfig
from export.tensorrt.compatibility import rebuild_command
from export.triton import Scheduling, model_config, to_text
from vpr.artifacts.store import (
    Artifact,
    check_output,
    config_to_json,
    find_up_to_date,
    load_artifact,
    reraise_as_artifact_error,
    write_artifact,
)
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_graph import load_graph
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.search import search

log = get_logger(__name__)

_FILES = {"onnx": "model.onnx", "engine": "model.plan"}
_GRAPH_BATCH = 32
_HNSW_LINKS = 32
_ASKED = 256
_TEMPLATES = Path(__file__).parent / "templates"


def export_serving(config: ServingConfig) -> Path:
    """Write a Triton model repository, the gallery and its index as an artifact of kind ``serving``.

    Raises:
        UserError: a model that Triton does not load, a gallery of another model or preprocessing, a wrong name.
    """
    model, gallery = load_artifact(config.model, ("onnx", "engine")), load_embeddings(config.gallery)
    name = config.name or model.card.name
    if not _NAME.fullmatch(name):
        raise UserError(f"{config.model}: Triton takes no model of the name {name!r}: give --name")
    check_output(config.output, "serving")
    _check_model(model, config)
    preprocess = _check_gallery(model, gallery)
    values = {**config_to_json(config), "name": name}
    parents = [model.as_parent(model.card.kind), gallery.artifact.as_parent("embeddings")]
    if find_up_to_date(config.output, "serving", values, parents):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    with reraise_as_artifact_error(model):
        scheduling = _scheduling(model, config)
        fields = model_config(name, model, preprocess, scheduling)
    with write_artifact(config.output, "serving", values, parents) as draft:
        _write_repository(draft.path / "model_repository" / name, model, fields)
        images, overlap = _write_gallery(draft.path / "gallery", gallery, config.index)
        text = _read_me(name, model, preprocess, scheduling, images, config.index)
        (draft.path / "README.md").write_text(text, encoding="utf-8")
        draft.preprocess, draft.embedding = preprocess, model.card.embedding
        draft.catalog = gallery.artifact.card.catalog
        draft.inputs, draft.outputs = model.card.inputs, model.card.outputs
        draft.metrics = {"max_batch": scheduling.max_batch, "gallery": images, "index_top10_overlap": overlap}
    exact = "exact" if overlap is None else f"finds {overlap:.3f} of the exact top 10"
    log.info(f"{config.output}: model '{name}' for {fields['backend']}, batches to {scheduling.max_batch}")
    log.info(f"{config.output}: {images} gallery images, {config.index} index, {exact}")
    return Path(config.output)


def _check_model(model: Artifact, config: ServingConfig) -> None:
    """Refuse what Triton would not load, or could not ask for a single image."""
    ends = [model.card.inputs, model.card.outputs]
    if any(len(specs) != 1 or not specs[0].shape or not isinstance(specs[0].shape[0], str) for specs in ends):
        raise UserError(f"{model.path}: its card tells no input and output for batches of any size: export it again")
    if model.card.kind == "onnx":
        _check_graph(model)
        return
    with reraise_as_artifact_error(model):
        built, least = model.card.config, int(model.card.metrics["profile"][0])
        elsewhere = rebuild_command(model, backend="tensorrt", min_batch=1, weight_stripped=False)
        graph = built["onnx"]
    if built["backend"] != "tensorrt":
        raise UserError(
            f"{model.path}: is of {built['backend']}, Triton loads engines of TensorRT alone: give the graph {graph}, "
            f"or where TensorRT is installed build: {elsewhere}"
        )
    if built.get("weight_stripped"):
        raise UserError(f"{model.path}: has no weights, and Triton puts none in: {elsewhere}")
    if least > 1:
        raise UserError(f"{model.path}: takes no fewer than {least} images, requests may have one: {elsewhere}")
    if config.device == "cpu":
        raise UserError(f"device: cpu: an engine needs a GPU: give the graph {graph}")


def _check_graph(model: Artifact) -> None:
    """Load a graph as Triton's backend does, with ONNX Runtime's own settings."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    content = load_graph(model).SerializeToString()
    try:
        ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model.path}: ONNX Runtime does not load it ({reason}): build an engine from it") from None


def _check_gallery(model: Artifact, gallery: Embeddings) -> Preprocess:
    """Refuse a gallery that the model's embeddings cannot be compared with; the preprocessing they share."""
    where, students = gallery.artifact.path, model.parents("student")
    if not students:
        raise UserError(f"{model.path}: its card names no student: export it again from the student's graph")
    if gallery.model.sha256 not in {model.sha256, students[0].sha256}:
        raise UserError(
            f"{where}: embedded with '{gallery.model.name}', the model is of student '{students[0].name}': "
            "embed the gallery with that student ('vpr student embed')"
        )
    card, theirs = model.card, gallery.artifact.card
    if card.preprocess is None or card.preprocess != theirs.preprocess:
        raise UserError(f"{where}: not preprocessed as {model.path}: embed the gallery again")
    if card.embedding is None or theirs.embedding is None or card.embedding.dim != theirs.embedding.dim:
        raise UserError(f"{where}: its vectors are not of the dimension of {model.path}: embed the gallery again")
    return card.preprocess


def _scheduling(model: Artifact, config: ServingConfig) -> Scheduling:
    """The batch sizes that the configuration leaves open come from the engine's profile."""
    engine = model.card.kind == "engine"
    _, tuned, most = model.card.metrics["profile"] if engine else (1, 0, MAX_BATCH)
    chosen = config.max_batch or (most if engine else _GRAPH_BATCH)
    if chosen > most:
        raise UserError(f"max_batch: {chosen}: {model.path} takes at most {most}: give that or less")
    preferred = config.preferred_batches
    if preferred is None:
        preferred = tuple(sorted({min(tuned, chosen), chosen})) if engine else ()
    if any(not 1 <= size <= chosen for size in preferred):
        raise UserError(f"preferred_batches: {preferred} for {model.path}: give sizes of 1 to {chosen}")
    return Scheduling(chosen, preferred, config.queue_delay_us, config.instances, config.device)


def _write_repository(folder: Path, model: Artifact, fields: dict[str, Any]) -> None:
    source = model.file("engine.plan" if model.card.kind == "engine" else "model.onnx")
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(source, folder / "1" / _FILES[model.card.kind])
    (folder / "config.pbtxt").write_text(to_text(fields), encoding="utf-8")


def _write_gallery(folder: Path, gallery: Embeddings, kind: str) -> tuple[int, float | None]:
    """Write vectors, rows and index; the number of images, and what share of the exact top 10 ``hnsw`` finds."""
    import faiss

    rows = gallery.rows_with_role("gallery")
    vectors = np.ascontiguousarray(gallery.vectors[rows])
    with reraise_as_artifact_error(gallery.artifact):
        columns = ["image", "product", "category"]
        table = pq.read_table(gallery.artifact.file("rows.parquet"), columns=columns).take(rows)
    folder.mkdir()
    np.save(folder / "vectors.npy", vectors, allow_pickle=False)
    pq.write_table(table.add_column(0, "id", pa.array(np.arange(len(rows)))), folder / "rows.parquet")
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(vectors.shape[1], _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    faiss.write_index(index, str(folder / "index.faiss"))
    if kind == "flat":
        return len(rows), None
    asked = gallery.rows_with_role("query")
    asked = asked[np.linspace(0, len(asked) - 1, min(len(asked), _ASKED)).astype(int)]
    return len(rows), _overlap(index, gallery.vectors[asked], vectors)


def _overlap(index: Any, queries: NDArray[np.float32], vectors: NDArray[np.float32]) -> float:
    """Share of the exact first ten that the index finds."""
    count = min(10, len(vectors))
    exact, found = search(queries, vectors, count)[1], index.search(queries, count)[1]
    return float(np.mean([len(set(a) & set(b)) / count for a, b in zip(exact.tolist(), found.tolist(), strict=True)]))


def _read_me(
    name: str, model: Artifact, preprocess: Preprocess, scheduling: Scheduling, images: int, index: str
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    compatible = model.card.config.get("version_compatible")
    return templates.get_template("serving.md").render(
        name=name,
        file=_FILES[model.card.kind],
        input=model.card.inputs[0].name,
        output=model.card.outputs[0].name,
        preprocess=preprocess,
        embedding=model.card.embedding,
        gallery=images,
        index="an exact" if index == "flat" else "an approximate",
        max_batch=scheduling.max_batch,
        overflows=scheduling.device == "cpu" and str(model.card.metrics.get("precision")).startswith("int8"),
        builder=model.card.metrics.get("builder"),
        targets=", ".join(model.card.metrics.get("targets", ())),
        flags=" --backend-config=tensorrt,version-compatible=true" if compatible else "",
    )
