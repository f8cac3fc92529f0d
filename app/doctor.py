"""``vpr doctor``: backends and builders that run on this machine, and what the others lack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from app.config import DoctorConfig
from export.backends.registry import BACKENDS
from export.config import TARGETS
from export.tensorrt.bindings import import_tensorrt
from vpr.common.errors import UserError
from vpr.common.hardware import environment
from vpr.training.loop import best_precision

_MAIN_PACKAGES = 8


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: Name of the backend or of the builder.
        works: Whether it runs on this machine.
        detail: Version and devices, or the reason and the remedy.
    """

    name: str
    works: bool
    detail: str


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Print and return the machine, its packages and the result of every check."""
    machine = environment()
    cpu = machine["cpu"]
    console = Console(width=max(100, Console().width))
    gpus = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in machine["gpus"]) or "none"
    console.print(f"Python {machine['python']} on {machine['os']}; {cpu['model']}, {cpu['threads']} processors")
    console.print(f"instructions: {' '.join(cpu['features']) or 'none of note'}", highlight=False)
    console.print(f"GPU: {gpus}; driver: {machine['driver'] or 'none'}; training precision: {best_precision()}")
    table = Table("", "what", "detail", box=None, pad_edge=False)
    findings = run_checks()
    for finding in findings:
        mark = "[green]yes[/]" if finding.works else "[red]no[/]"
        table.add_row(mark, finding.name, finding.detail)
    console.print(table)
    versions = list(machine["packages"].items())[: None if config.verbose else _MAIN_PACKAGES]
    console.print("packages: " + ", ".join(f"{name} {version}" for name, version in versions), highlight=False)
    return {**machine, "findings": findings}


def run_checks() -> list[Finding]:
    """Check every backend and every engine builder; a failure becomes a finding instead of a traceback."""
    findings = []
    for backend in BACKENDS:
        reason = backend.missing()
        findings.append(Finding(backend.name, reason is None, backend.version() if reason is None else reason))
    for name, check in (("build TensorRT-RTX engines", _check_rtx), ("build TensorRT engines", _check_tensorrt)):
        try:
            findings.append(Finding(name, True, check()))
        except UserError as error:
            findings.append(Finding(name, False, str(error)))
    return findings


def _check_rtx() -> str:
    return f"{import_tensorrt('tensorrt-rtx').__version__}; builds for {', '.join(TARGETS)} without a GPU"


def _check_tensorrt() -> str:
    return str(import_tensorrt("tensorrt").__version__)
