"""Hostile recipes, tower configurations, and names of products and models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.reliability.fuzz.mutated_files import json_bytes
from tests.reliability.hostile.inputs import Data, Hostile, write

_NAMES = (
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</td></table><h1>x", "'\"><svg onload=alert(1)>"),
    *("{{ 7*7 }}", "{% include '/etc/passwd' %}", "&lt;b&gt;", "javascript:alert(1)", "<!--", "]]>", "</script><b>"),
    *("![x](http://example.com/x.png)", "[x](javascript:alert(1))", "| a | b |", "`x`", "$\\input{/etc/passwd}$"),
    *("\u202egnp.exe", "x" * 20_000, "a\u0000b", "\x1b[2J\x1b]0;x\x07", "=HYPERLINK(1)", "<style>*{display:none}"),
)
_RECIPE = "reader: folder\nroot: shop\n"
_TAGS = (
    *("!!python/object/apply:os.system [touch escaped]", "!!python/name:os.system", "!!python/module:os", "!custom x"),
    *("!!python/object/new:subprocess.Popen [touch escaped]", "!!set {a, b}", "!!binary aGVsbG8=", "!!omap [a: 1]"),
)


def recipes() -> Iterator[Hostile]:
    """Yield YAML that expands without end, runs code, or is no recipe."""
    texts = {**_recipe_texts(), **{f"the tag {tag.split()[0]}": f"{_RECIPE}seed: {tag}\n" for tag in _TAGS}}
    for name, text in texts.items():
        yield Hostile("recipe", name, "rejected", ("recipe",), partial(write, "in/recipe.yaml", text))


def names() -> Iterator[Hostile]:
    """Yield names of products and models with markup for the page that shows them."""
    for name in _NAMES:
        routes = ("report page", "search page results")
        yield Hostile("name", ascii(name[:40]), "accepted", routes, partial(write, "in/name.txt", name))


def towers() -> Iterator[Hostile]:
    """Yield configuration files of a teacher's tower."""
    vision: dict[str, Any] = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    for key in vision:
        for value in (0, -1, 10**7, 10**30, 0.5, "x", None):
            tower = {"embed_dim": 16, "vision_cfg": {**vision, key: value}}
            if key == "layers" and value == 0:
                continue  # a tower without blocks is valid
            put = partial(write, "in/tower.json", json_bytes(tower))
            yield Hostile("tower", f"{key} {value}", "rejected", ("teacher train",), put)
    files = {"100,000 brackets": b"[" * 100_000, "a list": b"[1]", "an empty file": b"", "not UTF-8": b'{"a": "\xff"}'}
    files["a number of 5000 digits"] = b'{"embed_dim": ' + b"9" * 5000 + b', "vision_cfg": {}}'
    yield Hostile(
        *("tower", "200 MB of blanks", "rejected", ("teacher train",)),
        partial(write, "in/tower.json", lambda: b" " * (200 << 20)),
    )
    for name, data in files.items():
        yield Hostile("tower", name, "rejected", ("teacher train",), partial(write, "in/tower.json", data))


def _recipe_texts() -> dict[str, Data]:
    nine = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    nine += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    return {
        "a billion aliases of a list": _RECIPE + nine,
        "aliases in a value": _RECIPE + "seed: [&a [x, x], *a, *a]\n",
        "a recursive list": _RECIPE + "seed: &a [*a]\n",
        "merged keys": _RECIPE + "x: &a {k: 1}\ny: {<<: [*a, *a, *a]}\n",
        "100,000 brackets": _RECIPE + "seed: " + "[" * 100_000,
        "900 brackets": _RECIPE + "seed: " + "[" * 900 + "]" * 900,
        "5000 braces": _RECIPE + "seed: " + "{a: " * 5000 + "}" * 5000,
        "a number to the base of 60": _RECIPE + "seed: 1" + ":1" * 500_000,
        "a shorter number to the base of 60": _RECIPE + "seed: 1" + ":1" * 30_000,
        "a million hexadecimal digits": _RECIPE + "seed: 0x" + "f" * 1_000_000,
        "50,000 hexadecimal digits": _RECIPE + "seed: 0x" + "f" * 50_000,
        "a million values": _RECIPE + "seed: [" + "1," * 1_000_000 + "]",
        "text instead of a mapping": "x" * 60_000,
        "not UTF-8": b"reader: \xff\xfe\n",
        "a zero byte": b"reader: \0\n",
        "two documents": "---\na: 1\n---\nb: 2\n",
        "a list instead of a mapping": "[1, 2]",
        "a key that is a list": _RECIPE + "? [1, 2]\n: b\n",
        "a key that is a number": _RECIPE + "1: b\n",
        "a recipe that includes itself": "config: recipe.yaml\n" + _RECIPE,
        "a class to import": _RECIPE + "class_path: os.system\ninit_args: {command: touch escaped}\n",
        "an infinite share": _RECIPE + "validation: .inf\n",
        "a share that is not a number": _RECIPE + "validation: .nan\n",
    }
