from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning as L
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from teacher.adapters import Adapters, add_adapters
from teacher.config import ScheduledStage, StageConfig, TowerConfig, TrainConfig
from teacher.layers import freeze_except
from teacher.losses import TrainingHead
from teacher.memory import Memory, estimate
from teacher.model import Teacher, build_teacher, load_teacher, read_tower
from teacher.module import TeacherModule
from teacher.tower_config import LoraConfig
from teacher.train import train
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, training_loader
from vpr.imaging.config import ViewConfig
from vpr.training.config import RunConfig

LORA = LoraConfig(rank=4)
TOWERS = ["sample-vit", "timm/vit_tiny_patch16_224", "timm/pvt_v2_b0"]
ALL = StageConfig("all", 2, lr_head=1e-3, lr_tower=1e-2)


def make_teacher(name: str = "sample-vit", device: str = "cpu", **changes: object) -> Teacher:
    config = TowerConfig(name, "", **changes)  # type: ignore[arg-type]
    return build_teacher(config, read_tower(name), False, device)[0]


def randomise(teacher: Teacher) -> None:
    """Give the matrices B values, as training does; they start at 0."""
    for name, parameter in teacher.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def adapted(name: str, config: LoraConfig = LORA) -> tuple[Teacher, Adapters, dict[str, torch.Tensor]]:
    """Return a teacher with trained adapters, and the weights that it had without."""
    teacher = make_teacher(name, image_size=32, embedding_dim=16).eval()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    adapters = add_adapters(teacher, config, 32)
    randomise(teacher)
    return teacher, adapters, before


@pytest.mark.parametrize("name", TOWERS)
def test_merged_tower_has_the_outputs_and_names_of_the_adapted_one(name: str) -> None:
    teacher, adapters, before = adapted(name)
    merged = adapters.merge(teacher.state_dict())
    plain = make_teacher(name, image_size=32, embedding_dim=16).eval()
    plain.load_state_dict(merged)  # strict: names and shapes
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = teacher(images)
        torch.testing.assert_close(plain(images), expected, rtol=0, atol=1e-5)
        plain.load_state_dict(before)
        assert (plain(images) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", TOWERS)
def test_new_adapters_do_not_change_the_outputs(name: str) -> None:
    teacher = make_teacher(name, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = teacher(images)
        add_adapters(teacher, LORA, 32)
        torch.testing.assert_close(teacher(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_merge_equals_that_of_peft(name: str) -> None:
    teacher, adapters, _ = adapted(name, LoraConfig(rank=4, alpha=3))
    merged = adapters.merge(teacher.state_dict())
    for layer in adapters.layers:
        wrapped = teacher.visual.get_submodule(layer)
        assert isinstance(wrapped, peft.tuners.lora.Linear)
        wrapped.merge()
        weight = f"visual.{layer}.weight"
        weight = weight.replace(".in_proj.", ".in_proj_") if adapters.attentions else weight
        torch.testing.assert_close(merged[weight], wrapped.base_layer.weight, rtol=0, atol=1e-6)


def test_attention_of_open_clip_is_adapted_in_all_its_projections() -> None:
    teacher, adapters, before = adapted("sample-vit")
    assert len(adapters.attentions) == 4
    assert len(adapters.layers) == 4 * 4  # in_proj, out_proj, c_fc, c_proj
    merged = adapters.merge(teacher.state_dict())
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    change = (merged[name] - before[name]).chunk(3)
    assert all(torch.linalg.matrix_rank(part, atol=1e-4) == LORA.rank for part in change)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_and_head_have_gradients(name: str, checkpointing: bool) -> None:
    teacher = make_teacher(name, image_size=32, embedding_dim=16, gradient_checkpointing=checkpointing).train()
    freeze_except(teacher, "all")
    adapters = add_adapters(teacher, LORA, 32)
    randomise(teacher)
    teacher(torch.randn(4, 3, 32, 32))[:, 0].sum().backward()
    with_gradient = {key for key, value in teacher.named_parameters() if value.grad is not None and value.grad.any()}
    matrices = {f"visual.{layer}.lora_{m}.default.weight" for layer in adapters.layers for m in "AB"}
    assert with_gradient == matrices | {"project.linear.weight"}


def test_last_blocks_alone_are_adapted() -> None:
    teacher = make_teacher()
    freeze_except(teacher, "last", 1)
    layers = add_adapters(teacher, LORA, 64).layers
    assert len(layers) == 4
    assert all(name.startswith("transformer.resblocks.3.") for name in layers)


def test_linears_without_a_call_are_left_out() -> None:
    """SwinV2 multiplies by the weight of its qkv layer itself: an adapter around the layer would train nothing."""
    teacher = make_teacher("timm/swinv2_tiny_window8_256", "meta")
    layers = add_adapters(teacher, LORA, 256).layers
    assert not any(name.endswith("qkv") for name in layers)
    assert any(name.endswith("attn.proj") for name in layers)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (LoraConfig(rank=200), "sample-vit", r"lora\.rank: expected at most 128, the smaller side of \S+, got 200\."),
        (LORA, "timm/tf_efficientnet_lite0", r"lora\.rank: .* has no linear layer to adapt\. Set it to 0"),
    ],
)
def test_towers_that_cannot_be_adapted_are_rejected_before_training(
    config: LoraConfig, name: str, message: str, catalog: Catalog, tmp_path: Path
) -> None:
    tower = TowerConfig(name, "", image_size=32)
    with pytest.raises(UserError, match=message):
        train(lora_config(catalog, tmp_path / "t", lora=config, tower=tower))
    assert list(tmp_path.iterdir()) == []


def test_values_out_of_range_are_rejected() -> None:
    with pytest.raises(UserError, match=r"lora\.rank: no stage trains the tower"):
        TrainConfig("c", "o", lora=LORA, stages=(StageConfig("head", 1),))
    for values, message in (({"rank": -1}, "rank"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")):
        with pytest.raises(UserError, match=rf"lora\.{message}: expected"):
            LoraConfig(**values)  # type: ignore[arg-type]


def lora_config(catalog: Catalog, output: Path, **changes: object) -> TrainConfig:
    assert catalog.artifact is not None
    config = TrainConfig(
        str(catalog.artifact.path),
        str(output),
        tower=TowerConfig("sample-vit", "", image_size=32, embedding_dim=16, gradient_checkpointing=True),
        lora=LoraConfig(rank=4, dropout=0.1),
        stages=(ALL,),
        loader=LoaderConfig(batch_size=16),
        run=RunConfig(precision="32-true"),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("part", "has_norm"), [("tower", False), ("all", True)])
def test_dropout_after_the_tower_is_on_next_to_adapters(part: str, has_norm: bool, catalog: Catalog) -> None:
    teacher, preprocess = build_teacher(
        TowerConfig("sample-vit", "", 32, embedding_dim=16, batch_norm=True, dropout=0.5),
        read_tower("sample-vit"),
        False,
    )
    scheduled = ScheduledStage(StageConfig(part, 1), 0, 1, ViewConfig(), 0)  # type: ignore[arg-type]
    splits = catalog.select(split="train"), catalog.select(split="validation")
    module = TeacherModule(scheduled, teacher, preprocess, *splits)
    module.add_adapters(LORA, preprocess.size)
    module.on_train_epoch_start()
    assert teacher.project.get_submodule("dropout").training
    assert teacher.project.get_submodule("norm").training == has_norm
    assert not teacher.visual.training


def test_rate_too_low_for_adapters_is_reported(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default rate is for pretrained weights."""
    text = "lr_tower 3e-07 hardly trains adapters"
    for stages, lora, is_reported in (
        ((StageConfig("all", 1),), LORA, True),
        ((StageConfig("all", 1),), LoraConfig(), False),
        ((StageConfig("head", 1), ALL), LORA, False),
    ):
        train(lora_config(catalog, tmp_path / "t", stages=stages, lora=lora, dry_run=True))
        assert (text in capsys.readouterr().err) == is_reported


STAGES = (
    StageConfig("head", 1, lr_head=1e-3),
    StageConfig("last", 1, lr_head=1e-3, lr_tower=1e-2, last_blocks=2, layer_decay=0.5),
    replace(ALL, image_size=24, epochs=3, layer_decay=0.8),
)


@pytest.mark.slow
def test_teacher_trained_in_stages_is_a_plain_teacher(catalog: Catalog, tmp_path: Path) -> None:
    """Validation recall of the adapted network is that of the stored weights."""
    train(lora_config(catalog, tmp_path / "lora", stages=STAGES, run=RunConfig(precision="32-true", ema=0.5)))
    train(lora_config(catalog, tmp_path / "plain", lora=LoraConfig(), stages=STAGES[:1]))
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("lora", "plain")}
    assert weights["lora"].keys() == weights["plain"].keys()
    teacher, artifact = load_teacher(tmp_path / "lora")
    assert artifact.card.metrics["parameters"] == sum(p.numel() for p in teacher.parameters())
    assert not any("lora" in name for name in teacher.state_dict())
    changed = {
        k
        for k, v in weights["lora"].items()
        if v.shape != weights["plain"][k].shape or (v != weights["plain"][k]).any()
    }
    matrices = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    assert {k for k in changed if k.endswith(matrices)} == {k for k in weights["lora"] if k.endswith(matrices)}
    assert {k for k in changed if not k.endswith(matrices)} == {
        "visual.positional_embedding",  # resized to 24 pixels
        "project.linear.weight",
    }


@pytest.mark.slow
def test_interrupted_training_resumes_bit_equal(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption is in the last stage, after merging the adapters of the second."""
    config = lora_config(catalog, tmp_path / "interrupted", stages=STAGES, run=RunConfig(precision="32-true", ema=0.5))
    train(replace(config, output=str(tmp_path / "uninterrupted")))
    start_epoch = TeacherModule.on_train_epoch_start

    def interrupt(module: TeacherModule) -> None:
        if module.scheduled.stage == STAGES[-1] and module.current_epoch == 2:
            raise RuntimeError("interrupted")
        start_epoch(module)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherModule, "on_train_epoch_start", interrupt)
        with pytest.raises(RuntimeError, match="interrupted"):
            train(config)
    train(config)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("uninterrupted", "interrupted")]
    assert weights[0] == weights[1]


def plan_vit_h_14(lora: LoraConfig) -> Memory:
    teacher = make_teacher("ViT-H-14", "meta", gradient_checkpointing=True)
    if lora.rank:
        add_adapters(teacher, lora, 224)
    assert all(value.is_meta for value in teacher.state_dict().values())
    counts = torch.ones(10_300, dtype=torch.int64)
    head = TrainingHead(1024, counts, ScheduledStage(ALL, 0, 2, ViewConfig(), 0).losses).to("meta")
    return estimate(teacher, head, 32, 224, "adamw", has_ema=False, is_half=True, shards=1)


def test_plan_of_vit_h_14_fits_into_10_gib() -> None:
    """Batch 32 with gradient checkpointing in bf16; the adapters' sizes follow from the layers' shapes."""
    memory, full = plan_vit_h_14(LoraConfig(rank=8)), plan_vit_h_14(LoraConfig())
    print(f"with LoRA {memory}\nwithout   {full}")
    assert memory.total <= 10 << 30 < full.total
    sides = (1280 + 3 * 1280) + (1280 + 1280) + 2 * (1280 + 5120)
    trainable = 4 * (32 * 8 * sides + 10_300 * 1024)
    assert memory.gradients == trainable
    assert memory.optimiser == 2 * trainable


@pytest.mark.slow
def test_vit_h_14_trains_its_adapters(catalog: Catalog) -> None:
    """Train one step of the full tower, 632 M random weights."""
    tower = TowerConfig("ViT-H-14", "", gradient_checkpointing=True)
    teacher, preprocess = build_teacher(tower, read_tower(tower.name), load_pretrained=False)
    training = catalog.select(split="train")
    stage = StageConfig("all", 1, lr_tower=1e-2, lr_head=1e-2, weight_decay=0.0, warmup=0.0)
    scheduled = ScheduledStage(stage, 0, 1, ViewConfig(), 0)
    module = TeacherModule(scheduled, teacher, preprocess, training, catalog.select(split="validation"))
    module.add_adapters(LoraConfig(rank=8), preprocess.size)
    before = {name: p.detach().sum().item() for name, p in teacher.named_parameters()}
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, training_loader(ImageDataset(training, preprocess), LoaderConfig(batch_size=2), 0))
    after = {name: p.detach().sum().item() for name, p in teacher.named_parameters()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "lora_B" in name}  # A has no gradient while B is 0
