"""The diagrams of docs/architecture.md follow the contracts of import-linter."""

from __future__ import annotations

import re
import tomllib

import pytest

from experiments.figures import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def _arrows(number: int) -> list[tuple[str, str]]:
    diagram = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)[number]
    return re.findall(r"^ +(\w+) --> (\w+)$", diagram, re.MULTILINE)


@pytest.mark.parametrize("number", [0, 1], ids=["packages", "vpr"])
def test_diagram_follows_the_import_contract(number: int) -> None:
    layers = [set(layer.split(" : ")) for layer in CONTRACTS[number]["layers"]]
    rank = {package: index for index, layer in enumerate(layers) for package in layer}
    arrows = _arrows(number)
    assert {package for arrow in arrows for package in arrow} == set(rank)
    assert [arrow for arrow in arrows if rank[arrow[0]] >= rank[arrow[1]]] == []


def test_every_named_file_exists() -> None:
    assert [path for path in re.findall(r"`(\w+/[\w/]+\.py)`", PAGE) if not (ROOT / path).is_file()] == []
