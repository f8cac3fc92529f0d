from __future__ import annotations

from pathlib import Path

import pytest

from experiments.demo.interrupted import interrupt
from vpr.artifacts.run_folder import run_folder
from vpr.data.catalog import Catalog


@pytest.mark.reliability
def test_killed_training_resumes_bit_equal(catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    stages = ("{train: head, epochs: 1}", "{train: all, epochs: 5, lr_head: 1.0e-3, lr_tower: 1.0e-3}")
    arguments = ["--catalog", str(catalog.artifact.path), "--stages", *stages, "--run.precision", "32-true"]
    arguments += ["--tower.name", "sample", "--tower.pretrained", "", "--tower.image-size", "32"]
    arguments += ["--loader.batch-size", "16"]
    interruption = interrupt("teacher train", arguments, tmp_path, epochs=6)
    assert 3 <= interruption.epochs_before_kill < 6
    expected, resumed = interruption.unbroken.card, interruption.resumed.card
    assert resumed.metrics["steps"] == expected.metrics["steps"]
    assert resumed.metrics["best_epoch"] == expected.metrics["best_epoch"]
    assert resumed.metrics["val_recall_at_1"] == pytest.approx(expected.metrics["val_recall_at_1"], abs=0.02)
    assert resumed.files["model.safetensors"] == expected.files["model.safetensors"]  # bit-equal


def test_another_configuration_does_not_resume(tmp_path: Path) -> None:
    first = run_folder(str(tmp_path / "teacher"), {"seed": 0}, [])
    assert first == run_folder(str(tmp_path / "teacher"), {"seed": 0}, [])
    assert first != run_folder(str(tmp_path / "teacher"), {"seed": 1}, [])
