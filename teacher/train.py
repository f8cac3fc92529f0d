"""``vpr teacher train``: fine-tune a tower of open_clip or timm with margin, proxy and pair losses, in stages."""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L

from teacher.config import TrainConfig
from teacher.licence import start_parent, weights_licences
from teacher.model import build_teacher, read_tower
from teacher.module import TeacherModule
from teacher.plan import print_plan
from vpr.artifacts.card import UNKNOWN_LICENCE, Embedding, Parent, combine_licences
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.run_folder import run_lock
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, file_sha256, load_artifact
from vpr.artifacts.writer import ArtifactWriter, check_output
from vpr.common.config_values import config_values
from vpr.common.distributed import is_first, rank_and_world
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.loaders import ImageDataset, open_caches, training_loader, validation_loader
from vpr.data.seen import count_seen, hash_catalog, read_seen, record_seen
from vpr.data.splits import find_leaks
from vpr.imaging.preprocess import Preprocess
from vpr.training.callbacks import drop_checkpoints
from vpr.training.loggers import copy_logs
from vpr.training.loop import FitResult, fit, training_and_validation, training_values, validation_values

log = get_logger(__name__)


def train(config: TrainConfig) -> Path | None:
    """Train a teacher and write it as an artifact of kind ``teacher``; a dry run returns None and writes nothing."""
    output = Path(config.output)
    catalog, tower = load_catalog(config.catalog), read_tower(config.tower.name)
    init = identify_init_weights(config.tower.pretrained)
    values, parents = _artifact_inputs(config, catalog, tower, init)
    licences = weights_licences(config.tower, tower)
    if config.require_licence and not _are_known(licences, parents):
        raise UserError("tower.licence: the licence of the initial weights is not known. Set it.")
    stage = Stage(config.output, "teacher", values, parents)
    folder = stage.run_folder
    if not config.dry_run and stage.find():
        drop_checkpoints(folder)  # left by a process killed after it wrote the artifact
        return stage.path

    training, validation = training_and_validation(catalog, config.catalog)
    check_output(config.output, "teacher")
    if isinstance(init, Artifact) and init.path.resolve() == output.resolve():
        raise UserError(f"output: {output} is tower.pretrained and would be replaced. Choose another path.")
    leaks = _leak_metadata(config, catalog, init)
    inherited = [read_seen(init)] if isinstance(init, Artifact) else []
    print_plan(config, tower, training, validation)
    if config.dry_run:
        return None

    with run_lock(folder):
        if is_first():  # read by `vpr teacher runs` until the training is finished
            (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        stages, preprocess, dim = _run_stages(config, tower, training, validation, folder)
        if is_first():
            with stage.write() as writer:
                writer.licences = licences
                writer.preprocess = preprocess
                nested = list(config.schedule()[-1].losses.head.nested)
                writer.embedding = Embedding(dim=dim, normalised=True, dtype="float32", nested=nested)
                writer.catalog = {**catalog.summary(), **leaks}
                _write_files(writer, config, stages, folder)
                record_seen(writer.path, inherited, {"training": training, "selection": validation})
            drop_checkpoints(folder)
            log.info(f"{output}: teacher of epoch {writer.metrics['best_epoch']}, recall@1 {stages[-1].best:.3f}")
    return output


def identify_init_weights(pretrained: str) -> Artifact | str:
    """Return what identifies the initial weights: a teacher, a file's sha256, or "" for a tag or random weights."""
    path = Path(pretrained)
    if path.name == "model.safetensors" and (path.parent / CARD_NAME).is_file():
        path = path.parent
    if pretrained and (path / CARD_NAME).is_file():
        return load_artifact(path, "teacher")
    return file_sha256(path) if path.suffix == ".safetensors" and path.is_file() else ""


def warn_unverified_init(init: Artifact | str, catalog: Catalog) -> dict[str, str]:
    """Warn if training starts from a model that has learned from held-out products, and return the text for the card.

    A model of another catalogue without a record of its products may have.
    """
    if not isinstance(init, Artifact) or (init.card.catalog or {}).get("sha256") == catalog.sha256:
        return {}
    held_out = catalog.where(catalog.table["split"].to_numpy() != "train")
    seen = count_seen(read_seen(init), hash_catalog(held_out))
    if not seen.learned and not seen.unknown:
        return {}
    text = f"{init.card.name} was trained on another catalogue and may have seen images held out in this one"
    if seen.learned:
        text = f"{init.card.name} has learned from products held out in this catalogue ({seen.learned})"
    log.warning(f"{text}; the card records this")
    return {"start": text}


def _artifact_inputs(
    config: TrainConfig, catalog: Catalog, tower: dict[str, Any], init: Artifact | str
) -> tuple[dict[str, Any], list[Parent]]:
    """Return the values and parents that determine the teacher."""
    network = config_values(config.stages[-1].tower(config.tower))
    values = {**training_values(config), **validation_values(catalog), "network": network, "tower_config": tower}
    # No part of the network. Without a licence, cards that were written before the key existed stay up to date.
    for section in (network, *([] if config.tower.licence else [values["tower"]])):
        section.pop("licence")
    parents = catalog.as_parents()
    if isinstance(init, Artifact):
        parents.append(start_parent(init, config.tower))
    elif init:
        values["pretrained_sha256"] = init
    return values, parents


def _are_known(licences: list[str], parents: list[Parent]) -> bool:
    known = combine_licences(licences, parents)
    return bool(known) and UNKNOWN_LICENCE not in known


def _leak_metadata(config: TrainConfig, catalog: Catalog, init: Artifact | str) -> dict[str, Any]:
    """Return leak metadata for the card, including leaks inherited from the initial teacher."""
    leak = find_leaks(catalog, config.allow_leak)
    if isinstance(init, Artifact) and (init.card.catalog or {}).get("leak"):
        leak["start"] = (init.card.catalog or {})["leak"]
    return {**({"leak": leak} if leak else {}), **warn_unverified_init(init, catalog)}


def _run_stages(
    config: TrainConfig, tower: dict[str, Any], training: Catalog, validation: Catalog, folder: Path
) -> tuple[list[FitResult], Preprocess, int]:
    """Train the stages in order; return their results, and the teacher's preprocessing and embedding dimension."""
    results: list[FitResult] = []
    datasets: tuple[ImageDataset, ImageDataset] | None = None
    for number, scheduled in enumerate(config.schedule(), start=1):
        stage = scheduled.stage
        L.seed_everything(config.seed, verbose=False)
        teacher, preprocess = build_teacher(stage.tower(config.tower), tower, load_pretrained=not results)
        module = TeacherModule(scheduled, teacher, preprocess, training, validation)
        if results:
            module.load_previous_stage(results[-1].last)
        module.add_adapters(config.lora, preprocess.size)
        if datasets is None or datasets[0].preprocess != preprocess:
            keep = config.loader.keep_in_memory
            views = [other.views for other in config.schedule()]
            datasets = ImageDataset(training, preprocess, keep, views), ImageDataset(validation, preprocess, keep)
            open_caches(datasets, folder, config.loader)
        loader = stage.loader(config.loader)
        train_loader = training_loader(datasets[0], loader, config.seed + number - 1, *rank_and_world())
        module.mine_hard_negatives(config.mining, train_loader.sampler)
        loaders = (train_loader, validation_loader(datasets[1], loader, *rank_and_world()))
        log.info(f"stage {number}/{len(config.stages)}: {stage.train}, {stage.epochs} epochs")
        results.append(fit(module, loaders, teacher, folder / f"stage-{number}", stage.epochs, stage.run(config.run)))
    return results, preprocess, teacher.embedding_dim


def _write_files(writer: ArtifactWriter, config: TrainConfig, stages: list[FitResult], folder: Path) -> None:
    """Write logs, weights and metrics of the stages into the artifact."""
    for number in range(1, len(stages) + 1):
        copy_logs(folder / f"stage-{number}", writer.path, f"metrics-stage-{number}")
    shutil.copyfile(folder / f"stage-{len(stages)}" / "best.safetensors", writer.path / "model.safetensors")
    writer.metrics = {
        "val_recall_at_1": stages[-1].best,
        "best_epoch": config.schedule()[-1].before + stages[-1].epoch,
        "steps": sum(stage.steps for stage in stages),
        "seconds": round(sum(stage.seconds for stage in stages), 1),
        "parameters": sum(value.numel() for name, value in stages[-1].last.items() if name.startswith("teacher.")),
    }
