"""Distributed training over the processes that ``torchrun`` starts.

``torchrun --nproc-per-node 8 -m vpr teacher train ...`` runs one process per GPU; ``vpr`` alone runs one process.
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
_MIN_SHARD_PARAMETERS = 1 << 20  # gathering smaller blocks separately costs more than it saves


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes, from torchrun's environment variables."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process logs and writes for all processes."""
    return rank_and_world()[0] == 0


def compute_device() -> torch.device:
    """Return this process's GPU, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def destroy_process_group() -> None:
    """Wait for all processes and destroy their group; its threads may abort a process that exits with it open."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def trainer_options(strategy: Strategy) -> dict[str, Any]:
    """Return arguments of Lightning's ``Trainer`` for the current number of processes.

    ``auto`` selects DDP for several processes. FSDP is PyTorch's FSDP2 (``fully_shard``). It keeps the
    shapes of parameters, so clipping, averaging and checkpoints work as in one process.

    Raises:
        UserError: FSDP is requested for one process.
    """
    import torch
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    world = rank_and_world()[1]
    if world == 1:
        if strategy == "fsdp":
            raise UserError("run.strategy: fsdp needs several processes. Start it with `torchrun --nproc-per-node N`.")
        return {"devices": 1}
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))
    fsdp: dict[str, Any] = {
        "data_parallel_size": world,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
    }
    return {
        "devices": local_world,
        "num_nodes": world // local_world,
        "strategy": ModelParallelStrategy(**fsdp) if strategy == "fsdp" else DDPStrategy(),
        # PyTorch synchronises BatchNorm on GPUs only; on CPUs each process keeps separate statistics.
        "sync_batchnorm": torch.cuda.is_available() and strategy != "fsdp",
    }


def shard(module: nn.Module, mesh: Any, is_bf16: bool = False) -> None:
    """Shard a module's parameters over a mesh: each large block separately, all others together.

    With ``is_bf16`` the blocks are gathered in bfloat16, half the bytes, for a forward pass under bf16 autocast. Their
    matrices are multiplied in bfloat16 anyway; vectors such as the weights of norms are rounded. Inputs of blocks,
    gradients between processes, stored weights and all parameters outside of the blocks stay float32.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = bf16 if is_bf16 else MixedPrecisionPolicy()
    for block in _large_blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh)


def _large_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the innermost large members of lists of one type, such as a tower's transformer blocks."""
    from torch import nn

    blocks: list[nn.Module] = []
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in module.children()}) == 1
    for child in module.children():
        inner = _large_blocks(child)
        is_large = sum(p.numel() for p in child.parameters()) >= _MIN_SHARD_PARAMETERS
        blocks += [child] if is_list and is_large and not inner else inner
    return blocks


def all_gather_cat(value: Tensor) -> Tensor:
    """Concatenate the same-shaped tensors of all processes along the first axis; every process must call it."""
    import torch
    from torch import distributed

    world = rank_and_world()[1]
    if world == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world)]
    distributed.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's weights on the CPU, gathered if they are sharded; every process must call it."""
    from torch.distributed.tensor import DTensor

    state = module.state_dict()
    full = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in state.items()}
    return {name: value.detach().cpu().contiguous() for name, value in full.items()}
