from __future__ import annotations

from typing import Any

import pytest

from vpr.artifacts.card import Parent
from vpr.artifacts.identity import identity


def _parents(*roles: str) -> list[Parent]:
    return [Parent(role=role, name="name", sha256="0") for role in roles]


@pytest.mark.parametrize(
    ("first", "second", "roles"),
    [
        ({"catalog": "/a/catalog", "seed": 1}, {"catalog": "b", "seed": 1}, ["catalog"]),
        ({"models": ["/a/x", "/a/y"]}, {"models": ["x", "y"]}, ["teacher", "teacher"]),
        ({"tower": {"pretrained": "/a/t"}}, {"tower": {"pretrained": "t"}}, ["start"]),
        (
            {"network": {"pretrained": "/a/w.safetensors"}, "pretrained_sha256": "1"},
            {"network": {"pretrained": "w.safetensors"}, "pretrained_sha256": "1"},
            [],
        ),
        ({"quantise": {"ranges": "/a/r"}, "cache": "/a/c"}, {"quantise": {"ranges": "r"}, "cache": ""}, ["ranges"]),
        ({"start": "/a/s"}, {"start": "s"}, ["start"]),
        ({"root": "/a", "tables": {"/a/x.csv": "1"}}, {"root": "/b", "tables": {"/b/x.csv": "1"}}, []),
        ({"catalog": "/a", "catalog_sha256": "1"}, {"catalog": "b", "catalog_sha256": "1"}, ["student"]),
        ({"loader": {"batch_size": 8, "workers": 0}}, {"loader": {"batch_size": 8, "workers": "auto"}}, []),
        ({"loader": {"batch_size": 8}}, {"loader": {"batch_size": 8, "cache_gb": 4.0}}, []),
        ({"recipe": "fused", "threads": 0}, {"recipe": "fused", "threads": 8}, []),
    ],
)
def test_place_of_an_identified_input_does_not_matter(
    first: dict[str, Any], second: dict[str, Any], roles: list[str]
) -> None:
    assert identity(first, _parents(*roles)) == identity(second, _parents(*roles))


@pytest.mark.parametrize(
    ("first", "second", "roles"),
    [
        ({"catalog": "a"}, {"catalog": "b"}, ["student"]),  # no parent identifies the catalogue
        ({"catalog": "a"}, {"catalog": ""}, ["catalog"]),
        ({"models": ["a"]}, {"models": ["a", "b"]}, ["teacher"]),
        ({"tower": {"pretrained": "openai"}}, {"tower": {"pretrained": "laion"}}, ["catalog"]),
        ({"start": "timm/a", "start_tower": {}}, {"start": "timm/b", "start_tower": {}}, ["start"]),
        ({"tower": {"name": "timm/a"}, "tower_config": {}}, {"tower": {"name": "timm/b"}, "tower_config": {}}, []),
        ({"tables": {"x": "1"}}, {"tables": {"x": "2"}}, []),
        ({"model": {"dim": 1}}, {"model": {"dim": 2}}, ["model"]),
        ({"loader": {"batch_size": 8, "workers": 0}}, {"loader": {"batch_size": 9, "workers": 0}}, []),
        ({"threads": 1}, {"threads": 2}, []),
        ({"catalog": "a", "catalog_sha256": "1"}, {"catalog": "a", "catalog_sha256": "2"}, ["student"]),
    ],
)
def test_other_values_matter(first: dict[str, Any], second: dict[str, Any], roles: list[str]) -> None:
    assert identity(first, _parents(*roles)) != identity(second, _parents(*roles))
