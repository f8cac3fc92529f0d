"""``vpr student distill``: catalogue -> teacher's signal -> vit-pytorch ViT -> trainer -> artifact."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from student.losses import cosine_loss, similarity_kl
from student.model import Student, StudentConfig, count_multiply_adds, count_parameters
from student.signal import Signal, cache_signal
from teacher.model import load_teacher
from vpr.artifact import Artifact, Embedding, find_current, plain, write_artifact
from vpr.catalog import Catalog, check_leaks, load_catalog
from vpr.console import say
from vpr.errors import UserError
from vpr.images import Preprocess
from vpr.loading import LoaderConfig, PictureDataset, training_loader, validation_loader
from vpr.processes import rank_and_world
from vpr.training import (
    RecallModule,
    RunConfig,
    copy_logs,
    decay_groups,
    drop_checkpoint,
    fit,
    run_folder,
    warmup_cosine,
)
from vpr.views import ViewConfig, apply_views, draw_views


@dataclass(frozen=True)
class DistillConfig:
    """A distillation.

    Attributes:
        teacher: teacher artifact.
        catalog: catalogue artifact; its ``train`` split is used (no labels), ``validation`` chooses the epoch.
        output: where the student is written; the teacher's signal is kept beside it as ``<output>-views``.
        model: shape of the student.
        views: augmentation, the same for teacher and student.
        view_count: cached views of each picture; epochs go round them.
        epochs: passes over the pictures.
        cosine: weight of the cosine loss.
        similarity_kl: weight of the KL of similarities.
        temperature: of those similarities.
        bank: teacher embeddings that similarities are taken to.
        lr: peak learning rate.
        warmup: share of the training spent warming up.
        weight_decay: of matrices; biases and norms have none.
        loader: batches.
        run: how it is carried out.
        seed: of weights, order and views.
    """

    teacher: str
    catalog: str
    output: str
    model: StudentConfig = StudentConfig()
    views: ViewConfig = ViewConfig()
    view_count: int = 8
    epochs: int = 30
    cosine: float = 1.0
    similarity_kl: float = 1.0
    temperature: float = 0.05
    bank: int = 4096
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig = RunConfig(validate_every=2)
    seed: int = 0


class StudentModule(RecallModule):
    """Student and losses; the teacher is present only through its cached signal."""

    def __init__(
        self, config: DistillConfig, student: Student, signal: Signal, preprocess: Preprocess, validation: Catalog
    ) -> None:
        super().__init__(preprocess, validation)
        self.config = config
        self.student = student
        self.signal = signal

    def embed(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, dim) of unit length."""
        return self.student(x)

    def on_train_epoch_start(self) -> None:
        """Draw this epoch's bank, by seed and epoch alone."""
        seed = self.config.seed * 1_000_003 + self.current_epoch
        self.bank = self.signal.bank(self.config.bank, seed).to(self.device)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        """Weighted sum of the losses of one batch of views."""
        rows = batch["rows"].cpu()
        view = self.current_epoch % self.config.view_count
        parameters = draw_views(self.config.views, self.config.seed, rows, torch.full_like(rows, view))
        student = self.student(self.normalise(apply_views(batch["pixels"], parameters)))
        teacher = self.signal.lookup(rows, view).to(student.device)
        losses = self.losses(student, teacher)
        self.log_dict(losses, on_step=True, on_epoch=True, batch_size=len(rows))
        loss = self.config.cosine * losses["cosine"] + self.config.similarity_kl * losses["similarity_kl"]
        return self.of_step(loss, number)

    def losses(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """The losses by name, unweighted, in float32 also under autocast."""
        with torch.autocast(student.device.type, enabled=False):
            kl = similarity_kl(student, teacher, self.bank, self.config.temperature)
            return {"cosine": cosine_loss(student, teacher), "similarity_kl": kl}

    def configure_optimizers(self) -> Any:
        """AdamW with one warm-up and cosine."""
        config, steps = self.config, int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(decay_groups(list(self.student.parameters()), config.lr, config.weight_decay))
        warmup = max(1, int(config.warmup * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def distill(config: DistillConfig) -> Path:
    """Distil a student and write it as an artifact of kind ``student``."""
    if rank_and_world()[1] > 1:
        raise UserError("vpr student distill: runs in one process: start it without torchrun")
    catalog = load_catalog(config.catalog)
    teacher, teacher_artifact = load_teacher(config.teacher)
    values = plain(config)
    values["model"] = asdict(config.model)
    parents = [teacher_artifact.as_parent("teacher")]
    if catalog.artifact:
        parents.append(catalog.artifact.as_parent("catalog"))
    if find_current(config.output, "student", values, parents):
        say(f"{config.output}: up to date")
        return Path(config.output)
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    check_leaks(training, validation)
    check_leaks(training, catalog.select(split="test"))
    check_leaks(validation, catalog.select(split="test"))
    preprocess = _preprocess(config, teacher_artifact)
    started = time.monotonic()
    signal = cache_signal(
        f"{Path(config.output)}-views",
        teacher,
        teacher_artifact,
        training,
        config.views,
        config.view_count,
        config.seed,
    )
    signal_seconds = time.monotonic() - started
    L.seed_everything(config.seed, verbose=False)
    student = Student(config.model)
    size = preprocess.size
    parameters, multiply_adds = count_parameters(student), count_multiply_adds(student, size)
    say(
        f"student: {parameters / 1e6:.2f} M parameters, {multiply_adds / 1e6:.0f} M multiply-adds, "
        f"{config.epochs} epochs of {len(training)} pictures"
    )
    module = StudentModule(config, student, signal, preprocess, validation)
    keep = config.loader.keep_in_memory
    loaders = (
        training_loader(PictureDataset(training, preprocess, keep), config.loader, config.seed),
        validation_loader(PictureDataset(validation, preprocess, keep), config.loader),
    )
    folder = run_folder(config.output, values, parents)
    best = fit(module, loaders, student, folder, config.epochs, config.run)
    with write_artifact(config.output, "student", values, parents) as draft:
        copy_logs(folder, draft.path)
        shutil.copyfile(folder / "best.safetensors", draft.path / "model.safetensors")
        draft.preprocess = preprocess
        draft.embedding = Embedding(dim=config.model.embedding_dim, normalised=True, dtype="float32")
        leak = (teacher_artifact.card.catalog or {}).get("leak")
        draft.catalog = {**catalog.summary(), **({"leak": leak} if leak else {})}
        draft.metrics = {
            "val_recall_at_1": best.best,
            "best_epoch": best.epoch,
            "steps": best.steps,
            "seconds": round(best.seconds + signal_seconds, 1),
            "parameters": parameters,
            "multiply_adds": multiply_adds,
        }
    drop_checkpoint(folder)
    say(f"{config.output}: student of epoch {best.epoch}, validation recall@1 {best.best:.3f}")
    return Path(config.output)


def _preprocess(config: DistillConfig, teacher: Artifact) -> Preprocess:
    card = teacher.card
    if card.preprocess is None or card.embedding is None:
        raise UserError(f"{teacher.path}: its card has no preprocessing or embedding: train the teacher again")
    if card.embedding.dim != config.model.embedding_dim:
        raise UserError(
            f"model.embedding_dim: {config.model.embedding_dim}, the teacher's embeddings have {card.embedding.dim}: "
            f"set it to {card.embedding.dim}"
        )
    return card.preprocess.model_copy(update={"size": config.model.image_size})
