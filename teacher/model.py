"""Teacher network: an OpenCLIP image tower, an optional projection and an L2-normalised output."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from teacher.config import TowerConfig
from teacher.tower import drop_projection, input_size, overlap_patches, set_size
from teacher.weights import download, load_tower_weights, read_tower_weights
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess

# A tower's JSON file is untrusted: these limit the network that it can describe.
_MAX_TOWER_BYTES = 1 << 20
_MAX_SIZE, _MAX_LAYERS = 1 << 16, 512
_TOWERS = Path(__file__).parent / "towers"
_IMAGE_KEYS = ("embed_dim", "vision_cfg", "quick_gelu")
# Only the image tower is used, so the text tower is as small as open_clip allows.
_TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}


class Teacher(nn.Module):
    """Network from images to L2-normalised embeddings.

    ``visual`` is an OpenCLIP image tower from (batch, 3, size, size) to (batch, width).
    """

    def __init__(self, visual: nn.Module, width: int, config: TowerConfig) -> None:
        super().__init__()
        self.visual = visual
        self.embedding_dim = config.embedding_dim or width
        self.project = nn.Sequential()
        if config.dropout:
            self.project.add_module("dropout", nn.Dropout(config.dropout))
        if config.embedding_dim:
            self.project.add_module("linear", nn.Linear(width, config.embedding_dim, bias=False))
        if config.batch_norm:
            self.project.add_module("norm", nn.BatchNorm1d(self.embedding_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map preprocessed (batch, 3, size, size) to L2-normalised (batch, embedding_dim) float32."""
        return F.normalize(self.project(self.visual(x)).float(), dim=1)


def read_tower(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of a tower, by name or JSON file; raise :class:`UserError` if it is invalid."""
    import open_clip

    packaged = _TOWERS / f"{name}.json"
    path = packaged if packaged.is_file() else Path(name)
    if path.suffix == ".json":
        return _read_tower_file(path)
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"tower.name: '{name}' is no open_clip model and no JSON file. See open_clip.list_models().")
    return config


def _read_tower_file(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # reading a device or a pipe may never end
            raise ValueError("not a file")
        if path.stat().st_size > _MAX_TOWER_BYTES:
            raise ValueError(f"more than {_MAX_TOWER_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"tower.name: {path} is not readable JSON ({error}). Name another file.") from None
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg"} <= config.keys():
        raise UserError(f"tower.name: {path} lacks embed_dim or vision_cfg. Add both, as in open_clip's configs.")
    _check_tower(path, config)
    return config


def _check_tower(path: Path, config: dict[str, Any]) -> None:
    """Raise :class:`UserError` for unreasonable sizes, and for timm models that are downloaded from a hub."""
    vision = config["vision_cfg"]
    if not isinstance(vision, dict):
        raise UserError(f"tower.name: {path}: vision_cfg must be an object, as in open_clip's configs.")
    for key, value in {**vision, "embed_dim": config["embed_dim"]}.items():
        largest = _MAX_LAYERS if key == "layers" else _MAX_SIZE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not 0 <= number <= largest:
                raise UserError(f"tower.name: {path}: {key}: expected 0 to {largest}, got {number}.")
    if ":" in str(vision.get("timm_model_name", "")):
        raise UserError(f"tower.name: {path}: timm_model_name names a hub. Use the name of a model in timm.")


def build_teacher(
    config: TowerConfig, tower: dict[str, Any], load_pretrained: bool, device: str = "cpu"
) -> tuple[Teacher, Preprocess]:
    """Create the network and its preprocessing; on the device ``meta`` it has shapes without memory.

    ``tower`` comes from :func:`read_tower`. ``load_pretrained`` loads the weights of ``config.pretrained``.
    """
    visual = _create_tower(config, tower, device)
    width = int(tower["embed_dim"]) if config.keep_projection else drop_projection(visual, config.name)
    if config.patch_stride:
        overlap_patches(visual, config.patch_stride, config.name)
    if config.gradient_checkpointing:
        if not hasattr(visual, "transformer") and not hasattr(visual, "trunk"):
            raise UserError(f"tower.gradient_checkpointing: {config.name} does not support it. Set it to false.")
        visual.set_grad_checkpointing(True)
    teacher = Teacher(visual, width, config).to(device)
    recorded = dict(visual.preprocess_cfg)
    if config.pretrained:
        recorded.update(_load_pretrained(config, tower, teacher, load_pretrained))
    values: dict[str, Any] = {key: recorded[key] for key in ("interpolation", "mean", "std")}
    values |= {"resize": "squash", "crop": "none"} if config.squash else {"resize": "shortest", "crop": "center"}
    return teacher, Preprocess(size=input_size(visual), **values)


def load_teacher(path: Path | str, artifact: Artifact | None = None) -> tuple[Teacher, Artifact]:
    """Load a teacher artifact: the network in evaluation mode, and the artifact."""
    artifact = artifact or load_artifact(path, "teacher")
    with reraise_as_artifact_error(artifact):
        config = TowerConfig(**artifact.card.config["network"])
        # Initial weights and checkpointing matter in training only.
        config = replace(config, pretrained="", gradient_checkpointing=False)
        model, built = build_teacher(config, artifact.card.config["tower_config"], load_pretrained=False)
        recorded = artifact.card.preprocess
        if recorded is None or (recorded.size, recorded.resize) != (built.size, built.resize):
            raise UserError(f"{path}: the card's preprocessing does not match its tower. Train the teacher again.")
        model.load_state_dict(load_file(artifact.file("model.safetensors")))
    return model.eval(), artifact


def _create_tower(config: TowerConfig, tower: dict[str, Any], device: str) -> Any:
    """Create the image tower alone, with random weights."""
    import open_clip

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


def _load_pretrained(config: TowerConfig, tower: dict[str, Any], teacher: Teacher, load: bool) -> dict[str, Any]:
    """Load the weights of ``config.pretrained`` and return the preprocessing that they were trained with."""
    import open_clip

    path = Path(config.pretrained)
    if (path / CARD_NAME).is_file():
        start = load_artifact(path, "teacher")
        with reraise_as_artifact_error(start):
            # Weights of equal shapes may still be from another tower, with other heads or another activation.
            if _architecture_key(start.card.config["tower_config"]) != _architecture_key(tower):
                raise UserError(f"tower.pretrained: {path} has another tower than {config.name}. Set tower.name to it.")
            if load:
                file = start.file("model.safetensors")
                load_tower_weights(teacher.visual, read_tower_weights(file))
                _load_projection_from(teacher, file)
        recorded = start.card.preprocess
        return {} if recorded is None else recorded.model_dump(include={"interpolation", "mean", "std"})
    if path.suffix or "/" in config.pretrained:
        if load:
            load_tower_weights(teacher.visual, read_tower_weights(path))
        return _common_preprocessing(config.name)
    tag = open_clip.get_pretrained_cfg(config.name, config.pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(config.name)) or "none"
        raise UserError(f"tower.pretrained: {config.name} has no tag '{config.pretrained}'. Choose from: {known}.")
    if tag.get("quick_gelu", False) and any(isinstance(module, nn.GELU) for module in teacher.visual.modules()):
        problem = f"'{config.pretrained}' was trained with QuickGELU, {config.name} computes GELU"
        raise UserError(f"tower.pretrained: {problem}. Set tower.name to {config.name}-quickgelu.")
    if load:
        load_tower_weights(teacher.visual, read_tower_weights(download(config.name, tag)))
    return {key: tag[key] for key in ("interpolation", "mean", "std") if key in tag}


def _common_preprocessing(name: str) -> dict[str, Any]:
    """Return the preprocessing shared by all published weights of a tower, since a weights file records none."""
    import open_clip

    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    common: dict[str, Any] = {}
    for key in ("interpolation", "mean", "std"):
        values = {tag[key] for tag in tags if key in tag}
        if len(values) == 1:
            common[key] = values.pop()
    return common


def _architecture_key(tower: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies an architecture, without the image size."""
    vision = {key: value for key, value in tower["vision_cfg"].items() if key != "image_size"}
    return tower["embed_dim"], bool(tower.get("quick_gelu", False)), vision


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
