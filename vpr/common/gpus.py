"""NVIDIA GPUs as CUDA numbers them in this process, their choice by ``--device``, and their memory and clocks."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vpr.common.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER = "CUDA_DEVICE_ORDER"
_LOCAL_RANK = "LOCAL_RANK"  # of torchrun
_PROBE = Path(__file__).with_name("cuda_probe.py")
_PROBE_SECONDS = 60  # eight GPUs without the persistence daemon take tens of seconds to start
_NVML_SM_CLOCK = 1
# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a busy GPU down; an idle GPU is no reason.
_SLOWDOWNS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU, or a MIG instance of one, that CUDA lists in this process."""

    name: str
    compute_capability: str  # such as "8.9"
    memory_bytes: int
    uuid: str  # identity without the prefix "GPU-" or "MIG-"

    @property
    def architecture(self) -> str:
        """Compute capability in TensorRT's words, such as ``sm89``."""
        return f"sm{self.compute_capability.replace('.', '')}"


@dataclass(frozen=True)
class Listing:
    """GPUs in CUDA's order, and versions. ``problem`` is the reason and remedy if there is no GPU to use."""

    gpus: tuple[VisibleGpu, ...] = ()
    cuda: str | None = None  # CUDA version that the driver supports, such as "13.0"
    driver: str | None = None  # such as "580.95.05"
    problem: str = ""


def list_gpus() -> Listing:
    """Return the GPUs that CUDA would use in this process. The listing is cached until the environment changes."""
    return _list_gpus(os.environ.get(VISIBLE), os.environ.get(_ORDER))


def select_device(device: str) -> None:
    """Hide every GPU but one from all libraries of this process and of those that it starts.

    ``device`` is an index in CUDA's order, a UUID of ``nvidia-smi -L``, or ``cpu``, which hides all GPUs. Call this
    before a library starts CUDA.

    Raises:
        UserError: There is no such GPU, or torchrun has started the process.
    """
    if device == "cpu":
        os.environ[VISIBLE] = ""
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("device: torchrun gives each process its own GPU. Remove --device, or set --nproc-per-node 1.")
    listing = list_gpus()
    if not listing.gpus:
        problem = f"there is no GPU '{device}'; this machine {listing.problem.rstrip('.')}"
        raise UserError(f"device: {problem}. Remove --device or set it to cpu.")
    identities = [gpu.uuid for gpu in listing.gpus]
    prefix, _, identity = device.partition("-")
    if prefix in ("GPU", "MIG") and identity in identities:
        os.environ[VISIBLE] = device
        return
    if not device.isdecimal() or int(device) >= len(listing.gpus):
        names = ", ".join(f"{index} ({gpu.name})" for index, gpu in enumerate(listing.gpus))
        raise UserError(f"device: expected cpu or one of {names}, got '{device}'.")
    visible = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    # The names of the user keep their meaning: CUDA may know a GPU by another index than nvidia-smi does.
    os.environ[VISIBLE] = visible[int(device)] if visible else device


def select_gpu_of_rank() -> None:
    """Hide every GPU but that of this process of torchrun, for backends that compute on the first GPU.

    The process then counts as the first of its machine for the choice of a device. Call this before a library starts
    CUDA. Without torchrun or GPUs nothing changes.

    Raises:
        UserError: The machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get(VISIBLE) == "":
        return
    rank, gpus = int(os.environ.get(_LOCAL_RANK, "0")), list_gpus().gpus
    if not gpus:
        return
    if rank >= len(gpus):
        raise UserError(f"device: torchrun started a process {rank} for {len(gpus)} GPUs. Lower --nproc-per-node.")
    visible = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    os.environ[VISIBLE] = visible[rank] if visible else str(rank)
    os.environ[_LOCAL_RANK] = "0"


def gpu_memory_used(gpu: VisibleGpu | None = None) -> int | None:
    """Return the bytes that all processes use on a GPU, by default the first; None if NVML does not report them."""

    class Memory(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    memory = Memory()
    return memory.used if _ask_nvml(gpu, "nvmlDeviceGetMemoryInfo", ctypes.byref(memory)) else None


def read_clocks(gpu: VisibleGpu | None = None) -> dict[str, Any]:
    """Return the SM clock and its maximum (MHz), the power limit (W) and reasons for a slow clock, where known."""
    clock, maximum, limit = (ctypes.c_uint() for _ in range(3))
    reasons = ctypes.c_ulonglong()
    state: dict[str, Any] = {}
    if _ask_nvml(gpu, "nvmlDeviceGetClockInfo", _NVML_SM_CLOCK, ctypes.byref(clock)):
        state["sm_clock_mhz"] = clock.value
    if _ask_nvml(gpu, "nvmlDeviceGetMaxClockInfo", _NVML_SM_CLOCK, ctypes.byref(maximum)):
        state["max_sm_clock_mhz"] = maximum.value
    if _ask_nvml(gpu, "nvmlDeviceGetEnforcedPowerLimit", ctypes.byref(limit)):
        state["power_limit_w"] = limit.value / 1000
    # Drivers before r535 know the call by its older name.
    names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    if any(_ask_nvml(gpu, name, ctypes.byref(reasons)) for name in names):
        state["throttled"] = [name for bit, name in _SLOWDOWNS.items() if reasons.value & bit]
    return state


@cache
def _list_gpus(visible: str | None, order: str | None) -> Listing:
    """Run the probe; the arguments, which it reads from the environment itself, are the key of the cache."""
    try:
        ctypes.CDLL("libcuda.so.1")  # loading does not start CUDA
    except OSError:
        return Listing(problem=_explain_no_driver())
    if visible == "":
        return Listing(problem=f"hides its NVIDIA GPUs by an empty {VISIBLE}. Unset it.")
    command = [sys.executable, "-I", "-S", str(_PROBE)]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True).stdout
        found = json.loads(output)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())
        return Listing(problem=f"has an NVIDIA driver that does not answer ({reason}). Check `nvidia-smi`.")
    gpus = tuple(VisibleGpu(**gpu) for gpu in found["gpus"])
    if gpus:
        return Listing(gpus, found["cuda"], found["driver"])
    hidden = f" {VISIBLE} is '{visible}'." if visible is not None else ""
    reason = found["error"] or "it lists none"
    problem = f"has an NVIDIA driver, but CUDA finds no GPU ({reason}).{hidden} Check `nvidia-smi`."
    return Listing((), found["cuda"], found["driver"], problem)


def _explain_no_driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "has none"
    remedy = "In a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility; else install the driver again."
    return f"has nvidia-smi but no libcuda.so.1. {remedy}"


@cache
def _nvml() -> Any | None:
    """Return the started NVML library, or None. It starts no CUDA."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def _ask_nvml(gpu: VisibleGpu | None, name: str, *arguments: Any) -> bool:
    """Call an NVML function of a GPU, by default the first visible one; return whether it succeeded."""
    gpu = gpu or next(iter(list_gpus().gpus), None)
    library = _nvml() if gpu else None
    call = getattr(library, name, None)
    if gpu is None or library is None or call is None:
        return False
    device = ctypes.c_void_p()
    # CUDA's identity does not show whether the device is a MIG instance.
    names = (f"{kind}-{gpu.uuid}".encode() for kind in ("GPU", "MIG"))
    is_known = any(library.nvmlDeviceGetHandleByUUID(text, ctypes.byref(device)) == 0 for text in names)
    return is_known and call(device, *arguments) == 0
