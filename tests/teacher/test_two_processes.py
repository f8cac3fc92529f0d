from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.teacher.two_processes import train_spread
from vpr.data.catalog import Catalog


@pytest.mark.slow
def test_two_processes_train_like_one(catalog: Catalog, tmp_path: Path) -> None:
    """Compare two stages of ``vpr teacher train`` under torchrun (FSDP and DDP) with one process."""
    assert catalog.artifact is not None
    arguments = ["--catalog", str(catalog.artifact.path), "--tower.name", "sample-vit", "--tower.pretrained", ""]
    arguments += ["--run.precision", "32-true", "--run.ema", "0.9", "--stages"]
    arguments += ["{train: all, epochs: 6, lr_tower: 1.0e-3}", "{train: last, last_blocks: 2, epochs: 1}"]
    single = train_spread(arguments, tmp_path / "one", 1, 16)
    assert len(single.losses) >= 2
    for strategy in ("ddp", "fsdp"):
        distributed = train_spread(arguments, tmp_path / strategy, 2, 16, strategy)  # type: ignore[arg-type]
        assert distributed.losses == pytest.approx(single.losses, abs=1e-4)
        assert distributed.artifact.card.metrics["steps"] == single.artifact.card.metrics["steps"]
        weights = [load_file(run.artifact.file("model.safetensors")) for run in (single, distributed)]
        torch.testing.assert_close(weights[0], weights[1], atol=2e-3, rtol=0)


@pytest.mark.slow
def test_pair_losses_and_memory_in_two_processes_equal_one(catalog: Catalog, tmp_path: Path) -> None:
    """Compare 52 steps of all kinds of losses under torchrun (DDP) with one process."""
    assert catalog.artifact is not None
    arguments = ["--catalog", str(catalog.artifact.path), "--tower.name", "sample-vit", "--tower.pretrained", ""]
    arguments += ["--tower.image-size", "32", "--run.precision", "32-true", "--run.validate-every", "13"]
    arguments += ["--head.scale", "16", "--proxy.loss", "proxy-anchor", "--loader.images-per-product", "2"]
    arguments += ["--pair.loss", "contrastive", "--no-pair.miner", "--pair.memory", "48"]
    arguments += ["--mining.every", "4", "--mining.products", "1"]
    arguments += ["--stages", json.dumps({"train": "all", "epochs": 13, "lr_tower": 1e-4})]
    single = train_spread(arguments, tmp_path / "one", 1, 16)
    assert single.artifact.card.metrics["steps"] == 52
    both = train_spread(arguments, tmp_path / "two", 2, 16, "ddp")
    assert both.losses == pytest.approx(single.losses, abs=1e-4)
    assert max(both.losses) >= 49
    weights = [load_file(run.artifact.file("model.safetensors")) for run in (single, both)]
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=0)
