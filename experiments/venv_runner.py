"""Run standalone programs in other virtual environments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from experiments.figures import ROOT
from vpr.common.errors import UserError


def run_in_venv(environment: str, program: str, arguments: Sequence[str], target: str) -> str:
    """Run a program of ``experiments/external/`` and return its output.

    Args:
        environment: Folder of the virtual environment; empty for the current one.
        program: File name.
        arguments: Arguments of the program.
        target: Make target that installs the environment.

    Raises:
        UserError: The environment does not exist, or the program failed.
    """
    python = str(ROOT / environment / "bin" / "python") if environment else sys.executable
    command = [python, str(ROOT / "experiments" / "external" / program), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{environment}: the environment of {program} does not exist. Run `make {target}`.") from None
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        reason = lines[-1][:300] if lines else f"exit status {process.returncode}"
        raise UserError(f"{program} {arguments[0]}: it failed ({reason}). Run `make {target}` and try again.")
    return process.stdout
