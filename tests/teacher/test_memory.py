from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teacher.config import HeadConfig, TowerConfig
from teacher.head import MarginHead
from teacher.layers import freeze_except
from teacher.memory import Memory, activation_bytes, estimate, suggest_changes
from teacher.model import Teacher, build_teacher, read_tower
from tests.teacher.saved_tensors import saved_storages


def make_teacher(name: str, device: str = "cpu", **changes: object) -> Teacher:
    return build_teacher(TowerConfig(name, "", **changes), read_tower(name), False, device)[0]  # type: ignore[arg-type]


def saved_bytes(teacher: Teacher, batch_size: int, is_half: bool) -> int:
    """Return the bytes that autograd saves in a real forward pass on the CPU."""
    with saved_storages() as storages, torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        teacher.train()(torch.randn(batch_size, 3, 64, 64))
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", ["sample-vit", "sample"])
def test_activations_equal_those_of_a_real_batch(name: str) -> None:
    teacher = make_teacher(name, image_size=64)
    difference = saved_bytes(teacher, 24, False) - saved_bytes(teacher, 8, False)
    assert 16 * activation_bytes(teacher, 64, is_half=False) == pytest.approx(difference, rel=0.02)


def test_16_bit_estimate_is_within_bounds() -> None:
    teacher = make_teacher("sample-vit")
    lower = saved_bytes(teacher, 24, True) - saved_bytes(teacher, 8, True)  # a CPU saves less than a GPU
    upper = saved_bytes(teacher, 24, False) - saved_bytes(teacher, 8, False)
    assert 0.9 * lower < 16 * activation_bytes(teacher, 64, is_half=True) < upper


class LiveBytes(TorchDispatchMode):
    """Track the peak memory of tensors created by operators."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.live -= size


def peak_bytes(teacher: Teacher, batch_size: int) -> int:
    """Return the peak memory of a real forward and backward pass on the CPU."""
    teacher.zero_grad(set_to_none=True)
    images = torch.randn(batch_size, 3, 64, 64)
    with LiveBytes() as live_bytes:
        teacher(images).sum().backward()
    return live_bytes.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "part", "blocks"), [("sample-vit", "all", 0), ("sample-vit", "last", 2), ("sample", "all", 0)]
)
def test_activations_equal_the_peak_of_a_real_step(name: str, part: Any, blocks: int, checkpointing: bool) -> None:
    teacher = make_teacher(name, image_size=64, gradient_checkpointing=checkpointing).train()
    freeze_except(teacher, part, blocks)
    peak_bytes(teacher, 2)
    difference = peak_bytes(teacher, 24) - peak_bytes(teacher, 8)
    assert 16 * activation_bytes(teacher, 64, is_half=False) == pytest.approx(difference, rel=0.15)


def test_checkpointing_keeps_block_inputs_and_one_block() -> None:
    """Each further trained block adds only its input."""
    counts = {}
    for blocks in (1, 2, 4):
        teacher = make_teacher("sample-vit", gradient_checkpointing=True)
        freeze_except(teacher, "last", blocks)
        counts[blocks] = activation_bytes(teacher, 64, is_half=False)
    input_bytes = 65 * 128 * 4  # tokens, width, bytes
    assert counts[2] - counts[1] == pytest.approx(input_bytes, rel=0.01)
    assert counts[4] - counts[1] == pytest.approx(3 * input_bytes, rel=0.01)


@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "swin_base_patch4_window7_224", "MobileCLIP2-S0", "ViTamin-S", "EVA02-B-16", "coca_ViT-B-32"],
)
def test_checkpointing_lowers_memory_in_every_family(name: str) -> None:
    plain, checkpointed = (make_teacher(name, "meta", gradient_checkpointing=value) for value in (False, True))
    size = read_tower(name)["vision_cfg"].get("image_size", 224)
    assert 0 < activation_bytes(checkpointed, size, False) < 0.7 * activation_bytes(plain, size, False)


def test_frozen_tower_keeps_no_activations() -> None:
    teacher = make_teacher("sample-vit", gradient_checkpointing=True)
    freeze_except(teacher, "head")
    assert activation_bytes(teacher, 64, is_half=False) < 20_000


def test_optimiser_states_equal_real_ones() -> None:
    teacher = make_teacher("sample-vit")
    head = MarginHead(128, torch.arange(1, 11), HeadConfig())
    parameters = [*teacher.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    memory = estimate(teacher, head, 2, 64, "adamw", has_ema=False, is_half=False, shards=1)
    assert memory.optimiser == expected
    assert memory.gradients == sum(p.nbytes for p in parameters)
    assert estimate(teacher, head, 2, 64, "sgd", has_ema=False, is_half=False, shards=1).optimiser == expected / 2
    sharded = estimate(teacher, head, 2, 64, "adamw", has_ema=True, is_half=False, shards=4)
    assert sharded.optimiser == expected // 4
    assert sharded.activations == memory.activations


def test_vit_h_14_is_estimated_without_weights() -> None:
    teacher = make_teacher("ViT-H-14", "meta")
    head = MarginHead(1024, torch.ones(10_300, dtype=torch.int64), HeadConfig()).to("meta")
    memory = estimate(teacher, head, 32, 224, "adamw", has_ema=False, is_half=True, shards=1)
    assert memory.weights == pytest.approx((632.08e6 + 10_300 * 1024) * 4, rel=1e-3)
    assert memory.optimiser == pytest.approx(2 * (632.08e6 + 10_300 * 1024) * 4, rel=1e-3)
    assert memory.total == memory.weights + memory.gradients + memory.optimiser + memory.activations


def test_changes_are_suggested_if_memory_is_too_small() -> None:
    memory = Memory(weights=2 << 30, gradients=2 << 30, optimiser=4 << 30, average=0, activations=16 << 30)
    assert suggest_changes(memory, 30 << 30, 64, False, True, 1) == []
    lines = suggest_changes(memory, 16 << 30, 64, has_checkpointing=False, is_half=False, processes=1)
    assert "24.0 GiB needed, 16.0 GiB available" in lines[0]
    assert any("bf16" in line for line in lines)
    assert any("--tower.gradient-checkpointing" in line for line in lines)
    assert any("--loader.batch-size 32 --run.accumulate 2" in line for line in lines)
    lines = suggest_changes(memory, 6 << 30, 64, has_checkpointing=True, is_half=True, processes=1)
    assert any("weights and optimiser states need 8.0 GiB" in line for line in lines)
    assert "fsdp" in lines[-1]
