from __future__ import annotations

from pathlib import Path

import pytest

from experiments.demo.interrupted import interrupt
from vpr.artifacts.run_folder import run_folder
from vpr.data.catalog import Catalog


def test_a_killed_training_resumes_to_the_unbroken_result(catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    stages = ("{train: head, epochs: 1}", "{train: all, epochs: 5, lr_head: 1.0e-3, lr_tower: 1.0e-3}")
    arguments = ["--catalog", str(catalog.artifact.path), "--stages", *stages, "--run.precision", "32-true"]
    arguments += ["--tower.name", "sample", "--tower.pretrained", "", "--tower.image-size", "32"]
    arguments += ["--loader.batch-size", "16"]
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
