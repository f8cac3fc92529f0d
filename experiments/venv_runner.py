"""Standalone programs of ours, each run by the Python of an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from experiments.figures import ROOT
from vpr.common.errors import UserError


def run_in_venv(environment: str, program: str, arguments: Sequence[str], target: str) -> str:
    """What a program of ``experiments/external/`` printed.

    Args:
        environment: folder of a virtual environment; ours if empty.
        program: file name.
        arguments: of the program.
        target: of the Makefile, that makes the environment.

    Raises:
        UserError: the environment is not there, or the program failed.
    """
    python = str(ROOT / environment / "bin" / "python") if environment else sys.executable
    command = [python, str(ROOT / "experiments" / "external" / program), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{environment}: not there, {program} runs in it: make {target}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(
            f"{program} {arguments[0]}: failed: {said[-1][:300] if said else done.returncode}: make {target}"
        )
    return done.stdout
