"""``pytest -m gpu`` on a machine without a GPU, and without most packages: everything is skipped, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.figures import ROOT

# Packages that a machine for a short check may lack.
MISSING = ("hypothesis", "onnx", "faiss", "onnxruntime", "openvino", "matplotlib", "lightning", "jsonargparse")

HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Hidden())
"""


def run_gpu_tests(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = "-m gpu -rs -p no:xdist -p no:cacheprovider"
    command = [sys.executable, "-m", "pytest", *options.split(), *arguments]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=900)


def test_gpu_tests_are_skipped_with_the_reason() -> None:
    run = run_gpu_tests("tests/benchmarks", "tests/export/tensorrt")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "needs an NVIDIA GPU; this machine" in run.stdout
    assert "failed" not in run.stdout
    assert "error" not in run.stdout


@pytest.mark.slow
def test_missing_packages_are_reasons_too(tmp_path: Path) -> None:
    """``sitecustomize`` hides the packages from every import of the process."""
    (tmp_path / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    # Hypothesis has a plugin of pytest, which a machine without the package lacks too.
    run = run_gpu_tests("-p", "no:hypothesispytest", "tests", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" in run.stdout
    assert "error" not in run.stdout.lower().replace("modulenotfounderror", "")
