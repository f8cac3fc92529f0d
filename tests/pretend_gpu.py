"""A pretended GPU on the CPU, which records every time that the host would wait for a real one.

Tensors of the pretended GPU report the device ``meta``, since PyTorch would start CUDA for tensors of CUDA, and hold
their values on the CPU. So code copies to another device and back, and its results stay real.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

GPU = torch.device("meta")
_AUTOCAST = torch.autocast
_ROOT = Path(__file__).parents[1]
# Operators that give the host a value, or a shape that depends on values.
_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::is_nonzero")


class GpuTensor(torch.Tensor):
    """A tensor of the pretended GPU."""

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> GpuTensor:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=GPU,
            requires_grad=requires_grad,
        )

    def __init__(self, values: Tensor, requires_grad: bool = False) -> None:
        self.values_on_cpu = values

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("tensors of the pretended GPU are used outside of its block")


class PretendGpu(TorchDispatchMode):
    """Run the operators of GPU tensors on the CPU; ``waits`` holds a line for each time that the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_gpu = any(isinstance(value, GpuTensor) for value in inputs)
        target = kwargs.get("device")
        to_gpu = on_gpu if target is None else torch.device(target) == GPU
        name = function.name().partition(".")[0]
        if name == "aten::_pin_memory":
            copy = args[0].clone()
            self.pinned.add(copy.untyped_storage().data_ptr())
            self._keep = getattr(self, "_keep", []) + [copy]  # the addresses must not be used again
            return copy
        if name == "aten::_to_copy" and to_gpu != on_gpu:
            is_pinned = inputs[0].untyped_storage().data_ptr() in self.pinned if not on_gpu else False
            if not (to_gpu and is_pinned and kwargs.get("non_blocking")):
                self._record(f"copy {'to' if to_gpu else 'from'} the GPU")
        elif on_gpu and (name in _READS or _has_boolean_index(name, args)):
            self._record(name)
        elif on_gpu and any(value.ndim and not isinstance(value, GpuTensor) for value in inputs):
            self._record(f"{name} copies an argument to the GPU")
        elif on_gpu and name == "aten::copy_" and isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor):
            self._record(name)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        arguments, options = tree_map(_unwrap, (args, kwargs))
        result = function(*arguments, **options)
        by_values = {id(_unwrap(value)): value for value in inputs}

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or not to_gpu:
                return value
            return by_values[id(value)] if id(value) in by_values else GpuTensor(value)

        return tree_map(wrap, result)

    def _record(self, what: str) -> None:
        frames = [
            frame
            for frame in traceback.extract_stack()
            if frame.filename.startswith(str(_ROOT)) and ".venv" not in frame.filename
        ]
        places = [f for f in frames if not f.filename.endswith("pretend_gpu.py") and "/tests/" not in f.filename]
        place = f"{Path(places[-1].filename).relative_to(_ROOT)}:{places[-1].lineno}" if places else "a library"
        self.waits.append(f"{place}: {what}")


def _unwrap(value: Any) -> Any:
    return value.values_on_cpu if isinstance(value, GpuTensor) else value


def _has_boolean_index(name: str, args: Any) -> bool:
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        return False
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


def on_gpu(value: Tensor) -> Tensor:
    """Return a tensor of the pretended GPU with the same values; a parameter stays one."""
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(GpuTensor(value.detach().clone()), value.requires_grad)
    return GpuTensor(value.detach().clone())


def move(module: torch.nn.Module) -> None:
    """Move the parameters and buffers of a module to the pretended GPU."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                part._parameters[name] = on_gpu(value)  # type: ignore[assignment]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = on_gpu(buffer)


@contextmanager
def pretended_gpu() -> Iterator[PretendGpu]:
    """Run a block with a pretended GPU. Its tensors can be used inside only."""
    attention, autocast = F.scaled_dot_product_attention, torch.autocast
    F.scaled_dot_product_attention = _attention  # PyTorch chooses its kernel by properties of the device
    torch.autocast = _autocast  # type: ignore[assignment, misc]
    try:
        with PretendGpu() as gpu:
            yield gpu
    finally:
        F.scaled_dot_product_attention, torch.autocast = attention, autocast  # type: ignore[misc]


def _autocast(device_type: str, *args: Any, **options: Any) -> Any:
    return _AUTOCAST("cpu" if device_type == GPU.type else device_type, *args, **options)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **options: Any) -> Tensor:
    scores = query @ key.transpose(-2, -1) * (options.get("scale") or query.shape[-1] ** -0.5)
    return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ value


def check_waits(module: Any, batch: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """Check that a training step gives ``expected`` on the pretended GPU, and that only each tenth one waits for it."""
    with pretended_gpu() as gpu:
        move(module)
        moved = {**batch, "pixels": on_gpu(batch["pixels"])}
        module.training_step(moved, 1)  # copies constants once
        gpu.waits.clear()
        value = module.training_step(moved, 1)
        assert gpu.waits == []
        module.training_step(moved, 10)
        assert [wait.partition(":")[0] for wait in gpu.waits] == ["vpr/training/loop.py"]
    torch.testing.assert_close(value.values_on_cpu, expected.detach())
