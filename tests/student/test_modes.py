"""Complete distillations: every mode, resumed, and rejected settings."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.demo.interrupted import interrupt
from experiments.student.epoch import epoch_figures
from student import teacher_cache
from student.config import DimensionConfig, DistillConfig, LossConfig, QuantiseConfig, StudentConfig, TargetsConfig
from student.distill import distill
from student.model import load_student
from student.module import StudentModule
from student.teacher_cache import build_teacher_cache
from student.teacher_model import load_teacher_model
from tests.student.conftest import STUDENT
from vpr.artifacts.run_folder import is_written
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.config_values import config_values
from vpr.common.errors import UserError
from vpr.common.flags import to_flags
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import LoaderConfig
from vpr.imaging.config import ViewConfig
from vpr.training.config import RunConfig

LOGITS = LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, logits=1.0)
ONLINE, MIXED = TargetsConfig(mode="online"), TargetsConfig(mode="online", mixup=0.5)
SHORT: dict[str, Any] = {"epochs": 1, "targets": TargetsConfig(views=1, bank=32)}


def distill_artifact(config: DistillConfig, folder: Path, **changes: Any) -> Artifact:
    path = distill(replace(config, **{**SHORT, **changes, "output": str(folder / "student")}))
    assert path is not None
    return load_artifact(path, "student")


def read_log(artifact: Artifact, name: str) -> list[float]:
    with artifact.file("metrics.csv").open() as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


@pytest.mark.parametrize(
    "losses",
    [
        LossConfig(mse=1.0, affinity=1.0, rkd_distance=1.0, rkd_angle=2.0, contrastive=1.0, margin=0.1),
        LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, logits=1.0),
        LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, margin=1.0),
    ],
    ids=["all", "logits", "labels"],
)
def test_losses_train_and_are_logged(losses: LossConfig, config: DistillConfig, tmp_path: Path) -> None:
    artifact = distill_artifact(config, tmp_path, losses=losses, epochs=3)
    for name in losses.weights():
        values = read_log(artifact, f"{name}_epoch")
        assert len(values) == 3
        assert values[-1] < values[0] or name == "margin", name  # The margin grows.
    assert (tmp_path / "student-views").exists() == losses.needs_teacher
    load_student(tmp_path / "student")  # Heads and wrappers are dropped.


def test_steps_replace_epochs(config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last epoch is completed."""
    run = RunConfig(precision="32-true", accumulate=2)
    artifact = distill_artifact(config, tmp_path, steps=5, epochs=30, loader=LoaderConfig(16), run=run)
    per_epoch = math.ceil(len(load_catalog(config.catalog).select(split="train")) / 16 / 2)
    assert artifact.card.metrics["steps"] == math.ceil(5 / per_epoch) * per_epoch
    log = capsys.readouterr().err
    assert "; 5 steps of " in log
    assert f"  5 steps: {math.ceil(5 / per_epoch)} epochs of {per_epoch} steps" in log


def test_online_with_mixup_and_ema(config: DistillConfig, tmp_path: Path) -> None:
    run = RunConfig(precision="32-true", ema=0.8)
    artifact = distill_artifact(
        config, tmp_path, targets=TargetsConfig(mode="online", bank=32, mixup=0.4), epochs=6, run=run
    )
    losses = read_log(artifact, "cosine_epoch")
    assert losses[-1] < 0.8 * losses[0]
    assert not (tmp_path / "student-views").exists()


@pytest.mark.parametrize("method", ["pca", "cosine", "projector"])
@pytest.mark.parametrize("mode", ["cached", "online"])
def test_smaller_dimension(
    method: Any, mode: Any, config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = distill_artifact(
        config,
        tmp_path,
        model=replace(STUDENT, embedding_dim=24),
        dimension=DimensionConfig(method, steps=20),
        targets=TargetsConfig(mode=mode, views=1, bank=32),
    )
    assert artifact.card.embedding is not None
    assert artifact.card.embedding.dim == 24
    assert "dimension:" in capsys.readouterr().err
    assert ("projection.safetensors" in artifact.card.files) == (method != "projector")
    if method != "projector":
        recall = artifact.card.metrics["projected_teacher_val_recall_at_1"]
        assert 0 <= recall <= artifact.card.metrics["teacher_val_recall_at_1"] + 0.1
        assert load_file(artifact.file("projection.safetensors"))["projection"].shape == (256, 24)
    model, _ = load_student(tmp_path / "student")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 24)


def test_assistant_gives_the_targets(student: Path, config: DistillConfig, tmp_path: Path) -> None:
    small = replace(STUDENT, dim=32, heads=1, mlp_dim=48, embedding_dim=0)
    artifact = distill_artifact(config, tmp_path, assistant=str(student), model=small)
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "assistant", "catalog"}
    cache = load_artifact(tmp_path / "student-views")
    assert cache.card.parents[0].sha256 == load_artifact(student).sha256


def test_start_from_a_larger_student(
    student: Path, config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = distill_artifact(
        config, tmp_path, start=str(student), model=replace(STUDENT, dim=32, heads=1, mlp_dim=64)
    )
    assert {parent.role for parent in artifact.card.parents} == {"teacher", "start", "catalog"}
    # Both stems have the minimum width.
    share = int(capsys.readouterr().err.split("% of the student's parameters are selected")[0].split()[-1])
    assert share > 90


def test_killed_cache_resumes(teacher: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_teacher_model(load_artifact(teacher))
    training, config = catalog.select(split="train"), TargetsConfig(views=2, shard=24)
    path, embed = str(tmp_path / "views"), teacher_cache._embed_view
    calls = []

    def embed_four(*arguments: Any) -> np.ndarray:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(arguments[4].name)
        return embed(*arguments)

    monkeypatch.setattr(teacher_cache, "_embed_view", embed_four)
    with pytest.raises(KeyboardInterrupt):
        build_teacher_cache(path, model, training, ViewConfig(), config, 0)
    assert not (tmp_path / "views").exists()
    first, calls = calls, []
    resumed = build_teacher_cache(path, model, training, ViewConfig(), config, 0)
    assert sorted(first + calls) == sorted({*first, *calls})  # No file is computed twice.
    assert len(first + calls) == 6
    monkeypatch.setattr(teacher_cache, "_embed_view", embed)
    unbroken = build_teacher_cache(str(tmp_path / "unbroken"), model, training, ViewConfig(), config, 0)
    assert resumed.artifact.card.files == unbroken.artifact.card.files
    assert not list(tmp_path.glob("*.run-*"))


def arguments(config: DistillConfig) -> list[str]:
    shape = {name: getattr(STUDENT, name) for name in ("image_size", "dim", "depth", "heads", "dim_head", "mlp_dim")}
    flags = ["--teacher", *config.teacher, "--catalog", config.catalog, "--run.precision", "32-true"]
    flags += to_flags(DistillConfig, {"model": {**shape, "stem": "conv"}})
    return [*flags, "--run.validate-every", "2", "--run.ema", "0.8"]


@pytest.mark.slow
@pytest.mark.parametrize("targets", [{"views": 2, "bank": 32}, {"mode": "online", "bank": 32, "mixup": 0.5}])
def test_killed_distillation_resumes_bit_equal(targets: dict[str, Any], config: DistillConfig, tmp_path: Path) -> None:
    flags = [*arguments(config), "--epochs", "8", "--loader.batch-size", "16"]
    flags += to_flags(DistillConfig, {"targets": targets})
    runs = interrupt("student distill", flags, tmp_path, epochs=8)
    assert runs.resumed.card.metrics["steps"] == runs.unbroken.card.metrics["steps"]
    assert runs.resumed.card.files["model.safetensors"] == runs.unbroken.card.files["model.safetensors"]
    # The best epoch may precede the kill, so the logs of later epochs are compared too.
    names = ("epoch", "step", "cosine_epoch", "similarity_kl_epoch", "val_recall_at_1", "val_map")
    with runs.unbroken.file("metrics.csv").open() as stream:
        unbroken = {tuple(row[name] for name in names) for row in csv.DictReader(stream)}
    with runs.resumed.file("metrics-resumed-1.csv").open() as stream:
        resumed = {tuple(row[name] for name in names) for row in csv.DictReader(stream)}
    assert {row[0] for row in resumed} >= {"6", "7"}
    assert any(row[2] for row in resumed)
    assert resumed <= unbroken


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"^epochs: expected .+ got 0"),
        ({"lr": float("nan")}, r"^lr: .*nan"),
        ({"seed": -1}, r"^seed: expected 0 to below 2\^31, got -1"),
        ({"run": RunConfig(strategy="fsdp")}, r"run\.strategy: distillation does not support fsdp"),
        ({"quantise": QuantiseConfig("x")}, r"quantise\.ranges: QAT fine-tunes a trained student"),
        ({"cache": "a", "output": "./a"}, r"cache: a is also the output"),
        ({"targets": MIXED, "losses": LossConfig(margin=0.1)}, r"targets\.mixup: mixed images have no label"),
        ({"targets": ONLINE, "losses": LOGITS}, r"losses\.logits: .* Set targets\.mode to cached"),
        ({"dimension": DimensionConfig("pca"), "losses": LOGITS}, r"losses\.logits: .* Set dimension\.method to none"),
        ({"unlabelled": ("more",), "losses": LOGITS}, r"losses\.logits: .* Remove unlabelled"),
        (
            {"loader": LoaderConfig(1), "losses": LossConfig(affinity=1.0)},
            r"loader\.batch_size: losses\.affinity needs at least 2",
        ),
    ],
)
def test_wrong_values_are_rejected_by_key(changes: dict[str, Any], message: str, config: DistillConfig) -> None:
    with pytest.raises(UserError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetsConfig(mixup=0.2), r"targets\.mixup: the cache holds no mixed images"),
        (
            lambda: TargetsConfig(mode="online", mixup=0.001),
            r"targets\.mixup: expected 0 \(off\) or 0\.05 to 100, got 0\.001",
        ),
        (lambda: TargetsConfig(views=0), r"^targets\.views: expected .+ got 0"),
        (lambda: DimensionConfig(steps=0), r"^dimension\.steps: expected .+ got 0"),
        (lambda: StudentConfig(preset="huge"), r"model\.preset: expected one of .*, got 'huge'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_sections_are_rejected_by_key(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_bad_input_keeps_the_finished_student(student: Path, config: DistillConfig, teacher: Path) -> None:
    before = load_artifact(student).sha256
    with pytest.raises(UserError, match="is also the start"):
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
            r"model\.embedding_dim: the embeddings give at most 64 directions, got 200",
        ),
        ({"unlabelled": ("nowhere",)}, r"unlabelled: no catalogue of nowhere .*\. Use a folder of images"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_bad_settings_are_rejected_before_caching(
    dry_run: bool,
    changes: dict[str, Any],
    message: str,
    config: DistillConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vpr.training.loggers.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=message):
        distill(replace(config, **{"output": str(tmp_path / "s"), "dry_run": dry_run, **changes}))
    assert list(tmp_path.iterdir()) == []


def test_cache_of_another_kind_is_rejected(config: DistillConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds an artifact of kind teacher, expected views"):
        distill(replace(config, output=str(tmp_path / "s"), cache=config.teacher[0]))


def test_truncated_cache_file_is_recomputed(
    teacher: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_teacher_model(load_artifact(teacher))
    training, config = catalog.select(split="train"), TargetsConfig(views=2)
    embed, calls = teacher_cache._embed_view, []

    def embed_once(*arguments: Any) -> np.ndarray:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return embed(*arguments)

    monkeypatch.setattr(teacher_cache, "_embed_view", embed_once)
    with pytest.raises(KeyboardInterrupt):
        build_teacher_cache(str(tmp_path / "views"), model, training, ViewConfig(), config, 0)
    (finished,) = tmp_path.glob("views.run-*/view-*.npy")
    finished.write_bytes(finished.read_bytes()[:5000])
    monkeypatch.setattr(teacher_cache, "_embed_view", embed)
    repaired = build_teacher_cache(str(tmp_path / "views"), model, training, ViewConfig(), config, 0)
    unbroken = build_teacher_cache(str(tmp_path / "unbroken"), model, training, ViewConfig(), config, 0)
    assert repaired.artifact.card.files == unbroken.artifact.card.files


def test_cache_is_identified_by_config_and_parents(teacher: Path, catalog: Catalog, tmp_path: Path) -> None:
    """Processes wait for their cache; the folder may hold a stale cache of another teacher."""
    model = load_teacher_model(load_artifact(teacher))
    training, path = catalog.select(split="train"), str(tmp_path / "views")
    artifact = build_teacher_cache(path, model, training, ViewConfig(), TargetsConfig(views=1), 0).artifact
    config = {**artifact.card.config, "views": config_values(ViewConfig())}  # The card has lists instead of tuples.
    assert is_written(path, config, artifact.card.parents)
    assert not is_written(path, {**config, "seed": 1}, artifact.card.parents)
    assert not is_written(path, config, [model.artifact.as_parent("other")])
    assert not is_written(str(tmp_path / "none"), config, artifact.card.parents)
    (tmp_path / "none").mkdir()
    for broken in ("[]", "{}", "[" * 100_000):
        (tmp_path / "none" / "card.json").write_text(broken)
        assert not is_written(str(tmp_path / "none"), config, artifact.card.parents)


def test_unverified_init_is_inherited(config: DistillConfig, teacher: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(teacher, tmp_path / "teacher")
    card = json.loads((tmp_path / "teacher" / "card.json").read_text())
    card["catalog"]["start"] = "pretrained may have seen what is scored"
    (tmp_path / "teacher" / "card.json").write_text(json.dumps(card))
    artifact = distill_artifact(replace(config, teacher=(str(tmp_path / "teacher"),)), tmp_path)
    assert artifact.card.catalog is not None
    assert artifact.card.catalog["start"] == "pretrained may have seen what is scored"


def test_dry_run_writes_nothing(config: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill(replace(config, output=str(tmp_path / "s"), dry_run=True)) is None
    assert list(tmp_path.iterdir()) == []
    err = capsys.readouterr().err
    assert "teacher cache: 192 forward passes" in err
    assert "dry run: one step taken, nothing written" in err


@pytest.mark.parametrize(
    "changes",
    [
        {"losses": LOGITS},
        {"losses": LossConfig(cosine=0.0, similarity_kl=0.0, contrastive=0.0, margin=1.0)},
        {"targets": MIXED, "model": replace(STUDENT, image_size=48)},
        {"dimension": DimensionConfig("pca"), "model": replace(STUDENT, embedding_dim=24)},
        {"dimension": DimensionConfig("projector"), "model": replace(STUDENT, embedding_dim=24)},
    ],
    ids=["logits", "labels", "online", "pca", "projector"],
)
def test_dry_run_takes_a_step_in_every_mode(
    changes: dict[str, Any], config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    batches = []
    step = StudentModule.training_step

    def count_step(module: StudentModule, batch: dict[str, Tensor], number: int) -> Tensor:
        batches.append(batch["rows"].tolist())
        return step(module, batch, number)

    monkeypatch.setattr(StudentModule, "training_step", count_step)
    assert distill(replace(config, **{"output": str(tmp_path / "s"), "dry_run": True, **changes})) is None
    assert batches == [[0, 63]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_epoch_time_is_measured(config: DistillConfig, tmp_path: Path) -> None:
    epoch, passes, ratio = (figure.value for figure in epoch_figures(config, tmp_path, "command"))
    assert epoch is not None
    assert passes is not None
    assert ratio == pytest.approx(epoch / passes)
    assert min(epoch, passes) > 0


def test_students_of_other_seeds_share_a_cache(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views have their own seed, so the second student finds the cache of the first and sees the same views."""
    shared = replace(config, cache=str(tmp_path / "views"), epochs=1, targets=TargetsConfig(views=1, bank=16))
    distill(replace(shared, output=str(tmp_path / "a"), seed=5))
    monkeypatch.setattr(teacher_cache, "_embed_view", None)  # nothing is embedded again
    card = load_artifact(distill(replace(shared, output=str(tmp_path / "b"), seed=6))).card  # type: ignore[arg-type]
    assert card.config["targets"]["seed"] == 0
    assert load_artifact(tmp_path / "views").card.config["seed"] == 0


def test_shared_cache_is_never_replaced(teacher: Path, catalog: Catalog, tmp_path: Path) -> None:
    model, training = load_teacher_model(load_artifact(teacher)), catalog.select(split="train")
    path, targets = str(tmp_path / "views"), TargetsConfig(views=1)
    build_teacher_cache(path, model, training, ViewConfig(), targets, 0, is_shared=True)
    before = load_artifact(path).sha256
    message = r"cache: .*views holds teacher embeddings of other settings \(views, targets\.seed\).*another folder"
    with pytest.raises(UserError, match=message):
        build_teacher_cache(path, model, training, ViewConfig(rotate=3), targets, 1, is_shared=True)
    with pytest.raises(UserError, match=r"\(the training images\)"):
        build_teacher_cache(path, model, training.take(np.arange(9)), ViewConfig(), targets, 0, is_shared=True)
    assert load_artifact(path).sha256 == before
    again = build_teacher_cache(path, model, training, ViewConfig(), targets, 0, is_shared=True)
    assert again.artifact.sha256 == before


@pytest.mark.parametrize(("mode", "seed"), [("cached", 3), ("online", 7)])
def test_seed_of_the_views(mode: str, seed: int, config: DistillConfig) -> None:
    targets = TargetsConfig(mode=mode, seed=3)  # type: ignore[arg-type]
    assert replace(config, seed=7, targets=targets).view_seed == seed
