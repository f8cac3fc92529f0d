from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.interrupted import interrupt
from vpr.ingest import CatalogConfig, build_catalog
from vpr.unfinished import run_folder


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory, texture_folder: Path) -> Path:
    output = tmp_path_factory.mktemp("catalog") / "catalog"
    return build_catalog(
        CatalogConfig(reader="folder", root=str(texture_folder), output=str(output), validation=0.25, test=0.25, seed=1)
    )


def test_a_killed_training_resumes_to_the_unbroken_result(textures: Path, tmp_path: Path) -> None:
    stages = '[{"train": "head", "epochs": 1}, {"train": "all", "epochs": 5, "lr_head": 1e-3, "lr_tower": 1e-3}]'
    arguments = ["--catalog", str(textures), "--tower.name", "sample", "--tower.pretrained", "", "--stages", stages]
    arguments += ["--tower.image_size", "32", "--loader.batch_size", "16", "--run.precision", "32-true"]
    both = interrupt("teacher train", arguments, tmp_path, epochs=6)
    assert 3 <= both.epochs_before_kill < 6
    unbroken, resumed = both.unbroken.card, both.resumed.card
    assert resumed.metrics["steps"] == unbroken.metrics["steps"]
    assert resumed.metrics["best_epoch"] == unbroken.metrics["best_epoch"]
    assert resumed.metrics["val_recall_at_1"] == pytest.approx(unbroken.metrics["val_recall_at_1"], abs=0.02)
    assert resumed.files["model.safetensors"] == unbroken.files["model.safetensors"]  # bit-equal


def test_another_configuration_never_resumes_from_this_run_s_checkpoint(tmp_path: Path) -> None:
    first = run_folder(str(tmp_path / "teacher"), {"seed": 0}, [])
    assert first == run_folder(str(tmp_path / "teacher"), {"seed": 0}, [])
    assert first != run_folder(str(tmp_path / "teacher"), {"seed": 1}, [])
