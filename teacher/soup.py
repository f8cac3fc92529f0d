"""``vpr teacher soup``: trained teachers averaged, or one interpolated with its zero-shot weights.

An average of weights costs nothing at inference. What it is worth is decided on the catalogue's ``validation``
split, as the epoch of a training is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from teacher.averaging import Row, greedy, read_weights, uniform, wise_ft
from teacher.config import SoupConfig, TowerConfig
from teacher.model import build_teacher
from teacher.scorer import Scorer, Weights
from teacher.train import identify_init_weights
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import (
    Artifact,
    config_to_json,
    find_up_to_date,
    load_artifact,
    reraise_as_artifact_error,
    write_artifact,
)
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.splits import find_leaks

log = get_logger(__name__)

# Parts of the network's configuration that weights do not depend on once they are trained.
_FREE = frozenset({"dropout", "gradient_checkpointing"})


def soup(config: SoupConfig) -> Path:
    """Join weights, choose on validation recall@1, and write the result as an artifact of kind ``teacher``.

    Raises:
        UserError: models that do not fit each other or the catalogue, a leak, or no zero-shot weights.
    """
    started = time.monotonic()
    catalog = load_catalog(config.catalog)
    teachers = [load_artifact(path, "teacher") for path in config.models]
    check_alike(teachers, catalog)
    parents = [*(teacher.as_parent("teacher") for teacher in teachers), *catalog.as_parents()]
    card = teachers[0].card
    built = {key: card.config[key] for key in ("tower", "network", "tower_config")}
    values = config_to_json(config) | {"recipe": f"{config.method} soup"} | built
    if find_up_to_date(config.output, "teacher", values, parents):
        log.info(f"{config.output}: up to date")
        return Path(config.output)
    leak = known_leak(teachers, catalog)
    zero_shot = zero_shot_weights(teachers[0]) if config.method == "wise-ft" else {}
    scorer = Scorer(config.models[0], catalog, config.batch_size, config.workers, config.seed)
    if config.method == "wise-ft":
        chosen = wise_ft(config.alphas, zero_shot, read_weights(teachers[0]), scorer)
    else:
        chosen = (greedy if config.method == "greedy" else uniform)(config.models, teachers, scorer)
    with write_artifact(config.output, "teacher", values, parents) as draft:
        save_file(chosen.weights, draft.path / "model.safetensors")
        draft.preprocess, draft.embedding = card.preprocess, card.embedding
        draft.catalog = {**(card.catalog or {}), **({"leak": leak} if leak else {})}
        draft.metrics = {
            "val_recall_at_1": chosen.scores.recall_at_1,
            "val_map": chosen.scores.map,
            **chosen.what,
            "candidates": chosen.rows,
            "seconds": round(time.monotonic() - started, 1),
            "parameters": sum(p.numel() for p in scorer.model.parameters()),
        }
    log.info(f"{config.output}: {config.method} soup, validation recall@1 {chosen.scores.recall_at_1:.4f}")
    return Path(config.output)


def check_alike(teachers: Sequence[Artifact], catalog: Catalog) -> None:
    """Refuse teachers whose weights or recalls cannot be compared.

    Raises:
        UserError: another network, tower or preprocessing, another training catalogue, or one teacher given twice.
    """
    first = teachers[0]
    for teacher in teachers:
        for key in ("tower", "network", "tower_config"):
            if key not in teacher.card.config:
                raise UserError(f"{teacher.path}: its card has no '{key}': train it again with this version")
    known: dict[str, Path] = {}
    sha256 = catalog.sha256
    for teacher in teachers:
        if teacher.sha256 in known:
            raise UserError(f"models: {teacher.path} and {known[teacher.sha256]} are the same: give each once")
        known[teacher.sha256] = teacher.path
        one, other = (_comparable(artifact) for artifact in (first, teacher))
        differs = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        if differs:
            values = f"{other.get(differs[0])!r}, not {one.get(differs[0])!r}"
            reason = "" if differs[0] in ("tower_config", "preprocess") else f" ({values})"
            raise UserError(f"{teacher.path}: {differs[0]} differs from {first.path}'s{reason}: join what is alike")
        if (teacher.card.catalog or {}).get("sha256") != sha256:
            raise UserError(
                f"{teacher.path}: was trained on another catalogue than --catalog: give its own, so that nothing it "
                "was trained on chooses"
            )


def known_leak(teachers: Sequence[Artifact], catalog: Catalog) -> Row:
    """What the teachers' cards say of a leak; a leak that they do not know of is refused.

    Their catalogue is this one, so a leak was either allowed when they were trained or is none.
    """
    leak: Row = {}
    for teacher in teachers:
        leak |= (teacher.card.catalog or {}).get("leak") or {}
    if leak:
        log.info("  leak: these teachers were trained with one allowed; the soup's card says so too")
        return leak
    return find_leaks(catalog, allow=False)


def zero_shot_weights(teacher: Artifact) -> Weights:
    """The tower's weights as they were before fine-tuning, ``visual.*`` float32.

    Raises:
        UserError: it began from random weights, or they can no longer be read.
    """
    with reraise_as_artifact_error(teacher):
        network = TowerConfig(**teacher.card.config["network"])
        if not network.pretrained:
            raise UserError(
                f"{teacher.path}: was trained from random weights (tower.pretrained is empty): it has no zero-shot "
                "weights, use uniform or greedy"
            )
        began = started_from(teacher)
        found = identify_init_weights(network.pretrained)
        if began and began != (found.sha256 if isinstance(found, Artifact) else found):
            raise UserError(
                f"{teacher.path}: {network.pretrained} is not what its training began from any more: put that back"
            )
        if (Path(network.pretrained) / CARD_NAME).is_file():
            log.info(f"  {teacher.path} began from the teacher {network.pretrained}: interpolating with its weights")
        model, _ = build_teacher(network, teacher.card.config["tower_config"], load_pretrained=True)
    return {name: value for name, value in model.state_dict().items() if name.startswith("visual.")}


def started_from(teacher: Artifact) -> str:
    """Checksum of the teacher or file that a training began from, as its card tells; empty for a tag or none."""
    starts = [parent.sha256 for parent in teacher.card.parents if parent.role == "start"]
    return starts[0] if starts else str(teacher.card.config.get("pretrained_sha256", ""))


def _comparable(teacher: Artifact) -> Row:
    """What must be equal for weights to be of one network."""
    config = teacher.card.config
    network = {f"network.{key}": value for key, value in config["network"].items() if key not in _FREE}
    # Weights drawn at random are alike only where the draw was: an average of others is of nothing.
    random = not config["network"].get("pretrained") or config["network"].get("embedding_dim")
    start = {"start": started_from(teacher), "seed": config.get("seed") if random else None}
    return {**network, **start, "tower_config": config["tower_config"], "preprocess": teacher.card.preprocess}
