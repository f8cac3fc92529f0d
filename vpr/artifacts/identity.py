"""Identity of an artifact: the values that determine it, without the places where its inputs are stored."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vpr.artifacts.card import Parent

_MASK = "*"
# Keys with paths of artifacts, and roles of the parents that identify these artifacts by their checksums.
_PATHS: dict[str, frozenset[str]] = {
    "assistant": frozenset({"assistant"}),
    "catalog": frozenset({"catalog"}),
    "embeddings": frozenset({"embeddings"}),
    "evaluation": frozenset({"evaluation"}),
    "gallery": frozenset({"embeddings"}),
    "model": frozenset({"model", "onnx", "engine"}),
    "models": frozenset({"teacher"}),
    "onnx": frozenset({"onnx"}),
    "ranges": frozenset({"ranges"}),
    "storage": frozenset({"storage"}),
    "student": frozenset({"student"}),
    "teacher": frozenset({"teacher"}),
    "threshold": frozenset({"threshold"}),
    "training": frozenset({"storage"}),
    "unlabelled": frozenset({"unlabelled"}),
}
# Keys of a loader that decide how fast images arrive, not which.
_SPEED_KEYS = ("workers", "cache_gb")
# Sources of a catalogue, whose tables are identified by their checksums in `tables`.
_SOURCES = ("products10k", "aicrowd", "csv")


def identity(config: Mapping[str, Any], parents: Sequence[Parent]) -> dict[str, Any]:
    """Return a configuration as JSON without paths of inputs that a checksum identifies: a moved input is the same.

    A path stays if neither a parent nor a checksum in the configuration identifies what it names.
    """
    values: dict[str, Any] = json.loads(json.dumps(dict(config)))
    roles = {parent.role for parent in parents}
    for key, needed in _PATHS.items():
        if roles & needed:
            _mask(values, key)
    if "catalog_sha256" in values:
        _mask(values, "catalog")
    if "metadata_sha256" in values:
        _mask(values, "metadata")
    if "ranges" in roles:
        _mask(values.get("quantise"), "ranges")
    _mask_start(values, "start" in roles)
    values.pop("cache", None)  # place of the cached embeddings of a teacher
    if isinstance(loader := values.get("loader"), dict):
        for key in _SPEED_KEYS:
            loader.pop(key, None)
    if values.get("recipe") == "fused":  # its threads follow the loader
        values.pop("threads", None)
    for key in ("root", "image_root"):  # the rows of a catalogue are compared, or its tables
        _mask(values, key)
    if isinstance(tables := values.get("tables"), dict):
        values["tables"] = list(tables.values())
        for key in _SOURCES:
            _mask(values, key)
    return values


def _mask_start(values: dict[str, Any], has_parent: bool) -> None:
    """Mask the paths of initial weights and of the files that describe their networks."""
    if has_parent or "pretrained_sha256" in values:
        for section in ("tower", "network"):
            _mask(values.get(section), "pretrained")
    if "tower_config" in values:
        for section in ("tower", "network"):
            _mask(values.get(section), "name", ".json")
    if "start_tower" in values:
        _mask(values, "start", ".json")
        if has_parent or "start_sha256" in values:
            _mask(values, "start_weights")
    elif has_parent:
        _mask(values, "start")


def _mask(section: Any, key: str, suffix: str = "") -> None:
    """Replace the text or the texts of a key; an empty text and other values stay."""
    value = section.get(key) if isinstance(section, dict) else None
    if isinstance(value, str) and value and value.endswith(suffix):
        section[key] = _MASK
    elif isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        section[key] = [_MASK] * len(value)
