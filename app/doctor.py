"""``vpr doctor``: what this machine can run, and what is missing, in one screen."""

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


@dataclass(frozen=True)
class Finding:
    """One thing that runs here or does not.

    Attributes:
        name: of the backend, or of what is built.
        works: whether nothing is missing.
        detail: version and devices, or what is missing and the remedy.
    """

    name: str
    works: bool
    detail: str


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Print and return the environment and the findings."""
    found = environment()
    cpu = found["cpu"]
    console = Console(width=max(100, Console().width))
    gpus = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in found["gpus"]) or "none"
    console.print(f"Python {found['python']} on {found['os']}; {cpu['model']}, {cpu['threads']} processors")
    console.print(f"instructions: {' '.join(cpu['features']) or 'none that matter here'}", highlight=False)
    console.print(f"GPU: {gpus}; driver: {found['driver'] or 'none'}; training precision: {best_precision()}")
    table = Table("", "what", "detail", box=None, pad_edge=False)
    findings = examine()
    for finding in findings:
        mark = "[green]yes[/]" if finding.works else "[red]no[/]"
        table.add_row(mark, finding.name, finding.detail)
    console.print(table)
    packages = found["packages"].items() if config.verbose else list(found["packages"].items())[:8]
    console.print("packages: " + ", ".join(f"{name} {version}" for name, version in packages), highlight=False)
    return {**found, "findings": findings}


def examine() -> list[Finding]:
    """Ask every backend and load the engine builders; a failure becomes a finding, never a traceback."""
    findings = []
    for backend in BACKENDS:
        reason = backend.missing()
        findings.append(Finding(backend.name, reason is None, backend.version() if reason is None else reason))
    for name, check in (("build TensorRT-RTX engines", _rtx), ("build TensorRT engines", _tensorrt)):
        try:
            findings.append(Finding(name, True, check()))
        except UserError as error:
            findings.append(Finding(name, False, str(error)))
    return findings


def _rtx() -> str:
    return f"{import_tensorrt('tensorrt-rtx').__version__}; builds for {', '.join(TARGETS)} without a GPU"


def _tensorrt() -> str:
    return str(import_tensorrt("tensorrt").__version__)
