"""``vpr student distill``: catalogue -> teacher embeddings -> vit-pytorch ViT -> training -> artifact."""

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from student.config import DistillConfig
from student.criterion import DistillationLoss, Labels, compute_class_means
from student.inputs import DistillInputs, leak_metadata, load_inputs
from student.model import Student
from student.module import StudentModule
from student.projection import PROJECTION, find_projection
from student.qat import insert_fake_quant, read_thresholds
from student.start_fit import fit_start
from student.targets import CachedTargets, OnlineTargets, Targets, TwoSizeDataset
from student.teacher_cache import TeacherCache, build_teacher_cache, cache_bytes
from student.tokens import TeacherTokens, find_teacher_tokens
from student.weight_selection import init_from_start
from vpr.artifacts.card import Embedding
from vpr.artifacts.run_folder import run_lock
from vpr.artifacts.stage import Stage
from vpr.artifacts.writer import ArtifactWriter, check_output
from vpr.common.distributed import is_first, rank_and_world, trainer_options
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.data.loaders import EpochSampler, ImageDataset, open_caches, training_loader, validation_loader
from vpr.data.seen import Use, read_seen, record_seen
from vpr.imaging.preprocess import Preprocess
from vpr.inference.model_size import count_multiply_adds, count_parameters
from vpr.training.callbacks import drop_checkpoints
from vpr.training.config import RunConfig
from vpr.training.loggers import check_tracker, copy_logs
from vpr.training.loop import FitResult, best_precision, fit, training_values, validation_values

log = get_logger(__name__)

Loader = DataLoader[dict[str, Tensor]]


def distill(config: DistillConfig) -> Path | None:
    """Distil a student and write it as an artifact of kind ``student``; a dry run writes nothing."""
    inputs = load_inputs(config)
    config = replace(config, model=inputs.model)
    values, parents = _values(config, inputs), inputs.parents
    stage = Stage(config.output, "student", values, parents)
    folder = stage.run_folder
    if not config.dry_run and stage.find():
        drop_checkpoints(folder)  # A process killed after writing the artifact leaves them.
        return stage.path
    tokens = find_teacher_tokens(config, config.model, inputs.teacher)
    inputs = inputs.add_unlabelled(config, None if config.dry_run else folder)
    own = {"size": config.model.image_size, **(inputs.start.statistics if inputs.start is not None else {})}
    preprocess = inputs.teacher.preprocess.model_copy(update=own)
    catalog_metadata = {**inputs.catalog.summary(), **inputs.unlabelled, **leak_metadata(inputs, config.allow_leak)}
    inherited = [read_seen(model) for model in inputs.learned_from(config)]
    _log_plan(config, inputs, tokens)
    check_tracker(config.run.tracker)
    start = time.monotonic()
    loaders = _build_loaders(config, inputs, preprocess)
    epochs = count_epochs(config, len(loaders[0]))
    _log_steps(config, loaders[0], epochs)
    student = _build_student(config, inputs)
    licences = [] if inputs.start is None else list(inputs.start.licences)
    fits_head = inputs.fits_head(config)
    inputs = replace(inputs, start=None)  # frees the weights, which may be many times the student's
    L.seed_everything(config.seed, verbose=False)
    token_width = 0 if tokens is None else tokens.grid.width
    criterion = DistillationLoss(config.losses, student, Labels(inputs.training), inputs.target_dim, token_width)
    targets, recalls = _build_targets(config, inputs, criterion)
    module = StudentModule(config, student, criterion, targets, preprocess, inputs.validation, tokens)
    if config.dry_run:
        _train_one_step(module, loaders[0].dataset, config.run)
        return None
    if fits_head:
        cosine = fit_start(module, loaders[0].dataset)  # type: ignore[arg-type]
        aim = "" if cosine is None else f", mean cosine with the teacher {cosine:.3f} on the images of the fit"
        first = "a prediction of the teacher's embeddings" if config.fit_head == "teacher" else "the start's features"
        log.info(f"  the new head begins with {first}{aim}")
    seconds = time.monotonic() - start
    with run_lock(folder):
        open_caches([loader.dataset for loader in loaders], folder, config.loader)  # type: ignore[misc]
        result = fit(module, loaders, student, folder, epochs, config.run)
        if is_first():
            with stage.write() as draft:
                draft.preprocess, draft.catalog, draft.licences = preprocess, catalog_metadata, licences
                draft.metrics = {**_summarise_training(config, student, result, seconds), **recalls}
                _write_files(draft, config, folder, targets)
                uses: dict[Use, Catalog] = {"distillation": inputs.training, "selection": inputs.validation}
                record_seen(draft.path, inherited, uses)
            drop_checkpoints(folder)
            log.info(f"{config.output}: student of epoch {result.epoch}, validation recall@1 {result.best:.3f}")
    return stage.path


def _values(config: DistillConfig, inputs: DistillInputs) -> dict[str, Any]:
    """Return the JSON values that determine the student, without those that do not matter here."""
    values = {**training_values(config), **validation_values(inputs.catalog)}
    if not inputs.fits_head(config):
        del values["fit_head"]
    if inputs.start is None or not config.model.has_network_stem:
        del values["freeze_statistics"]
    if config.view_seed == config.seed:  # as before the views had a seed of their own
        del values["targets"]["seed"]
    return values | ({} if inputs.start is None else inputs.start.values)


def count_epochs(config: DistillConfig, batches: int) -> int:
    """Return the number of epochs: with ``steps``, the fewest that reach them by epochs of so many batches."""
    if not config.steps:
        return config.epochs
    steps = math.ceil(batches / config.run.accumulate)
    epochs = math.ceil(config.steps / steps)
    log.info(f"  {config.steps} steps: {epochs} epochs of {steps} steps")
    return epochs


def _log_steps(config: DistillConfig, loader: Loader, epochs: int) -> None:
    sampler = loader.sampler
    assert isinstance(sampler, EpochSampler)
    steps = math.ceil(len(loader) / config.run.accumulate)
    if not config.steps:
        log.info(f"  {epochs} epochs of {steps} steps")
    if few := sampler.describe_few_steps(config.run.accumulate):
        log.warning(f"  {few}")


def _log_plan(config: DistillConfig, inputs: DistillInputs, tokens: TeacherTokens | None) -> None:
    with torch.device("meta"):
        parameters = count_parameters(Student(config.model))
    images, model = len(inputs.training), config.model
    name = inputs.teacher.artifact.card.name if len(config.teacher) == 1 else "the fused teacher"
    losses = ", ".join(f"{weight:g} x {loss}" for loss, weight in config.losses.weights().items())
    size = f"{parameters / 1e6:.2f} M parameters, {model.embedding_dim} dimensions, {model.image_size} pixels"
    length = f"{config.steps} steps" if config.steps else f"{config.epochs} epochs"
    log.info(f"student: {size}; {length} of {images} images; {losses}")
    if prefixes := config.losses.prefixes:
        log.info("  nested: " + ", ".join(f"{weight:g} x the first {dim}" for dim, weight in prefixes.items()))
    if not config.losses.needs_teacher:
        log.info("  labels only, no teacher")
    elif config.targets.mode == "online":
        log.info(f"  teacher {name} runs in every step, bank of {config.targets.bank}")
        if tokens is not None:
            log.info(f"  tokens: {tokens.describe(model)}")
    else:
        megabytes = cache_bytes(images, inputs.teacher.dim, config.targets) / 1e6
        log.info(f"  teacher cache: {config.targets.views * images} forward passes of {name}, {megabytes:.1f} MB")


def _build_loaders(config: DistillConfig, inputs: DistillInputs, preprocess: Preprocess) -> tuple[Loader, Loader]:
    """Return the loaders of training and validation images. A dry run keeps no images in memory."""
    keep = config.loader.keep_in_memory and not config.dry_run
    if config.losses.needs_teacher and (config.targets.mode == "online" or config.dry_run):
        sizes = preprocess, inputs.teacher.preprocess
        training: ImageDataset = TwoSizeDataset(inputs.training, *sizes, keep, [config.views])
    else:
        training = ImageDataset(inputs.training, preprocess, keep, [config.views])
    validation, world = ImageDataset(inputs.validation, preprocess, keep), rank_and_world()
    loader = training_loader(training, config.loader, config.seed, *world)
    return loader, validation_loader(validation, config.loader, *world)


def _build_student(config: DistillConfig, inputs: DistillInputs) -> Student:
    L.seed_everything(config.seed, verbose=False)
    student = Student(config.model)
    if (start := inputs.start) is not None:
        count, difference = init_from_start(student, start)
        name = start.name if start.artifact is None else start.artifact.card.name
        log.info(f"  {count / count_parameters(student):.0%} of the student's parameters are selected from {name}")
        if difference is not None:
            log.info(f"  features before the head equal those of {name}, max abs difference {difference:.1e}")
    if ranges := inputs.models.get("ranges"):
        names = insert_fake_quant(student, read_thresholds(ranges), config.quantise.exclude_layers)
        log.info(f"  QAT: {len(names)} linear layers compute as in INT8")
    return student


def _build_targets(
    config: DistillConfig, inputs: DistillInputs, criterion: DistillationLoss
) -> tuple[Targets | None, dict[str, float]]:
    """Return the targets and the teacher's validation recall before and after projection.

    A dry run writes no cache and fits no projection: the teacher runs in the step, and its embeddings are cut.
    """
    if not config.losses.needs_teacher:
        return None, {}
    teacher, dim, cache_path = inputs.teacher, inputs.target_dim, config.cache or f"{Path(config.output)}-views"
    cache: TeacherCache | None = None
    recalls: dict[str, float] = {}
    if config.targets.mode == "cached":
        check_output(cache_path, "views")
    if config.targets.mode == "cached" and not config.dry_run:
        images, settings = inputs.training, (config.views, config.targets, config.view_seed, config.loader)
        cache = build_teacher_cache(cache_path, teacher, images, *settings, is_shared=bool(config.cache))
    if config.dry_run:
        projection = None if dim == teacher.dim else torch.eye(teacher.dim)[:, :dim]
    else:
        splits = inputs.training, inputs.validation
        projection, recalls = find_projection(config, teacher, cache, *splits, inputs.models.get("start"))
    if cache is None:
        return OnlineTargets(teacher.network, teacher.preprocess, config.targets, dim, projection), recalls
    if criterion.logits is not None:
        views = [cache.lookup(np.arange(len(cache)), view) for view in range(len(cache.shards))]
        criterion.logits.set_classes(compute_class_means(np.mean(views, axis=0), criterion.labels))
    return CachedTargets(cache, config.targets, projection, config.seed), recalls


def _train_one_step(module: StudentModule, images: Any, run: RunConfig) -> None:
    """Train for one step on two images and write nothing."""
    trainer = L.Trainer(
        accelerator="auto",
        precision=run.precision if run.precision != "auto" else best_precision(),
        fast_dev_run=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer_options(run.strategy),
    )
    # `__getitems__` of the images returns a batch already.
    trainer.fit(module, DataLoader(images, batch_sampler=[[0, len(images) - 1]], collate_fn=lambda batch: batch))
    log.info("dry run: one step taken, nothing written")


def _summarise_training(config: DistillConfig, student: Student, result: FitResult, seconds: float) -> dict[str, Any]:
    """Return the metrics of the card. ``seconds`` is the time before the training."""
    return {
        "val_recall_at_1": result.best,
        "best_epoch": result.epoch,
        "steps": result.steps,
        "seconds": round(result.seconds + seconds, 1),
        "parameters": count_parameters(student),
        "multiply_adds": count_multiply_adds(student, config.model.image_size),
    }


def _write_files(draft: ArtifactWriter, config: DistillConfig, folder: Path, targets: Targets | None) -> None:
    copy_logs(folder, draft.path)
    shutil.copyfile(folder / "best.safetensors", draft.path / "model.safetensors")
    if targets is not None and targets.projection is not None:
        save_file({"projection": targets.projection.cpu().contiguous()}, draft.path / PROJECTION)
    nested = list(config.losses.prefixes)
    draft.embedding = Embedding(dim=config.model.embedding_dim, normalised=True, dtype="float32", nested=nested)
    if config.quantise.ranges:
        draft.metrics["quantise_exclude_layers"] = list(config.quantise.exclude_layers)
