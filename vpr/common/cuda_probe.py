"""List the GPUs that CUDA finds; as a script, print them as one line of JSON.

It runs in a separate process, without other packages: CUDA reads ``CUDA_VISIBLE_DEVICES`` once per process, and a
process that was forked after CUDA started cannot use CUDA. ``nvidia-smi`` is no substitute. It ignores
``CUDA_VISIBLE_DEVICES``, may be missing from a container, and describes a GPU that is divided by MIG as one.
"""

import ctypes
import json
import re
import uuid
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NAME_BYTES, _UUID_BYTES = 256, 16
_KERNEL_DRIVER = Path("/proc/driver/nvidia/version")


def probe(cuda: Any, nvml: Any | None) -> dict[str, Any]:
    """Return ``gpus``, ``cuda`` (the version that the driver supports), ``driver``, and ``error`` if CUDA fails.

    Args:
        cuda: Library ``libcuda.so.1``.
        nvml: Library ``libnvidia-ml.so.1``, for the driver version; None reads the kernel module's.
    """
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    supported = f"{version.value // 1000}.{version.value % 1000 // 10}"
    known: dict[str, Any] = {"gpus": [], "cuda": supported, "driver": driver_version(nvml), "error": ""}
    if status := cuda.cuInit(0):
        return {**known, "error": f"cuInit: {_error_name(cuda, status)}"}
    count = ctypes.c_int()
    if status := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return {**known, "error": f"cuDeviceGetCount: {_error_name(cuda, status)}"}
    return {**known, "gpus": [_describe(cuda, index) for index in range(count.value)]}


def driver_version(nvml: Any | None) -> str | None:
    """Return the version of the NVIDIA driver, such as ``580.95.05``, or None if it is unknown."""
    if nvml is not None and nvml.nvmlInit_v2() == 0:
        text = ctypes.create_string_buffer(_NAME_BYTES)
        if nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(_NAME_BYTES)) == 0:
            return text.value.decode()
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", _KERNEL_DRIVER.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
    return found.group() if found else None


def _describe(cuda: Any, index: int) -> dict[str, Any]:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name, identity = ctypes.create_string_buffer(_NAME_BYTES), (ctypes.c_ubyte * _UUID_BYTES)()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    # The second version gives a MIG instance its own identity; older drivers have the first one only.
    read_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
    read_uuid(ctypes.byref(identity), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(str(number.value))
    return {
        "name": name.value.decode(errors="replace"),
        "memory_bytes": memory.value,
        "compute_capability": ".".join(capability),
        "uuid": str(uuid.UUID(bytes=bytes(identity))),
    }


def _error_name(cuda: Any, status: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorName(status, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({status})"


def _load(name: str) -> Any | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


if __name__ == "__main__":
    print(json.dumps(probe(ctypes.CDLL("libcuda.so.1"), _load("libnvidia-ml.so.1"))))
