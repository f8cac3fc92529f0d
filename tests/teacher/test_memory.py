from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teacher.head import HeadConfig, MarginHead
from teacher.layers import trainable
from teacher.memory import Memory, activation_bytes, advice, estimate
from teacher.model import Teacher, TowerConfig, build_teacher, read_tower


def teacher_of(name: str, device: str = "cpu", **changes: object) -> Teacher:
    return build_teacher(TowerConfig(name, "", **changes), read_tower(name), False, device)[0]  # type: ignore[arg-type]


def kept_bytes(teacher: Teacher, batch: int, half: bool) -> int:
    """What autograd really keeps in a forward pass on the CPU."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        teacher.train()(torch.randn(batch, 3, 64, 64))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["sample-vit", "sample"])
def test_activations_are_what_a_larger_batch_really_keeps_more(name: str, half: bool) -> None:
    teacher = teacher_of(name, image_size=64)
    more = kept_bytes(teacher, 24, half) - kept_bytes(teacher, 8, half)
    assert 16 * activation_bytes(teacher, 64, half) == pytest.approx(more, rel=0.05)


def test_checkpointing_keeps_the_blocks_inputs_and_one_block() -> None:
    teacher = teacher_of("sample-vit", gradient_checkpointing=True)
    inputs = 4 * 65 * 128 * 4  # blocks, tokens, width, bytes
    whole = activation_bytes(teacher_of("sample-vit"), 64, half=False)
    assert activation_bytes(teacher, 64, half=False) == pytest.approx(inputs + whole / 4, rel=0.01)


def test_a_frozen_tower_keeps_nothing() -> None:
    teacher = teacher_of("sample-vit", gradient_checkpointing=True)
    trainable(teacher, "head")
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
