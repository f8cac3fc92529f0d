from __future__ import annotations

from pathlib import Path

import pytest

from vpr.common import hardware
from vpr.common.hardware import lacks_vnni


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "flags\t\t: fpu avx2 fma", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512bw", True),
        ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("x86_64", "flags\t\t: fpu avx2 avx_vnni", False),
        ("AMD64", None, True),  # Windows has no /proc/cpuinfo
        ("aarch64", "Features\t: fp asimd", False),
    ],
)
def test_missing_vnni_is_detected(
    machine: str, cpuinfo: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(f"processor\t: 0\n{cpuinfo}\n")
    monkeypatch.setattr(hardware, "_CPUINFO", file)
    monkeypatch.setattr(hardware.platform, "machine", lambda: machine)
    assert lacks_vnni() is expected
