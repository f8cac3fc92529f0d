"""``vpr student distill``: catalogue -> teacher's signal -> vit-pytorch ViT -> trainer -> artifact."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from student.config import DistillConfig
from student.criterion import DistillationLoss, Labels, class_means
from student.dimension import project
from student.model import Student, count_multiply_adds, count_parameters
from student.module import StudentModule
from student.projection import find_projection, student_dimension
from student.qat import check_ranges, insert_fake_quant, read_thresholds
from student.targets import CachedTargets, OnlineTargets, TwoSizeDataset
from student.teacher_cache import TeacherCache, build_teacher_cache, cache_bytes, embed_pixels
from student.teacher_model import TeacherModel, load_teacher_model
from student.unlabelled import add_unlabelled
from student.weight_selection import init_from_larger
from teacher.train import warn_unverified_init
from vpr.artifacts.run_folder import run_folder, run_lock
from vpr.artifacts.store import (
    ArtifactWriter,
    Embedding,
    Parent,
    check_output,
    find_up_to_date,
    load_artifact,
    write_artifact,
)
from vpr.common.distributed import is_first, rank_and_world
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.loaders import ImageDataset, Normalise, training_loader, validation_loader
from vpr.data.splits import find_leaks
from vpr.imaging.decode import Preprocess
from vpr.training.callbacks import drop_checkpoints
from vpr.training.loggers import check_tracker, copy_logs
from vpr.training.loop import FitResult, fit, training_and_validation, training_values

log = get_logger(__name__)


def distill(config: DistillConfig) -> Path | None:
    """Distil a student and write it as an artifact of kind ``student``; a dry run writes nothing."""
    catalog = load_catalog(config.catalog)
    source = load_teacher_model(config.teacher, config.assistant)
    config = replace(config, model=replace(config.model, embedding_dim=student_dimension(config, source)))
    training, validation = training_and_validation(catalog, config.catalog)
    _check_paths(config)
    scored = [validation, catalog.select(split="test")]
    training, extra, more = add_unlabelled(training, scored, config.unlabelled, config.output, config.dry_run)
    values, parents = _cache_key(config, catalog, source, more)
    folder = run_folder(config.output, values, parents)
    if not config.dry_run and find_up_to_date(config.output, "student", values, parents):
        drop_checkpoints(folder)  # of a run that was killed after its artifact was there
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    preprocess = source.preprocess.model_copy(update={"size": config.model.image_size})
    notes = {**extra, **_leak_metadata(config, catalog)}
    _print_plan(config, source, training, preprocess)
    started = time.monotonic()
    images = _build_dataset(config, training, preprocess, source.preprocess)
    student, labels = _build_student(config), Labels(training)
    _validate_early(config, student, labels, source, images)
    if config.dry_run:
        _smoke_test_step(config, student, labels, source, images, preprocess)
        log.info("dry run: one step taken, nothing written")
        return None
    signal = _signal(config, source, training)
    projection, recalls = find_projection(config, source, signal, training, validation)
    objective, targets = _build_loss_and_targets(config, student, labels, source, signal, projection)
    module = StudentModule(config, student, objective, targets, preprocess, validation)
    before = time.monotonic() - started
    held = ImageDataset(validation, preprocess, config.loader.keep_in_memory)
    loaders = (
        training_loader(images, config.loader, config.seed, *rank_and_world()),
        validation_loader(held, config.loader, *rank_and_world()),
    )
    with run_lock(folder):
        best = fit(module, loaders, student, folder, config.epochs, config.run)
        if is_first():
            with write_artifact(config.output, "student", values, parents) as draft:
                _write_files(draft, config, folder, projection)
                draft.preprocess = preprocess
                draft.catalog = {**catalog.summary(), **notes}
                draft.metrics |= {**_metrics(student, preprocess, best, before), **recalls}
            drop_checkpoints(folder)
            log.info(f"{config.output}: student of epoch {best.epoch}, validation recall@1 {best.best:.3f}")
    return Path(config.output)


def _check_paths(config: DistillConfig) -> None:
    """Refuse an output that may not be replaced, and ranges of another student."""
    check_output(config.output, "student")
    for key in ("teacher", "assistant", "start"):
        named = getattr(config, key)
        if named and Path(named).resolve() == Path(config.output).resolve():
            raise UserError(f"output: {config.output} is the {key} and would be replaced: choose another")
    if config.quantise.ranges:
        check_ranges(config.quantise.ranges, config.start)


def _write_files(draft: ArtifactWriter, config: DistillConfig, folder: Path, projection: Tensor | None) -> None:
    """Put what a run has left into the artifact."""
    copy_logs(folder, draft.path)
    shutil.copyfile(folder / "best.safetensors", draft.path / "model.safetensors")
    if projection is not None:
        save_file({"projection": projection.contiguous()}, draft.path / "projection.safetensors")
    draft.embedding = Embedding(dim=config.model.embedding_dim, normalised=True, dtype="float32")
    if config.quantise.ranges:
        draft.metrics["quantise_exclude_layers"] = list(config.quantise.exclude_layers)


def _metrics(student: Student, preprocess: Preprocess, fitted: FitResult, before: float) -> dict[str, Any]:
    """What the card says of a training; ``before`` are the seconds that came before it."""
    return {
        "val_recall_at_1": fitted.best,
        "best_epoch": fitted.epoch,
        "steps": fitted.steps,
        "seconds": round(fitted.seconds + before, 1),
        "parameters": count_parameters(student),
        "multiply_adds": count_multiply_adds(student, preprocess.size),
    }


def _cache_key(
    config: DistillConfig, catalog: Catalog, source: TeacherModel, more: list[Parent]
) -> tuple[dict[str, Any], list[Parent]]:
    """What decides the result: configuration and parents."""
    values = {**training_values(config), "model": asdict(config.model)}
    parents = [load_artifact(config.teacher, "teacher").as_parent("teacher")]
    if config.assistant:
        parents.append(source.artifact.as_parent("assistant"))
    parents += catalog.as_parents()
    if config.start:
        parents.append(load_artifact(config.start).as_parent("start"))
    if config.quantise.ranges:
        parents.append(load_artifact(config.quantise.ranges, "ranges").as_parent("ranges"))
    return values, parents + more


def _leak_metadata(config: DistillConfig, catalog: Catalog) -> dict[str, Any]:
    """What the card says of leaks, also of those before this stage."""
    leak = find_leaks(catalog, config.allow_leak)
    named = {"teacher": config.teacher, "assistant": config.assistant, "start": config.start}
    started = []
    for role, path in {**named, "ranges": config.quantise.ranges}.items():
        if path:
            artifact = load_artifact(path)
            before = artifact.card.catalog or {}
            leak |= {role: before["leak"]} if before.get("leak") else {}
            started += [before.get("start"), warn_unverified_init(artifact, catalog).get("start")]
    told = "; ".join(dict.fromkeys(text for text in started if text))
    return {**({"start": told} if told else {}), **({"leak": leak} if leak else {})}


def _print_plan(config: DistillConfig, source: TeacherModel, training: Catalog, preprocess: Preprocess) -> None:
    with torch.device("meta"):
        parameters = count_parameters(Student(config.model))
    log.info(
        f"student: {parameters / 1e6:.2f} M parameters, {config.model.embedding_dim} dimensions, {preprocess.size} "
        f"pixels; {config.epochs} epochs of {len(training)} images; "
        + ", ".join(f"{weight:g} x {name}" for name, weight in config.losses.weights().items())
    )
    if not config.losses.needs_teacher:
        log.info("  from labels alone: the teacher is not asked")
    elif config.targets.mode == "online":
        log.info(f"  {source.artifact.card.name} runs beside the student, queue of {config.targets.bank}")
    else:
        size, asked = cache_bytes(len(training), source.dim, config.targets), config.targets.views * len(training)
        log.info(f"  {source.artifact.card.name} is asked {asked} times, then cached in {size} bytes")


def _build_dataset(config: DistillConfig, training: Catalog, student: Preprocess, teacher: Preprocess) -> ImageDataset:
    keep = config.loader.keep_in_memory and not config.dry_run
    if config.targets.mode == "online" and config.losses.needs_teacher:
        return TwoSizeDataset(training, student, teacher, keep)
    return ImageDataset(training, student, keep)


def _build_student(config: DistillConfig) -> Student:
    L.seed_everything(config.seed, verbose=False)
    student = Student(config.model)
    if config.start:
        artifact, taken = init_from_larger(student, config.start)
        share = taken / count_parameters(student)
        log.info(f"  {share:.0%} of the student's parameters are selected from {artifact.card.name}")
    if config.quantise.ranges:
        names = insert_fake_quant(student, read_thresholds(config.quantise.ranges), config.quantise.exclude_layers)
        log.info(f"  {len(names)} linears compute as they will in INT8")
    return student


def _validate_early(
    config: DistillConfig, student: Student, labels: Labels, source: TeacherModel, images: ImageDataset
) -> None:
    """Refuse now what would only come to light when the teacher's signal is there."""
    width = source.dim
    if config.dimension.projects_teacher and config.model.embedding_dim != width:
        width = config.model.embedding_dim
        most = min(config.dimension.images, len(images))
        if width > most:
            raise UserError(
                f"model.embedding_dim: {width} directions cannot be fitted on {most} embeddings: give at most {most}, "
                "or raise dimension.images"
            )
    DistillationLoss(config.losses, student, labels, width, torch.zeros(len(labels.counts), width))
    training_loader(images, config.loader, config.seed, *rank_and_world())
    check_tracker(config.run.tracker)
    if config.cache:
        check_output(config.cache, "views")


def _signal(config: DistillConfig, source: TeacherModel, training: Catalog) -> TeacherCache | None:
    if not config.losses.needs_teacher or config.targets.mode == "online":
        return None
    path = config.cache or f"{Path(config.output)}-views"
    return build_teacher_cache(path, source, training, config.views, config.targets, config.seed, config.loader)


def _build_loss_and_targets(
    config: DistillConfig,
    student: Student,
    labels: Labels,
    source: TeacherModel,
    signal: TeacherCache | None,
    projection: Tensor | None,
) -> tuple[DistillationLoss, CachedTargets | OnlineTargets | None]:
    """The losses, and what they compare the student with; None for losses of labels alone."""
    width = config.model.embedding_dim if projection is not None else source.dim
    classes = None if signal is None or not config.losses.logits else _class_means(signal, labels)
    targets: CachedTargets | OnlineTargets | None = None
    if signal is not None:
        targets = CachedTargets(signal, config.targets, projection, config.seed)
    elif config.losses.needs_teacher:
        targets = OnlineTargets(source.network, source.preprocess, config.targets, width, projection)
    L.seed_everything(config.seed, verbose=False)
    return DistillationLoss(config.losses, student, labels, width, classes), targets


def _class_means(signal: TeacherCache, labels: Labels) -> Tensor:
    rows = np.arange(len(signal))
    return class_means(np.mean([signal.lookup(rows, view) for view in range(len(signal.shards))], axis=0), labels)


def _smoke_test_step(
    config: DistillConfig,
    student: Student,
    labels: Labels,
    source: TeacherModel,
    images: ImageDataset,
    preprocess: Preprocess,
) -> None:
    """One forward and backward pass of everything on two images: what a dry run finds out beyond the plan."""
    two = [0, len(images) - 1]
    batch = images.__getitems__(two)
    seen = ImageDataset(images.catalog, source.preprocess).__getitems__(two)["pixels"]
    vectors = embed_pixels(source.network, Normalise(source.preprocess), seen.float()).clone()
    width = vectors.shape[1]
    if config.dimension.projects_teacher and config.model.embedding_dim != width:
        width = config.model.embedding_dim
        vectors = project(vectors, torch.eye(vectors.shape[1])[:, :width])
    classes = torch.randn(len(labels.counts), width)
    objective = DistillationLoss(config.losses, student, labels, width, classes)
    x = Normalise(preprocess)(batch["pixels"].float())
    if objective.logits is not None:
        loss = objective.logits(x, labels.of_rows[batch["rows"]], vectors)
    else:
        asked = vectors if config.losses.needs_teacher else None
        loss = objective.total(objective(student(x), asked, vectors, batch["rows"], 0.0, 0))
    loss.backward()
