"""Licence of a teacher's initial weights, from the metadata of their library or from the configuration."""

from typing import Any

from teacher.config import TowerConfig
from teacher.registry import open_clip_name, timm_tags
from vpr.artifacts.card import UNKNOWN_LICENCE, Parent
from vpr.artifacts.store import Artifact


def weights_licences(config: TowerConfig, tower: dict[str, Any]) -> list[str]:
    """Return the licences of ``config.pretrained``: the recorded and the configured one, or none.

    A configured licence does not hide a recorded one. Only a tag has a recorded one: a file may hold other weights than
    those of the tag in the tower's name. open_clip 3.3 records none.
    """
    if tower.get("library") == "timm":
        recorded = _timm_licence(tower["vision_cfg"]["timm_model_name"], config.pretrained)
    else:
        recorded = _open_clip_licence(open_clip_name(config.name), config.pretrained)
    return sorted({config.licence, recorded} - {"", UNKNOWN_LICENCE})


def start_parent(start: Artifact, config: TowerConfig) -> Parent:
    """Return the initial teacher as a parent; a configured licence replaces an unknown one, and no known one."""
    parent = start.as_parent("start")
    if config.licence and not start.card.licences:
        return parent.model_copy(update={"licences": [config.licence]})
    return parent


def _timm_licence(model: str, tag: str) -> str:
    import timm

    if tag not in timm_tags(model):  # random weights, a file or a teacher
        return ""
    published = timm.get_pretrained_cfg(f"{model}.{tag}")
    return (published and published.license) or ""


def _open_clip_licence(name: str, tag: str) -> str:
    import open_clip

    return str((open_clip.get_pretrained_cfg(name, tag) or {}).get("license", "")) if tag else ""
