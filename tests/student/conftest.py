from __future__ import annotations

from pathlib import Path

import pytest

from student.config import DistillConfig, StudentConfig, TargetsConfig
from teacher.config import HeadConfig, StageConfig, TowerConfig, TrainConfig
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.training.config import RunConfig

STUDENT = StudentConfig(
    image_size=32, dim=64, depth=2, heads=2, dim_head=32, mlp_dim=128, embedding_dim=256, stem="conv"
)


@pytest.fixture(scope="session")
def teacher(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from teacher.train import train  # imported late: the tests of GPUs are collected without every package

    assert catalog.artifact is not None
    stages = (StageConfig("all", 8, lr_head=2e-3, lr_tower=2e-3),)
    return train(
        TrainConfig(
            catalog=str(catalog.artifact.path),
            output=str(tmp_path_factory.mktemp("t") / "teacher"),
            tower=TowerConfig("sample", "", 32),
            stages=stages,
            head=HeadConfig(scale=16.0, margin=0.0, margin_end=0.1),
            loader=LoaderConfig(batch_size=16, keep_in_memory=True),
            run=RunConfig(precision="32-true"),
        )
    )


@pytest.fixture(scope="session")
def config(teacher: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    assert catalog.artifact is not None
    return DistillConfig(
        teacher=(str(teacher),),
        catalog=str(catalog.artifact.path),
        output=str(tmp_path_factory.mktemp("s") / "student"),
        model=STUDENT,
        targets=TargetsConfig(views=3, bank=32, shard=40),
        epochs=12,
        loader=LoaderConfig(batch_size=16, keep_in_memory=True),
        run=RunConfig(precision="32-true", validate_every=2),
    )


@pytest.fixture(scope="session")
def student(config: DistillConfig) -> Path:
    from student.distill import distill

    return distill(config)
