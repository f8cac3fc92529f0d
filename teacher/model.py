"""Teacher network: an image tower of open_clip or timm, an optional projection and an L2-normalised output."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from teacher.config import TowerConfig
from teacher.fused import MAX_TEACHERS, FusedTeacher, WhitenedPart
from teacher.preprocessing import STATISTICS, published_values, timm_values, tower_preprocess
from teacher.registry import architecture_key, check_sizes, check_timm_tag, open_clip_name
from teacher.registry import read_tower as read_tower  # with build_teacher the two calls that make a teacher
from teacher.tower import drop_projection, input_size, overlap_patches, set_size
from teacher.weights import (
    download_open_clip,
    download_timm,
    load_tower_weights,
    read_tower_weights,
)
from vpr.artifacts.card import Card
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess

_IMAGE_KEYS = ("embed_dim", "vision_cfg", "quick_gelu")
# Only the image tower is used, so the text tower is as small as open_clip allows.
_TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}


class Teacher(nn.Module):
    """Network from images to L2-normalised embeddings.

    ``visual`` is an image tower from (batch, 3, size, size) to (batch, width).
    """

    def __init__(self, visual: nn.Module, width: int, config: TowerConfig) -> None:
        super().__init__()
        self.visual = visual
        self.embedding_dim = config.embedding_dim or width
        self.project = nn.Sequential()
        if config.dropout:
            self.project.add_module("dropout", nn.Dropout(config.dropout))
        if config.embedding_dim:
            self.project.add_module("linear", nn.Linear(width, config.embedding_dim, config.projection_bias))
        if config.batch_norm:
            self.project.add_module("norm", nn.BatchNorm1d(self.embedding_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map preprocessed (batch, 3, size, size) to L2-normalised (batch, embedding_dim) float32."""
        return F.normalize(self.project(self.visual(x)).float(), dim=1)


def build_teacher(
    config: TowerConfig, tower: dict[str, Any], load_pretrained: bool, device: str = "cpu"
) -> tuple[Teacher, Preprocess]:
    """Create the network and its preprocessing; on the device ``meta`` it has shapes without memory.

    ``tower`` comes from :func:`teacher.registry.read_tower`. ``load_pretrained`` loads the weights of
    ``config.pretrained``.
    """
    visual = _create_tower(config, tower, device)
    width = int(tower["embed_dim"]) if config.keep_projection else drop_projection(visual, config.name)
    if config.patch_stride:
        overlap_patches(visual, config.patch_stride, config.name)
    if config.gradient_checkpointing:
        _enable_checkpointing(visual, config.name)
    teacher = Teacher(visual, width, config).to(device)
    published = _load_pretrained(config, tower, teacher, load_pretrained)
    return teacher, tower_preprocess(config, input_size(visual), published)


def load_teacher(path: Path | str, artifact: Artifact | None = None) -> tuple[Teacher | FusedTeacher, Artifact]:
    """Load a teacher artifact, also a fused one: the network in evaluation mode, and the artifact."""
    artifact = artifact or load_artifact(path, "teacher")
    card = artifact.card
    with reraise_as_artifact_error(artifact):
        model = _rebuild_fused(path, card) if is_fused(artifact) else _rebuild(path, card.config, card.preprocess)
        model.load_state_dict(load_file(artifact.file("model.safetensors")))
    return model.eval(), artifact


def is_fused(artifact: Artifact) -> bool:
    """Return whether a teacher artifact holds several teachers."""
    return "parts" in artifact.card.config


def _rebuild(path: Path | str, values: dict[str, Any], recorded: Preprocess | None) -> Teacher:
    """Create the network of a teacher from the values of its card, with random weights."""
    # Initial weights and checkpointing matter in training only.
    config = replace(TowerConfig(**values["network"]), pretrained="", gradient_checkpointing=False)
    if "vision_cfg" in values["tower_config"]:
        check_sizes(f"{path}: tower_config", values["tower_config"])
    model, built = build_teacher(config, values["tower_config"], load_pretrained=False)
    if recorded is None or (recorded.size, recorded.resize) != (built.size, built.resize):
        raise UserError(f"{path}: the card's preprocessing does not match its tower. Train the teacher again.")
    return model


def _rebuild_fused(path: Path | str, card: Card) -> FusedTeacher:
    """Create the network of a fused teacher from its card, with random weights and no whitening."""
    entries = card.config["parts"]
    if not 2 <= len(entries) <= MAX_TEACHERS:
        raise UserError(f"{path}: expected 2 to {MAX_TEACHERS} teachers in its card, got {len(entries)}.")
    if card.preprocess is None or card.embedding is None:
        raise UserError(f"{path}: the card has no preprocessing or embedding. Fuse the teachers again.")
    parts = []
    for entry in entries:
        own = Preprocess.model_validate(entry["preprocess"])
        network = _rebuild(path, entry, own)
        parts.append(WhitenedPart(network, network.embedding_dim, own, card.preprocess))
    return FusedTeacher(parts, card.embedding.dim)


def _create_tower(config: TowerConfig, tower: dict[str, Any], device: str) -> Any:
    """Create the image tower alone, with random weights."""
    import open_clip

    if tower.get("library") == "timm":
        from teacher.timm_tower import create_tower

        return create_tower(tower, config.image_size, device)
    image_config: dict[str, Any] = {key: tower[key] for key in _IMAGE_KEYS if key in tower}
    # open_clip reads configurations by name only, so register this one under a name that cannot clash.
    open_clip.factory._MODEL_CONFIGS["vpr-tower"] = {**image_config, "text_cfg": _TEXT}
    with torch.device(device):  # created there directly: a meta tower never allocates weights
        visual: Any = open_clip.create_model(
            "vpr-tower",
            load_weights=False,
            pretrained_image=False,
            force_quick_gelu=bool(tower.get("quick_gelu", False)),
            force_image_size=config.image_size or None,
            device=device,
        ).visual
    visual.output_tokens = False  # else CoCa's tower returns its tokens too
    # timm creates its towers with their default size and ignores the configuration's.
    set_size(visual, input_size(visual))
    return visual


def _enable_checkpointing(visual: Any, name: str) -> None:
    """Switch gradient checkpointing on; raise :class:`UserError` if the tower does not support it."""
    try:
        if not hasattr(visual, "transformer") and not hasattr(visual, "trunk"):
            raise NotImplementedError
        visual.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError):
        fix = "Set it to false"
        raise UserError(f"tower.gradient_checkpointing: {name} does not support it. {fix}.") from None


def _load_pretrained(config: TowerConfig, tower: dict[str, Any], teacher: Teacher, load: bool) -> dict[str, Any]:
    """Load the weights of ``config.pretrained`` and return the preprocessing that they were trained with."""
    path = Path(config.pretrained)
    published = published_values(config.name, tower, is_random=not config.pretrained)
    if not config.pretrained:
        return published
    if (path / CARD_NAME).is_file():
        return published | _load_from_teacher(config, tower, teacher, load)
    if path.suffix or "/" in config.pretrained:
        if load:
            load_tower_weights(teacher.visual, read_tower_weights(path))
        return published
    if tower.get("library") == "timm":
        model = tower["vision_cfg"]["timm_model_name"]
        check_timm_tag("tower.pretrained", model, config.pretrained)
        if load:
            load_tower_weights(teacher.visual, download_timm(model, config.pretrained))
        return published | timm_values(model, config.pretrained)
    return published | _load_open_clip_tag(config, teacher, load)


def _load_from_teacher(config: TowerConfig, tower: dict[str, Any], teacher: Teacher, load: bool) -> dict[str, Any]:
    path = Path(config.pretrained)
    start = load_artifact(path, "teacher")
    if is_fused(start):
        raise UserError(f"tower.pretrained: {path} holds several teachers. Start from one of them.")
    with reraise_as_artifact_error(start):
        # Weights of equal shapes may still be from another tower, with other heads or another activation.
        if architecture_key(start.card.config["tower_config"]) != architecture_key(tower):
            raise UserError(f"tower.pretrained: {path} has another tower than {config.name}. Set tower.name to it.")
        if load:
            file = start.file("model.safetensors")
            load_tower_weights(teacher.visual, read_tower_weights(file))
            _load_projection_from(teacher, file)
    recorded = start.card.preprocess
    return {} if recorded is None else recorded.model_dump(include=set(STATISTICS))


def _load_open_clip_tag(config: TowerConfig, teacher: Teacher, load: bool) -> dict[str, Any]:
    import open_clip

    name = open_clip_name(config.name)
    tag = open_clip.get_pretrained_cfg(name, config.pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"tower.pretrained: {name} has no tag '{config.pretrained}'. Choose from: {known}.")
    if tag.get("quick_gelu", False) and any(isinstance(module, nn.GELU) for module in teacher.visual.modules()):
        problem = f"'{config.pretrained}' was trained with QuickGELU, {name} computes GELU"
        raise UserError(f"tower.pretrained: {problem}. Set tower.name to {name}-quickgelu.")
    if load:
        load_tower_weights(teacher.visual, download_open_clip(name, tag))
    return {key: tag[key] for key in STATISTICS if key in tag}


def _load_projection_from(teacher: Teacher, file: Path) -> None:
    """Load the layers added to the tower from another teacher, up to the first whose shapes differ."""
    with safe_open(file, "pt") as stored:
        names = [name for name in stored.keys() if name.startswith("project.")]  # noqa: SIM118 (no dictionary)
        weights = {name.removeprefix("project."): stored.get_tensor(name) for name in names}
    # In this order, because the statistics of a norm depend on the projection before it.
    for part in ("linear.", "norm."):
        stored_part = {name: value for name, value in weights.items() if name.startswith(part)}
        shapes = {name: value.shape for name, value in teacher.project.state_dict().items() if name.startswith(part)}
        if shapes != {name: value.shape for name, value in stored_part.items()}:
            return
        teacher.project.load_state_dict(stored_part, strict=False)
