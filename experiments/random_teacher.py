"""Untrained teacher, for measurements and tests that do not depend on its weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from teacher.config import TowerConfig
from teacher.model import build_teacher, read_tower
from vpr.artifacts.card import Embedding
from vpr.artifacts.writer import write_artifact
from vpr.data.seen import record_seen


def write_random_teacher(path: Path, config: TowerConfig) -> Path:
    """Write a teacher artifact with random weights of a fixed seed, and random statistics of its BatchNorms."""
    torch.manual_seed(0)
    tower = read_tower(config.name)
    model, preprocess = build_teacher(config, tower, load_pretrained=False)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    with write_artifact(path, "teacher", {"network": asdict(config), "tower_config": tower}) as draft:
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, draft.path / "model.safetensors")
        record_seen(draft.path, [])
        draft.preprocess = preprocess
        draft.embedding = Embedding(dim=model.embedding_dim, normalised=True, dtype="float32")
    return path
