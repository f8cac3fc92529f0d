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
from torch import Tensor, nn

from student.config import DistillConfig
from student.dimension import project
from student.model import Student, count_multiply_adds, count_parameters
from student.module import StudentModule
from student.objective import Labels, Objective, class_means
from student.quantise import check_ranges, fake_quantise, read_thresholds
from student.signal import Signal, cache_bytes, cache_signal, embed_pixels
from student.source import find_projection, load_source, own_dimension, source_dim
from student.start import start_from
from student.targets import CachedTargets, OnlineTargets, PairDataset
from student.unlabelled import add_unlabelled
from teacher.train import unknown_start
from vpr.artifact import Artifact, Embedding, Parent, check_output, find_current, load_artifact, plain, write_artifact
from vpr.callbacks import drop_checkpoints
from vpr.catalog import Catalog, load_catalog
from vpr.console import say
from vpr.embeddings import score_split
from vpr.errors import UserError
from vpr.images import Preprocess
from vpr.loading import Normalise, PictureDataset, training_loader, validation_loader
from vpr.logs import check_tracker, copy_logs
from vpr.processes import is_first, rank_and_world
from vpr.splits import find_leaks
from vpr.training import Fitted, fit
from vpr.unfinished import only_run, run_folder


def distill(config: DistillConfig) -> Path | None:
    """Distil a student and write it as an artifact of kind ``student``; a dry run writes nothing."""
    catalog = load_catalog(config.catalog)
    teacher, source = load_source(config)
    dim = own_dimension(config, source)
    config = replace(config, model=replace(config.model, embedding_dim=dim))
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    if not len(training) or not len(validation):
        raise UserError(f"{config.catalog}: needs a train and a validation split: build it with --validation 0.1")
    score_split(validation, np.ones((len(validation), 1), np.float32))  # refuses what no epoch could be chosen by
    _check_paths(config)
    scored = [validation, catalog.select(split="test")]
    training, extra, more = add_unlabelled(training, scored, config.unlabelled, config.output, config.dry_run)
    values, parents = _identity(config, catalog, source, more)
    folder = run_folder(config.output, values, parents)
    if not config.dry_run and find_current(config.output, "student", values, parents):
        drop_checkpoints(folder)  # of a run that was killed after its artifact was there
        say(f"{config.output}: up to date")
        return Path(config.output)
    assert source.card.preprocess is not None
    preprocess = source.card.preprocess.model_copy(update={"size": config.model.image_size})
    notes = _notes(config, catalog)
    _print_plan(config, source, training, preprocess)
    started = time.monotonic()
    pictures = _pictures(config, training, preprocess, source.card.preprocess)
    student, labels = _build_student(config), Labels(training)
    _check(config, student, labels, source, pictures)
    if config.dry_run:
        _try_step(config, student, labels, teacher, source, training, validation, pictures, preprocess)
        say("dry run: one step taken, nothing written")
        return None
    signal = _signal(config, teacher, source, training)
    projection, recalls = find_projection(config, teacher, source, signal, training, validation)
    targets = _targets(config, teacher, source, signal, projection, dim)
    classes = None if signal is None or not config.losses.logits else _class_means(signal, labels)
    before = time.monotonic() - started
    L.seed_everything(config.seed, verbose=False)
    width = dim if projection is not None else source_dim(source)
    objective = Objective(config.losses, student, labels, width, classes)
    module = StudentModule(config, student, objective, targets, preprocess, validation)
    keep = config.loader.keep_in_memory
    loaders = (
        training_loader(pictures, config.loader, config.seed, *rank_and_world()),
        validation_loader(PictureDataset(validation, preprocess, keep), config.loader, *rank_and_world()),
    )
    with only_run(folder):
        best = fit(module, loaders, student, folder, config.epochs, config.run)
        if is_first():
            with write_artifact(config.output, "student", values, parents) as draft:
                copy_logs(folder, draft.path)
                shutil.copyfile(folder / "best.safetensors", draft.path / "model.safetensors")
                if projection is not None:
                    save_file({"projection": projection.contiguous()}, draft.path / "projection.safetensors")
                draft.preprocess = preprocess
                draft.embedding = Embedding(dim=dim, normalised=True, dtype="float32")
                draft.catalog = {**catalog.summary(), **extra, **notes}
                draft.metrics = {**_metrics(student, preprocess, best, before), **recalls}
                if config.quantise.ranges:
                    draft.metrics["quantise_keep"] = list(config.quantise.keep)
            drop_checkpoints(folder)
            say(f"{config.output}: student of epoch {best.epoch}, validation recall@1 {best.best:.3f}")
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


def _metrics(student: Student, preprocess: Preprocess, fitted: Fitted, before: float) -> dict[str, Any]:
    """What the card says of a training; ``before`` are the seconds that came before it."""
    return {
        "val_recall_at_1": fitted.best,
        "best_epoch": fitted.epoch,
        "steps": fitted.steps,
        "seconds": round(fitted.seconds + before, 1),
        "parameters": count_parameters(student),
        "multiply_adds": count_multiply_adds(student, preprocess.size),
    }


def _identity(
    config: DistillConfig, catalog: Catalog, source: Artifact, more: list[Parent]
) -> tuple[dict[str, Any], list[Parent]]:
    """What decides the result: configuration and parents."""
    values = plain(config)
    values.pop("dry_run")
    values["model"] = asdict(config.model)
    if rank_and_world()[1] > 1:  # the batch of a step is that of all processes
        values["processes"] = rank_and_world()[1]
    parents = [load_artifact(config.teacher, "teacher").as_parent("teacher")]
    if config.assistant:
        parents.append(source.as_parent("assistant"))
    parents += catalog.as_parents()
    if config.start:
        parents.append(load_artifact(config.start).as_parent("start"))
    if config.quantise.ranges:
        parents.append(load_artifact(config.quantise.ranges, "ranges").as_parent("ranges"))
    return values, parents + more


def _notes(config: DistillConfig, catalog: Catalog) -> dict[str, Any]:
    """What the card says of leaks, also of those before this stage."""
    leak = find_leaks(catalog, config.allow_leak)
    named = {"teacher": config.teacher, "assistant": config.assistant, "start": config.start}
    started = []
    for role, path in {**named, "ranges": config.quantise.ranges}.items():
        if path:
            artifact = load_artifact(path)
            before = artifact.card.catalog or {}
            leak |= {role: before["leak"]} if before.get("leak") else {}
            started += [before.get("start"), unknown_start(artifact, catalog).get("start")]
    told = "; ".join(dict.fromkeys(text for text in started if text))
    return {**({"start": told} if told else {}), **({"leak": leak} if leak else {})}


def _print_plan(config: DistillConfig, source: Artifact, training: Catalog, preprocess: Preprocess) -> None:
    with torch.device("meta"):
        parameters = count_parameters(Student(config.model))
    say(
        f"student: {parameters / 1e6:.2f} M parameters, {config.model.embedding_dim} dimensions, {preprocess.size} "
        f"pixels; {config.epochs} epochs of {len(training)} pictures; "
        + ", ".join(f"{weight:g} x {name}" for name, weight in config.losses.weights().items())
    )
    if not config.losses.needs_teacher:
        say("  from labels alone: the teacher is not asked")
    elif config.signal.mode == "online":
        say(f"  {source.card.name} runs beside the student, queue of {config.signal.bank}")
    else:
        size = cache_bytes(len(training), source_dim(source), config.signal)
        say(f"  {source.card.name} is asked {config.signal.views * len(training)} times, then cached in {size} bytes")


def _pictures(config: DistillConfig, training: Catalog, student: Preprocess, teacher: Preprocess) -> PictureDataset:
    keep = config.loader.keep_in_memory and not config.dry_run
    if config.signal.mode == "online" and config.losses.needs_teacher:
        return PairDataset(training, student, teacher, keep)
    return PictureDataset(training, student, keep)


def _build_student(config: DistillConfig) -> Student:
    L.seed_everything(config.seed, verbose=False)
    student = Student(config.model)
    if config.start:
        artifact, taken = start_from(student, config.start)
        share = taken / count_parameters(student)
        say(f"  {share:.0%} of the student's parameters are selected from {artifact.card.name}")
    if config.quantise.ranges:
        names = fake_quantise(student, read_thresholds(config.quantise.ranges), config.quantise.keep)
        say(f"  {len(names)} linears compute as they will in INT8")
    return student


def _check(config: DistillConfig, student: Student, labels: Labels, source: Artifact, pictures: PictureDataset) -> None:
    """Refuse now what would only come to light when the teacher's signal is there."""
    width = source_dim(source)
    if config.dimension.projects_teacher and config.model.embedding_dim != width:
        width = config.model.embedding_dim
        most = min(config.dimension.pictures, len(pictures))
        if width > most:
            raise UserError(
                f"model.embedding_dim: {width} directions cannot be fitted on {most} embeddings: give at most {most}, "
                "or raise dimension.pictures"
            )
    Objective(config.losses, student, labels, width, torch.zeros(len(labels.counts), width))
    training_loader(pictures, config.loader, config.seed, *rank_and_world())
    check_tracker(config.run.tracker)
    if config.cache:
        check_output(config.cache, "views")


def _signal(config: DistillConfig, teacher: nn.Module, source: Artifact, training: Catalog) -> Signal | None:
    if not config.losses.needs_teacher or config.signal.mode == "online":
        return None
    path = config.cache or f"{Path(config.output)}-views"
    return cache_signal(path, teacher, source, training, config.views, config.signal, config.seed, config.loader)


def _targets(
    config: DistillConfig,
    teacher: nn.Module,
    source: Artifact,
    signal: Signal | None,
    projection: Tensor | None,
    dim: int,
) -> CachedTargets | OnlineTargets | None:
    if not config.losses.needs_teacher:
        return None
    if signal is not None:
        return CachedTargets(signal, config.signal, projection, config.seed)
    assert source.card.preprocess is not None
    width = dim if projection is not None else source_dim(source)
    return OnlineTargets(teacher, source.card.preprocess, config.signal, width, projection)


def _class_means(signal: Signal, labels: Labels) -> Tensor:
    rows = np.arange(len(signal))
    return class_means(np.mean([signal.lookup(rows, view) for view in range(len(signal.shards))], axis=0), labels)


def _try_step(
    config: DistillConfig,
    student: Student,
    labels: Labels,
    teacher: nn.Module,
    source: Artifact,
    training: Catalog,
    validation: Catalog,
    pictures: PictureDataset,
    preprocess: Preprocess,
) -> None:
    """One forward and backward pass of everything on two pictures: what a dry run finds out beyond the plan."""
    assert source.card.preprocess is not None
    batch = pictures.__getitems__([0, len(training) - 1])
    seen = PictureDataset(training, source.card.preprocess).__getitems__([0, len(training) - 1])["pixels"]
    vectors = embed_pixels(teacher, Normalise(source.card.preprocess), seen.float()).clone()
    width = vectors.shape[1]
    if config.dimension.projects_teacher and config.model.embedding_dim != width:
        width = config.model.embedding_dim
        vectors = project(vectors, torch.eye(vectors.shape[1])[:, :width])
    classes = torch.randn(len(labels.counts), width)
    objective = Objective(config.losses, student, labels, width, classes)
    x = Normalise(preprocess)(batch["pixels"].float())
    if objective.logits is not None:
        loss = objective.logits(x, labels.of_rows[batch["rows"]], vectors)
    else:
        asked = vectors if config.losses.needs_teacher else None
        loss = objective.total(objective(student(x), asked, vectors, batch["rows"], 0.0, 0))
    loss.backward()
    score_split(validation, np.ones((len(validation), 1), np.float32))
