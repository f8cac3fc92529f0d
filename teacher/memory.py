"""What a training needs of memory, estimated before it starts, without the weights being there."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from teacher.model import Teacher

_GIB = 1 << 30
_FLOAT = 4  # bytes; weights, gradients and optimiser states are float32, also under autocast


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: parameters and buffers.
        gradients: of the parameters that learn.
        optimiser: its states.
        average: the moving average, if there is one.
        activations: kept between the forward and the backward pass, of one batch.
    """

    weights: int
    gradients: int
    optimiser: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimiser + self.average + self.activations

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name) / _GIB:.2f}" for name in self.__dataclass_fields__]
        return f"{self.total / _GIB:.2f} GiB ({', '.join(parts)})"


def estimate(
    teacher: Teacher, head: nn.Module, batch: int, size: int, optimizer: str, average: bool, half: bool, share: int = 1
) -> Memory:
    """Estimate a training's memory; the frozen part of the network keeps no activations.

    Args:
        teacher: on any device, ``meta`` included; ``requires_grad`` says what learns.
        head: of the classes.
        batch: images on one device.
        size: side of an image, pixels.
        optimizer: ``adamw`` (two states) or ``sgd`` (momentum).
        average: whether there is a moving average.
        half: whether autocast computes in 16 bits.
        share: processes that the weights are spread over (FSDP).
    """
    parameters = [*teacher.parameters(), *head.parameters()]
    tensors = [*parameters, *teacher.buffers(), *head.buffers()]
    learning = _FLOAT * sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in tensors)
    classes = sum(p.shape[0] for p in head.parameters())
    # The head keeps its cosines, its softmax, and its directions as scaled to length 1.
    directions = _FLOAT * sum(p.numel() for p in head.parameters())
    activations = batch * activation_bytes(teacher, size, half) + 2 * _FLOAT * batch * classes + directions
    states = learning * (2 if optimizer == "adamw" else 1)
    mean = weights if average else 0
    return Memory(weights // share, learning // share, states // share, mean // share, activations)


def activation_bytes(teacher: Teacher, size: int, half: bool) -> int:
    """Bytes that autograd keeps for one image, counted in a forward pass of tensors without memory.

    Under gradient checkpointing these are the inputs of the blocks, what lies outside of them, and all of the
    largest block while it is at work.

    Args:
        teacher: its ``requires_grad`` decides what is kept; not changed.
        size: side of the image, pixels.
        half: under a GPU's autocast a ViT block keeps 36 instead of 64 bytes per value of its width, for its norms
            and the residual stream stay float32; other towers are taken to do alike. A CPU's keeps less.
    """
    shadow = copy.deepcopy(teacher).to("meta").train()
    blocks = _take_checkpointing_off(shadow)
    # The difference of two batches leaves out the weights.
    larger, smaller = (_kept(shadow, blocks, batch, size) for batch in (4, 2))
    (whole, _), *each = [((a - c) // 2, (b - d) // 2) for (a, b), (c, d) in zip(larger, smaller, strict=True)]
    learning = [(inside, taken) for inside, taken in each if inside]
    if learning:
        whole += max(inside for inside, _ in learning) - sum(inside for inside, _ in learning)
    return (whole * 36 // 64 if half else whole) + sum(taken for _, taken in learning)


def _kept(shadow: Teacher, blocks: list[nn.Module], batch: int, size: int) -> list[tuple[int, int]]:
    """Bytes that autograd keeps and bytes that come in: of the whole teacher, then of each block."""
    kept: dict[int, torch.UntypedStorage] = {}
    found = dict.fromkeys(blocks, (0, 0))

    def count() -> int:
        return sum(storage.nbytes() for storage in kept.values())

    def enter(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found[block] = (count(), arguments[0].nbytes)

    def leave(block: nn.Module, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        found[block] = (count() - found[block][0], arguments[0].nbytes)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that its address is not given to another
        return tensor

    # Fake CPU tensors choose the operators of real ones (meta tensors would materialise every attention matrix).
    with FakeTensorMode():
        state = {
            name: torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)
            for name, value in (*shadow.named_parameters(), *shadow.named_buffers())
        }
        images = torch.empty(batch, 3, size, size)
        hooks = [block.register_forward_pre_hook(enter) for block in blocks]
        hooks += [block.register_forward_hook(leave) for block in blocks]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            torch.func.functional_call(shadow, state, (images,))
        for hook in hooks:
            hook.remove()
    return [(count(), images.nbytes), *found.values()]


def advice(memory: Memory, available: int, batch: int, checkpointing: bool, half: bool, processes: int) -> list[str]:
    """What to change, in the order to try it, where a training does not fit; empty where it does.

    Args:
        memory: of one device.
        available: bytes of it.
        batch: images on it.
        checkpointing: whether gradient checkpointing is on.
        half: whether autocast computes in 16 bits.
        processes: that share the work.
    """
    if memory.total <= available:
        return []
    lines = [f"needs {memory.total / _GIB:.1f} GiB, there are {available / _GIB:.1f}:"]
    if not half:
        lines.append("--run.precision bf16-mixed nearly halves the activations")
    if not checkpointing:
        lines.append("--tower.gradient-checkpointing keeps a block's input only, for a third more computation")
    fixed = memory.total - memory.activations
    if fixed < available:
        fits = max(1, int(batch * (available - fixed) / max(1, memory.activations)))
        lines.append(f"--loader.batch-size {fits} with --run.accumulate {-(-batch // fits)} keeps the step's batch")
    elif processes == 1:
        lines.append(f"weights and states alone are {fixed / _GIB:.1f} GiB: train the head or the last blocks only, or")
    lines.append("torchrun with --run.strategy fsdp spreads weights and states over the processes")
    return lines


def available_memory() -> int:
    """Bytes of the GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _take_checkpointing_off(teacher: Teacher) -> list[nn.Module]:
    """The blocks that are checkpointed, with checkpointing switched off so that all they keep can be counted."""
    visual: Any = teacher.visual
    if not any(getattr(module, "grad_checkpointing", False) for module in visual.modules()):
        return []
    visual.set_grad_checkpointing(False)
    if hasattr(visual, "transformer"):
        return list(visual.transformer.resblocks)
    trunk = visual.trunk
    if hasattr(trunk, "blocks"):
        return list(trunk.blocks)
    names = [name for name in ("stages", "layers") if hasattr(trunk, name)]
    stages = getattr(trunk, names[0]) if names else [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
    return [block for stage in stages for block in getattr(stage, "blocks", stage)]
