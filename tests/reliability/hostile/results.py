"""Hostile thresholds, plans of a migration, and tables of ``vpr bench``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.reliability.hostile.artifacts import PICKLE
from tests.reliability.hostile.command_routes import GIVEN, edit_json, sign_file
from tests.reliability.hostile.inputs import Data, Hostile, write

_Change = Callable[[Any], object]
_NAN, _INFINITY = float("nan"), float("inf")
_DIGITS = b"9" * 5000
_REPORT = f"{GIVEN}/report.json"


def _set(key: str, value: Any) -> _Change:
    """Return a change of a value; the key's parts are separated by dots, and numbers are places of a list."""

    def change(values: Any) -> None:
        *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
        for part in parents:
            values = values[part]
        values[last] = value

    return change


def thresholds() -> Iterator[Hostile]:
    """Yield thresholds with impossible values, and files that are no threshold."""
    routes = ("search, threshold", "gallery search, threshold")
    invalid = {
        "threshold": (_NAN, _INFINITY, "x", [], {}, 10**400, None),
        "score": ("unknown", [], {}, None, 1),
        "probability": (None, [], {}, {"intercept": _NAN, "similarity": 1, "margin": 1}, "x" * (10 << 20)),
        "gallery_products": (_NAN, _INFINITY, [], None, "x"),
        "max_false_accept": (_NAN, [], "x"),
        "confidence": (-_INFINITY, {}),
    }
    for key, values in invalid.items():
        for value in values:
            put = partial(edit_json, "threshold/threshold.json", _set(key, value))
            yield Hostile("threshold", f"{key} {str(value)[:24]} ({type(value).__name__})", "rejected", routes, put)
    put = partial(edit_json, "threshold/threshold.json", lambda values: values.update(threshold=None, statement=_LONG))
    yield Hostile("threshold", "no threshold, a statement of 10 MB", "rejected", routes, put)
    put = partial(edit_json, "threshold/threshold.json", lambda values: values.update(threshold=None, statement=_CODES))
    yield Hostile("threshold", "no threshold, a statement with control codes", "rejected", routes, put)
    for name, data in _no_json().items():
        put = partial(_put_signed, "threshold", "threshold.json", data)
        yield Hostile("threshold", name, "rejected", routes, put)
    put = partial(edit_json, "threshold/card.json", lambda card: card.update(parents=card["parents"] * 2))
    yield Hostile("threshold", "two models in the card", "rejected", routes, put)
    put = partial(_repeat_key, "threshold/threshold.json", "score")
    yield Hostile("threshold", "a repeated key", "accepted", routes, put)


def plans() -> Iterator[Hostile]:
    """Yield plans with impossible values, and with adapters that give no vectors."""
    routes = ("gallery migrate",)
    invalid = {"adapter": ("unknown", [], None), "order": ({}, "first"), "old_dim": (_NAN, 10**12, -1, "x", 10**400)}
    for key, values in invalid.items():
        for value in values:
            put = partial(edit_json, "plan/plan.json", _set(key, value))
            yield Hostile("plan", f"{key} {str(value)[:24]} ({type(value).__name__})", "rejected", routes, put)
    for value in (-1, None, "x", [], _INFINITY, _NAN):
        put = partial(edit_json, "plan/card.json", _set("config.seed", value))
        yield Hostile("plan", f"seed {value} ({type(value).__name__})", "rejected", routes, put)
    put = partial(edit_json, "plan/card.json", lambda card: card["config"].clear())
    yield Hostile("plan", "no seed", "rejected", routes, put)
    for name, data in _no_json().items():
        yield Hostile("plan", name, "rejected", routes, partial(_put_signed, "plan", "plan.json", data))
    adapters: dict[str, Callable[[dict[str, Any]], object]] = {
        "NaN": lambda tensors: [tensor.fill(np.nan) for tensor in tensors.values()],
        "zeros": lambda tensors: [tensor.fill(0) for tensor in tensors.values()],
        "the largest numbers": lambda tensors: [tensor.fill(3.4e38) for tensor in tensors.values()],
        "no tensors": dict.clear,
        "integers": lambda tensors: tensors.update({name: array.astype(np.int32) for name, array in tensors.items()}),
        "vectors": lambda tensors: tensors.update({name: array.ravel() for name, array in tensors.items()}),
        "too many numbers": lambda tensors: tensors.update(x=np.zeros(1 << 20, np.float32)),
    }
    for name, change in adapters.items():
        yield Hostile("plan", f"an adapter of {name}", "rejected", routes, partial(_edit_adapters, change))
    put = partial(_put_signed, "plan", "adapter.safetensors", PICKLE)
    yield Hostile("plan", "an adapter of a pickle", "rejected", routes, put)
    put = partial(edit_json, "plan/card.json", lambda card: card["embedding"].update(dim=65536))
    yield Hostile("plan", "a card of 65536 dimensions", "rejected", routes, put)


def storages() -> Iterator[Hostile]:
    """Yield storage settings with impossible values, and files without settings."""
    routes = ("export serving", "bench report")
    decision: dict[str, tuple[Any, ...]] = {
        "decisions.0.size": (_NAN, "x", -1, 10**400),
        "decisions.0.max_recall_drop": (_NAN, "x"),
        "decisions.0.confirmation_products": (_NAN, []),
        "decisions": ({}, None, [[]], "x" * (10 << 20)),
        "rows": (None, [1], {}),
        "rows.0.dims": (_INFINITY, 1.5, []),
        "rows.0.format": ("unknown", None, ["int8"]),
        "galleries": (None, [{}]),
    }
    for key, values in decision.items():
        for value in values:
            put = partial(edit_json, "storage/storage.json", _set(key, value))
            yield Hostile("storage", f"{key} {str(value)[:24]} ({type(value).__name__})", "rejected", routes[:1], put)
    for name, data in _no_json().items():
        yield Hostile("storage", name, "rejected", routes, partial(_put_signed, "storage", "storage.json", data))
    for value in (10**400, -1, _NAN, "x", None):
        put = partial(edit_json, "storage/card.json", _set("config.tuning", {"probes": value}))
        yield Hostile("storage", f"tuning {str(value)[:24]}", "rejected", routes[:1], put)
    for name in ("skew/skew.json", "decided/decision.json"):
        for key, value in (("rows", _NAN), ("name", None)) if name.startswith("skew") else (("trials", [_NAN]),):
            yield Hostile("table", f"{name}: {key}", "rejected", routes[1:], partial(edit_json, name, _set(key, value)))
        yield Hostile("table", f"{name}: no keys", "rejected", routes[1:], partial(edit_json, name, dict.clear))
        for label, data in (("not UTF-8", b'{"a": "\xff"}'), ("100,000 brackets", b"[" * 100_000)):
            put = partial(_put_signed, *name.split("/"), data)
            yield Hostile("table", f"{name}: {label}", "rejected", routes[1:], put)


def reports() -> Iterator[Hostile]:
    """Yield reports with impossible values, and files that are no report."""
    routes = ("bench compare",)
    row = "rows.0"
    rejected: dict[str, tuple[Any, ...]] = {
        "schema": (_NAN, -1, 10**400, "x", True),
        "rows": (None, {}, [None]),
        f"{row}.hits": ({"x": "2"}, {"x": ""}, {"y" * (10 << 20): "1" * 1000}, []),
        f"{row}.recall_at_1": (_NAN, 2, "x"),
        f"{row}.latency_ms": ({"9" * 5000: {"p50": 1, "p90": 1, "p99": 1}}, {"0": {}}, {"1": {"p50": 0}}),
        f"{row}.size_bytes": (_INFINITY, [], "x", 10**400),
        "catalog": (None, {}),
        "environment.gpus": ([1], None),
        "threads": (0, "x"),
        "catalog.sha256": ("x",),
    }
    for key, values in rejected.items():
        for value in values:
            name = f"{key} {str(value)[:24]} ({type(value).__name__})"
            yield Hostile("report", name, "rejected", routes, partial(edit_json, _REPORT, _set(key, value)))
    for name, change in {
        "a model of 10 MB": _set(f"{row}.name", _LONG),
        "a model with control codes": _set(f"{row}.name", _CODES),
        "a file of 10^18 bytes": _set_all("size_bytes", 10**18),
        "a latency of 1e-320 ms": _set_all("latency_ms", {"1": {"p50": 1e-320, "p90": 1, "p99": 1}}),
        "unknown keys": lambda values: values.update({f"x{n}": [[]] for n in range(100_000)}),
        "a command of 10 MB": _set("command", _LONG),
        "a processor with control codes": _set("environment.cpu.model", _CODES),
    }.items():
        yield Hostile("report", name, "accepted", routes, partial(edit_json, _REPORT, change))
    yield Hostile("report", "a long product in both reports", "accepted", routes, _put_long_product)
    for name, data in _no_json().items():
        yield Hostile("report", name, "rejected", routes, partial(write, _REPORT, data))
    yield Hostile("report", "3 GB of zeros, which take no space", "rejected", routes, _put_sparse)
    for target in ("/dev/zero", "report.json", "/etc/passwd"):
        yield Hostile("report", f"a link to {target}", "rejected", routes, partial(_put_link, target))


_LONG = "x" * (10 << 20)
_CODES = "\x1b[2J\x1b]0;x\x07\nvpr: ok\r\u202e"


def _no_json() -> dict[str, Data]:
    return {
        "an empty file": b"",
        "a list": b"[]",
        "not UTF-8": b'{"a": "\xff"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a zero byte": b'{"a": "\0"}',
        "100,000 brackets": b"[" * 100_000,
        "900 braces": b'{"a": ' * 900 + b"1" + b"}" * 900,
        "a number of 5000 digits": b'{"schema": ' + _DIGITS + b"}",
        "half a surrogate": b'{"score": "\\ud800", "statement": "\\ud800", "threshold": null}',
        "a pickle": PICKLE,
    }


def _set_all(key: str, value: Any) -> _Change:
    return lambda values: [row.update({key: value}) for row in values["rows"]]


def _put_signed(artifact: str, file: str, data: Data, folder: Path) -> None:
    write(f"{artifact}/{file}", data, folder)
    sign_file(folder / artifact, file)


def _repeat_key(name: str, key: str, folder: Path) -> None:
    path = folder / name
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("{", f'{{"{key}": "unknown", ', 1), encoding="utf-8")
    sign_file(path.parent, path.name)


def _edit_adapters(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    path = folder / "plan" / "adapter.safetensors"
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    sign_file(path.parent, path.name)


def _put_long_product(folder: Path) -> None:
    for name in ("before.json", "report.json"):
        path = folder / GIVEN / name
        values = json.loads(path.read_bytes())
        for row in values["rows"]:
            row["hits"] = {"x" * (10 << 20): "01" * 500, "y": "1"}
        path.write_text(json.dumps(values), encoding="utf-8")


def _put_sparse(folder: Path) -> None:
    os.truncate(folder / _REPORT, 3 << 30)


def _put_link(target: str, folder: Path) -> None:
    (folder / _REPORT).unlink()
    (folder / _REPORT).symlink_to(target)
