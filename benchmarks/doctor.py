"""``vpr doctor``: what this machine can run, and what is missing, in one screen."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from export.engine import TARGETS, load_builder
from vpr.environment import environment
from vpr.errors import UserError
from vpr.training import best_precision


@dataclass(frozen=True)
class DoctorConfig:
    """Nothing to choose.

    Attributes:
        verbose: list the version of every package, not only of the main ones.
    """

    verbose: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing that runs here or does not.

    Attributes:
        name: of the backend.
        works: whether it was loaded.
        detail: version and devices, or what is missing and the remedy.
    """

    name: str
    works: bool
    detail: str


def doctor(config: DoctorConfig) -> None:
    """Print the findings."""
    found = environment()
    cpu = found["cpu"]
    console = Console(width=max(100, Console().width))
    gpus = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in found["gpus"]) or "none"
    console.print(f"Python {found['python']} on {found['os']}; {cpu['model']}, {cpu['threads']} processors")
    console.print(f"instructions: {' '.join(cpu['features']) or 'none that matter here'}", highlight=False)
    console.print(f"GPU: {gpus}; driver: {found['driver'] or 'none'}; training precision: {best_precision()}")
    table = Table("", "what", "detail", box=None, pad_edge=False)
    for finding in examine(bool(found["gpus"])):
        mark = "[green]yes[/]" if finding.works else "[red]no[/]"
        table.add_row(mark, finding.name, finding.detail)
    console.print(table)
    packages = found["packages"].items() if config.verbose else list(found["packages"].items())[:8]
    console.print("packages: " + ", ".join(f"{name} {version}" for name, version in packages), highlight=False)


def examine(has_gpu: bool) -> list[Finding]:
    """Load every backend; a failure becomes a finding, never a traceback."""
    checks: list[tuple[str, Callable[[bool], str]]] = [
        ("torch", _torch),
        ("ONNX Runtime, CPU", _onnxruntime_cpu),
        ("ONNX Runtime, CUDA", _onnxruntime_cuda),
        ("OpenVINO", _openvino),
        ("TensorRT-RTX builder", _rtx),
        ("TensorRT builder", _tensorrt),
        ("running engines", _running),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(Finding(name, True, check(has_gpu)))
        except (UserError, ImportError, OSError, RuntimeError) as error:
            findings.append(Finding(name, False, " ".join(str(error).split())))
    return findings


def _torch(_: bool) -> str:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}; {', '.join(devices) or 'CPU only'}; {torch.get_num_threads()} threads"


def _onnxruntime_cpu(_: bool) -> str:
    return str(importlib.import_module("onnxruntime").__version__)


def _onnxruntime_cuda(has_gpu: bool) -> str:
    runtime = importlib.import_module("onnxruntime")
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        raise UserError("this build has no CUDA provider: pip install -r requirements.txt")
    if not has_gpu:
        raise UserError("the provider is installed; it needs an NVIDIA GPU")
    return str(runtime.__version__)


def _openvino(_: bool) -> str:
    openvino = importlib.import_module("openvino")
    return f"{openvino.__version__.split('-')[0]}; {', '.join(openvino.Core().available_devices)}"


def _rtx(_: bool) -> str:
    return f"{load_builder('tensorrt-rtx').__version__}; builds for {', '.join(TARGETS)} without a GPU"


def _tensorrt(_: bool) -> str:
    return str(load_builder("tensorrt").__version__)


def _running(has_gpu: bool) -> str:
    if not has_gpu:
        raise UserError("needs an NVIDIA GPU; engines are built and checked here, not run")
    importlib.import_module("pycuda.driver")
    return f"pycuda, Python {sys.version_info.major}.{sys.version_info.minor}"
