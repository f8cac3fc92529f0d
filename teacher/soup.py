"""``vpr teacher soup``: average teachers, or interpolate one with its zero-shot weights.

An average of weights costs nothing at inference. It is selected on the ``validation`` split, like the epoch of a
training.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from teacher.averaging import Row, greedy, read_weights, uniform, wise_ft
from teacher.config import SoupConfig, TowerConfig
from teacher.model import build_teacher, is_fused
from teacher.scorer import Scorer, Weights
from teacher.train import identify_init_weights
from vpr.artifacts.card import Embedding
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import config_to_json
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.seen import record_seen
from vpr.data.splits import find_leaks

log = get_logger(__name__)

# Settings of the network that matter in training only.
_TRAINING_KEYS = frozenset({"dropout", "gradient_checkpointing"})
_NETWORK_KEYS = ("tower", "network", "tower_config")


def soup(config: SoupConfig) -> Path:
    """Average weights, select on validation recall@1, and write an artifact of kind ``teacher``.

    Raises:
        UserError: The models do not match each other or the catalogue, leak, or have no zero-shot weights.
    """
    started = time.monotonic()
    catalog = load_catalog(config.catalog)
    teachers = [load_artifact(path, "teacher") for path in config.models]
    check_comparable(teachers, catalog)
    parents = [*(teacher.as_parent("teacher") for teacher in teachers), *catalog.as_parents()]
    card = teachers[0].card
    network = {key: card.config[key] for key in _NETWORK_KEYS}
    values = config_to_json(config) | {"recipe": f"{config.method} soup"} | network
    stage = Stage(config.output, "teacher", values, parents)
    if stage.find():
        return stage.path
    leak = inherited_leak(teachers, catalog)
    zero_shot = zero_shot_weights(teachers[0]) if config.method == "wise-ft" else {}
    scorer = Scorer(config.models[0], catalog, config.batch_size, config.workers, config.seed)
    if config.method == "wise-ft":
        result = wise_ft(config.alphas, zero_shot, read_weights(teachers[0]), scorer)
    else:
        result = (greedy if config.method == "greedy" else uniform)(config.models, teachers, scorer)
    with stage.write() as writer:
        save_file(result.weights, writer.path / "model.safetensors")
        record_seen(writer.path, teachers, {"selection": scorer.validation})
        writer.preprocess, writer.embedding = card.preprocess, common_embedding(teachers)
        writer.catalog = {**(card.catalog or {}), **({"leak": leak} if leak else {})}
        writer.metrics = {
            "val_recall_at_1": result.scores.recall_at_1,
            "val_map": result.scores.map,
            **result.members,
            "candidates": result.rows,
            "seconds": round(time.monotonic() - started, 1),
            "parameters": sum(p.numel() for p in scorer.model.parameters()),
        }
    log.info(f"{config.output}: {config.method} soup, recall@1 {result.scores.recall_at_1:.4f}")
    return stage.path


def check_comparable(teachers: Sequence[Artifact], catalog: Catalog) -> None:
    """Raise :class:`UserError` unless the teachers have one network and were trained on this catalogue, each once."""
    for teacher in teachers:
        if is_fused(teacher):
            raise UserError(f"{teacher.path}: holds several teachers. Average its teachers, then fuse the averages.")
        for key in _NETWORK_KEYS:
            if key not in teacher.card.config:
                raise UserError(f"{teacher.path}: the card has no '{key}'. Train the teacher again with this version.")
    first, catalog_sha256 = teachers[0], catalog.sha256
    paths: dict[str, Path] = {}
    for teacher in teachers:
        if teacher.sha256 in paths:
            raise UserError(f"models: {teacher.path} and {paths[teacher.sha256]} are the same. Name each once.")
        paths[teacher.sha256] = teacher.path
        with reraise_as_artifact_error(teacher):
            _check_same_network(first, teacher)
        if (teacher.card.catalog or {}).get("sha256") != catalog_sha256:
            # Else the soup might be selected on training images.
            raise UserError(f"{teacher.path}: trained on another catalogue than --catalog. Use that of its training.")


def _check_same_network(first: Artifact, teacher: Artifact) -> None:
    """Raise :class:`UserError` if two teachers differ in network, tower, preprocessing or initial weights."""
    expected, network = _network_identity(first), _network_identity(teacher)
    differing = sorted(key for key in expected.keys() | network.keys() if expected.get(key) != network.get(key))
    if differing:
        key = differing[0]
        is_long = key in ("tower_config", "preprocess")
        values = "" if is_long else f" ({network.get(key)!r}, not {expected.get(key)!r})"
        raise UserError(f"{teacher.path}: {key} differs from {first.path}{values}. Soups need identical networks.")


def common_embedding(teachers: list[Artifact]) -> Embedding | None:
    """Return the embedding of teachers of one network, with the nested dimensions that all have."""
    embeddings = [teacher.card.embedding for teacher in teachers]
    known = [embedding for embedding in embeddings if embedding is not None]
    if len(known) < len(embeddings):
        return embeddings[0]
    nested = [dim for dim in known[0].nested if all(dim in embedding.nested for embedding in known)]
    return known[0].model_copy(update={"nested": nested})


def inherited_leak(teachers: Sequence[Artifact], catalog: Catalog) -> Row:
    """Return the leaks of the teachers' cards; without one, raise :class:`UserError` if the catalogue has a leak.

    The teachers were trained on this catalogue, so an allowed leak is recorded in their cards.
    """
    leak: Row = {}
    for teacher in teachers:
        leak |= (teacher.card.catalog or {}).get("leak") or {}
    if leak:
        log.warning("leak: a teacher was trained with an allowed leak; the new card records it")
        return leak
    return find_leaks(catalog, allow=False)


def zero_shot_weights(teacher: Artifact) -> Weights:
    """Return the tower's weights before fine-tuning, ``visual.*`` float32.

    Raises:
        UserError: Training started from random weights, or from weights that are missing or have changed.
    """
    with reraise_as_artifact_error(teacher):
        network = TowerConfig(**teacher.card.config["network"])
        if not network.pretrained:
            problem = "trained from random weights (tower.pretrained is empty), so there are no zero-shot weights"
            raise UserError(f"{teacher.path}: {problem}. Use --method uniform or greedy.")
        recorded, init = init_checksum(teacher), identify_init_weights(network.pretrained)
        if recorded and recorded != (init.sha256 if isinstance(init, Artifact) else init):
            raise UserError(f"{network.pretrained}: changed since {teacher.path} was trained from it. Restore it.")
        if (Path(network.pretrained) / CARD_NAME).is_file():
            log.info(f"  zero-shot weights: those of the teacher {network.pretrained}")
        model, _ = build_teacher(network, teacher.card.config["tower_config"], load_pretrained=True)
    return {name: value for name, value in model.state_dict().items() if name.startswith("visual.")}


def init_checksum(teacher: Artifact) -> str:
    """Return the recorded checksum of the initial teacher or file; empty for a tag or random weights."""
    parents = [parent.sha256 for parent in teacher.card.parents if parent.role == "start"]
    return parents[0] if parents else str(teacher.card.config.get("pretrained_sha256", ""))


def _network_identity(teacher: Artifact) -> Row:
    """Return the values that must be equal for weights to be averaged."""
    config = teacher.card.config
    network = {f"network.{key}": value for key, value in config["network"].items() if key not in _TRAINING_KEYS}
    # An average is meaningful only from the same initial weights, so randomly drawn ones need the same seed.
    is_random = not config["network"].get("pretrained") or config["network"].get("embedding_dim")
    start = {"start": init_checksum(teacher), "seed": config.get("seed") if is_random else None}
    return {**network, **start, "tower_config": config["tower_config"], "preprocess": teacher.card.preprocess}
