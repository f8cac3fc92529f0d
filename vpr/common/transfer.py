"""Copies to a GPU that the host does not wait for."""

from functools import lru_cache

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for a GPU.

    A copy from pageable memory waits until the GPU has finished all earlier work. So the values are first copied to
    pinned memory, which PyTorch reuses only after the GPU has read it.
    """
    if device.type == "cpu" or value.device.type != "cpu":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return float32 values on a device; only the first call with them copies, and waits for a GPU."""
    with torch.inference_mode(False):  # the result is also used where gradients are computed
        return torch.tensor(values, dtype=torch.float32).to(device)
