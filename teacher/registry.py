"""Image towers by name: of timm, of open_clip, or of a JSON file in open_clip's form."""

import difflib
import json
from pathlib import Path
from typing import Any

from vpr.common.errors import UserError

# A tower's JSON file is untrusted: these limit the network that it can describe.
_MAX_TOWER_BYTES = 1 << 20
_MAX_SIZE, _MAX_LAYERS = 1 << 16, 512
_TOWERS = Path(__file__).parent / "towers"
_TIMM, _OPEN_CLIP = "timm/", "open_clip/"


def read_tower(name: str) -> dict[str, Any]:
    """Return the configuration of a tower in open_clip's form; of a timm tower it has the key ``library``.

    Raises:
        UserError: There is no such tower, or its file is invalid.
    """
    import open_clip

    if name.startswith(_TIMM):
        from teacher.timm_tower import describe

        return describe(name, *split_timm_name(name))
    packaged = _TOWERS / f"{name}.json"
    path = packaged if packaged.is_file() else Path(name)
    if path.suffix == ".json":
        return _read_tower_file(path)
    # open_clip downloads the configuration of a name such as `hf-hub:OWNER/NAME`, and reads any file for `local-dir:`.
    config = None if ":" in name else open_clip.get_model_config(open_clip_name(name))
    if config is None:
        raise UserError(f"tower.name: '{name}' is no open_clip model, timm model or JSON file. {_nearest(name)}")
    return config


def open_clip_name(name: str) -> str:
    """Return a tower's name in open_clip."""
    return name.removeprefix(_OPEN_CLIP)


def split_timm_name(name: str) -> tuple[str, str]:
    """Return model and tag of ``timm/MODEL`` or ``timm/MODEL.TAG``; raise :class:`UserError` if timm lacks them."""
    import timm

    model, _, tag = name.removeprefix(_TIMM).partition(".")
    if not timm.is_model(model):
        raise UserError(f"tower.name: '{name}' is no model of timm. {_nearest(name)}")
    check_timm_tag("tower.name", model, tag)
    return model, tag


def check_timm_tag(key: str, model: str, tag: str) -> None:
    """Raise :class:`UserError` if a model of timm has no weights of this tag; an empty tag is accepted."""
    known = timm_tags(model)
    if tag and tag not in known:
        raise UserError(f"{key}: timm/{model} has no tag '{tag}'. Choose from: {', '.join(known) or 'none'}.")


def timm_tags(model: str) -> list[str]:
    """Return the tags of the published weights of a model of timm."""
    import timm

    return [name.partition(".")[2] for name in timm.list_pretrained(f"{model}.*")]


def architecture_key(tower: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies an architecture, without the image size."""
    vision = {key: value for key, value in tower["vision_cfg"].items() if key != "image_size"}
    return tower.get("library"), tower["embed_dim"], bool(tower.get("quick_gelu", False)), vision


def _nearest(name: str) -> str:
    """Return a sentence with the names of both libraries that are most alike."""
    import open_clip
    import timm

    known = [*(_TIMM + model for model in timm.list_models()), *open_clip.list_models()]
    # Compared without the library, so that a name with the wrong one or without it is found.
    by_model = {model.removeprefix(_TIMM).lower(): model for model in known}
    wanted = name.removeprefix(_TIMM).removeprefix(_OPEN_CLIP).lower()
    close = [by_model[model] for model in difflib.get_close_matches(wanted, by_model, n=3, cutoff=0.5)]
    lists = "See timm.list_models() and open_clip.list_models()."
    return f"Nearest names: {', '.join(close)}." if close else lists


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


def check_sizes(where: str, config: dict[str, Any]) -> None:
    """Raise :class:`UserError` for numbers of a tower's configuration that would take too much memory."""
    for key, value in {**config["vision_cfg"], "embed_dim": config["embed_dim"]}.items():
        largest = _MAX_LAYERS if key == "layers" else _MAX_SIZE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not 0 <= number <= largest:
                raise UserError(f"{where}: {key}: expected 0 to {largest}, got {number}.")


def _check_tower(path: Path, config: dict[str, Any]) -> None:
    """Raise :class:`UserError` for unreasonable sizes, and for timm models that are downloaded from a hub."""
    vision = config["vision_cfg"]
    if not isinstance(vision, dict):
        raise UserError(f"tower.name: {path}: vision_cfg must be an object, as in open_clip's configs.")
    check_sizes(f"tower.name: {path}", config)
    if "library" in config:
        raise UserError(f"tower.name: {path}: 'library' is no key of open_clip's configs. Set tower.name to timm/NAME.")
    if vision.get("timm_pool") == "" and vision.get("timm_proj") not in ("linear", "mlp"):
        problem = "timm_pool: '' pools nothing, so the tower returns no vector"
        raise UserError(f"tower.name: {path}: {problem}. Set it to avg or max, or for a ViT also to token.")
    if ":" in str(vision.get("timm_model_name", "")):
        raise UserError(f"tower.name: {path}: timm_model_name names a hub. Use the name of a model in timm.")
