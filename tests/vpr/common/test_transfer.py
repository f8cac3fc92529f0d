from __future__ import annotations

import torch

from tests.pretend_gpu import GPU, GpuTensor, pretended_gpu
from vpr.common.transfer import constant, to_device


def test_copy_to_the_cpu_is_the_tensor_itself() -> None:
    value = torch.arange(3)
    assert to_device(value, torch.device("cpu")) is value


def test_copy_to_a_gpu_does_not_wait() -> None:
    value = torch.arange(6.0).view(2, 3)
    with pretended_gpu() as gpu:
        plain = value.to(GPU)
        assert len(gpu.waits) == 1
        copy = to_device(value, GPU)
        assert to_device(copy, GPU) is copy
    assert len(gpu.waits) == 1
    for moved in (plain, copy):
        assert isinstance(moved, GpuTensor)
        assert torch.equal(moved.values_on_cpu, value)


def test_constant_waits_once_and_takes_part_in_gradients() -> None:
    constant.cache_clear()
    with pretended_gpu() as gpu:
        with torch.inference_mode():
            constant((1.0, 2.0), GPU)
        waits = len(gpu.waits)
        constant((1.0, 2.0), GPU)
    assert waits == len(gpu.waits) <= 1
    constant.cache_clear()
    with torch.inference_mode():
        constant((3.0, 4.0), torch.device("cpu"))
    x = torch.ones(2, requires_grad=True)
    (x * constant((3.0, 4.0), torch.device("cpu"))).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 4]
