"""Hardware and package versions that results are recorded with; no host names, no paths."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from vpr.common.gpus import list_gpus

MAX_THREADS = 512  # some libraries abort the process if they cannot start all threads
PACKAGES = (
    "visual-product-recognition", "torch", "torchvision", "lightning", "open_clip_torch", "timm", "vit-pytorch",
    "numpy", "pillow", "pyarrow", "faiss-cpu", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "openvino",
    "tensorrt", "tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "pycuda",
    "cuda-bindings",
)  # fmt: skip
# Instruction sets that decide which kernels a CPU runs: vector width, and dot products of INT8 and BF16.
_X86_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
_CPU_FEATURES = (*_X86_FEATURES, "asimd", "asimddp", "i8mm", "bf16", "sve")
_CPUINFO = Path("/proc/cpuinfo")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def environment() -> dict[str, Any]:
    """Return versions, CPU, memory, GPUs and driver of this machine, as JSON values."""
    gpus, driver = read_gpus()
    cpu = {"model": cpu_model(), "cores": physical_cores(), "threads": len(available_cpus())}
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": {**cpu, "features": cpu_features()},
        "memory_bytes": memory_bytes(),
        "gpus": gpus,
        "driver": driver,
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages among :data:`PACKAGES`, by distribution name."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def available_cpus() -> list[int]:
    """Return the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Return the number of physical cores available, or of logical processors if the topology is unknown."""
    cores = set()
    for cpu in available_cpus():
        folder = _TOPOLOGY / f"cpu{cpu}" / "topology"
        try:
            cores.add(((folder / "physical_package_id").read_text(), (folder / "core_id").read_text()))
        except OSError:
            return len(available_cpus())
    return len(cores)


def cpu_model() -> str:
    """Return the name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Return the vector and matrix instruction sets that affect inference speed."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [name for name in _CPU_FEATURES if name in flags]


def lacks_vnni() -> bool:
    """Return whether this is an x86 processor without VNNI, such as AMD's before Zen 4.

    INT8 kernels accumulate in 16 bits there. By default ONNX Runtime and OpenVINO saturate these sums, so a Q/DQ
    graph gives different embeddings than an engine. If the instruction sets are unknown, VNNI counts as missing.
    """
    vnni = {"avx_vnni", "avx512_vnni", "amx_int8"}
    return platform.machine().lower() in ("x86_64", "amd64") and not vnni & set(cpu_features())


def memory_bytes() -> int | None:
    """Return the bytes of physical memory, or None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def read_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Return the NVIDIA GPUs that CUDA uses here, in its order, and the driver version.

    Each GPU has ``name``, ``memory_mib`` and ``compute_capability``. ``CUDA_VISIBLE_DEVICES`` and MIG apply.
    """
    listing = list_gpus()
    gpus = [
        {"name": gpu.name, "memory_mib": gpu.memory_bytes >> 20, "compute_capability": gpu.compute_capability}
        for gpu in listing.gpus
    ]
    return gpus, listing.driver


def _cpuinfo(key: str) -> str | None:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
