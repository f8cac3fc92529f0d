"""The teacher: an OpenCLIP image tower, an optional projection, and an L2-normalised output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vpr.artifact import Artifact, load_artifact, reading
from vpr.errors import UserError
from vpr.images import Preprocess

_TOWERS = Path(__file__).parent / "towers"


@dataclass(frozen=True)
class TowerConfig:
    """Which image tower, and how its output becomes the embedding.

    Attributes:
        name: an ``open_clip`` model such as ``ViT-H-14``, a JSON file in open_clip's form, or the
            name of one in ``teacher/towers`` (``sample``).
        pretrained: a tag of ``open_clip`` such as ``laion2b_s32b_b79k``, a local ``.safetensors``
            file, or empty for random weights.
        image_size: side of the input in pixels; 0 keeps the tower's own.
        keep_projection: keep CLIP's own projection (ViT-H-14: 1280 to 1024).
        embedding_dim: a new linear projection to this many dimensions; 0 adds none.
        squash: squash the whole picture to the square instead of cropping its centre.
    """

    name: str = "ViT-H-14"
    pretrained: str = "laion2b_s32b_b79k"
    image_size: int = 0
    keep_projection: bool = True
    embedding_dim: int = 0
    squash: bool = True


class Teacher(nn.Module):
    """Pictures to L2-normalised embeddings.

    Args:
        visual: OpenCLIP image tower, (batch, 3, size, size) to (batch, width).
        width: of the tower's output.
        embedding_dim: of the added projection; 0 adds none.
    """

    def __init__(self, visual: nn.Module, width: int, embedding_dim: int = 0) -> None:
        super().__init__()
        self.visual = visual
        self.project = nn.Linear(width, embedding_dim, bias=False) if embedding_dim else nn.Identity()
        self.embedding_dim = embedding_dim or width

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) preprocessed to (batch, embedding_dim) float32 of unit length."""
        return F.normalize(self.project(self.visual(x)).float(), dim=1)


def read_tower(name: str) -> dict[str, Any]:
    """open_clip's JSON configuration of a tower, by its name or file."""
    import open_clip

    own = _TOWERS / f"{name}.json"
    path = own if own.is_file() else Path(name)
    if path.suffix == ".json" or own.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"tower.name: {path}: cannot be read as JSON ({error}): mend or rename it") from None
        if not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
            raise UserError(
                f"tower.name: {path}: needs embed_dim, vision_cfg and text_cfg, as open_clip's configs have"
            )
        return config
    known = open_clip.get_model_config(name)
    if known is None:
        raise UserError(
            f"tower.name: '{name}' is neither an open_clip model nor a JSON file: see open_clip.list_models()"
        )
    return known


def build_teacher(config: TowerConfig, tower: dict[str, Any], load_pretrained: bool) -> tuple[Teacher, Preprocess]:
    """Create the network and its preprocessing.

    Args:
        config: the choice made.
        tower: open_clip's configuration, from :func:`read_tower`.
        load_pretrained: read the weights that ``config.pretrained`` names.
    """
    import open_clip

    # open_clip reads configurations by name only; ours is added under one that cannot clash.
    open_clip.factory._MODEL_CONFIGS["vpr-tower"] = tower
    pretrained = _pretrained(config, tower) if load_pretrained else None
    model = open_clip.create_model(
        "vpr-tower",
        pretrained=pretrained,
        load_weights=pretrained is not None,
        force_image_size=config.image_size or None,
        force_quick_gelu=bool(tower.get("quick_gelu", False)),
    )
    visual = model.visual
    width = int(tower["embed_dim"])
    if not config.keep_projection:
        if getattr(visual, "proj", None) is None:
            raise UserError(f"tower.keep_projection: {config.name} has no projection to drop: set it to true")
        width = int(visual.proj.shape[0])
        visual.proj = None
    size = visual.image_size
    recorded = visual.preprocess_cfg
    preprocess = Preprocess(
        size=size if isinstance(size, int) else size[0],
        resize="squash" if config.squash else "shortest",
        crop="none" if config.squash else "center",
        interpolation=recorded["interpolation"],
        mean=tuple(recorded["mean"]),
        std=tuple(recorded["std"]),
    )
    return Teacher(visual, width, config.embedding_dim), preprocess


def load_teacher(path: Path | str) -> tuple[Teacher, Artifact]:
    """Load a teacher artifact: the network in evaluation mode, and the artifact."""
    artifact = load_artifact(path, "teacher")
    with reading(artifact):
        config = TowerConfig(**artifact.card.config["tower"])
        model, preprocess = build_teacher(config, artifact.card.config["tower_config"], load_pretrained=False)
        if preprocess != artifact.card.preprocess:
            raise UserError(f"{path}: its preprocessing is not this tower's: train it again with this version")
        model.load_state_dict(load_file(artifact.file("model.safetensors")))
    return model.eval(), artifact


def _pretrained(config: TowerConfig, tower: dict[str, Any]) -> str | None:
    """The path of the weights: a local safetensors file, or what open_clip downloads for a tag."""
    import open_clip

    if not config.pretrained:
        return None
    path = Path(config.pretrained)
    if path.suffix in (".pt", ".pth", ".bin"):
        raise UserError(f"tower.pretrained: {path}: pickled weights can run code: convert them to .safetensors first")
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"tower.pretrained: {path}: no such file: check the path")
        return str(path)
    tag = open_clip.get_pretrained_cfg(config.name, config.pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(config.name)) or "none"
        raise UserError(f"tower.pretrained: {config.name} has no tag '{config.pretrained}': choose from {known}")
    return str(open_clip.download_pretrained(tag, prefer_hf_hub=True))
