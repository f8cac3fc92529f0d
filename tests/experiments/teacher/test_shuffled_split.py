from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.teacher.ablation import build_grocery
from experiments.teacher.shuffled_split import build_shuffled_catalog
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import load_catalog

EXPECTED = {
    "test": ["p03", "p06", "p08", "p13", "p14", "p21", "p27", "p29", "p32", "p37"],
    "validation": ["p01", "p04", "p11", "p23", "p33", "p38"],
}


def test_division_is_the_one_of_the_first_versions(tmp_path: Path) -> None:
    """The expected products are those of a catalogue that `vpr catalog` wrote when it shuffled."""
    for number in range(40):
        folder = tmp_path / "shop" / f"p{number:02}"
        folder.mkdir(parents=True)
        for view in range(4 if number % 5 else 1):
            Image.fromarray(np.full((4, 4, 3), 4 * number + view, dtype=np.uint8)).save(folder / f"{view}.png")
    output = build_shuffled_catalog("folder", str(tmp_path / "shop"), str(tmp_path / "c"), 0.15, 0.25)
    catalog = load_catalog(output)
    assert sorted(set(catalog.select(split="test").products)) == EXPECTED["test"]
    assert sorted(set(catalog.select(split="validation").products)) == EXPECTED["validation"]
    test = catalog.select(split="test")
    assert [(Path(row["image"]).stem, row["role"]) for row in test.table.to_pylist()[:4]] == [
        ("0", "gallery"),
        ("1", "gallery"),
        ("2", "query"),
        ("3", "query"),
    ]
    first = load_artifact(output).sha256
    assert (
        load_artifact(build_shuffled_catalog("folder", str(tmp_path / "shop"), str(output), 0.15, 0.25)).sha256 == first
    )


@pytest.mark.data
def test_photographs_keep_their_catalogue(data_folder: Path, tmp_path: Path) -> None:
    built = load_artifact(build_grocery(data_folder, tmp_path))
    table = "e9a7f4dec137aef3d49e3a19b8e84d5968be57a167bd2ddd1a26142c1a86ff8c"
    assert built.card.files["catalog.parquet"].sha256 == table
    assert built.card.catalog["sha256"] == "55f3168744d71daa5941b153e1dee05c317d5690e898ae246bf4f2840a7616dd"
