from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

import teacher
from teacher.config import HeadConfig, ScheduledStage, StageConfig, TowerConfig, TrainConfig
from teacher.loss_config import MiningConfig, PairConfig, ProxyConfig
from teacher.model import build_teacher, load_teacher, read_tower
from teacher.module import TeacherModule
from teacher.train import train
from tests.catalogs import write_catalog
from vpr.artifacts.store import load_artifact
from vpr.cli import read_config
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.imaging.config import ViewConfig
from vpr.training.config import RunConfig

SMALL = TowerConfig(name="sample", pretrained="", image_size=32)
STAGES = (StageConfig("head", 1, lr_head=1e-3), StageConfig("all", 2, lr_head=1e-3, lr_tower=1e-3))
RECIPES = sorted(Path(teacher.__file__).parent.glob("recipes/*.yaml"))
_LONG = dict.fromkeys(("guie-1st", "guie-2nd", "aicrowd-margin", "aicrowd-1st", "melgor"), pytest.mark.slow)


def small_config(catalog: Catalog, output: Path, **changes: object) -> TrainConfig:
    assert catalog.artifact is not None
    config = TrainConfig(
        str(catalog.artifact.path),
        str(output),
        tower=SMALL,
        head=HeadConfig(scale=16.0),
        stages=STAGES,
        loader=LoaderConfig(batch_size=16),
        run=RunConfig(precision="32-true"),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def trained(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher") / "teacher"
    assert train(small_config(catalog, output)) == output
    return output


def test_trained_teacher_is_loaded(trained: Path) -> None:
    model, artifact = load_teacher(trained)
    assert not model.training
    assert artifact.card.metrics["steps"] == 3 * (64 // 16)
    assert artifact.card.preprocess is not None
    assert artifact.card.preprocess.size == 32
    assert set(load_file(artifact.file("model.safetensors"))) == set(model.state_dict())
    assert artifact.file("metrics-stage-2.csv").read_text().startswith("epoch")
    assert artifact.card.catalog is not None
    assert "leak" not in artifact.card.catalog
    with torch.inference_mode():
        out = model(torch.randn(3, 3, 32, 32))
    torch.testing.assert_close(out.norm(dim=1), torch.ones(3))


def test_nested_head_trains_and_is_listed(catalog: Catalog, tmp_path: Path) -> None:
    stages = (StageConfig("head", 1, lr_head=1e-3),)
    config = small_config(catalog, tmp_path / "t", head=HeadConfig(scale=16.0, nested=(4, 16)), stages=stages)
    artifact = load_artifact(train(config) or "")
    assert artifact.card.embedding is not None
    assert artifact.card.embedding.nested == [4, 16]
    assert "margin_16" in artifact.file("metrics-stage-1.csv").read_text()
    with pytest.raises(UserError, match=r"head\.nested: expected less than the teacher's 256 dimensions, got 256"):
        train(replace(config, head=HeadConfig(nested=(256,)), output=str(tmp_path / "o")))
    assert not (tmp_path / "o").exists()


def test_unchanged_training_is_skipped(trained: Path, catalog: Catalog) -> None:
    before = (trained / "card.json").stat().st_mtime_ns
    train(small_config(catalog, trained))
    assert (trained / "card.json").stat().st_mtime_ns == before


def test_dry_run_prints_the_plan_and_writes_nothing(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_config(catalog, tmp_path / "teacher", dry_run=True)) is None
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().err
    assert "64 images of 8 products" in printed
    assert "stage 2: all, 2 epochs, 8 steps" in printed


def test_plan_reports_pixels_in_no_patch(catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sides of 50 pixels are no multiple of the patches' 8 pixels (vit-pytorch#28); a batch has 4 of 1000 parts."""
    config = small_config(catalog, tmp_path / "teacher", dry_run=True, stages=(StageConfig("all", 1),))
    run = RunConfig(precision="32-true", accumulate=1000)
    for size, text in (
        (50, "image_size 50: the last 2 rows and columns of an image are in no patch. Set it to 48."),
        (48, ""),
    ):
        train(replace(config, tower=replace(SMALL, name="sample-vit", image_size=size), run=run))
        printed = capsys.readouterr().err
        assert text in printed
        assert ("in no patch" in printed) == bool(text)
        assert "1 steps of 64 images" in printed


def _fail_if_trained(*_: object) -> None:
    raise AssertionError("the training started")


@pytest.mark.parametrize("existing", ["folder", "file", "catalog"])
def test_foreign_output_is_rejected_before_training(
    existing: str, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher.train.fit", _fail_if_trained)
    output = tmp_path / "output"
    if existing == "folder":
        output.mkdir()
        (output / "notes.txt").write_text("notes")
    elif existing == "file":
        output.write_text("notes")
    else:
        write_catalog(output, catalog)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"output: "):
        train(small_config(catalog, output))
    assert sorted(tmp_path.rglob("*")) == before


def test_validation_without_queries_is_rejected(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher.train.fit", _fail_if_trained)
    splits = np.array(catalog.table["split"].to_pylist())
    keep = (splits != "validation") | (catalog.roles != "query")
    path = write_catalog(tmp_path / "c", Catalog(catalog.table.filter(pa.array(keep)), catalog.root))
    with pytest.raises(UserError, match="validation split has 16 images and none with the role query"):
        train(replace(small_config(catalog, tmp_path / "t"), catalog=str(path)))


def test_batch_larger_than_the_split_is_rejected(catalog: Catalog, tmp_path: Path) -> None:
    stages = (StageConfig("head", 1), StageConfig("all", 1, batch_size=5000))
    with pytest.raises(UserError, match="stages 2: a batch has 5000 images, the training split 64"):
        train(small_config(catalog, tmp_path / "t", stages=stages, dry_run=True))


def test_invalid_image_size_is_rejected(catalog: Catalog, tmp_path: Path) -> None:
    tower = TowerConfig(name="ViT-B-32", pretrained="", image_size=16)
    with pytest.raises(UserError, match="cannot be built"):
        train(small_config(catalog, tmp_path / "t", tower=tower, dry_run=True))
    with pytest.raises(UserError, match="tower.image_size: expected 0, or 16 to 2048, got 5000"):
        TowerConfig(name="sample", image_size=5000)


def with_memory(stage: StageConfig) -> StageConfig:
    """Return the stage; if it has a memory, with one that holds 48 images, fewer than the small catalogue has."""
    pair = stage.pair
    return replace(stage, pair=replace(pair, memory=48)) if pair and pair.memory else stage


_PLANNED_LONG = {"guie-1st": pytest.mark.slow}  # 13 stages of ViT-H-14


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=_PLANNED_LONG.get(path.stem, ())) for path in RECIPES]
)
def test_every_recipe_is_planned(
    path: Path, catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Build the towers in full size on the meta device, without weights."""
    assert catalog.artifact is not None
    arguments = ["--recipe", str(path), "--catalog", str(catalog.artifact.path), "--output", str(tmp_path / "t")]
    config = read_config(TrainConfig, "teacher train", [*arguments, "--dry-run", "--loader.batch-size", "24"])
    assert config.recipe == path.stem
    train(replace(config, stages=tuple(replace(with_memory(stage), batch_size=0) for stage in config.stages)))
    printed = capsys.readouterr().err
    assert f"stage {len(config.stages)}: {config.stages[-1].train}" in printed
    assert "optimiser" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=_LONG.get(path.stem, ())) for path in RECIPES])
def test_every_recipe_trains_a_small_tower(path: Path, catalog: Catalog, tmp_path: Path) -> None:
    """Use all settings of the recipe except tower, batch size and epochs."""
    assert catalog.artifact is not None
    arguments = ["--recipe", str(path), "--catalog", str(catalog.artifact.path), "--output", str(tmp_path / "t")]
    config = read_config(TrainConfig, "teacher train", arguments)
    sizes = {0: 32, 64: 24, 96: 32, 224: 24, 256: 32, 280: 40, 290: 44}
    stages = tuple(
        replace(
            with_memory(stage),
            epochs=1,
            milestones=(),
            batch_size=0,
            image_size=sizes[stage.image_size],
            patch_stride=stage.patch_stride and 6,
        )
        for stage in config.stages
    )
    tower = replace(config.tower, name="sample-vit", pretrained="", image_size=32)
    loader = LoaderConfig(
        batch_size=24, max_per_product=config.loader.max_per_product, min_per_product=config.loader.min_per_product
    )
    train(replace(config, tower=tower, stages=stages, loader=loader, run=replace(config.run, validate_every=1)))
    model, artifact = load_teacher(tmp_path / "t")
    assert model.embedding_dim == (config.tower.embedding_dim or model.embedding_dim)
    assert artifact.card.metrics["val_recall_at_1"] > 0
    assert len([name for name in artifact.card.files if name.startswith("metrics")]) == len(stages)
    size = artifact.card.preprocess.size if artifact.card.preprocess else 0
    with torch.inference_mode():
        assert torch.isfinite(model(torch.randn(2, 3, size, size))).all()


def make_module(catalog: Catalog, stage: StageConfig) -> TeacherModule:
    built, preprocess = build_teacher(SMALL, read_tower("sample"), False)
    training, validation = catalog.select(split="train"), catalog.select(split="validation")
    return TeacherModule(ScheduledStage(stage, 0, 1, ViewConfig(), 0), built, preprocess, training, validation)


@pytest.mark.parametrize(
    ("part", "tower", "head"),
    [
        ("head", False, True),
        ("classes", False, True),
        ("projection", False, False),
        ("tower", True, False),
        ("all", True, True),
    ],
)
def test_stage_trains_only_its_parts(part: str, tower: bool, head: bool, catalog: Catalog) -> None:
    module = make_module(catalog, StageConfig(part, 1))
    assert all(p.requires_grad == tower for p in module.teacher.visual.parameters())
    assert all(p.requires_grad == head for p in module.head.parameters())
    module.train()
    module.on_train_epoch_start()
    norms = [m for m in module.teacher.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert all(norm.training == tower for norm in norms)


def test_head_stage_does_not_change_the_tower(catalog: Catalog, tmp_path: Path) -> None:
    train(small_config(catalog, tmp_path / "teacher", stages=STAGES[:1]))
    trained = load_file(tmp_path / "teacher" / "model.safetensors")
    L.seed_everything(0, verbose=False)
    initial, _ = build_teacher(SMALL, read_tower("sample"), False)
    for name, value in initial.state_dict().items():
        assert torch.equal(value, trained[name]), name


@pytest.mark.slow
def test_artifact_has_the_averaged_weights(catalog: Catalog, tmp_path: Path) -> None:
    train(small_config(catalog, tmp_path / "plain"))
    train(small_config(catalog, tmp_path / "ema", run=RunConfig(precision="32-true", ema=0.9)))
    plain, ema = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "ema"))
    assert set(plain) == set(ema)
    assert any(not torch.equal(plain[name], ema[name]) for name in plain)


ALL_LOSSES = {
    "proxy": ProxyConfig("soft-triple", centres=2),
    "pair": PairConfig("contrastive", miner=False, memory=48),
    "mining": MiningConfig(every=2, products=1),
    "loader": LoaderConfig(batch_size=16, images_per_product=2),
    "stages": (StageConfig("all", 5, lr_head=1e-3, lr_tower=1e-3),),
}


@pytest.mark.slow
def test_interrupted_training_with_memory_and_mining_resumes_bit_equal(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epochs after the interruption see the proxies, the memory and the hard negatives of before."""
    train(small_config(catalog, tmp_path / "uninterrupted", **ALL_LOSSES))
    config = small_config(catalog, tmp_path / "interrupted", **ALL_LOSSES)
    start_epoch = TeacherModule.on_train_epoch_start

    def interrupt(module: TeacherModule) -> None:
        if module.current_epoch == 3:
            raise RuntimeError("interrupted")
        start_epoch(module)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherModule, "on_train_epoch_start", interrupt)
        with pytest.raises(RuntimeError, match="interrupted"):
            train(config)
    train(config)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("uninterrupted", "interrupted")]
    assert weights[0] == weights[1]
    model, artifact = load_teacher(tmp_path / "interrupted")
    assert set(load_file(artifact.file("model.safetensors"))) == set(model.state_dict())
    columns = artifact.file("metrics-stage-1.csv").read_text().partition("\n")[0].split(",")
    assert {"loss_step", "margin_step", "soft_triple_step", "contrastive_step"} <= set(columns)


def test_stage_with_other_losses_keeps_the_tower(catalog: Catalog, tmp_path: Path) -> None:
    """The second stage drops the class directions and draws proxies; a rate of 0 shows the tower of the first."""
    other = StageConfig("all", 1, lr_head=0.0, lr_tower=0.0, margin_weight=0.0, proxy=ProxyConfig("proxy-anchor"))
    train(small_config(catalog, tmp_path / "one", stages=STAGES[:1]))
    train(small_config(catalog, tmp_path / "two", stages=(*STAGES[:1], other)))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert "running" in name or "num_batches" in name or torch.equal(value, two[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": PairConfig("contrastive")}, r"loader\.images_per_product: contrastive compares"),
        ({"pair": PairConfig("multi-similarity", memory=8)}, r"pair\.memory: expected at least 16.* got 8"),
        (
            {"pair": PairConfig("contrastive"), "loader": LoaderConfig(batch_size=4, images_per_product=4)},
            r"loader\.batch_size: a batch of 4 images has one product",
        ),
    ],
)
def test_batches_without_pairs_are_rejected_before_training(
    changes: dict[str, object], message: str, catalog: Catalog, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(small_config(catalog, tmp_path / "t", **changes))
    assert list(tmp_path.iterdir()) == []


def test_leak_is_rejected_or_recorded_in_the_card(catalog: Catalog, tmp_path: Path) -> None:
    rows = catalog.table.to_pylist()
    scored = next(row for row in rows if row["split"] == "test")
    leaking = Catalog(
        catalog.table.from_pylist([*rows, {**scored, "split": "train"}], catalog.table.schema), catalog.root
    )
    path = write_catalog(tmp_path / "catalog", leaking)
    config = replace(small_config(catalog, tmp_path / "teacher", stages=STAGES[:1]), catalog=str(path))
    with pytest.raises(UserError, match="leak: 1 products are trained and scored"):
        train(config)
    assert not (tmp_path / "teacher").exists()
    train(replace(config, allow_leak=True))
    card = load_artifact(tmp_path / "teacher").card
    assert card.catalog is not None
    assert "train in test" in card.catalog["leak"]
    second_config = replace(
        small_config(catalog, tmp_path / "second", stages=STAGES[:1]), tower=replace(SMALL, pretrained=config.output)
    )
    train(second_config)
    second = load_artifact(tmp_path / "second").card
    assert second.catalog is not None
    assert second.catalog["leak"] == {"start": card.catalog["leak"]}
    assert [parent.role for parent in second.parents] == ["catalog", "start"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StageConfig("all", 0), r"stages\.epochs: expected .+ got 0"),
        (lambda: StageConfig("last", 1), r"stages\.last_blocks: .*got 0 with train: last"),
        (lambda: StageConfig("all", 1, layer_decay=0.0), "layer_decay"),
        (lambda: StageConfig("all", 1, lr_head=float("nan")), r"stages\.lr_head: .*nan"),
        (lambda: RunConfig(accumulate=0), r"run\.accumulate: expected .+ got 0"),
        (lambda: RunConfig(ema=1.0), r"run\.ema: expected .+ got 1\.0"),
        (lambda: ViewConfig(flip=2.0), r"views\.flip: expected .+ got 2\.0"),
        (lambda: ViewConfig(scale=(0.0, 1.0)), r"views\.scale"),
        (lambda: TrainConfig("c", "o", stages=()), "stages: expected one or more"),
        (lambda: TrainConfig("c", "o", seed=-1), "seed: expected .+ got -1"),
    ],
)
def test_values_out_of_range_are_rejected(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        make()


def test_learning_rates_follow_depth_and_part(catalog: Catalog) -> None:
    stage = StageConfig("all", 1, lr_head=0.5, lr_tower=0.1, layer_decay=0.5)
    module = make_module(catalog, stage)
    cpu = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(estimated_stepping_batches=10, precision_plugin=None, strategy=cpu)
    module._trainer = trainer  # type: ignore[assignment]
    optimizer = module.configure_optimizers()["optimizer"]
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(module.teacher.visual.named_parameters())
    assert module.head.margin is not None
    assert rates[id(module.head.margin.weight)] == 0.5
    assert set(rates) == {id(p) for p in module.parameters()}
    stem = rates[id(named["trunk.conv1.0.weight"])] if "trunk.conv1.0.weight" in named else min(rates.values())
    assert stem < 0.1 <= rates[id(named["head.proj.weight"])]
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0 or all(p.ndim > 1 for p in group["params"])
    assert np.isclose(max(rate for key, rate in rates.items() if key != id(module.head.margin.weight)), 0.1)


def test_batch_norm_of_one_image_is_rejected() -> None:
    tower, stages = replace(SMALL, batch_norm=True), (StageConfig("all", 1, batch_size=1),)
    with pytest.raises(UserError, match=r"loader\.batch_size: tower\.batch_norm has no statistics of a single image"):
        TrainConfig("c", "o", tower=tower, stages=stages)
    # A stage that does not train the projection keeps the statistics.
    TrainConfig("c", "o", tower=tower, stages=(StageConfig("tower", 1, batch_size=1),))


def test_network_whose_last_map_is_a_single_pixel_needs_two_images(catalog: Catalog, tmp_path: Path) -> None:
    """Only the network knows that 32 pixels become one."""
    tower, stages = TowerConfig("sample", "", 32), (StageConfig("all", 1, batch_size=1),)
    with pytest.raises(UserError, match=r"loader\.batch_size: .* no statistics of a single image of this size"):
        train(small_config(catalog, tmp_path / "t", tower=tower, stages=stages))
    assert not (tmp_path / "t").exists()


def test_plan_shows_the_statistics_of_the_weights(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = TowerConfig("timm/tf_efficientnet_lite0", "", image_size=32)
    train(small_config(catalog, tmp_path / "t", tower=tower, dry_run=True))
    assert "images: squash, bicubic, mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["projection", "classes", "head"])
def test_stage_without_parameters_is_rejected(part: str) -> None:
    """Without a projection, BatchNorm and classes an optimiser would have nothing to step."""
    losses = {"margin_weight": 0.0, "pair": PairConfig("contrastive")}
    stages = (StageConfig(part, 1), StageConfig("all", 1))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"stages\.train: {part} has no parameters"):
        TrainConfig("c", "o", tower=SMALL, stages=stages, **losses)  # type: ignore[arg-type]
    TrainConfig("c", "o", tower=replace(SMALL, embedding_dim=8), stages=(StageConfig("projection", 1),))
