"""The machine and the versions behind a number: no host names, no paths."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

MAX_THREADS = 512  # that anyone may ask for; some libraries end the process when there are too many
PACKAGES = (
    "visual-product-recognition",
    "torch",
    "torchvision",
    "lightning",
    "open_clip_torch",
    "timm",
    "vit-pytorch",
    "numpy",
    "pillow",
    "pyarrow",
    "faiss-cpu",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "pycuda",
)
# What decides which kernels a CPU runs: vector width, and the dot products of INT8 and BF16.
_CPU_FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_CPUINFO = Path("/proc/cpuinfo")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def environment() -> dict[str, Any]:
    """Versions, CPU, memory, GPUs and driver of this machine, as JSON values."""
    gpus, driver = read_gpus()
    return {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "model": cpu_model(),
            "cores": physical_cores(),
            "threads": len(available_cpus()),
            "features": cpu_features(),
        },
        "memory_bytes": memory_bytes(),
        "gpus": gpus,
        "driver": driver,
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of :data:`PACKAGES`, by distribution name; what is not installed is left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def available_cpus() -> list[int]:
    """Logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Physical cores among the available processors; where the system does not tell, the processors themselves."""
    cores = set()
    for cpu in available_cpus():
        folder = _TOPOLOGY / f"cpu{cpu}" / "topology"
        try:
            cores.add(((folder / "physical_package_id").read_text(), (folder / "core_id").read_text()))
        except OSError:
            return len(available_cpus())
    return len(cores)


def cpu_model() -> str:
    """Name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Vector and matrix instructions that bear on inference speed."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [name for name in _CPU_FEATURES if name in flags]


def lacks_vnni() -> bool:
    """Whether this is an x86 processor without VNNI, as AMD's before Zen 4: it adds products of eight bits in sixteen.

    By default ONNX Runtime and OpenVINO clip the sums there, and a graph with Q/DQ gives other embeddings than an
    engine. Where the system does not tell the instructions, VNNI is taken to be missing.
    """
    exact = {"avx_vnni", "avx512_vnni", "amx_int8"}
    return platform.machine().lower() in ("x86_64", "amd64") and not exact & set(cpu_features())


def memory_bytes() -> int | None:
    """Physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def read_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """NVIDIA GPUs (name, memory in MiB, compute capability) and the driver version, by ``nvidia-smi``."""
    return parse_gpus(_ask_gpus("name,memory.total,compute_cap,driver_version"))


def gpu_memory_used() -> int | None:
    """Bytes that all processes hold on the NVIDIA GPUs together, or None where ``nvidia-smi`` does not tell."""
    used = _ask_gpus("memory.used").split()
    return sum(int(mib) << 20 for mib in used) if used and all(mib.isdigit() for mib in used) else None


def _ask_gpus(fields: str) -> str:
    """What ``nvidia-smi`` says of these fields, a line per GPU; nothing where it cannot be asked."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def parse_gpus(listing: str) -> tuple[list[dict[str, Any]], str | None]:
    """Read ``name, memory, capability, driver`` lines; as :func:`read_gpus` returns."""
    gpus: list[dict[str, Any]] = []
    driver = None
    for line in listing.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            memory = int(parts[1]) if parts[1].isdigit() else None
            gpus.append({"name": parts[0], "memory_mib": memory, "compute_capability": parts[2]})
            driver = parts[3]
    return gpus, driver


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
