"""``vpr doctor``: backends and builders that run on this machine, and what the others lack."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from app.config import DoctorConfig
from app.licences import check_licences
from export.backends.registry import BACKENDS
from export.config import TARGETS
from export.tensorrt.bindings import Builder, import_tensorrt
from vpr.common.errors import UserError
from vpr.common.gpus import list_gpus
from vpr.common.hardware import environment
from vpr.training.loop import best_precision

_MAIN_PACKAGES = 8


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    name: str  # name of the backend or of the builder
    works: bool  # whether it runs on this machine
    detail: str  # version and devices, or the reason and the remedy


def doctor(config: DoctorConfig) -> Mapping[str, Any]:
    """Print and return the machine, its packages and the result of every check; with models, their licences only."""
    if config.models:
        return check_licences(config.models, config.require_licence)
    machine = environment()
    cpu = machine["cpu"]
    console = Console(width=max(100, Console().width))
    described = (f"{gpu['name']} ({gpu['compute_capability']}, {gpu['memory_mib']} MiB)" for gpu in machine["gpus"])
    gpus = ", ".join(described) or f"this machine {list_gpus().problem.rstrip('.')}"
    console.print(f"Python {machine['python']} on {machine['os']}; {cpu['model']}, {cpu['threads']} processors")
    console.print(f"instructions: {' '.join(cpu['features']) or 'none of note'}", highlight=False)
    console.print(f"GPU: {gpus}; driver: {machine['driver'] or 'none'}; training precision: {best_precision()}")
    table = Table("", "what", "detail", box=None, pad_edge=False)
    findings = run_checks()
    for finding in findings:
        table.add_row("[green]yes[/]" if finding.works else "[red]no[/]", finding.name, finding.detail)
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
    builders: tuple[tuple[str, Builder, str], ...] = (
        ("build TensorRT-RTX engines", "tensorrt-rtx", f"; builds for {', '.join(TARGETS)} without a GPU"),
        ("build TensorRT engines", "tensorrt", ""),
    )
    for name, builder, note in builders:
        try:
            findings.append(Finding(name, True, f"{import_tensorrt(builder).__version__}{note}"))
        except UserError as error:
            findings.append(Finding(name, False, str(error)))
    return findings
