"""Estimate of a training's memory before it starts, from a network without weights."""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from teacher.model import Teacher

_GIB = 1 << 30
_FLOAT_BYTES = 4  # weights, gradients and optimiser states are float32, also under autocast


@dataclass(frozen=True)
class Memory:
    """Memory of a training on one device, in bytes; ``average`` is the moving average of the weights."""

    weights: int
    gradients: int
    optimiser: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimiser + self.average + self.activations

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name) / _GIB:.2f}" for name in self.__dataclass_fields__]
        return f"{self.total / _GIB:.2f} GiB ({', '.join(parts)})"


def estimate(
    teacher: Teacher,
    head: nn.Module,
    batch: int,
    size: int,
    optimizer: str,
    has_ema: bool,
    is_half: bool,
    shards: int,
    pair_bytes: int = 0,
) -> Memory:
    """Estimate the memory of a training; frozen parts of the network keep no activations.

    The teacher may be on the ``meta`` device. ``batch`` is per device, ``size`` in pixels. ``is_half`` means 16-bit
    autocast. Over ``shards`` processes the weights are sharded (FSDP). ``pair_bytes`` are those of a pair loss.
    """
    parameters = [*teacher.parameters(), *head.parameters()]
    tensors = [*parameters, *teacher.buffers(), *head.buffers()]
    trainable = _FLOAT_BYTES * sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in tensors)
    # The head keeps its cosines, its softmax and its normalised directions, which have the embedding's dimension.
    values = sum(p.numel() for p in head.parameters())
    activations = batch * activation_bytes(teacher, size, is_half) + pair_bytes
    activations += _FLOAT_BYTES * (2 * batch * (values // teacher.embedding_dim) + values)
    states = trainable * (2 if optimizer == "adamw" else 1)
    average = weights if has_ema else 0
    return Memory(weights // shards, trainable // shards, states // shards, average // shards, activations)


def activation_bytes(teacher: Teacher, size: int, is_half: bool) -> int:
    """Return the bytes that autograd keeps per image, counted in a forward pass of tensors without memory.

    With gradient checkpointing these are the inputs of the blocks, the activations outside the blocks and the
    activations of the largest block, which exist while it is recomputed. If autocast computes in 16 bits (``is_half``),
    a ViT block on a GPU keeps 36 instead of 64 bytes per value of its width, because norms and residual stream stay
    float32. Other towers are assumed to behave alike; a CPU keeps less.
    """
    shadow = copy.deepcopy(teacher).to("meta").train()
    blocks = _disable_checkpointing(shadow)
    # The difference of two batch sizes excludes the weights.
    larger, smaller = (_count_saved_bytes(shadow, blocks, batch_size, size) for batch_size in (4, 2))
    (total, _), *per_block = [((a - c) // 2, (b - d) // 2) for (a, b), (c, d) in zip(larger, smaller, strict=True)]
    trainable = [(inside, inputs) for inside, inputs in per_block if inside]
    if trainable:
        total += max(inside for inside, _ in trainable) - sum(inside for inside, _ in trainable)
    return (total * 36 // 64 if is_half else total) + sum(inputs for _, inputs in trainable)


def _count_saved_bytes(shadow: Teacher, blocks: list[nn.Module], batch_size: int, size: int) -> list[tuple[int, int]]:
    """Return the bytes that autograd saves and the bytes of the inputs: of the teacher, then of each block."""
    saved: dict[int, torch.UntypedStorage] = {}
    per_block = dict.fromkeys(blocks, (0, 0))

    def count() -> int:
        return sum(storage.nbytes() for storage in saved.values())

    def enter(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        per_block[block] = (count(), arguments[0].nbytes)

    def leave(block: nn.Module, arguments: tuple[Tensor, ...], _: Tensor) -> None:
        per_block[block] = (count() - per_block[block][0], arguments[0].nbytes)

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # keeps the storage alive, so that its address is not reused
        return tensor

    # Fake CPU tensors select the same operators as real ones; meta tensors would materialise attention matrices.
    with FakeTensorMode():
        values = (*shadow.named_parameters(), *shadow.named_buffers())
        state = {n: torch.empty(v.shape, dtype=v.dtype, requires_grad=v.requires_grad) for n, v in values}
        images = torch.empty(batch_size, 3, size, size)
        hooks = [block.register_forward_pre_hook(enter) for block in blocks]
        hooks += [block.register_forward_hook(leave) for block in blocks]
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            torch.func.functional_call(shadow, state, (images,))
        for hook in hooks:
            hook.remove()
    return [(count(), images.nbytes), *per_block.values()]


def suggest_changes(
    memory: Memory, available: int, batch_size: int, has_checkpointing: bool, is_half: bool, processes: int
) -> list[str]:
    """Return changes that make a training fit into ``available`` bytes, in the order to try them; empty if it fits."""
    if memory.total <= available:
        return []
    lines = [f"memory: {memory.total / _GIB:.1f} GiB needed, {available / _GIB:.1f} GiB available. Try in this order:"]
    if not is_half:
        lines.append("--run.precision bf16-mixed: nearly halves the activations")
    if not has_checkpointing:
        lines.append("--tower.gradient-checkpointing: keeps only the input of a block, for a third more computation")
    fixed = memory.total - memory.activations
    if fixed < available:
        fits = max(1, int(batch_size * (available - fixed) / max(1, memory.activations)))
        accumulate = -(-batch_size // fits)
        lines.append(f"--loader.batch-size {fits} --run.accumulate {accumulate}: keeps the images per step")
    elif processes == 1:
        lines.append(f"train: head or last, in stages: weights and optimiser states need {fixed / _GIB:.1f} GiB")
    lines.append("torchrun with --run.strategy fsdp: shards weights and optimiser states over the processes")
    return lines


def available_memory() -> int:
    """Return the memory of the GPU in bytes, or that of the machine without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _disable_checkpointing(teacher: Teacher) -> list[nn.Module]:
    """Switch checkpointing off, so that all activations are counted, and return the blocks that had it."""
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
    layers = [f"layer{number}" for number in range(1, 5)]
    stages = getattr(trunk, names[0]) if names else [getattr(trunk, name) for name in layers if hasattr(trunk, name)]
    return [block for stage in stages for block in getattr(stage, "blocks", stage)]
