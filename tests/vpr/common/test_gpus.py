"""GPUs as CUDA lists them, against a driver library that is compiled with the real header."""

from __future__ import annotations

import ctypes
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.export.tensorrt.fake_driver import build_fake_libcuda, run_with
from vpr.cli import main
from vpr.common import cuda_probe, gpus
from vpr.common.errors import UserError
from vpr.common.gpus import Listing, VisibleGpu, gpu_memory_used, read_clocks, select_device, select_gpu_of_rank

TWO = "NVIDIA A100-SXM4-40GB MIG 1g.5gb:8:0:4864,NVIDIA L4:8:9:23034"
LIST = """
import json
from dataclasses import asdict
from export.tensorrt.bindings import this_gpu
from vpr.common.gpus import list_gpus
from vpr.common.hardware import read_gpus
print(json.dumps([asdict(list_gpus()), this_gpu(), read_gpus()]))
"""


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_libcuda(tmp_path_factory.mktemp("libcuda"))


def listed(library: Path, **environment: str) -> Any:
    child = run_with(library, LIST, **environment)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_gpus_are_those_of_cuda(libcuda: Path) -> None:
    listing, architecture, read = listed(libcuda, FAKE_CUDA_GPUS=TWO)
    assert [gpu["name"] for gpu in listing["gpus"]] == ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L4"]
    assert [gpu["compute_capability"] for gpu in listing["gpus"]] == ["8.0", "8.9"]
    assert listing["gpus"][1]["memory_bytes"] == 23034 << 20
    assert listing["gpus"][1]["uuid"] == "02020202-0202-0202-0202-020202020202"
    assert listing["cuda"] == "13.0"
    assert listing["problem"] == ""
    # Different GPUs: TensorRT builds for the first one.
    assert architecture == "sm80"
    assert read[0][0] == {"name": "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "memory_mib": 4864, "compute_capability": "8.0"}


def test_visible_devices_are_honoured(libcuda: Path) -> None:
    listing, architecture, _ = listed(libcuda, FAKE_CUDA_GPUS=TWO, CUDA_VISIBLE_DEVICES="1")
    assert [gpu["name"] for gpu in listing["gpus"]] == ["NVIDIA L4"]
    assert architecture == "sm89"


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, r"hides its NVIDIA GPUs by an empty CUDA_VISIBLE_DEVICES\. Unset it\."),
        (
            {"CUDA_VISIBLE_DEVICES": "7"},
            r"CUDA finds no GPU \(cuInit: CUDA_ERROR_NO_DEVICE \(100\)\)\. CUDA_VISIBLE_DEVICES is '7'\. Check",
        ),
        ({"FAKE_CUDA_FAILS": "cuInit", "FAKE_CUDA_STATUS": "803"}, r"\(cuInit: .* \(803\)\)\. Check `nvidia-smi`\."),
        ({"FAKE_CUDA_FAILS": "cuDeviceGetCount"}, r"\(cuDeviceGetCount: CUDA_ERROR_UNKNOWN \(999\)\)"),
    ],
)
def test_unusable_gpus_have_a_reason(libcuda: Path, environment: dict[str, str], problem: str) -> None:
    listing, architecture, read = listed(libcuda, **environment)
    assert listing["gpus"] == []
    assert re.search(problem, listing["problem"])
    assert architecture == "this GPU"
    assert read[0] == []


def test_listing_starts_no_cuda_in_the_process(libcuda: Path, tmp_path: Path) -> None:
    """CUDA would not work in workers that are forked later, and would not read CUDA_VISIBLE_DEVICES again."""
    log = tmp_path / "log"
    code = "import os; from vpr.common.gpus import list_gpus; assert list_gpus().gpus; print(os.getpid())"
    child = run_with(libcuda, code, FAKE_CUDA_LOG=str(log))
    started = [line.split() for line in log.read_text().splitlines()]
    assert [name for name, _ in started if name == "cuInit"] == ["cuInit"]
    assert child.stdout.strip() not in {process for _, process in started}


def test_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(gpus.ctypes, "CDLL", fail)
    monkeypatch.setattr("shutil.which", lambda name: None)
    gpus._list_gpus.cache_clear()
    assert gpus._list_gpus(None, None) == Listing(problem="has none")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    gpus._list_gpus.cache_clear()
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in gpus._list_gpus(None, None).problem
    gpus._list_gpus.cache_clear()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of the user's choice, which nvidia-smi numbers 3 and 2."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    both = tuple(VisibleGpu(name, "8.9", 1 << 34, f"000{index}-a") for index, name in enumerate(("L4", "L40")))
    monkeypatch.setattr(gpus, "list_gpus", lambda: Listing(both, "13.0", "580.1"))


@pytest.mark.parametrize(
    ("device", "visible"),
    [("0", "3"), ("1", "2"), ("GPU-0001-a", "GPU-0001-a"), ("MIG-0000-a", "MIG-0000-a"), ("cpu", "")],
)
@pytest.mark.usefixtures("two")
def test_device_leaves_one_gpu_visible(device: str, visible: str) -> None:
    select_device(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.usefixtures("two")
def test_index_is_kept_without_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    select_device("1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize("device", ["2", "-1", "GPU-0009-a", "cuda", "1.0"])
@pytest.mark.usefixtures("two")
def test_missing_device_is_an_error(device: str) -> None:
    with pytest.raises(UserError, match=rf"^device: expected cpu or one of 0 \(L4\), 1 \(L40\), got '{device}'\.$"):
        select_device(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,2"


@pytest.mark.usefixtures("two")
def test_each_process_of_torchrun_sees_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for _ in range(2):  # a second call changes nothing
        select_gpu_of_rank()
        assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"]) == ("2", "0")


@pytest.mark.usefixtures("two")
def test_more_processes_than_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="torchrun started a process 2 for 2 GPUs. Lower --nproc-per-node"):
        select_gpu_of_rank()


def test_device_of_torchrun_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"^device: torchrun gives each process its own GPU\. Remove --device"):
        select_device("0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "latency", "--models", "a", "--output", "b", "--device", "0"], "device: there is no GPU '0'; this"),
        (["bench", "latency", "--device", "--models", "a", "--output", "b"], "device: no value given."),
        (["catalog", "--root", "a", "--output", "b", "--device", "0"], "--device: unknown option."),
    ],
)
def test_device_option_is_checked(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "list_gpus", lambda: Listing(problem="has none"))
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vpr: error: {message}")


def test_device_reaches_the_libraries(libcuda: Path, tmp_path: Path) -> None:
    """The command fails later; the GPU has been chosen before."""
    code = (
        "import os\nfrom vpr.cli import run\n"
        f"try: run(['student', 'embed', '--model', 'a', '--catalog', 'b', '--output', {str(tmp_path / 'c')!r}, "
        "'--device=1'])\n"
        "except Exception as error: print(error)\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    child = run_with(libcuda, code, FAKE_CUDA_GPUS=TWO)
    assert child.stdout.splitlines()[-1] == "1", child.stderr


class Nvml:
    """``libnvidia-ml.so.1`` with one MIG instance."""

    def nvmlDeviceGetHandleByUUID(self, name: bytes, device: Any) -> int:  # noqa: N802
        device._obj.value = 5
        return 0 if name == b"MIG-0001" else 6

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.used = 3 << 30
        return 0 if device.value == 5 else 1

    def nvmlDeviceGetClockInfo(self, device: Any, kind: int, clock: Any) -> int:  # noqa: N802
        clock._obj.value = 1200
        return int(kind != 1)

    def nvmlDeviceGetMaxClockInfo(self, device: Any, kind: int, clock: Any) -> int:  # noqa: N802
        return 3  # not supported

    def nvmlDeviceGetEnforcedPowerLimit(self, device: Any, limit: Any) -> int:  # noqa: N802
        limit._obj.value = 700_000
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Any, reasons: Any) -> int:  # noqa: N802
        reasons._obj.value = 0x1 | 0x4 | 0x20  # idle, power cap, thermal
        return 0


def test_memory_and_clocks_are_read_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = VisibleGpu("NVIDIA H200 MIG", "9.0", 1 << 35, "0001")
    monkeypatch.setattr(gpus, "_nvml", Nvml)
    assert gpu_memory_used(gpu) == 3 << 30
    assert read_clocks(gpu) == {
        "sm_clock_mhz": 1200,
        "power_limit_w": 700.0,
        "throttled": ["power cap", "thermal slowdown"],
    }
    monkeypatch.setattr(gpus, "_nvml", lambda: None)
    assert gpu_memory_used(gpu) is None
    assert read_clocks(gpu) == {}


def test_driver_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(text: Any, size: Any) -> int:
        text.value = b"580.95.05"
        return 0

    nvml = SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlSystemGetDriverVersion=version)
    assert cuda_probe.driver_version(nvml) == "580.95.05"
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC 13.3.0\n")
    monkeypatch.setattr(cuda_probe, "_KERNEL_DRIVER", file)
    assert cuda_probe.driver_version(None) == "570.86.15"
    file.unlink()
    assert cuda_probe.driver_version(SimpleNamespace(nvmlInit_v2=lambda: 9)) is None


def test_nvml_calls_are_those_of_the_header() -> None:
    """The names and the number of arguments, as ``cuda-bindings`` declares them."""
    declarations = Path(pytest.importorskip("cuda.bindings").__file__).with_name("cynvml.pxd").read_text()
    for name, count in (
        ("nvmlDeviceGetHandleByUUID", 2),
        ("nvmlDeviceGetMemoryInfo_v2", 2),
        ("nvmlDeviceGetClockInfo", 3),
        ("nvmlDeviceGetMaxClockInfo", 3),
        ("nvmlDeviceGetEnforcedPowerLimit", 2),
        ("nvmlDeviceGetCurrentClocksEventReasons", 2),
        ("nvmlSystemGetDriverVersion", 2),
    ):
        found = re.search(rf"nvmlReturn_t {name}\((.*?)\) except", declarations)
        assert found is not None, name
        assert len(found.group(1).split(",")) == count
    assert ctypes.sizeof(ctypes.c_ulonglong) * 3 == 24  # nvmlMemory_t: total, free, used
