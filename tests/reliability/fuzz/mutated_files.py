"""Seeded mutations of valid files. No I/O.

ONNX graphs, JSON and headers of tensor files are mostly changed field by field, all other files by their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.reliability.fuzz import mutated_bytes
from tests.reliability.fuzz.mutated_bytes import NUMBERS, TEXTS, Rng, describe, pick
from tests.reliability.fuzz.mutated_graphs import mutate_graph

_SHARE_OF_FIELDS = 0.8  # of the mutations of a file that has fields; the others change its bytes
_DEEP = "placeholder of deep nesting"
_ODD: tuple[Any, ...] = (
    *(None, True, "", [], {}, -1, 0, 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**63, 10**30, 10**400, "x" * 100_000, "\x1b[31m\n\u202e\ud800", "../../etc/passwd", "/dev/zero"),
    *("nan", [[[]]], {"": {}}, [1, "a", None], _DEEP),
)
_KINDS = ("catalog", "teacher", "student", "embeddings", "onnx", "ranges", "engine", "report", "spell")


def mutate_file(name: str, data: bytes, rng: Rng) -> tuple[str, bytes]:
    """Return a mutation in words, and the mutated file.

    Args:
        name: File name; the suffix determines the fields.
        data: Well-formed file.
        rng: Generator; the same state gives the same mutation.
    """
    mutate_fields = _BY_FIELD.get(name.rpartition(".")[2])
    if mutate_fields is not None and rng.random() < _SHARE_OF_FIELDS:
        return mutate_fields(data, rng)
    change = pick(rng, mutated_bytes.CHANGES)
    return describe(change), change(data, rng)


def _mutate_json(value: Any, rng: Rng) -> str:
    """Change one to three entries of a JSON object or list in place, and return the changes in words."""
    changes = []
    for _ in range(int(rng.integers(1, 4))):
        entries = list(_entries(value, ""))
        if not entries:
            break
        path, parent, key = pick(rng, entries)
        changes.append(f"{_change_entry(parent, key, entries, rng)} {path}")
    return ", ".join(changes)


def _change_entry(parent: Any, key: Any, entries: list[Any], rng: Rng) -> str:
    action = pick(rng, ("odd", "odd", "odd", "scale", "remove", "swap", "add"))
    old = parent[key]
    if action == "remove":
        del parent[key]
    elif action == "swap":
        _, other, name = pick(rng, entries)
        parent[key] = json.loads(json.dumps(other[name]))
    elif action == "add" and isinstance(parent, dict):
        parent[f"{key}{pick(rng, TEXTS)}"] = pick(rng, _ODD)
    elif action == "scale" and isinstance(old, int | float) and abs(old) < 1e300:
        parent[key] = old * pick(rng, (-1, 2, 1000, 10**9, 0.37))
    elif key == "kind":
        parent[key] = pick(rng, _KINDS)
    else:
        parent[key] = json.loads(json.dumps(pick(rng, _ODD)))
    return action


def _entries(value: Any, path: str) -> Any:
    """Yield (path, parent, key) of every entry of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield f"{path}/{str(key)[:40]}", value, key
        yield from _entries(inner, f"{path}/{str(key)[:40]}")


def json_bytes(value: Any) -> bytes:
    """Return JSON as Python writes it, with ``NaN`` and lone surrogates; placeholders become deep nesting."""
    text = json.dumps(value, indent=1)
    return text.replace(json.dumps(_DEEP), "[" * 100_000 + "]" * 100_000).encode()


def _json_file(data: bytes, rng: Rng) -> tuple[str, bytes]:
    value = json.loads(data)
    mutation = _mutate_json(value, rng)
    return mutation, json_bytes(value)


def _safetensors_file(data: bytes, rng: Rng) -> tuple[str, bytes]:
    """Mutate a header: eight bytes of length, then JSON of dtype, shape and offsets."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    mutation = _mutate_json(header, rng)
    text = json_bytes(header)
    size = len(text) if rng.random() < 0.9 else int(pick(rng, NUMBERS)) % 2**64
    return f"header: {mutation}", size.to_bytes(8, "little") + text + data[8 + length :]


_BY_FIELD: dict[str, Callable[[bytes, Rng], tuple[str, bytes]]] = {
    "onnx": mutate_graph,
    "json": _json_file,
    "safetensors": _safetensors_file,
}
