"""Training of students on a pretrained network: its statistics, and losses of relations in another width."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from student.config import DistillConfig, LossConfig, StudentConfig, TargetsConfig
from student.distill import distill
from student.model import load_student
from tests.student.test_network_stem import randomise_statistics
from tests.student.test_start import write_teacher
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.training.config import RunConfig

RELATIONS = LossConfig(cosine=0, similarity_kl=0, contrastive=0, affinity=1)


@pytest.fixture
def config(catalog: Catalog, tmp_path: Path) -> DistillConfig:
    """Return the distillation of a teacher of 16 dimensions into a student of 8, which starts from a network."""
    torch.manual_seed(0)
    network = randomise_statistics(timm.create_model("test_resnet", num_classes=0))
    save_file(network.state_dict(), tmp_path / "start.safetensors")
    write_teacher(tmp_path / "teacher", embedding_dim=16)
    assert catalog.artifact is not None
    return DistillConfig(
        (str(tmp_path / "teacher"),),
        str(catalog.artifact.path),
        str(tmp_path / "student"),
        start="timm/test_resnet",
        start_weights=str(tmp_path / "start.safetensors"),
        model=StudentConfig(preset="auto", pool="auto", image_size=64, embedding_dim=8),
        losses=RELATIONS,
        targets=TargetsConfig(views=1, bank=32),
        epochs=1,
        loader=LoaderConfig(batch_size=32, keep_in_memory=True),
        run=RunConfig(precision="32-true"),
    )


@pytest.mark.parametrize("keeps", [True, False])
def test_network_keeps_its_statistics_and_trains_its_weights(
    config: DistillConfig, tmp_path: Path, keeps: bool
) -> None:
    path = distill(replace(config, freeze_statistics=keeps))
    assert path is not None
    start = load_file(tmp_path / "start.safetensors")
    prefix = "vit.to_patch_embedding.network."
    trained = {k.removeprefix(prefix): v for k, v in load_student(path)[0].state_dict().items() if k.startswith(prefix)}
    statistics = [name for name in trained if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) > 10
    assert all(torch.equal(trained[name], start[name]) for name in statistics) == keeps
    changed = [
        name for name, value in trained.items() if name.endswith("weight") and not torch.equal(value, start[name])
    ]
    assert changed
    assert load_artifact(path).card.config["freeze_statistics"] is keeps


@pytest.mark.parametrize("fit", ["features", "teacher"])
def test_relations_need_no_common_width(config: DistillConfig, fit: Any) -> None:
    path = distill(replace(config, fit_head=fit))
    assert path is not None
    artifact = load_artifact(path)
    assert artifact.card.embedding is not None
    assert artifact.card.embedding.dim == 8
    assert not (artifact.path / "projection.safetensors").exists()


def test_other_losses_need_a_common_width(config: DistillConfig) -> None:
    for losses in (LossConfig(), replace(RELATIONS, cosine=0.1)):
        with pytest.raises(UserError, match=r"model\.embedding_dim: 8 differs from the teacher's 16"):
            distill(replace(config, losses=losses))
