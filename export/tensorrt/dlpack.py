"""Tensors of other libraries in GPU memory, read through DLPack: their address, without a copy.

The structures are those of ``dlpack.h``, version 0.8, which every producer exports without ``max_version``.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpr.common.errors import UserError

_CUDA = 2  # kDLCUDA
_CODES = {"u": 1, "f": 2}  # kDLUInt, kDLFloat, by NumPy's kind


class _Tensor(ctypes.Structure):
    """``DLTensor``, the first member of the ``DLManagedTensor`` in a capsule."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class DeviceTensor:
    """Contiguous tensor in GPU memory."""

    address: int
    shape: tuple[int, ...]
    owner: Any  # keeps the memory; the producer frees it after this object


def is_on_gpu(value: Any) -> bool:
    """Return whether a value is a DLPack tensor in CUDA memory."""
    read = getattr(value, "__dlpack_device__", None)
    return read is not None and int(read()[0]) == _CUDA


def read_device_tensor(name: str, value: Any, device: int, stream: int, dtype: np.dtype[Any]) -> DeviceTensor:
    """Return the address of a tensor; work on ``stream`` then waits for the producer's work on it.

    Args:
        name: Name of the argument, for error messages.
        value: Object with ``__dlpack__``, such as a tensor of PyTorch or CuPy.
        device: Index of the GPU that must hold it.
        stream: Address of the stream that will use it.
        dtype: Required type of its elements, float32 or uint8.

    Raises:
        UserError: The value is not a contiguous tensor of this type in the memory of this GPU.
    """
    if not is_on_gpu(value):
        raise UserError(f"{name}: expected a tensor in GPU memory with __dlpack__, got {type(value).__name__}.")
    try:
        capsule = value.__dlpack__(stream=stream)
    except (BufferError, RuntimeError, TypeError) as error:  # such as a tensor that requires a gradient
        raise UserError(f"{name}: cannot be read by DLPack ({' '.join(str(error).split())}). Detach it.") from None
    tensor = _tensor_of(capsule)
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.device_id != device:
        raise UserError(f"{name}: expected a tensor of GPU {device}, got one of GPU {tensor.device_id}. Move it.")
    expected = (_CODES[dtype.kind], 8 * dtype.itemsize, 1)
    if (tensor.code, tensor.bits, tensor.lanes) != expected or not _is_contiguous(tensor, shape):
        raise UserError(f"{name}: expected contiguous {dtype} values. Convert it with .to(torch.{dtype}).contiguous().")
    return DeviceTensor((tensor.data or 0) + tensor.byte_offset, shape, capsule)


def _tensor_of(capsule: Any) -> _Tensor:
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return _Tensor.from_address(get_pointer(capsule, b"dltensor"))


def _is_contiguous(tensor: _Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether the elements are in C order; no strides mean that they are."""
    if not tensor.strides:
        return True
    expected = 1
    for axis in reversed(range(tensor.ndim)):
        if shape[axis] > 1 and tensor.strides[axis] != expected:
            return False
        expected *= shape[axis]
    return True
