"""``vpr export serving``: write a model repository for Triton and a gallery with a faiss index."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from export.config import MAX_BATCH, ServingConfig, check_model_name
from export.golden import copy_golden, has_golden
from export.handoff import Handoff, load_handoff
from export.opset import OLDEST_RUNTIME, opset_of
from export.parity import mean_overlap
from export.tensorrt.compatibility import rebuild_command
from export.triton import Scheduling, ensemble_config, model_config, preprocess_config, to_text
from export.widen import EXACT_RUNTIME, graph_for_server, quantises_fp16
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import check_output, config_to_json
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.imaging.preprocess import Preprocess
from vpr.inference.onnx_file import detach_weights, save_graph
from vpr.inference.onnx_graph import load_graph
from vpr.inference.onnx_session import add_weights, import_onnxruntime
from vpr.retrieval.confirmed_storage import RESULTS
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.search import search
from vpr.retrieval.self_search import ContentKey, content_keys

log = get_logger(__name__)

_MODEL_FILES = {"onnx": "model.onnx", "engine": "model.plan"}
_GRAPH_BATCH = 32
_CLIENT_RESULTS = 5
_HNSW_LINKS = 32
_MAX_QUERIES = 256
_TEMPLATES = Path(__file__).parent / "templates"
_PREPROCESSING = Path(__file__).parent / "triton_preprocess.py"


def export_serving(config: ServingConfig) -> Path:
    """Write a Triton model repository, the gallery and its index as an artifact of kind ``serving``.

    :class:`UserError` if Triton cannot load the model, the name is invalid, the gallery is of another model or
    preprocessing, or threshold, metadata or storage setting do not fit the gallery.
    """
    model, gallery = load_artifact(config.model, ("onnx", "engine")), load_embeddings(config.gallery)
    name = config.name or model.card.name
    names = (name, f"{name}-preprocess", f"{name}-images")
    for model_name in names if config.accept_images else names[:1]:
        check_model_name(model_name)
    check_output(config.output, "serving")
    graph = graph_for_server(model, config.device) if model.card.kind == "onnx" else None
    _check_model(model, graph, config)
    preprocess = _check_gallery(model, gallery)
    handoff = load_handoff(config, model, gallery)
    values = {**config_to_json(config), "name": name, **handoff.checksums}
    if graph is not None:  # older hand-offs hold the graph as it is
        stored = load_graph(model)
        if opset_of(graph) < opset_of(stored):
            values["opset"] = opset_of(graph)
        if quantises_fp16(stored) and not quantises_fp16(graph):
            values["base"] = "fp32"
    parents = [model.as_parent(model.card.kind), gallery.artifact.as_parent("embeddings"), *handoff.parents]
    stage = Stage(config.output, "serving", values, parents)
    if stage.find():
        return stage.path
    with reraise_as_artifact_error(model):
        scheduling = _choose_scheduling(model, config)
        fields = model_config(name, model, preprocess, scheduling)
    with stage.write() as draft:
        _write_repository(draft.path / "model_repository" / name, model, graph, fields)
        if config.accept_images:
            _write_ensemble(draft.path / "model_repository", names, model, preprocess, scheduling)
        images, overlap = _write_gallery(draft.path / "gallery", gallery, config.index, handoff)
        handoff.write(draft.path)
        rounds = graph is not None and quantises_fp16(graph)
        text = _render_readme(name, model, preprocess, scheduling, images, config, handoff, rounds)
        (draft.path / "README.md").write_text(text, encoding="utf-8")
        copy_golden(model, draft.path)
        draft.preprocess, draft.embedding = preprocess, model.card.embedding
        draft.catalog = gallery.artifact.card.catalog
        draft.inputs, draft.outputs = model.card.inputs, model.card.outputs
        draft.metrics = {"max_batch": scheduling.max_batch, "gallery": images, "index_top10_overlap": overlap}
        if graph is not None:
            draft.metrics |= {"opset": opset_of(graph), "ir_version": graph.ir_version, "runtime": OLDEST_RUNTIME}
    log.info(f"{config.output}: model '{name}' for {fields['backend']}, batches up to {scheduling.max_batch}")
    _announce_gallery(config, handoff, images, overlap)
    return stage.path


def _announce_gallery(config: ServingConfig, handoff: Handoff, images: int, overlap: float | None) -> None:
    quality = f"top-10 overlap with exact search {overlap:.3f}" if overlap is not None else "overlap not measured"
    kind = f"{config.index} index"
    if handoff.index:
        kind = f"index of {handoff.index.storage.setting.name}"
    elif config.index == "flat":
        quality = "exact"
    log.info(f"{config.output}: {images} gallery images, {kind}, {quality}")


def _check_model(model: Artifact, graph: onnx.ModelProto | None, config: ServingConfig) -> None:
    """Raise :class:`UserError` if Triton cannot load the model, or cannot run it on a single image."""
    for specs in (model.card.inputs, model.card.outputs):
        if len(specs) != 1 or not specs[0].shape or not isinstance(specs[0].shape[0], str):
            raise UserError(f"{model.path}: the card lists no input and output of any batch size. Export it again.")
    if graph is not None:
        _check_graph(model, graph)
        return
    with reraise_as_artifact_error(model):
        built, min_batch = model.card.config, int(model.card.metrics["profile"][0])
        rebuild = rebuild_command(model, backend="tensorrt", min_batch=1)
        source = built["onnx"]
    if built["backend"] != "tensorrt":
        remedy = f"Use the graph {source}, or rebuild where TensorRT is installed: {rebuild}"
        raise UserError(f"{model.path}: built by {built['backend']}, but Triton loads TensorRT engines only. {remedy}")
    if built.get("weight_stripped"):
        raise UserError(f"{model.path}: the engine has no weights, and Triton adds none. Rebuild: {rebuild}")
    if min_batch > 1:
        raise UserError(f"{model.path}: the smallest batch is {min_batch}, a request may have 1. Rebuild: {rebuild}")
    if config.device == "cpu":
        raise UserError(f"device: an engine needs a GPU, got cpu. Use the graph {source}.")


def _check_graph(model: Artifact, graph: onnx.ModelProto) -> None:
    """Load a graph with ONNX Runtime's default settings, as Triton's backend does."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    outline, weights = detach_weights(graph)
    add_weights(options, weights)
    try:
        ort.InferenceSession(outline.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{model.path}: ONNX Runtime cannot load it ({reason}). Build an engine from it.") from None


def _check_gallery(model: Artifact, gallery: Embeddings) -> Preprocess:
    """Return the common preprocessing; raise :class:`UserError` if model and gallery are not comparable."""
    path, networks = gallery.artifact.path, model.networks()
    if not networks:
        raise UserError(f"{model.path}: the card names no teacher or student. Export it again.")
    if gallery.model.sha256 not in {model.sha256, networks[0].sha256}:
        network = f"{networks[0].role} '{networks[0].name}'"
        raise UserError(
            f"{path}: embedded with '{gallery.model.name}', but the model is of {network}. "
            f"Embed the gallery with that {networks[0].role} (`vpr embed`)."
        )
    card, gallery_card = model.card, gallery.artifact.card
    other = gallery_card.preprocess
    if card.preprocess is None or other is None or card.preprocess.float_input != other.float_input:
        raise UserError(f"{path}: preprocessing differs from {model.path}. Embed the gallery again.")
    if card.embedding is None or gallery_card.embedding is None or card.embedding.dim != gallery_card.embedding.dim:
        raise UserError(f"{path}: embedding dimension differs from {model.path}. Embed the gallery again.")
    return card.preprocess


def _choose_scheduling(model: Artifact, config: ServingConfig) -> Scheduling:
    """Return the scheduling; the engine's profile sets the batch sizes that the configuration leaves open."""
    is_engine = model.card.kind == "engine"
    _, opt_batch, limit = model.card.metrics["profile"] if is_engine else (1, 0, MAX_BATCH)
    max_batch = config.max_batch or (limit if is_engine else _GRAPH_BATCH)
    if max_batch > limit:
        raise UserError(f"max_batch: expected 1 to {limit} for {model.path}, got {max_batch}.")
    preferred = config.preferred_batches
    if preferred is None:
        preferred = tuple(sorted({min(opt_batch, max_batch), max_batch})) if is_engine else ()
    if any(not 1 <= size <= max_batch for size in preferred):
        raise UserError(f"preferred_batches: expected sizes from 1 to {max_batch} for {model.path}, got {preferred}.")
    return Scheduling(max_batch, preferred, config.queue_delay_us, config.instances, config.device)


def _write_repository(folder: Path, model: Artifact, graph: onnx.ModelProto | None, fields: dict[str, Any]) -> None:
    (folder / "1").mkdir(parents=True)
    target = folder / "1" / _MODEL_FILES[model.card.kind]
    if graph is None:
        shutil.copyfile(model.file("engine.plan"), target)
    else:
        save_graph(graph, target.parent)
    (folder / "config.pbtxt").write_text(to_text(fields), encoding="utf-8")


def _write_ensemble(
    repository: Path, names: tuple[str, str, str], model: Artifact, preprocess: Preprocess, scheduling: Scheduling
) -> None:
    """Write the preprocessing model and the ensemble; ``names`` are those of model, preprocessing and ensemble."""
    name, preprocessing, ensemble = names
    fields = {
        preprocessing: preprocess_config(preprocessing, model, preprocess, scheduling),
        ensemble: ensemble_config(ensemble, (preprocessing, name), model, preprocess, scheduling),
    }
    for folder, values in fields.items():
        (repository / folder / "1").mkdir(parents=True)
        (repository / folder / "config.pbtxt").write_text(to_text(values), encoding="utf-8")
    shutil.copyfile(_PREPROCESSING, repository / preprocessing / "1" / "model.py")
    text = "An ensemble has no model file, but Triton requires the folder of a version.\n"
    (repository / ensemble / "1" / "README").write_text(text, encoding="utf-8")


def _write_gallery(folder: Path, gallery: Embeddings, kind: str, handoff: Handoff) -> tuple[int, float | None]:
    """Write vectors, rows and index; return the number of images, and unless ``flat`` the overlap if it is measured."""
    import faiss

    rows = gallery.gallery_rows()
    vectors = np.ascontiguousarray(gallery.vectors[rows])
    with reraise_as_artifact_error(gallery.artifact):
        columns = ["image", "product", "category"]
        table = pq.read_table(gallery.artifact.file("rows.parquet"), columns=columns).take(rows)
    folder.mkdir()
    np.save(folder / "vectors.npy", vectors, allow_pickle=False)
    pq.write_table(table.add_column(0, "id", pa.array(np.arange(len(rows)))), folder / "rows.parquet")
    build = handoff.index.build if handoff.index else _link if kind == "hnsw" else _store_flat
    index = build(vectors)
    faiss.write_index(index, str(folder / "index.faiss"))
    return len(rows), None if build is _store_flat else _measure_overlap(gallery, rows, vectors, index, build)


def _store_flat(vectors: NDArray[np.float32]) -> Any:
    """Return an exact index of (n, dim) vectors."""
    import faiss

    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def _link(vectors: NDArray[np.float32]) -> Any:
    """Return an HNSW index of (n, dim) vectors."""
    import faiss

    index = faiss.IndexHNSWFlat(vectors.shape[1], _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    return index


def _measure_overlap(
    gallery: Embeddings,
    rows: NDArray[np.int64],
    vectors: NDArray[np.float32],
    index: Any,
    build: Callable[[NDArray[np.float32]], Any] = _link,
) -> float | None:
    """Return the overlap of an index of the ``rows``, (n, dim) vectors, with exact search.

    An image in an HNSW index finds itself and its neighbours by its links. So queries are other images. If there are
    none, a sample of the images queries an index of the others, which ``build`` returns; None for a gallery of a single
    content.
    """
    codes: dict[ContentKey, int] = {}
    contents = np.array([codes.setdefault(key, len(codes)) for key in content_keys(gallery.read_rows())])
    queries = np.flatnonzero((gallery.roles == "query") & ~np.isin(contents, contents[rows]))
    limit = _MAX_QUERIES
    if not len(queries):
        queries = rows[np.unique(contents[rows], return_index=True)[1]]
        limit = min(limit, len(queries) // 2)
        if not limit:
            return None
    queries = queries[np.linspace(0, len(queries) - 1, min(len(queries), limit)).astype(int)]
    is_searched = ~np.isin(contents[rows], contents[queries])
    if not is_searched.all():
        vectors = vectors[is_searched]
        index = build(vectors)
    count = min(10, len(vectors))
    exact = search(gallery.vectors[queries], vectors, count)[1]
    return mean_overlap(exact, index.search(gallery.vectors[queries], count)[1])


def _render_readme(
    name: str,
    model: Artifact,
    preprocess: Preprocess,
    scheduling: Scheduling,
    images: int,
    config: ServingConfig,
    handoff: Handoff,
    rounds: bool,
) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    blocks: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    templates = Environment(loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, **blocks)
    compatible = model.card.config.get("version_compatible")
    no_match, storage = handoff.no_match, handoff.index.storage if handoff.index else None
    results = max(_CLIENT_RESULTS, no_match.results if no_match else 1, RESULTS if storage else 1)
    return templates.get_template("serving.md").render(
        name=name,
        model=model.card.name,
        file=_MODEL_FILES[model.card.kind],
        input=model.card.inputs[0].name,
        output=model.card.outputs[0].name,
        preprocess=preprocess,
        embedding=model.card.embedding,
        gallery=images,
        index="an exact" if config.index == "flat" else "an approximate",
        accepts_images=config.accept_images,
        no_match=no_match,
        storage=storage,
        columns=handoff.columns,
        results=min(images, results),
        golden=has_golden(model),
        max_batch=scheduling.max_batch,
        saturates=scheduling.device == "cpu" and str(model.card.metrics.get("precision")).startswith("int8"),
        builder=model.card.metrics.get("builder"),
        runtime=OLDEST_RUNTIME if model.card.kind == "onnx" else "",
        exact_runtime=EXACT_RUNTIME if rounds else "",
        targets=", ".join(model.card.metrics.get("targets", ())),
        flags=" --backend-config=tensorrt,version-compatible=true" if compatible else "",
    )
