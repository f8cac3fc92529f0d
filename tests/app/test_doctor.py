from __future__ import annotations

import sys

import pytest

from app.config import DoctorConfig
from app.doctor import doctor, run_checks
from export.backends.registry import BACKENDS
from vpr.common.hardware import environment, package_versions


def test_every_backend_works_or_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.backends.base.read_gpus", lambda: ([], None))
    findings = {finding.name: finding for finding in run_checks()}
    assert {backend.name for backend in BACKENDS} <= set(findings)
    for name in ("torch", "onnxruntime-cpu", "openvino", "build TensorRT-RTX engines"):
        assert findings[name].works, findings[name].detail
    for name in ("onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "tensorrt-rtx"):
        assert not findings[name].works
        assert findings[name].detail == "needs an NVIDIA GPU; this machine has none"


def test_missing_package_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    doctor(DoctorConfig())
    screen = capsys.readouterr().out
    assert "openvino cannot be loaded" in screen
    assert "Traceback" not in screen
    assert len(screen.splitlines()) < 40


def test_environment_has_no_host_names_or_paths() -> None:
    import json
    import socket

    text = json.dumps(environment())
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert "/" not in text.replace("and/or", "")


def test_versions_omit_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpr.common.hardware.PACKAGES", ("pytest", "surely-not-installed"))
    assert package_versions().keys() == {"pytest"}
