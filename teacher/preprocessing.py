"""Preprocessing of a tower: the size, statistics and filter that its weights were trained with."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from teacher.registry import open_clip_name, timm_tags
from teacher.tower_config import TowerConfig
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess

STATISTICS = ("mean", "std", "interpolation")


def tower_preprocess(config: TowerConfig, size: int, published: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of a tower; values of the configuration come before the ``published`` ones.

    Raises:
        UserError: A statistic is neither configured nor published.
    """
    configured = {key: getattr(config, key) for key in STATISTICS if getattr(config, key)}
    values = {**published, **configured}
    for key in STATISTICS:
        if key not in values:
            problem = f"the weights record none, and published weights of {config.name} differ in it"
            fix = f"Set tower.{key}" + (" or add the tag to tower.name" if config.name.startswith("timm/") else "")
            raise UserError(f"tower.{key}: {problem}. {fix}.")
    crop_pct = min(1.0, values.get("crop_pct") or 1.0)
    resize: dict[str, Any] = {"resize": "shortest", "crop": "center", "crop_pct": crop_pct}
    if config.squash:
        resize = {"resize": "squash", "crop": "none"}
    return Preprocess(size=size, **resize, **{key: values[key] for key in STATISTICS})


def published_values(name: str, tower: Mapping[str, Any], is_random: bool) -> dict[str, Any]:
    """Return the preprocessing shared by all published weights of a tower, since a weights file records none.

    Statistics in which these weights differ are left out, unless the weights are drawn at random.
    """
    import open_clip

    if tower.get("library") == "timm":
        model, tag = tower["vision_cfg"]["timm_model_name"], tower.get("tag", "")
        default = timm_values(model, tag)
        tags = [] if tag else timm_tags(model)
        entries: list[Mapping[str, Any]] = [default, *(timm_values(model, known) for known in tags)]
    else:
        name = open_clip_name(name)
        default = asdict(open_clip.transform.PreprocessCfg())
        entries = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    differing = set() if is_random else {key for key in STATISTICS if len(_values(entries, key)) > 1}
    common = {key: entries[0][key] for key in STATISTICS if entries and key in entries[0]}
    return {key: value for key, value in {**default, **common}.items() if key not in differing}


def timm_values(model: str, tag: str) -> dict[str, Any]:
    """Return the preprocessing of published weights of timm; an empty tag takes the default weights."""
    import timm

    pretrained = timm.get_pretrained_cfg(f"{model}.{tag}" if tag else model)
    values = {key: getattr(pretrained, key) for key in (*STATISTICS, "crop_pct")}
    return {key: value for key, value in values.items() if value}


def _values(entries: Iterable[Mapping[str, Any]], key: str) -> set[Any]:
    return {tuple(entry[key]) if key != "interpolation" else entry[key] for entry in entries if key in entry}
