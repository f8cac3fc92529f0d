from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.config import EngineConfig, OnnxConfig
from export.tensorrt.bindings import import_tensorrt
from export.tensorrt.build import build_engine
from export.tensorrt.timing_cache import TimingCache
from export.to_onnx import export_onnx
from tests.export.tensorrt.recorded import VERSION
from vpr.artifacts.replace import lock_path
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.common.gpus import Listing, VisibleGpu
from vpr.common.locks import file_lock

L4, H200 = VisibleGpu("NVIDIA L4", "8.9", 1 << 34, "a"), VisibleGpu("NVIDIA H200", "9.0", 1 << 37, "b")
L4_FILE = "timings-sm89-nvidia-l4-tensorrt-11-4-0-106.cache"


class Cache:
    """TensorRT's timing cache: bytes of its version, and one more for each build."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class BuilderConfig:
    """Configuration of TensorRT-RTX with the timing cache of a TensorRT version."""

    def __init__(self, config: Any, version: str, loaded: list[bytes]) -> None:
        self.__dict__.update(config=config, header=f"{version}:".encode(), loaded=loaded)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.config, name, value)

    def create_timing_cache(self, content: bytes) -> Cache:
        return Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.__dict__["cache"] = cache
        if cache.content and not cache.content.startswith(self.header):
            return False
        self.loaded.append(cache.content)
        return True

    def get_timing_cache(self) -> Cache:
        return Cache((self.cache.content or self.header) + b"+")


class Machine:
    """A machine with GPUs and a TensorRT: TensorRT-RTX's parser, and plans without content."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.version, self.loaded, self.builds = VERSION, list[bytes](), 0
        self._patch = monkeypatch
        self.insert(L4)
        monkeypatch.setattr("export.tensorrt.build.import_tensorrt", lambda backend: self.module())

    def insert(self, *gpus: VisibleGpu) -> None:
        for module in ("bindings", "timing_cache"):
            self._patch.setattr(f"export.tensorrt.{module}.list_gpus", lambda: Listing(gpus))

    def module(self) -> SimpleNamespace:
        real, machine = import_tensorrt("tensorrt-rtx"), self

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.builder = real.Builder(logger)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.builder, name)

            def create_builder_config(self) -> BuilderConfig:
                return BuilderConfig(self.builder.create_builder_config(), machine.version, machine.loaded)

            def build_serialized_network(self, network: Any, config: BuilderConfig) -> bytes:
                machine.builds += 1
                return b"plan"

        return SimpleNamespace(**{**vars(real), "Builder": Builder, "__version__": self.version})

    def build(self, graph: Path, output: Path, **options: Any) -> Path:
        return build_engine(EngineConfig(str(graph), str(output), "tensorrt", **options))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture(scope="module")
def graph(student_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("timings") / "fp16"
    return export_onnx(OnnxConfig(str(student_artifact), str(output), precision="fp16"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_builds_next_to_each_other_share_their_timings(machine: Machine, graph: Path, tmp_path: Path) -> None:
    machine.build(graph, tmp_path / "first")
    machine.build(graph, tmp_path / "second", opt_batch=4)
    header = f"{VERSION}:".encode()
    assert machine.loaded == [b"", header + b"+"]
    assert (tmp_path / L4_FILE).read_bytes() == header + b"++"
    assert names(tmp_path) == ["first", "second", L4_FILE]
    card = load_artifact(tmp_path / "first").card
    assert (card.config["timing_cache"], card.metrics["targets"]) == ("", ["sm89"])  # as in older cards
    machine.build(graph, tmp_path / "first")
    assert machine.builds == 2


def test_gpus_and_versions_share_no_timings(machine: Machine, graph: Path, tmp_path: Path) -> None:
    machine.build(graph, tmp_path / "l4")
    machine.insert(H200, L4)  # TensorRT builds for the first one
    machine.build(graph, tmp_path / "h200")
    machine.version = "11.4.1.5"
    machine.build(graph, tmp_path / "newer")
    files = [L4_FILE, *(f"timings-sm90-nvidia-h200-tensorrt-{version}.cache" for version in ("11-4-0-106", "11-4-1-5"))]
    assert machine.loaded == [b""] * 3
    assert names(tmp_path) == sorted(["h200", "l4", "newer", *files])


@pytest.mark.parametrize(("options", "gpus"), [({"timing_cache": "none"}, [L4]), ({}, [])])
def test_no_file_if_not_wanted_or_the_gpu_is_unknown(
    machine: Machine, graph: Path, tmp_path: Path, options: dict[str, Any], gpus: list[VisibleGpu]
) -> None:
    machine.insert(*gpus)
    machine.build(graph, tmp_path / "engine", **options)
    assert names(tmp_path) == ["engine"]
    assert machine.loaded == []


def test_default_file_that_tensorrt_rejects_is_replaced(
    machine: Machine, graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / L4_FILE).write_bytes(b"of another CUDA")
    machine.build(graph, tmp_path / "engine")
    assert (
        f"warning: {tmp_path / L4_FILE}: timings of another GPU or version, measured again" in capsys.readouterr().err
    )
    assert (tmp_path / L4_FILE).read_bytes() == f"{VERSION}:+".encode()


def test_named_file_is_used_alone_and_never_replaced(machine: Machine, graph: Path, tmp_path: Path) -> None:
    named = tmp_path / "mine"
    machine.build(graph, tmp_path / "engine", timing_cache=str(named))
    assert names(tmp_path) == ["engine", "mine"]
    named.write_bytes(b"of another CUDA")
    with pytest.raises(
        UserError, match="mine: not a timing cache of this GPU and TensorRT version. Name another file."
    ):
        machine.build(graph, tmp_path / "other", timing_cache=str(named))
    assert names(tmp_path) == ["engine", "mine"]
    assert named.read_bytes() == b"of another CUDA"


def test_full_disk_costs_the_timings_and_not_the_engine(
    machine: Machine, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("export.tensorrt.timing_cache.atomic_write", full)
    machine.build(graph, tmp_path / "engine")
    assert f"{L4_FILE}: the kernel timings were not kept (No space left on device)" in capsys.readouterr().err
    assert names(tmp_path) == ["engine"]
    with pytest.raises(OSError, match="No space left"):
        machine.build(graph, tmp_path / "other", timing_cache=str(tmp_path / "mine"))


def test_tensorrt_rtx_gets_no_timing_cache(machine: Machine, tmp_path: Path) -> None:
    """It would look for a GPU at build time."""
    assert TimingCache.find(EngineConfig("a", str(tmp_path / "b")), "tensorrt-rtx", "1.7.1") is None


_WRITER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from export.tensorrt.timing_cache import TimingCache

cache = SimpleNamespace(serialize=lambda: b"of the second build")
print("ready", flush=True)
TimingCache(Path(sys.argv[1]), False).save(SimpleNamespace(get_timing_cache=lambda: cache))
"""


def test_builds_that_end_together_write_in_turn(tmp_path: Path) -> None:
    """Both would otherwise write the same unfinished file."""
    path = tmp_path / L4_FILE
    with file_lock(lock_path(path)):
        command = [sys.executable, "-c", _WRITER, str(path)]
        writer = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(1)
        assert not path.exists()
    assert writer.communicate(timeout=60) == ("", "")
    assert writer.returncode == 0
    assert path.read_bytes() == b"of the second build"
    assert names(tmp_path) == [L4_FILE]
