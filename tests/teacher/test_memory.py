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
from teacher.memory import Memory, activation_bytes, advice, estimate
from teacher.model import Teacher, build_teacher, read_tower
from tests.teacher.kept import kept_storages


def teacher_of(name: str, device: str = "cpu", **changes: object) -> Teacher:
    return build_teacher(TowerConfig(name, "", **changes), read_tower(name), False, device)[0]  # type: ignore[arg-type]


def kept_bytes(teacher: Teacher, batch: int, half: bool) -> int:
    """What autograd really keeps in a forward pass on the CPU."""
    with kept_storages() as kept, torch.autocast("cpu", torch.bfloat16, enabled=half):
        teacher.train()(torch.randn(batch, 3, 64, 64))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["sample-vit", "sample"])
def test_activations_are_what_a_larger_batch_really_keeps_more(name: str) -> None:
    teacher = teacher_of(name, image_size=64)
    more = kept_bytes(teacher, 24, False) - kept_bytes(teacher, 8, False)
    assert 16 * activation_bytes(teacher, 64, half=False) == pytest.approx(more, rel=0.02)


def test_in_16_bits_the_estimate_is_between_what_a_cpu_keeps_and_all() -> None:
    teacher = teacher_of("sample-vit")
    least = kept_bytes(teacher, 24, True) - kept_bytes(teacher, 8, True)
    most = kept_bytes(teacher, 24, False) - kept_bytes(teacher, 8, False)
    assert 0.9 * least < 16 * activation_bytes(teacher, 64, half=True) < most


class LiveBytes(TorchDispatchMode):
    """The most bytes that lived at once in tensors made by operators."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        return out

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def peak_bytes(teacher: Teacher, batch: int) -> int:
    """The peak of a real forward and backward pass on the CPU."""
    teacher.zero_grad(set_to_none=True)
    images = torch.randn(batch, 3, 64, 64)
    with LiveBytes() as counted:
        teacher(images).sum().backward()
    return counted.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "part", "blocks"), [("sample-vit", "all", 0), ("sample-vit", "last", 2), ("sample", "all", 0)]
)
def test_activations_are_the_peak_of_a_real_step(name: str, part: Any, blocks: int, checkpointing: bool) -> None:
    teacher = teacher_of(name, image_size=64, gradient_checkpointing=checkpointing).train()
    freeze_except(teacher, part, blocks)
    peak_bytes(teacher, 2)
    more = peak_bytes(teacher, 24) - peak_bytes(teacher, 8)
    assert 16 * activation_bytes(teacher, 64, half=False) == pytest.approx(more, rel=0.15)


def test_checkpointing_keeps_the_blocks_inputs_and_one_block() -> None:
    """What several trained blocks keep more than one are their inputs alone."""
    counts = {}
    for blocks in (1, 2, 4):
        teacher = teacher_of("sample-vit", gradient_checkpointing=True)
        freeze_except(teacher, "last", blocks)
        counts[blocks] = activation_bytes(teacher, 64, half=False)
    taken = 65 * 128 * 4  # tokens, width, bytes
    assert counts[2] - counts[1] == pytest.approx(taken, rel=0.01)
    assert counts[4] - counts[1] == pytest.approx(3 * taken, rel=0.01)


@pytest.mark.parametrize(
    "name",
    ["convnext_tiny", "swin_base_patch4_window7_224", "MobileCLIP2-S0", "ViTamin-S", "EVA02-B-16", "coca_ViT-B-32"],
)
def test_checkpointing_saves_in_every_family(name: str) -> None:
    plain, checkpointed = (teacher_of(name, "meta", gradient_checkpointing=value) for value in (False, True))
    size = read_tower(name)["vision_cfg"].get("image_size", 224)
    assert 0 < activation_bytes(checkpointed, size, False) < 0.7 * activation_bytes(plain, size, False)


def test_a_frozen_tower_keeps_nothing() -> None:
    teacher = teacher_of("sample-vit", gradient_checkpointing=True)
    freeze_except(teacher, "head")
    assert activation_bytes(teacher, 64, half=False) < 20_000


def test_states_are_those_of_the_real_optimiser() -> None:
    teacher = teacher_of("sample-vit")
    head = MarginHead(128, torch.arange(1, 11), HeadConfig())
    parameters = [*teacher.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    real = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    memory = estimate(teacher, head, 2, 64, "adamw", average=False, half=False)
    assert memory.optimiser == real
    assert memory.gradients == sum(p.nbytes for p in parameters)
    assert estimate(teacher, head, 2, 64, "sgd", average=False, half=False).optimiser == real / 2
    spread = estimate(teacher, head, 2, 64, "adamw", average=True, half=False, share=4)
    assert spread.optimiser == real // 4
    assert spread.activations == memory.activations


def test_vit_h_14_without_its_weights() -> None:
    teacher = teacher_of("ViT-H-14", "meta")
    head = MarginHead(1024, torch.ones(10_300, dtype=torch.int64), HeadConfig()).to("meta")
    memory = estimate(teacher, head, 32, 224, "adamw", average=False, half=True)
    assert memory.weights == pytest.approx((632.08e6 + 10_300 * 1024) * 4, rel=1e-3)
    assert memory.optimiser == pytest.approx(2 * (632.08e6 + 10_300 * 1024) * 4, rel=1e-3)
    assert memory.total == memory.weights + memory.gradients + memory.optimiser + memory.activations


def test_advice_comes_only_where_it_does_not_fit() -> None:
    memory = Memory(weights=2 << 30, gradients=2 << 30, optimiser=4 << 30, average=0, activations=16 << 30)
    assert advice(memory, 30 << 30, 64, False, True, 1) == []
    lines = advice(memory, 16 << 30, 64, checkpointing=False, half=False, processes=1)
    assert lines[0] == "needs 24.0 GiB, there are 16.0:"
    assert any("bf16" in line for line in lines)
    assert any("gradient_checkpointing" in line for line in lines)
    assert any("batch_size 32 with --run.accumulate 2" in line for line in lines)
    small = advice(memory, 6 << 30, 64, checkpointing=True, half=True, processes=1)
    assert any("weights and states alone are 8.0 GiB" in line for line in small)
    assert "fsdp" in small[-1]
