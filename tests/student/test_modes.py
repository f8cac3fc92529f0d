"""Whole distillations: every mode, resumed, in two processes, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.demo.interrupted import interrupt
from experiments.student.epoch import epoch_figures
from student import teacher_cache as signal
from student.config import DimensionConfig, DistillConfig, LossConfig, QuantiseConfig, StudentConfig, TargetsConfig
from student.distill import distill
from student.model import load_student
from student.teacher_cache import build_teacher_cache
from student.teacher_model import load_teacher_model
from tests.student.conftest import STUDENT
from vpr.artifacts.run_folder import is_written
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError
from vpr.common.flags import to_flags
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.imaging.config import ViewConfig
from vpr.training.config import RunConfig

LOGITS = LossConfig(cosine=0.0, similarity_kl=0.0, logits=1.0)
ONLINE, MIXED = TargetsConfig(mode="online"), TargetsConfig(mode="online", mixup=0.5)
SHORT: dict[str, Any] = {"epochs": 1, "signal": TargetsConfig(views=1, bank=32)}


def made(config: DistillConfig, folder: Path, **changes: Any) -> Artifact:
    path = distill(replace(config, **{**SHORT, **changes, "output": str(folder / "student")}))
    assert path is not None
    return load_artifact(path, "student")


def log(artifact: Artifact, name: str) -> list[float]:
    with artifact.file("metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


@pytest.mark.parametrize(
    "losses",
    [
        LossConfig(mse=1.0, affinity=1.0, rkd_distance=1.0, rkd_angle=2.0, contrastive=1.0, margin=0.1),
        LossConfig(cosine=0.0, similarity_kl=0.0, logits=1.0),
        LossConfig(cosine=0.0, similarity_kl=0.0, margin=1.0),
    ],
    ids=["all", "logits", "labels"],
)
def test_every_loss_trains_and_is_logged(losses: LossConfig, config: DistillConfig, tmp_path: Path) -> None:
    artifact = made(config, tmp_path, losses=losses, epochs=3)
    for name in losses.weights():
        values = log(artifact, f"{name}_epoch")
        assert len(values) == 3
        assert values[-1] < values[0] or name == "margin", name  # the margin grows
    assert (tmp_path / "student-views").exists() == losses.needs_teacher
    load_student(tmp_path / "student")  # heads and wrappers are no part of it


def test_online_with_mixup_and_average(config: DistillConfig, tmp_path: Path) -> None:
    run = RunConfig(precision="32-true", ema=0.8)
    artifact = made(config, tmp_path, signal=TargetsConfig(mode="online", bank=32, mixup=0.4), epochs=6, run=run)
    losses = log(artifact, "cosine_epoch")
    assert losses[-1] < 0.8 * losses[0]
    assert not (tmp_path / "student-views").exists()


@pytest.mark.parametrize("method", ["pca", "cosine", "projector"])
@pytest.mark.parametrize("mode", ["cached", "online"])
def test_a_smaller_dimension(
    method: Any, mode: Any, config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = made(
        config,
        tmp_path,
        model=replace(STUDENT, embedding_dim=24),
        dimension=DimensionConfig(method, steps=20),
        signal=TargetsConfig(mode=mode, views=1, bank=32),
    )
    assert artifact.card.embedding is not None
    assert artifact.card.embedding.dim == 24
    assert "dimension:" in capsys.readouterr().err
    assert ("projection.safetensors" in artifact.card.files) == (method != "projector")
    if method != "projector":
        loss = artifact.card.metrics["projected_teacher_val_recall_at_1"]
        assert 0 <= loss <= artifact.card.metrics["teacher_val_recall_at_1"] + 0.1
        assert load_file(artifact.file("projection.safetensors"))["projection"].shape == (256, 24)
    model, _ = load_student(tmp_path / "student")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 24)


def test_an_assistant_gives_the_signal(student: Path, config: DistillConfig, tmp_path: Path) -> None:
    small = replace(STUDENT, dim=32, heads=1, mlp_dim=48, embedding_dim=0)
    artifact = made(config, tmp_path, assistant=str(student), model=small)
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "assistant", "catalog"}
    signal = load_artifact(tmp_path / "student-views")
    assert signal.card.parents[0].sha256 == load_artifact(student).sha256


def test_a_start_from_a_larger_student(
    student: Path, config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = made(config, tmp_path, start=str(student), model=replace(STUDENT, dim=32, heads=1, mlp_dim=64))
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "start", "catalog"}
    # The stem's first convolutions have a least width, which both reach.
    share = int(capsys.readouterr().err.split("% of the student's parameters are selected")[0].split()[-1])
    assert share > 90


def test_a_cache_goes_on_where_it_was_left(
    teacher: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import student.teacher_cache as signal

    source = load_teacher_model(teacher)
    training, config = catalog.select(split="train"), TargetsConfig(views=2, shard=24)
    path, embed = str(tmp_path / "views"), signal._embed_view
    calls = []

    def counted(*arguments: Any) -> np.ndarray:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(arguments[4].name)
        return embed(*arguments)

    monkeypatch.setattr(signal, "_embed_view", counted)
    with pytest.raises(KeyboardInterrupt):
        build_teacher_cache(path, source, training, ViewConfig(), config, 0)
    assert not (tmp_path / "views").exists()
    first, calls = calls, []
    broken = build_teacher_cache(path, source, training, ViewConfig(), config, 0)
    assert sorted(first + calls) == sorted({*first, *calls})  # no file twice
    assert len(first + calls) == 6
    monkeypatch.setattr(signal, "_embed_view", embed)
    whole = build_teacher_cache(str(tmp_path / "whole"), source, training, ViewConfig(), config, 0)
    assert broken.artifact.card.files == whole.artifact.card.files
    assert not list(tmp_path.glob("*.run-*"))


def arguments(config: DistillConfig) -> list[str]:
    shape = {name: getattr(STUDENT, name) for name in ("image_size", "dim", "depth", "heads", "dim_head", "mlp_dim")}
    flags = ["--teacher", config.teacher, "--catalog", config.catalog, "--run.precision", "32-true"]
    flags += to_flags(DistillConfig, {"model": {**shape, "stem": "conv"}})
    return [*flags, "--run.validate-every", "2", "--run.ema", "0.8"]


@pytest.mark.parametrize("asked", [{"views": 2, "bank": 32}, {"mode": "online", "bank": 32, "mixup": 0.5}])
def test_a_killed_distillation_resumes_to_the_unbroken_result(
    asked: dict[str, Any], config: DistillConfig, tmp_path: Path
) -> None:
    flags = [*arguments(config), "--epochs", "8", "--loader.batch-size", "16"]
    flags += to_flags(DistillConfig, {"signal": asked})
    both = interrupt("student distill", flags, tmp_path, epochs=8)
    assert both.resumed.card.metrics["steps"] == both.unbroken.card.metrics["steps"]
    assert both.resumed.card.files["model.safetensors"] == both.unbroken.card.files["model.safetensors"]  # bit-equal
    # The best epoch may have come before the kill: what was trained after it shows in the logs, digit for digit.
    names = ("epoch", "step", "cosine_epoch", "similarity_kl_epoch", "val_recall_at_1", "val_map")
    with both.unbroken.file("metrics.csv").open() as stream:
        whole = {tuple(row[name] for name in names) for row in csv.DictReader(stream)}
    with both.resumed.file("metrics-resumed-1.csv").open() as stream:
        rest = {tuple(row[name] for name in names) for row in csv.DictReader(stream)}
    assert {row[0] for row in rest} >= {"6", "7"}
    assert any(row[2] for row in rest)
    assert rest <= whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs: 0: give 1 or more"),
        ({"lr": float("nan")}, r"lr: nan: give 0 to 10"),
        ({"seed": -1}, r"seed: -1: give 0 or more"),
        ({"run": RunConfig(strategy="fsdp")}, r"run\.strategy: a student fits on one device"),
        ({"quantise": QuantiseConfig("x")}, r"quantise\.ranges: finishes a trained student"),
        ({"cache": "a", "output": "./a"}, r"cache: a is the output"),
        ({"signal": MIXED, "losses": LossConfig(margin=0.1)}, r"signal\.mixup: a mixed image has no one label"),
        ({"signal": ONLINE, "losses": LOGITS}, r"losses\.logits: .* set signal\.mode to cached"),
        ({"dimension": DimensionConfig("pca"), "losses": LOGITS}, r"losses\.logits: .* set dimension\.method to none"),
        ({"unlabelled": ("more",), "losses": LOGITS}, r"losses\.logits: .* leave unlabelled out"),
        ({"loader": LoaderConfig(1), "losses": LossConfig(affinity=1.0)}, r"loader\.batch_size: 1: affinity relates"),
    ],
)
def test_wrong_values_are_refused_by_key(changes: dict[str, Any], message: str, config: DistillConfig) -> None:
    with pytest.raises(UserError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetsConfig(mixup=0.2), r"signal\.mixup: a mixed image cannot be looked up: set signal\.mode"),
        (lambda: TargetsConfig(mode="online", mixup=0.001), r"signal\.mixup: 0\.001: give 0 \(none\), or 0\.05 to"),
        (lambda: TargetsConfig(views=0), r"signal\.views: 0: give 1 to"),
        (lambda: DimensionConfig(steps=0), r"dimension\.steps: 0: give 1 to"),
        (lambda: StudentConfig(preset="huge"), r"model\.preset: 'huge': choose from"),  # type: ignore[arg-type]
    ],
)
def test_wrong_parts_are_refused_by_key(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_nothing_finished_is_harmed(student: Path, config: DistillConfig, teacher: Path) -> None:
    before = load_artifact(student).sha256
    with pytest.raises(UserError, match="is the start and would be replaced"):
        distill(replace(config, output=str(student), start=str(student), epochs=1))
    with pytest.raises(UserError, match="model.embedding_dim: 300 is more than the teacher's 256"):
        distill(replace(config, model=replace(STUDENT, embedding_dim=300), dimension=DimensionConfig("pca"), epochs=1))
    assert load_artifact(student).sha256 == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loader": LoaderConfig(65)}, r"loader\.batch_size: 65 is more than the 64"),
        ({"losses": LOGITS, "model": replace(STUDENT, family="small-data", stem="patch")}, r"losses\.logits: .* 'vit'"),
        ({"run": RunConfig(tracker="wandb")}, r"run\.tracker: wandb is not installed"),
        (
            {"dimension": DimensionConfig("pca"), "model": replace(STUDENT, embedding_dim=200)},
            r"model\.embedding_dim: 200 directions cannot be fitted on 64",
        ),
        ({"unlabelled": ("nowhere",)}, r"unlabelled: nowhere: .*: name a folder of images"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_what_cannot_be_trained_is_refused_before_the_teacher_is_asked(
    dry: bool,
    changes: dict[str, Any],
    message: str,
    config: DistillConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vpr.training.loggers.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=message):
        distill(replace(config, **{"output": str(tmp_path / "s"), "dry_run": dry, **changes}))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_something_else_is_refused_at_once(config: DistillConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a teacher artifact, a views would replace it"):
        distill(replace(config, output=str(tmp_path / "s"), cache=config.teacher))


def test_a_file_that_was_cut_short_is_made_again(
    teacher: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = load_teacher_model(teacher)
    training, chosen = catalog.select(split="train"), TargetsConfig(views=2)
    embed, calls = signal._embed_view, []

    def once(*arguments: Any) -> np.ndarray:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return embed(*arguments)

    monkeypatch.setattr(signal, "_embed_view", once)
    with pytest.raises(KeyboardInterrupt):
        build_teacher_cache(str(tmp_path / "views"), source, training, ViewConfig(), chosen, 0)
    (finished,) = tmp_path.glob("views.run-*/view-*.npy")
    finished.write_bytes(finished.read_bytes()[:5000])
    monkeypatch.setattr(signal, "_embed_view", embed)
    again = build_teacher_cache(str(tmp_path / "views"), source, training, ViewConfig(), chosen, 0)
    whole = build_teacher_cache(str(tmp_path / "whole"), source, training, ViewConfig(), chosen, 0)
    assert again.artifact.card.files == whole.artifact.card.files


def test_other_processes_wait_for_the_very_cache(teacher: Path, catalog: Catalog, tmp_path: Path) -> None:
    """They go by configuration and parents: a stale cache of another teacher may lie there still."""
    source = load_teacher_model(teacher)
    training, path = catalog.select(split="train"), str(tmp_path / "views")
    found = build_teacher_cache(path, source, training, ViewConfig(), TargetsConfig(views=1), 0).artifact
    config = {**found.card.config, "views": asdict(ViewConfig())}  # tuples, which the card has as lists
    assert is_written(path, config, found.card.parents)
    assert not is_written(path, {**config, "seed": 1}, found.card.parents)
    assert not is_written(path, config, [source.artifact.as_parent("other")])
    assert not is_written(str(tmp_path / "none"), config, found.card.parents)
    (tmp_path / "none").mkdir()
    for half in ("[]", "{}", "[" * 100_000):
        (tmp_path / "none" / "card.json").write_text(half)
        assert not is_written(str(tmp_path / "none"), config, found.card.parents)


def test_an_unknown_start_is_passed_on(config: DistillConfig, teacher: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(teacher, tmp_path / "teacher")
    card = json.loads((tmp_path / "teacher" / "card.json").read_text())
    card["catalog"]["start"] = "pretrained may have seen what is scored"
    (tmp_path / "teacher" / "card.json").write_text(json.dumps(card))
    artifact = made(replace(config, teacher=str(tmp_path / "teacher")), tmp_path)
    assert artifact.card.catalog is not None
    assert artifact.card.catalog["start"] == "pretrained may have seen what is scored"


def test_a_dry_run_writes_nothing(config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill(replace(config, output=str(tmp_path / "s"), dry_run=True)) is None
    assert list(tmp_path.iterdir()) == []
    err = capsys.readouterr().err
    assert "is asked 192 times, then cached in" in err
    assert "dry run: one step taken, nothing written" in err


def test_an_epoch_is_measured_as_it_is_trained(config: DistillConfig, tmp_path: Path) -> None:
    epoch, own, ratio = (figure.value for figure in epoch_figures(config, tmp_path, "command"))
    assert epoch is not None
    assert own is not None
    assert ratio == pytest.approx(epoch / own)
    assert min(epoch, own) > 0
