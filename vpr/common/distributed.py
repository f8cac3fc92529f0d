"""How a training is spread over the processes that ``torchrun`` starts.

``torchrun --nproc-per-node 8 -m vpr teacher train ...`` runs one process per GPU; without it there is one process.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Literal

from vpr.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Strategy = Literal["auto", "ddp", "fsdp"]
_SHARD_AT_LEAST = 1 << 20  # parameters; gathering smaller parts on their own costs more than it saves


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, by the environment that torchrun sets."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return rank_and_world()[0] == 0


def compute_device() -> torch.device:
    """This process's GPU, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def destroy_process_group() -> None:
    """End the group of processes once all are here: one that exits with it open may be aborted by its threads."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def trainer_options(strategy: Strategy) -> dict[str, Any]:
    """Arguments of Lightning's ``Trainer`` for the processes there are.

    ``auto`` is DDP when there are several. FSDP is PyTorch's second (``fully_shard``), which keeps a
    parameter's own shape, so that clipping, averages and checkpoints work as they do in one process.

    Raises:
        UserError: FSDP of one process.
    """
    import torch
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    world = rank_and_world()[1]
    if world == 1:
        if strategy == "fsdp":
            raise UserError("run.strategy: fsdp needs several processes: start it with torchrun --nproc-per-node N")
        return {"devices": 1}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    chosen = (
        ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)
        if strategy == "fsdp"
        else DDPStrategy()
    )
    return {
        "devices": local,
        "num_nodes": world // local,
        "strategy": chosen,
        # PyTorch has synchronised BatchNorm for GPUs only; elsewhere each process has its own statistics.
        "sync_batchnorm": torch.cuda.is_available() and strategy != "fsdp",
    }


def shard(module: nn.Module, mesh: Any) -> None:
    """Spread a module's parameters over a mesh: each large block on its own, the rest together."""
    from torch.distributed.fsdp import fully_shard

    for block in _blocks(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The large members of lists of one kind, such as a tower's transformer blocks; the innermost where they nest."""
    from torch import nn

    found: list[nn.Module] = []
    for child in module.children():
        inner = _blocks(child)
        alike = isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in module.children()}) == 1
        large = sum(p.numel() for p in child.parameters()) >= _SHARD_AT_LEAST
        found += [child] if alike and large and not inner else inner
    return found


def all_gather_cat(value: Tensor) -> Tensor:
    """The same-shaped tensors of all processes, joined along the first axis; every process must call it."""
    import torch
    from torch import distributed

    world = rank_and_world()[1]
    if world == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world)]
    distributed.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights on the CPU, gathered where they are spread; every process must call it."""
    from torch.distributed.tensor import DTensor

    state = module.state_dict()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().contiguous()
        for name, value in state.items()
    }
