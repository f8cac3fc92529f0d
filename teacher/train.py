"""``vpr teacher train``: catalogue -> tower -> margin head -> stages -> artifact."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L

from teacher.config import TrainConfig
from teacher.model import build_teacher, read_tower
from teacher.module import TeacherModule
from teacher.plan import print_plan
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.run_folder import run_folder, run_lock
from vpr.artifacts.store import (
    Artifact,
    ArtifactWriter,
    Embedding,
    check_output,
    file_sha256,
    find_up_to_date,
    load_artifact,
    write_artifact,
)
from vpr.common.distributed import is_first, rank_and_world
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.loaders import ImageDataset, training_loader, validation_loader
from vpr.data.splits import find_leaks
from vpr.imaging.preprocess import Preprocess
from vpr.training.callbacks import drop_checkpoints
from vpr.training.loggers import copy_logs
from vpr.training.loop import FitResult, fit, training_and_validation, training_values

log = get_logger(__name__)


def train(config: TrainConfig) -> Path | None:
    """Train a teacher and write it as an artifact of kind ``teacher``; a dry run writes nothing."""
    catalog = load_catalog(config.catalog)
    tower = read_tower(config.tower.name)
    values = training_values(config)
    values |= {"network": asdict(config.stages[-1].tower(config.tower)), "tower_config": tower}
    parents = catalog.as_parents()
    start = identify_init_weights(config.tower.pretrained)
    if isinstance(start, Artifact):
        parents.append(start.as_parent("start"))
    elif start:
        values["pretrained_sha256"] = start
    folder = run_folder(config.output, values, parents)
    if not config.dry_run and find_up_to_date(config.output, "teacher", values, parents):
        drop_checkpoints(folder)  # of a run that was killed after its artifact was there
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    training, validation = training_and_validation(catalog, config.catalog)
    check_output(config.output, "teacher")
    if isinstance(start, Artifact) and start.path.resolve() == Path(config.output).resolve():
        raise UserError(f"output: {config.output} is tower.pretrained and would be replaced: choose another")
    notes = _notes(config, catalog, start)
    print_plan(config.places(), config.tower, tower, config.head, training, validation, config.loader, config.run)
    if config.dry_run:
        return None
    with run_lock(folder):
        if is_first():  # what an unfinished run is shows in `vpr teacher runs`
            (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        fits, preprocess, dim = _run_stages(config, tower, training, validation, folder)
        if is_first():
            with write_artifact(config.output, "teacher", values, parents) as draft:
                draft.preprocess = preprocess
                draft.embedding = Embedding(dim=dim, normalised=True, dtype="float32")
                draft.catalog = {**catalog.summary(), **notes}
                _fill(draft, config, fits, folder)
            drop_checkpoints(folder)
            best = f"teacher of epoch {draft.metrics['best_epoch']}, validation recall@1 {fits[-1].best:.3f}"
            log.info(f"{config.output}: {best}")
    return Path(config.output)


def identify_init_weights(pretrained: str) -> Artifact | str:
    """What identifies the weights that training begins from: a teacher, or a file's sha256 (empty for tag or none)."""
    path = Path(pretrained)
    if path.name == "model.safetensors" and (path.parent / CARD_NAME).is_file():
        path = path.parent
    if pretrained and (path / CARD_NAME).is_file():
        return load_artifact(path, "teacher")
    return file_sha256(path) if path.suffix == ".safetensors" and path.is_file() else ""


def warn_unverified_init(start: Artifact | str, catalog: Catalog) -> dict[str, str]:
    """What a card says where training begins from a model of other images, which nobody compared with these."""
    if not isinstance(start, Artifact) or (start.card.catalog or {}).get("sha256") == catalog.sha256:
        return {}
    text = f"{start.card.name} was trained on another catalogue: it may have seen what is scored on this one"
    log.info(f"  {text}; the card says so")
    return {"start": text}


def _notes(config: TrainConfig, catalog: Catalog, start: Artifact | str) -> dict[str, Any]:
    """What the card says of leaks, also of one that the teacher has from which training begins."""
    leak = find_leaks(catalog, config.allow_leak)
    if isinstance(start, Artifact) and (start.card.catalog or {}).get("leak"):
        leak["start"] = (start.card.catalog or {})["leak"]
    return {**({"leak": leak} if leak else {}), **warn_unverified_init(start, catalog)}


def _fill(draft: ArtifactWriter, config: TrainConfig, fits: list[FitResult], folder: Path) -> None:
    """Put what the stages came to into the artifact."""
    for number in range(len(fits)):
        copy_logs(folder / f"stage-{number + 1}", draft.path, f"metrics-stage-{number + 1}")
    shutil.copyfile(folder / f"stage-{len(fits)}" / "best.safetensors", draft.path / "model.safetensors")
    draft.metrics = {
        "val_recall_at_1": fits[-1].best,
        "best_epoch": config.places()[-1].before + fits[-1].epoch,
        "steps": sum(fitted.steps for fitted in fits),
        "seconds": round(sum(fitted.seconds for fitted in fits), 1),
        "parameters": sum(value.numel() for name, value in fits[-1].last.items() if name.startswith("teacher.")),
    }


def _run_stages(
    config: TrainConfig, tower: dict[str, Any], training: Catalog, validation: Catalog, folder: Path
) -> tuple[list[FitResult], Preprocess, int]:
    """Fit one stage after the other; a run that was killed finds the finished ones by their checkpoints."""
    fits: list[FitResult] = []
    datasets: tuple[Preprocess, ImageDataset, ImageDataset] | None = None
    for number, place in enumerate(config.places(), start=1):
        L.seed_everything(config.seed, verbose=False)
        teacher, preprocess = build_teacher(place.stage.tower(config.tower), tower, load_pretrained=not fits)
        module = TeacherModule(place, config.head, teacher, preprocess, training, validation)
        if fits:
            module.start_from(fits[-1].last)
        if datasets is None or datasets[0] != preprocess:
            keep = config.loader.keep_in_memory
            datasets = (
                preprocess,
                ImageDataset(training, preprocess, keep),
                ImageDataset(validation, preprocess, keep),
            )
        loader = replace(config.loader, batch_size=place.stage.batch_size or config.loader.batch_size)
        loaders = (
            training_loader(datasets[1], loader, config.seed + number - 1, *rank_and_world()),
            validation_loader(datasets[2], loader, *rank_and_world()),
        )
        log.info(f"stage {number}/{len(config.stages)}: {place.stage.train}, {place.stage.epochs} epochs")
        fits.append(fit(module, loaders, teacher, folder / f"stage-{number}", place.stage.epochs, config.run))
    return fits, preprocess, teacher.embedding_dim
