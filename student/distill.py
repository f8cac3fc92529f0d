"""``vpr student distill``: catalogue -> teacher's signal -> vit-pytorch ViT -> trainer -> artifact."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from student.dimension import DimensionConfig, fit_projection, project
from student.model import Student, StudentConfig, count_multiply_adds, count_parameters, load_student
from student.objective import Labels, LossConfig, Objective, class_means
from student.quantise import fake_quantise, read_thresholds
from student.signal import Signal, SignalConfig, cache_bytes, cache_signal, embed_pixels
from student.start import start_from
from student.targets import CachedTargets, Mix, OnlineTargets, PairDataset
from student.unlabelled import add_unlabelled
from teacher.model import load_teacher
from teacher.train import find_leaks, unknown_start
from vpr.artifact import Artifact, Embedding, Parent, check_output, find_current, load_artifact, plain, write_artifact
from vpr.catalog import Catalog, load_catalog
from vpr.console import say
from vpr.embeddings import embed, torch_forward, unit
from vpr.errors import UserError
from vpr.images import Preprocess
from vpr.int8 import KEEP
from vpr.loading import LoaderConfig, Normalise, PictureDataset, training_loader, validation_loader
from vpr.processes import compute_device, is_first, rank_and_world
from vpr.training import (
    RecallModule,
    RunConfig,
    copy_logs,
    decay_groups,
    drop_checkpoint,
    fit,
    run_folder,
    score_split,
    warmup_cosine,
)
from vpr.views import ViewConfig, apply_views, draw_views


@dataclass(frozen=True)
class QuantiseConfig:
    """Quantisation-aware finishing.

    Attributes:
        ranges: ``ranges`` artifact of the graph of the student that ``start`` names; empty trains without Q/DQ.
        keep: linears whose names begin with one of these are not quantised, as in ``vpr export int8``.
    """

    ranges: str = ""
    keep: tuple[str, ...] = KEEP


@dataclass(frozen=True)
class DistillConfig:
    """A distillation.

    Attributes:
        teacher: teacher artifact.
        catalog: catalogue artifact; its ``train`` split is used (labels by ``losses.margin`` and ``logits`` alone),
            ``validation`` chooses the epoch.
        output: where the student is written; the teacher's signal is kept beside it as ``<output>-views``.
        cache: where the signal is kept instead, for students that share one.
        assistant: student artifact that gives the signal in the teacher's place, as in teacher -> base -> small.
        start: larger student, or teacher with a ViT of open_clip, whose weights are selected from; a student of the
            same shape is taken over whole.
        unlabelled: folders of further pictures (or catalogues of the reader ``pictures``), which need no labels.
        model: shape of the student.
        views: augmentation, the same for teacher and student.
        signal: how the teacher's embeddings come.
        losses: what is made small.
        dimension: how the teacher's dimension becomes the student's.
        quantise: train under the Q/DQ of an INT8 graph.
        epochs: passes over the pictures.
        lr: peak learning rate.
        warmup: share of the training spent warming up.
        weight_decay: of matrices; biases and norms have none.
        loader: batches.
        run: how it is carried out.
        allow_leak: distil even if a scored product or picture is inside; the card then says so.
        dry_run: print the plan, take one step on two pictures, and stop.
        seed: of weights, order and views.
    """

    teacher: str
    catalog: str
    output: str
    cache: str = ""
    assistant: str = ""
    start: str = ""
    unlabelled: tuple[str, ...] = ()
    model: StudentConfig = StudentConfig()
    views: ViewConfig = ViewConfig()
    signal: SignalConfig = SignalConfig()
    losses: LossConfig = LossConfig()
    dimension: DimensionConfig = DimensionConfig()
    quantise: QuantiseConfig = QuantiseConfig()
    epochs: int = 30
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig = RunConfig(validate_every=2)
    allow_leak: bool = False
    dry_run: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"epochs: {self.epochs}: give 1 or more")
        for name, most in (("lr", 10.0), ("weight_decay", 100.0), ("warmup", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise UserError(f"{name}: {getattr(self, name)}: give 0 to {most:g}")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed: {self.seed}: give 0 or more, below 2^31")
        if self.run.strategy == "fsdp":
            raise UserError("run.strategy: a student fits on one device: set it to ddp, or auto")
        if self.quantise.ranges and not self.start:
            raise UserError("quantise.ranges: finishes a trained student: name it by start")


class StudentModule(RecallModule):
    """Student and losses; the teacher is present only through its targets.

    Args:
        config: the distillation.
        student: the network.
        objective: its losses.
        targets: what it is compared with; None for losses of labels alone.
        preprocess: the student's.
        validation: what is scored.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        objective: Objective,
        targets: CachedTargets | OnlineTargets | None,
        preprocess: Preprocess,
        validation: Catalog,
    ) -> None:
        super().__init__(preprocess, validation)
        self.config = config
        self.student = student
        self.objective = objective
        self.targets = targets

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, dim) of unit length."""
        return self.student(x)

    def on_train_epoch_start(self) -> None:
        """Draw this epoch's bank."""
        if self.targets is not None:
            self.targets.start_epoch(self.current_epoch, self.device)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """Weighted sum of the losses of one batch of views."""
        config, epoch, rows = self.config, self.current_epoch, batch["rows"]
        self.seed_step(config.seed, epoch, number)
        view = epoch if self.targets is None else self.targets.view(epoch)
        parameters = draw_views(config.views, config.seed, rows.cpu(), torch.full_like(rows.cpu(), view))
        mix = Mix(config.signal.mixup, len(rows)) if config.signal.mixup else None
        pixels = apply_views(batch["pixels"], parameters)
        x = self.normalise(pixels if mix is None else mix(pixels))
        teacher = bank = None
        if self.targets is not None:
            teacher, bank = self.targets.of(batch, parameters, epoch, mix)
        if self.objective.logits is not None:
            assert teacher is not None
            labels = self.objective.labels.of_rows[rows.cpu()].to(x.device)
            losses = {"logits": self.objective.logits(x, labels, teacher)}
        else:
            progress = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
            losses = self.objective(self.student(x), teacher, bank, rows, progress, epoch)
        self.log_dict(losses, on_step=True, on_epoch=True, batch_size=len(rows))
        return self.of_step(self.objective.total(losses), number)

    def configure_optimizers(self) -> Any:
        """AdamW with one warm-up and cosine."""
        config, steps = self.config, int(self.trainer.estimated_stepping_batches)
        learning = list({id(p): p for p in (*self.student.parameters(), *self.objective.parameters())}.values())
        optimizer = torch.optim.AdamW(decay_groups(learning, config.lr, config.weight_decay))
        warmup = max(1, int(config.warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def distill(config: DistillConfig) -> Path | None:
    """Distil a student and write it as an artifact of kind ``student``; a dry run writes nothing."""
    catalog = load_catalog(config.catalog)
    teacher, source = _load_source(config)
    dim = _dimension(config, source)
    config = replace(config, model=replace(config.model, embedding_dim=dim))
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    if not len(training) or not len(validation):
        raise UserError(f"{config.catalog}: needs a train and a validation split: build it with --validation 0.1")
    score_split(validation, np.ones((len(validation), 1), np.float32))  # refuses what no epoch could be chosen by
    scored = [validation, catalog.select(split="test")]
    training, extra, more = add_unlabelled(training, scored, config.unlabelled, config.output)
    values, parents = _identity(config, catalog, source, more)
    if not config.dry_run and find_current(config.output, "student", values, parents):
        if is_first():
            say(f"{config.output}: up to date")
        return Path(config.output)
    check_output(config.output, "student")
    for key in ("teacher", "assistant", "start"):
        named = getattr(config, key)
        if named and Path(named).resolve() == Path(config.output).resolve():
            raise UserError(f"output: {config.output} is the {key} and would be replaced: choose another")
    assert source.card.preprocess is not None
    preprocess = source.card.preprocess.model_copy(update={"size": config.model.image_size})
    notes = _notes(config, catalog, source)
    _print_plan(config, source, training, preprocess)
    started = time.monotonic()
    pictures = _pictures(config, training, preprocess, source.card.preprocess)
    student, labels = _build_student(config), Labels(training)
    if config.dry_run:
        _try_step(config, student, labels, teacher, source, training, validation, pictures, preprocess)
        say("dry run: one step taken, nothing written")
        return None
    signal = _signal(config, teacher, source, training)
    projection, recalls = _projection(config, teacher, source, signal, training, validation)
    targets = _targets(config, teacher, source, signal, projection, dim)
    classes = None if signal is None or not config.losses.logits else _class_means(signal, labels)
    before = time.monotonic() - started
    L.seed_everything(config.seed, verbose=False)
    width = dim if projection is not None else _source_dim(source)
    objective = Objective(config.losses, student, labels, width, classes)
    module = StudentModule(config, student, objective, targets, preprocess, validation)
    keep = config.loader.keep_in_memory
    loaders = (
        training_loader(pictures, config.loader, config.seed, *rank_and_world()),
        validation_loader(PictureDataset(validation, preprocess, keep), config.loader, *rank_and_world()),
    )
    folder = run_folder(config.output, values, parents)
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
            draft.metrics = {
                "val_recall_at_1": best.best,
                "best_epoch": best.epoch,
                "steps": best.steps,
                "seconds": round(best.seconds + before, 1),
                "parameters": count_parameters(student),
                "multiply_adds": count_multiply_adds(student, preprocess.size),
                **recalls,
            }
        drop_checkpoint(folder)
        say(f"{config.output}: student of epoch {best.epoch}, validation recall@1 {best.best:.3f}")
    return Path(config.output)


def _load_source(config: DistillConfig) -> tuple[nn.Module, Artifact]:
    """The network that gives the signal: the assistant, or the teacher."""
    model, artifact = load_student(config.assistant) if config.assistant else load_teacher(config.teacher)
    if artifact.card.preprocess is None or artifact.card.embedding is None:
        raise UserError(f"{artifact.path}: its card has no preprocessing or embedding: train it again")
    return model.requires_grad_(False), artifact


def _source_dim(source: Artifact) -> int:
    assert source.card.embedding is not None
    return source.card.embedding.dim


def _dimension(config: DistillConfig, source: Artifact) -> int:
    """The student's own dimension."""
    wanted, given = config.model.embedding_dim, _source_dim(source)
    if wanted in (0, given):
        return given
    if config.dimension.method == "none" and config.losses.needs_teacher:
        raise UserError(
            f"model.embedding_dim: {wanted}, the teacher's embeddings have {given}: set it to {given}, or choose "
            "dimension.method pca, cosine or projector"
        )
    if config.dimension.projects_teacher and wanted > given:
        raise UserError(
            f"model.embedding_dim: {wanted} is more than the teacher's {given}: lower it, or use the projector"
        )
    return wanted


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
    if catalog.artifact:
        parents.append(catalog.artifact.as_parent("catalog"))
    if config.start:
        parents.append(load_artifact(config.start).as_parent("start"))
    if config.quantise.ranges:
        parents.append(load_artifact(config.quantise.ranges, "ranges").as_parent("ranges"))
    return values, parents + more


def _notes(config: DistillConfig, catalog: Catalog, source: Artifact) -> dict[str, Any]:
    """What the card says of leaks, also of those before this stage."""
    leak = find_leaks(catalog, config.allow_leak)
    found: dict[str, Any] = {}
    named = [load_artifact(config.teacher, "teacher"), source, *([load_artifact(config.start)] if config.start else [])]
    for artifact in named:
        earlier = (artifact.card.catalog or {}).get("leak")
        if earlier:
            leak[artifact.card.kind] = earlier
        found |= unknown_start(artifact, catalog)
    return {**found, **({"leak": leak} if leak else {})}


def _print_plan(config: DistillConfig, source: Artifact, training: Catalog, preprocess: Preprocess) -> None:
    if not is_first():
        return
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
        size = cache_bytes(len(training), _source_dim(source), config.signal)
        say(f"  {source.card.name} is asked {config.signal.views * len(training)} times, then cached in {size} bytes")


def _pictures(config: DistillConfig, training: Catalog, student: Preprocess, teacher: Preprocess) -> PictureDataset:
    keep = config.loader.keep_in_memory and not config.dry_run
    if config.signal.mode == "online":
        return PairDataset(training, student, teacher, keep)
    return PictureDataset(training, student, keep)


def _build_student(config: DistillConfig) -> Student:
    L.seed_everything(config.seed, verbose=False)
    student = Student(config.model)
    if config.start:
        artifact, taken = start_from(student, config.start)
        share = taken / count_parameters(student)
        if is_first():
            say(f"  {share:.0%} of the student's parameters are selected from {artifact.card.name}")
    if config.quantise.ranges:
        thresholds, _ = read_thresholds(config.quantise.ranges)
        names = fake_quantise(student, thresholds, config.quantise.keep)
        if is_first():
            say(f"  {len(names)} linears compute as they will in INT8")
    return student


def _signal(config: DistillConfig, teacher: nn.Module, source: Artifact, training: Catalog) -> Signal | None:
    if not config.losses.needs_teacher or config.signal.mode == "online":
        return None
    path = config.cache or f"{Path(config.output)}-views"
    return cache_signal(path, teacher, source, training, config.views, config.signal, config.seed, config.loader)


def _projection(
    config: DistillConfig,
    teacher: nn.Module,
    source: Artifact,
    signal: Signal | None,
    training: Catalog,
    validation: Catalog,
) -> tuple[Tensor | None, dict[str, float]]:
    """The projection to the student's dimension, and what it costs the teacher on the validation pictures."""
    dim = config.model.embedding_dim
    if not config.losses.needs_teacher or config.dimension.method == "none" or dim == _source_dim(source):
        return None, {}
    assert source.card.preprocess is not None
    teacher.to(compute_device())
    whole = embed(validation, source.card.preprocess, torch_forward(teacher))
    recall = score_split(validation, whole).recall_at_1
    if not config.dimension.projects_teacher:
        if is_first():
            say(f"dimension: the teacher stays whole (recall@1 {recall:.3f}); the student's {dim} are projected up")
        return None, {"teacher_val_recall_at_1": recall}
    if signal is not None:
        vectors = signal.draw(config.dimension.pictures, config.seed)
    else:
        rows = np.random.default_rng(config.seed).permutation(len(training))[: config.dimension.pictures]
        part = Catalog(training.table.take(np.sort(rows)), training.root)
        vectors = embed(part, source.card.preprocess, torch_forward(teacher))
    found = {}
    for method in dict.fromkeys(("pca", config.dimension.method)):
        projection = fit_projection(replace(config.dimension, method=method), vectors, dim, config.seed)  # type: ignore[arg-type]
        short = unit(project(torch.from_numpy(whole), projection).numpy())
        found[method] = score_split(validation, short).recall_at_1
    if is_first():
        told = ", ".join(f"{value:.3f} by {method}" for method, value in found.items())
        say(f"dimension: {_source_dim(source)} to {dim}: the teacher's recall@1 {recall:.3f} becomes {told}")
    return projection, {
        "teacher_val_recall_at_1": recall,
        "projected_teacher_val_recall_at_1": found[config.dimension.method],
    }


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
    width = dim if projection is not None else _source_dim(source)
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
    classes = torch.randn(max(2, len(labels.counts)), width)
    objective = Objective(config.losses, student, labels, width, classes)
    x = Normalise(preprocess)(batch["pixels"].float())
    if objective.logits is not None:
        loss = objective.logits(x, labels.of_rows[batch["rows"]].clamp_min(0), vectors)
    else:
        asked = vectors if config.losses.needs_teacher else None
        loss = objective.total(objective(student(x), asked, vectors, batch["rows"], 0.0, 0))
    loss.backward()
    score_split(validation, np.ones((len(validation), 1), np.float32))
