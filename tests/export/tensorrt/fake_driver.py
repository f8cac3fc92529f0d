"""A CUDA driver library without a GPU, compiled against the real ``cuda.h``, and scripts that run with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def cuda_header() -> Path:
    """Return the folder of ``cuda.h``, which torch's wheels contain; skip the test without it."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [path for folder in folders for path in folder.glob("cu*/include/cuda.h")]
    if not found:
        pytest.skip("cuda.h is not installed")
    return found[0].parent


def build_fake_libcuda(folder: Path) -> Path:
    """Compile the library; a prototype that differs from the header's is an error. Skip the test without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    source = Path(__file__).with_name("fake_libcuda.c")
    library = folder / "libcuda.so.1"
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-O1",
            "-Wall",
            "-I",
            str(cuda_header()),
            str(source),
            "-o",
            str(library),
            "-ldl",
        ],
        check=True,
    )
    return library


def run_with(library: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose CUDA driver is the library."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "FAKE_CUDA_"))}
    variables |= {"LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=120)
