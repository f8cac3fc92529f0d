from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from experiments.figures import ROOT
from export.backends.registry import models_of
from export.backends.tensorrt_engine import EngineBackend
from export.tensorrt.cuda_driver import Gpu
from tests.export.tensorrt.recorded import VERSION, Context, RecordedDriver, Trt, expected, images
from vpr.artifacts.store import Artifact
from vpr.artifacts.writer import write_artifact


class Machine:
    """A machine with a GPU and TensorRT-RTX, which compiles a kernel for each batch size that its cache lacks."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.gpu, self.version = Gpu("NVIDIA L4", "sm89"), VERSION
        self.driver = RecordedDriver()
        self.compiled: list[int] = []
        execute = Context.execute_async_v3

        def compile_and_execute(context: Context, handle: int) -> bool:
            assert context.shape is not None
            kernel, cache = f"[{context.shape[0]}]".encode(), getattr(context.settings, "cache", None)
            if cache is not None and kernel not in cache.content:
                self.compiled.append(context.shape[0])
                cache.content += kernel
            return execute(context, handle)

        patch.setattr(Context, "execute_async_v3", compile_and_execute)
        patch.setattr(EngineBackend, "missing", lambda backend: None)
        patch.setattr("export.tensorrt.runner.open_driver", lambda device: self.driver)
        module = "export.tensorrt.runner.import_tensorrt"
        patch.setattr(module, lambda backend: Trt(self.driver, self.version, needs_scratch=False))

    def embed(self, artifact: Artifact, *batches: int) -> list[int]:
        """Embed as a command does; return the batch sizes whose kernels were compiled."""
        self.driver, self.compiled = RecordedDriver(self.gpu.architecture), []
        self.driver.gpu = self.gpu
        (model,) = models_of(artifact.path)
        forward = model.open(1)
        for batch in batches:
            np.testing.assert_allclose(forward(images(batch)), expected(images(batch)), rtol=1e-6)
        del forward  # the engine is closed, without a search for cycles
        assert not self.driver.memory
        return self.compiled


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VPR_KERNEL_CACHE", raising=False)
    return tmp_path / "cache" / "visual-product-recognition" / "kernels"


@pytest.fixture
def engine(write: Callable[..., Artifact]) -> Artifact:
    return write(("sm89",), backend="tensorrt-rtx")


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_runs_of_commands_share_compiled_kernels(machine: Machine, folder: Path, engine: Artifact) -> None:
    assert machine.embed(engine, 2, 1) == [2, 1]
    (file,) = files(folder)
    digest = engine.card.files["engine.plan"].sha256
    assert file.name == f"kernels-sm89-nvidia-l4-tensorrt-rtx-11-4-0-106-{digest}.cache"
    assert file.read_bytes() == b"rtx:[2][1]"
    assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    written = file.stat().st_ino
    assert machine.embed(engine, 1, 2) == []
    assert file.stat().st_ino == written  # nothing was compiled, so nothing is written
    assert machine.embed(engine, 1, 3) == [3]
    assert file.read_bytes() == b"rtx:[2][1][3]"
    assert files(folder) == [file]


def test_other_engines_gpus_and_versions_share_no_kernels(
    machine: Machine, folder: Path, engine: Artifact, tmp_path: Path
) -> None:
    with write_artifact(tmp_path / "other", "engine", engine.card.config) as draft:
        (draft.path / "engine.plan").write_bytes(b"other plan")
        draft.metrics = engine.card.metrics
    other = Artifact(tmp_path / "other", engine.card, "")
    assert machine.embed(engine, 2) == machine.embed(other, 2) == [2]
    machine.gpu = Gpu("NVIDIA L40S", "sm89")
    assert machine.embed(engine, 2) == [2]
    with write_artifact(tmp_path / "newer", "engine", {**engine.card.config, "builder_version": "11.5.0.1"}) as draft:
        (draft.path / "engine.plan").write_bytes(b"plan" * 100)
        draft.metrics = engine.card.metrics
    machine.version = "11.5.0.1"
    assert machine.embed(Artifact(tmp_path / "newer", engine.card, ""), 2) == [2]
    assert len(files(folder)) == 4


def test_tensorrt_has_no_file(machine: Machine, folder: Path, write: Callable[..., Artifact]) -> None:
    assert machine.embed(write(("sm89",)), 2) == []
    assert not folder.exists()


_PROCESS = """
import sys
from export.tensorrt import runner
from export.tensorrt.kernel_cache import AUTO
from tests.export.tensorrt.recorded import RecordedDriver, Trt, images
from vpr.artifacts.store import load_artifact

driver = RecordedDriver("sm89")
runner.open_driver = lambda device: driver
runner.import_tensorrt = lambda backend: Trt(driver, needs_scratch=False)
engine = runner.start_engine(load_artifact(sys.argv[1]), kernel_cache=AUTO)
engine(images(2))
sys.exit(2)
"""


@pytest.mark.slow
def test_kernels_are_kept_when_a_command_ends(folder: Path, engine: Artifact) -> None:
    """Commands close no engine."""
    command = [sys.executable, "-c", _PROCESS, str(engine.path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (2, "")
    (file,) = files(folder)
    assert file.read_bytes() == b"rtx:"


@pytest.mark.parametrize("case", ["unwritable", "open to others", "of a previous driver"])
def test_unusable_folder_costs_the_kernels_only(
    machine: Machine, folder: Path, engine: Artifact, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine.embed(engine, 2) == [2]
    (file,) = files(folder)
    before = file.read_bytes()
    if case == "unwritable":  # for root too
        folder.rename(folder.with_name("moved"))
        folder.write_bytes(b"")
        warning, before = f"{folder}: the compiled kernels were not kept (File exists)", b""
        file = folder
    elif case == "open to others":
        folder.chmod(0o777)
        warning = f"{folder}: the compiled kernels were not kept (other users can write there)"
    else:
        file.write_bytes(b"rejected")
        warning = f"{file}: kernels of another GPU or version, compiled again"
    for _ in range(1 if case == "of a previous driver" else 2):
        assert machine.embed(engine, 2) == [2]
        assert file.read_bytes() == before
        error = capsys.readouterr().err
        assert warning in error
        assert error.count("\n") == 1
        assert ("Set VPR_KERNEL_CACHE to a folder of yours, or to none." in error) == ("not kept" in error)


def test_variable_moves_and_disables_the_folder(
    machine: Machine, folder: Path, engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VPR_KERNEL_CACHE", str(tmp_path / "mine"))
    assert [machine.embed(engine, 2), machine.embed(engine, 2)] == [[2], []]
    assert len(files(tmp_path / "mine")) == 1
    monkeypatch.setenv("VPR_KERNEL_CACHE", "none")
    assert [machine.embed(engine, 2), machine.embed(engine, 2)] == [[2], [2]]
    assert not folder.exists()


def test_home_folder_is_the_default_and_may_be_missing(
    machine: Machine, folder: Path, engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: it is ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert [machine.embed(engine, 2), machine.embed(engine, 2)] == [[2], []]
    assert len(files(tmp_path / "home" / ".cache" / "visual-product-recognition" / "kernels")) == 1

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    assert machine.embed(engine, 2) == [2]


def test_files_that_were_not_used_for_longest_leave_a_full_folder(
    machine: Machine, folder: Path, engine: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine.embed(engine, 2) == [2]
    (file,) = files(folder)
    for age, name in ((5, "kernels-oldest.cache"), (3, "kernels-old.cache"), (9, "of-the-user")):
        (folder / name).write_bytes(bytes(60))
        os.utime(folder / name, (1000 - age, 1000 - age))
    os.utime(file, (1, 1))
    monkeypatch.setattr("export.tensorrt.kernel_cache._MAX_BYTES", 100)
    assert machine.embed(engine, 2) == []  # a use without a write removes nothing
    assert len(files(folder)) == 4
    machine.gpu = Gpu("NVIDIA L40S", "sm89")
    assert machine.embed(engine, 2) == [2]
    names = [path.name.partition("-tensorrt")[0] for path in files(folder)]
    assert names == ["kernels-old.cache", "kernels-sm89-nvidia-l4", "kernels-sm89-nvidia-l40s", "of-the-user"]
