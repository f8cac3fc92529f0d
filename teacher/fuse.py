"""``vpr teacher fuse``: several teachers whitened, concatenated and reduced to one embedding."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from teacher.config import FuseConfig
from teacher.fused import FusedTeacher, WhitenedPart, fit_whitening, shared_preprocess
from teacher.model import is_fused, load_teacher
from teacher.soup import inherited_leak
from vpr.artifacts.card import Embedding
from vpr.artifacts.run_folder import is_written, wait_until
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import config_to_json
from vpr.common.distributed import compute_device, is_first
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.seen import record_seen
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import embed, l2_normalize, read_batches, score_split, torch_forward
from vpr.retrieval.metrics import RetrievalScores
from vpr.retrieval.projection import preserve_cosines, principal_directions
from vpr.training.loop import training_and_validation

log = get_logger(__name__)

Vectors = NDArray[np.float32]


def fuse(config: FuseConfig) -> Path:
    """Fit the fusion on training images, score it on validation images and write an artifact of kind ``teacher``.

    Raises:
        UserError: The teachers do not fit each other, the catalogue or the settings.
    """
    started = time.monotonic()
    catalog = load_catalog(config.catalog)
    teachers = [load_artifact(path, "teacher") for path in config.models]
    check_fusable(teachers, catalog)
    parents = [*(teacher.as_parent("teacher") for teacher in teachers), *catalog.as_parents()]
    values = config_to_json(config) | {"recipe": "fused", "parts": [_card_entry(teacher) for teacher in teachers]}
    stage = Stage(config.output, "teacher", values, parents)
    if stage.find():
        return stage.path
    if not is_first():
        wait_until(lambda: is_written(config.output, values, parents))
        return stage.path
    training, validation = training_and_validation(catalog, config.catalog)
    leak = inherited_leak(teachers, catalog)
    starts = {str(text) for teacher in teachers if (text := (teacher.card.catalog or {}).get("start"))}
    model, preprocess = build_unfitted(teachers, config.embedding_dim)
    fit_fusion(model.to(compute_device()), preprocess, training, config)
    scores = score_teachers(model, preprocess, teachers, validation, config)
    fused = scores.pop("fused")
    with stage.write() as writer:
        weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(weights, writer.path / "model.safetensors")
        record_seen(writer.path, teachers, {"training": training})
        writer.preprocess = preprocess
        writer.embedding = Embedding(dim=model.embedding_dim, normalised=True, dtype="float32")
        start = {"start": "; ".join(sorted(starts))} if starts else {}
        writer.catalog = {**catalog.summary(), **start, **({"leak": leak} if leak else {})}
        writer.metrics = {
            "val_recall_at_1": fused.recall_at_1,
            "val_map": fused.map,
            "teachers": [{"name": Path(path).name, "val_recall_at_1": row.recall_at_1} for path, row in scores.items()],
            "seconds": round(time.monotonic() - started, 1),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    log.info(f"{config.output}: {len(teachers)} teachers fused, recall@1 {fused.recall_at_1:.4f}")
    best = max(scores, key=lambda path: scores[path].recall_at_1)
    if fused.recall_at_1 < scores[best].recall_at_1:
        log.warning(f"{config.output}: {best} alone has more recall. Use it alone, or change the shrinkage.")
    return stage.path


def check_fusable(teachers: Sequence[Artifact], catalog: Catalog) -> None:
    """Raise :class:`UserError` unless these are different teachers, each trained on this catalogue."""
    paths: dict[str, Path] = {}
    first = teachers[0]
    for teacher in teachers:
        if is_fused(teacher):
            raise UserError(f"{teacher.path}: holds several teachers already. Name its teachers instead.")
        if teacher.sha256 in paths:
            raise UserError(f"{teacher.path}: the same teacher as {paths[teacher.sha256]}. Name each once.")
        paths[teacher.sha256] = teacher.path
        if missing := [key for key in ("network", "tower_config") if key not in teacher.card.config]:
            raise UserError(f"{teacher.path}: the card has no '{missing[0]}'. Train the teacher again.")
    for teacher in teachers:
        if _catalog_sha256(teacher) != _catalog_sha256(first):
            # One of them may have been trained on images that the other's catalogue holds out.
            fix = "Train both on one catalogue"
            raise UserError(f"{teacher.path}: trained on another catalogue than {first.path}. {fix}.")
    if _catalog_sha256(first) != catalog.sha256:
        raise UserError(f"{first.path}: trained on another catalogue than --catalog. Use that of its training.")


def build_unfitted(teachers: Sequence[Artifact], embedding_dim: int) -> tuple[FusedTeacher, Preprocess]:
    """Load the teachers into one network that does not whiten yet, with its preprocessing."""
    shared = shared_preprocess([(str(teacher.path), _preprocess(teacher)) for teacher in teachers])
    parts = []
    for teacher in teachers:
        network, _ = load_teacher(teacher.path, teacher)
        parts.append(WhitenedPart(network, network.embedding_dim, _preprocess(teacher), shared))
    return FusedTeacher(parts, embedding_dim).eval(), shared


def fit_fusion(model: FusedTeacher, preprocess: Preprocess, training: Catalog, config: FuseConfig) -> None:
    """Fit whitening and reduction in place on embeddings of training images.

    Raises:
        UserError: There are too few images for the directions, or a teacher's embeddings are all equal.
    """
    rows = np.sort(np.random.default_rng(config.seed).permutation(len(training))[: config.images])
    images = training.take(rows)
    # n vectors have n - 1 directions around their mean. The reduction needs one for each dimension; the whitening does
    # not, because its shrinkage gives a variance to directions that the images do not show.
    needed = model.embedding_dim + 1 if model.reduction is not None else 2
    if len(images) < needed:
        problem = f"{needed} training images are needed to fit {model.embedding_dim} dimensions, got {len(images)}"
        raise UserError(f"catalog: {problem}. Add images, raise images, or lower embedding_dim.")
    for path, part in zip(config.models, model.parts, strict=True):
        if len(images) <= len(part.mean):
            few = f"{len(images)} images for {len(part.mean)} dimensions"
            log.warning(f"{path}: {few}, so the shrinkage decides part of the whitening. More images are better.")
    embeddings = _embed_parts(model, preprocess, images, config)
    whitened = []
    for path, part, vectors in zip(config.models, model.parts, embeddings, strict=True):
        mean, matrix = fit_whitening(vectors, config.shrinkage, path)
        whitened.append(l2_normalize((vectors - mean.numpy()) @ matrix.numpy()))
        part.mean.copy_(mean)
        part.matrix.copy_(matrix)
    if model.reduction is not None:
        joined = l2_normalize(np.concatenate(whitened, axis=1))
        start = principal_directions(joined, model.embedding_dim)
        model.reduction.copy_(preserve_cosines(joined, start, config.steps, config.seed))


def score_teachers(
    model: FusedTeacher, preprocess: Preprocess, teachers: Sequence[Artifact], validation: Catalog, config: FuseConfig
) -> dict[str, RetrievalScores]:
    """Return and log validation scores: of each teacher with its own preprocessing, and of ``fused``."""
    networks: dict[str, tuple[Any, Preprocess]] = {}
    for part, teacher in zip(model.parts, teachers, strict=True):
        networks[str(teacher.path)] = part.network, _preprocess(teacher)
    scores = {}
    for name, (network, own) in {**networks, "fused": (model, preprocess)}.items():
        vectors = embed(validation, own, torch_forward(network), config.batch_size, config.threads)
        scores[name] = score_split(validation, vectors)
        log.info(f"  recall@1 {scores[name].recall_at_1:.4f}  {name}")
    return scores


@torch.inference_mode()
def _embed_parts(model: FusedTeacher, preprocess: Preprocess, images: Catalog, config: FuseConfig) -> list[Vectors]:
    """Return each teacher's own (n, dim) embeddings of images, not whitened."""
    batches: list[list[Vectors]] = [[] for _ in model.parts]
    device = next(model.parameters()).device
    for batch in read_batches(images, preprocess, config.batch_size, config.threads):
        x = torch.from_numpy(batch).to(device)
        for part, collected in zip(model.parts, batches, strict=True):
            collected.append(part.embed(x).cpu().numpy())
    return [np.concatenate(collected) for collected in batches]


def _card_entry(teacher: Artifact) -> dict[str, Any]:
    """Return the values of a teacher's card that make its network again."""
    network = {key: teacher.card.config[key] for key in ("network", "tower_config")}
    return {"name": teacher.card.name, **network, "preprocess": _preprocess(teacher).model_dump(mode="json")}


def _preprocess(teacher: Artifact) -> Preprocess:
    if teacher.card.preprocess is None:
        raise UserError(f"{teacher.path}: the card has no preprocessing. Train the teacher again.")
    return teacher.card.preprocess


def _catalog_sha256(teacher: Artifact) -> Any:
    return (teacher.card.catalog or {}).get("sha256")
