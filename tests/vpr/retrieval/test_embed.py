from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from student.embed import EmbedConfig, embed_catalog
from student.model import load_student
from tests.vpr.data.test_webdataset import build, write_shards
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import load_catalog
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import embed, load_embeddings, read_batches, torch_forward

KILLED = """
import sys
from tests.reliability.faults.injection import before_file, die
from vpr.cli import main
before_file(4, "*/part-*.npy", die)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, texture_folder: Path) -> Path:
    """A catalogue of four shards."""
    folder = tmp_path_factory.mktemp("shards")
    build(write_shards(folder / "shards", texture_folder, 32), folder / "catalog")
    return folder / "catalog"


def command(model: Path, catalog: Path, output: Path, *flags: str) -> list[str]:
    verb = ["student", "embed", "--model", str(model), "--catalog", str(catalog), "--output", str(output)]
    return ["-m", "vpr", *verb, "--batch-size", "8", "--images-per-part", "10", *flags]


def run(arguments: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process with one thread, so that sums have the same order in every process."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=check,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, student_artifact: Path, shards: Path) -> Path:
    output = tmp_path_factory.mktemp("one") / "vectors"
    run(command(student_artifact, shards, output))
    return output


def is_same(*paths: Path) -> bool:
    """Return whether two artifacts have bit-equal files, the same configuration and the same parents."""
    first, second = (load_artifact(path, "embeddings").card for path in paths)
    return (first.files, first.config, first.parents) == (second.files, second.config, second.parents)


def test_parts_do_not_change_the_vectors(student_artifact: Path, shards: Path, tmp_path: Path) -> None:
    model, artifact = load_student(str(student_artifact))
    assert artifact.card.preprocess is not None
    expected = embed(load_catalog(shards), artifact.card.preprocess, torch_forward(model), 8)
    outputs = []
    for images_per_part, threads in ((1 << 20, 0), (10, 3)):
        output = tmp_path / f"{images_per_part}"
        embed_catalog(EmbedConfig(str(student_artifact), str(shards), str(output), "", 8, threads, images_per_part))
        assert np.array_equal(load_embeddings(output).vectors, expected)
        outputs.append(output)
    assert is_same(*outputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "1048576"]


@pytest.mark.slow
def test_killed_embedding_resumes_at_next_part(
    student_artifact: Path, shards: Path, one_process: Path, tmp_path: Path
) -> None:
    output = tmp_path / "vectors"
    arguments = command(student_artifact, shards, output)
    killed = run(["-c", KILLED, *arguments[2:]], check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists()
    assert len(list(tmp_path.glob("vectors.run-*/part-*.npy"))) == 3
    resumed = run(arguments)
    assert "resuming, 3 of 8 parts are done" in resumed.stderr
    assert resumed.stderr.count("  part ") == 5
    assert is_same(output, one_process)
    assert "up to date" in run(command(student_artifact, shards, output)).stderr


def test_parts_of_another_job_are_ignored(student_artifact: Path, shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "vectors.run-0123456789ab"
    other.mkdir()
    np.save(other / "part-000000.npy", np.zeros((128, 32), np.float32))
    config = EmbedConfig(str(student_artifact), str(shards), str(tmp_path / "vectors"))
    assert np.linalg.norm(load_embeddings(embed_catalog(config)).vectors) > 0


@pytest.mark.slow
def test_torchrun_equals_one_process(student_artifact: Path, shards: Path, one_process: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, *command(student_artifact, shards, tmp_path / "vectors")])
    assert is_same(tmp_path / "vectors", one_process)
    assert done.stderr.count("  part ") == 4  # only the first process logs
    run([*torchrun, *command(student_artifact, shards, tmp_path / "vectors")])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: make scale")
def test_ray_equals_one_process(student_artifact: Path, shards: Path, one_process: Path, tmp_path: Path) -> None:
    run(command(student_artifact, shards, tmp_path / "vectors", "--ray", "2"))
    assert is_same(tmp_path / "vectors", one_process)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_missing_ray_is_reported(student_artifact: Path, shards: Path, tmp_path: Path) -> None:
    config = EmbedConfig(str(student_artifact), str(shards), str(tmp_path / "vectors"), ray=2)
    with pytest.raises(UserError, match=r"ray: not installed\. Run `pip install -r requirements-scale\.txt`"):
        embed_catalog(config)


def test_decoding_threads_keep_the_order(shards: Path) -> None:
    catalog, preprocess = load_catalog(shards), Preprocess(size=32)
    batches = [list(read_batches(catalog, preprocess, 9, threads)) for threads in (0, 4)]
    assert np.array_equal(np.concatenate(batches[0]), np.concatenate(batches[1]))
    assert [len(batch) for batch in batches[1]] == [9] * 14 + [2]


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("threads", -1), ("images_per_part", 0), ("ray", -1)])
def test_values_out_of_range_are_rejected(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"^{name}: .*{value}"):
        EmbedConfig("m", "c", "o", **{name: value})  # type: ignore[arg-type]


def test_output_that_is_an_input_is_rejected(student_artifact: Path, shards: Path) -> None:
    with pytest.raises(UserError, match="is also the input 'model'"):
        embed_catalog(EmbedConfig(str(student_artifact), str(shards), str(student_artifact)))
