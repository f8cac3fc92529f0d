from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from teacher.config import HeadConfig, ScheduledStage, StageConfig, TowerConfig
from teacher.model import Teacher, build_teacher, load_teacher, read_tower
from teacher.module import TeacherModule
from teacher.weights import load_tower_weights, read_tower_weights, resize_positions
from vpr.artifacts.card import Embedding
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, training_loader
from vpr.imaging.config import ViewConfig

SMALL = TowerConfig(name="sample", pretrained="", image_size=32)


def test_weights_load_from_a_safetensors_file(tmp_path: Path) -> None:
    """Load random CLIP weights the way a downloaded checkpoint is loaded."""
    tower = read_tower("sample")
    open_clip.factory._MODEL_CONFIGS["test-tower"] = tower
    torch.manual_seed(5)
    clip = open_clip.create_model("test-tower", load_weights=False)
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    config = TowerConfig(name="sample", pretrained=str(tmp_path / "clip.safetensors"))
    model, preprocess = build_teacher(config, tower, load_pretrained=True)
    x = torch.randn(2, 3, preprocess.size, preprocess.size)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(clip.visual.eval()(x), dim=1)
        torch.testing.assert_close(model.eval()(x), expected)


def test_tower_is_initialised_from_a_teacher(tmp_path: Path) -> None:
    tower = read_tower("sample-vit")
    torch.manual_seed(3)
    first, preprocess = build_teacher(TowerConfig("sample-vit", ""), tower, False)
    recorded = preprocess.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    with write_artifact(tmp_path / "first", "teacher", {"tower_config": tower}) as writer:
        save_file(first.state_dict(), writer.path / "model.safetensors")
        writer.preprocess, writer.embedding = recorded, Embedding(dim=128, normalised=True, dtype="float32")
    config = TowerConfig("sample-vit", str(tmp_path / "first"), keep_projection=False, embedding_dim=24)
    second, preprocess = build_teacher(config, tower, load_pretrained=True)
    assert second.embedding_dim == 24
    assert preprocess == recorded
    state = second.visual.state_dict()
    assert "proj" not in state
    for name, value in state.items():
        assert torch.equal(value, first.visual.state_dict()[name]), name


def write_teacher(path: Path, config: TowerConfig, tower: dict[str, Any]) -> Teacher:
    """Write a teacher artifact with random weights and BatchNorm statistics."""
    torch.manual_seed(1)
    teacher, preprocess = build_teacher(config, tower, load_pretrained=False)
    for buffer in teacher.project.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    with write_artifact(path, "teacher", {"network": asdict(config), "tower_config": tower}) as writer:
        save_file(teacher.state_dict(), writer.path / "model.safetensors")
        writer.preprocess = preprocess
        writer.embedding = Embedding(dim=teacher.embedding_dim, normalised=True, dtype="float32")
    return teacher


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"embedding_dim": 24, "batch_norm": True}, {"linear", "norm"}),
        ({"embedding_dim": 24}, {"linear"}),
        ({"embedding_dim": 24, "batch_norm": True, "image_size": 80}, {"linear", "norm"}),
        ({"embedding_dim": 12, "batch_norm": True}, set()),
        ({"batch_norm": True}, set()),
    ],
)
def test_projection_is_initialised_where_shapes_match(
    tmp_path: Path, changes: dict[str, Any], expected: set[str]
) -> None:
    tower = read_tower("sample-vit")
    first = write_teacher(tmp_path / "first", TowerConfig("sample-vit", "", embedding_dim=24, batch_norm=True), tower)
    torch.manual_seed(2)
    second, _ = build_teacher(TowerConfig("sample-vit", str(tmp_path / "first"), **changes), tower, True)
    first_state = first.project.state_dict()
    copied = {
        name.split(".")[0]
        for name, value in second.project.state_dict().items()
        if value.is_floating_point() and torch.equal(value, first_state[name])
    }
    # Weight and bias of every new norm are ones and zeros, so only the statistics show whether it was copied.
    if "norm" in copied and not torch.equal(second.project.norm.running_var, first.project.norm.running_var):
        copied.remove("norm")
    assert copied == expected


def test_teacher_of_another_tower_is_rejected(tmp_path: Path) -> None:
    """The shapes match, but the attention has other heads."""
    tower = read_tower("sample-vit")
    write_teacher(tmp_path / "first", TowerConfig("sample-vit", ""), tower)
    other = {**tower, "vision_cfg": {**tower["vision_cfg"], "head_width": 64}}
    with pytest.raises(UserError, match=r"first has another tower than other\.json"):
        build_teacher(TowerConfig("other.json", str(tmp_path / "first")), other, load_pretrained=True)
    with pytest.raises(UserError, match=r"first has another tower than sample"):
        build_teacher(TowerConfig("sample", str(tmp_path / "first")), read_tower("sample"), load_pretrained=False)


def test_loaded_teacher_equals_the_written_one(tmp_path: Path) -> None:
    changes = {"image_size": 72, "patch_stride": 5, "keep_projection": False, "dropout": 0.1, "embedding_dim": 24}
    config = TowerConfig("sample-vit", "", batch_norm=True, gradient_checkpointing=True, **changes)
    written = write_teacher(tmp_path / "first", config, read_tower("sample-vit"))
    loaded, _ = load_teacher(tmp_path / "first")
    x = torch.randn(2, 3, 72, 72)
    assert torch.equal(written.eval()(x), loaded(x))


@pytest.mark.parametrize(("name", "tag"), [("ViT-B-32", "openai"), ("ViT-H-14", "dfn5b")])
def test_weights_of_another_activation_are_rejected(name: str, tag: str) -> None:
    with pytest.raises(UserError, match=rf"'{tag}' was trained with QuickGELU.*Set tower\.name to {name}-quickgelu"):
        build_teacher(TowerConfig(name, tag), read_tower(name), False, "meta")
    build_teacher(TowerConfig(f"{name}-quickgelu", tag), read_tower(f"{name}-quickgelu"), False, "meta")


def test_tower_without_gelu_accepts_quickgelu_weights() -> None:
    build_teacher(TowerConfig("RN50", "openai"), read_tower("RN50"), False, "meta")


def test_timm_tower_has_the_configured_size() -> None:
    tower = {"embed_dim": 32, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 96}}
    model, preprocess = build_teacher(TowerConfig("t", ""), tower, False)
    assert preprocess.size == 96
    assert model.visual.trunk.pos_embed.shape[1] == 1 + 6 * 6
    assert model.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 32)


def tiny_vit(**changes: object) -> open_clip.model.VisionTransformer:
    torch.manual_seed(0)
    shape = {"image_size": 64, "patch_size": 8, "width": 64, "layers": 2, "heads": 2, "mlp_ratio": 2, "output_dim": 32}
    return open_clip.model.VisionTransformer(**{**shape, **changes}).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [64, 80, 96])
def test_resized_positions_equal_open_clip(size: int) -> None:
    tower, larger = tiny_vit(), tiny_vit(image_size=size)
    expected = {f"visual.{name}": value.clone() for name, value in tower.state_dict().items()}
    open_clip.model.resize_pos_embed(expected, type("Model", (), {"visual": larger})())
    load_tower_weights(larger, tower.state_dict())
    for name, value in larger.state_dict().items():
        torch.testing.assert_close(value, expected[f"visual.{name}"], msg=name)
    if size == 64:
        assert torch.equal(larger.positional_embedding, tower.positional_embedding)


def test_timm_positions_are_resized() -> None:
    tower = {"embed_dim": 32, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 64}}
    small, _ = build_teacher(TowerConfig("t", "", image_size=64), tower, False)
    large, preprocess = build_teacher(TowerConfig("t", "", image_size=96), tower, False)
    load_tower_weights(large.visual, small.visual.state_dict())
    before, after = small.visual.trunk.pos_embed, large.visual.trunk.pos_embed
    assert (before.shape[1], after.shape[1]) == (1 + 16, 1 + 36)
    assert torch.equal(before[:, 0], after[:, 0])
    grid = before[:, 1:].detach().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(after[:, 1:].detach(), expected.flatten(2).transpose(1, 2))
    assert large.eval()(torch.randn(1, 3, preprocess.size, preprocess.size)).shape == (1, 32)


def test_overlapping_patches_contain_the_original_ones() -> None:
    """Every second patch of stride 4 is a patch of stride 8."""
    plain, _ = build_teacher(TowerConfig("sample-vit", ""), read_tower("sample-vit"), False)
    config = TowerConfig("sample-vit", "", patch_stride=4)
    overlapping, _ = build_teacher(config, read_tower("sample-vit"), False)
    load_tower_weights(overlapping.visual, plain.visual.state_dict())
    assert overlapping.visual.positional_embedding.shape == (1 + 15 * 15, 128)
    x = torch.randn(1, 3, 64, 64)
    dense, sparse = overlapping.visual.conv1(x), plain.visual.conv1(x)
    torch.testing.assert_close(dense[:, :, ::2, ::2], sparse)
    assert overlapping.eval()(x).shape == (1, 128)


def test_weights_of_another_tower_are_rejected(tmp_path: Path) -> None:
    narrow = tiny_vit(width=32, heads=1)
    with pytest.raises(UserError, match=r"differ in the shape of 'class_embedding'|differ in the shape of"):
        load_tower_weights(tiny_vit(), narrow.state_dict())
    with pytest.raises(UserError, match=r"lack 'transformer\.resblocks\.1"):
        load_tower_weights(tiny_vit(), tiny_vit(layers=1).state_dict())
    with pytest.raises(UserError, match=r"have 'transformer\.resblocks\.2"):
        load_tower_weights(tiny_vit(), tiny_vit(layers=3).state_dict())
    save_file({"text.weight": torch.zeros(1)}, tmp_path / "text.safetensors")
    with pytest.raises(UserError, match=r"has no tensor of an image tower"):
        read_tower_weights(tmp_path / "text.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="is not a safetensors file"):
        read_tower_weights(tmp_path / "junk.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # safetensors#414
        ("checkpoint", r"is a PyTorch checkpoint under another name\. Convert it with vpr teacher convert\.$"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a pointer of Git LFS .*git lfs pull\.$"),
        (b"", r"is not a safetensors file \(.*\)\. Copy it again\.$"),
    ],
)
def test_other_files_named_as_weights_are_explained(tmp_path: Path, content: bytes | str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=rf"^tower\.pretrained: {path} {message}"):
        read_tower_weights(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: (value * 100).to(torch.int8), r"have integers in 'class_embedding', which are quantised"),
        (lambda value: value / 0, r"have values that are not finite in 'class_embedding'\. Use another checkpoint"),
    ],
    ids=["quantised", "not finite"],
)
def test_weights_without_usable_values_are_rejected(change: Any, message: str) -> None:
    state = tiny_vit().state_dict()
    with pytest.raises(UserError, match=message):
        load_tower_weights(tiny_vit(), state | {"class_embedding": change(state["class_embedding"])})


@pytest.mark.parametrize("tokens", [2 * 4, 1 + 2 * 4 * 4])
def test_positions_of_a_rectangle_are_rejected(tokens: int) -> None:
    """Their grid is not known (pytorch-image-models#2190)."""
    state = tiny_vit().state_dict()
    state["positional_embedding"] = torch.randn(tokens, state["positional_embedding"].shape[1])
    with pytest.raises(UserError, match="differ in the shape of 'positional_embedding'"):
        load_tower_weights(tiny_vit(), state)


def test_positions_of_the_same_grid_are_unchanged() -> None:
    positions = torch.randn(17, 8)
    assert resize_positions(positions, (17, 8)) is positions
    assert resize_positions(positions, (26, 8)).shape == (26, 8)
    assert torch.equal(resize_positions(positions, (26, 8))[0], positions[0])


def test_projection_has_dropout_before_and_norm_after() -> None:
    config = TowerConfig("sample-vit", "", embedding_dim=24, dropout=0.5, batch_norm=True)
    model, _ = build_teacher(config, read_tower("sample-vit"), False)
    assert [name for name, _ in model.project.named_children()] == ["dropout", "linear", "norm"]
    x = torch.randn(4, 3, 64, 64)
    model.eval()
    assert torch.equal(model(x), model(x))
    expected = model.project.norm(model.project.linear(model.visual(x)))
    torch.testing.assert_close(model(x), torch.nn.functional.normalize(expected, dim=1))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["sample-vit", "sample"])
def test_gradient_checkpointing_keeps_gradients(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = TowerConfig(name, "", image_size=64, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        model, _ = build_teacher(config, read_tower(name), False)
        torch.manual_seed(1)
        model.train()(torch.randn(4, 3, 64, 64)).sum(dim=1).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_rotary_tower_supports_overlapping_patches() -> None:
    """The rotary embedding has one entry per patch of the larger grid."""
    plain, _ = build_teacher(TowerConfig("EVA02-B-16", ""), read_tower("EVA02-B-16"), False, "meta")
    config = TowerConfig("EVA02-B-16", "", patch_stride=8)
    teacher, preprocess = build_teacher(config, read_tower("EVA02-B-16"), False, "meta")
    assert len(plain.visual.trunk.rope.get_embed()) == 14 * 14
    assert len(teacher.visual.trunk.rope.get_embed()) == 27 * 27
    assert teacher(torch.empty(1, 3, preprocess.size, preprocess.size, device="meta")).shape == (1, 512)


def test_attention_pool_is_not_removed() -> None:
    vision = {"timm_model_name": "resnet10t", "timm_pool": "rot_attn", "timm_proj": "linear", "image_size": 224}
    with pytest.raises(UserError, match="t has no projection to remove"):
        build_teacher(TowerConfig("t", "", keep_projection=False), {"embed_dim": 64, "vision_cfg": vision}, False)


FAMILIES = ["RN50", "convnext_base", "ViT-B-16-SigLIP", "coca_ViT-B-32", "xlm-roberta-base-ViT-B-32", "EVA02-B-16"]


@pytest.mark.parametrize("name", FAMILIES)
def test_tower_of_every_family_returns_embeddings(name: str) -> None:
    model, preprocess = build_teacher(TowerConfig(name, ""), read_tower(name), False, device="meta")
    assert model(torch.empty(2, 3, preprocess.size, preprocess.size, device="meta")).shape == (2, model.embedding_dim)
    # The text tower is not included.
    assert sum(p.numel() for p in model.parameters()) < 130e6


def test_tag_sets_the_preprocessing() -> None:
    _, siglip = build_teacher(TowerConfig("ViT-B-16-SigLIP", "webli"), read_tower("ViT-B-16-SigLIP"), False, "meta")
    assert siglip.mean == siglip.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 8}, r"tower\.image_size: expected .+ got 8"),
        ({"patch_stride": -1}, r"tower\.patch_stride: expected .+ got -1"),
        ({"dropout": 1.0}, r"tower\.dropout: expected .+ got 1\.0"),
        ({"embedding_dim": -5}, r"tower\.embedding_dim: expected .+ got -5"),
    ],
)
def test_values_out_of_range_are_rejected(changes: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TowerConfig(**changes)  # type: ignore[arg-type]


def test_preprocessing_follows_the_tower() -> None:
    _, preprocess = build_teacher(SMALL, read_tower("sample"), load_pretrained=False)
    assert preprocess.mean == open_clip.OPENAI_DATASET_MEAN
    assert (preprocess.size, preprocess.resize, preprocess.crop) == (32, "squash", "none")
    centred = TowerConfig(name="sample", pretrained="", squash=False)
    _, preprocess = build_teacher(centred, read_tower("sample"), load_pretrained=False)
    assert (preprocess.size, preprocess.resize, preprocess.crop) == (96, "shortest", "center")


def test_projection_sets_the_dimension() -> None:
    model, _ = build_teacher(TowerConfig("sample", "", 32, embedding_dim=24), read_tower("sample"), False)
    assert model.embedding_dim == 24
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 24)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TowerConfig(name="ViT-Q-7"), "'ViT-Q-7' is no open_clip model, timm model or JSON file. Nearest names: "),
        (TowerConfig(name="absent.json"), r"absent\.json is not readable"),
        (TowerConfig("ViT-B-32", "laion7b"), "ViT-B-32 has no tag 'laion7b'. Choose from"),
        (TowerConfig("ViT-B-32", "absent.safetensors"), "does not exist"),
        (TowerConfig("RN50", "", keep_projection=False), "has no projection to remove"),
        (TowerConfig("RN50", "", patch_stride=8), "is no ViT with position embeddings"),
        (TowerConfig("sample-vit", "", patch_stride=9), "expected at most 8"),
        (TowerConfig("RN50", "", gradient_checkpointing=True), "does not support it"),
    ],
)
def test_invalid_towers_are_rejected(config: TowerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_teacher(config, read_tower(config.name), load_pretrained=True)


def test_pickled_weights_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="pickled weights can run code"):
        build_teacher(TowerConfig("ViT-B-32", str(path)), read_tower("ViT-B-32"), load_pretrained=True)


@pytest.mark.slow
def test_vit_h_14_trains_its_head_and_embeds(catalog: Catalog) -> None:
    """Train the head of the full tower, 632 M random parameters."""
    tower = TowerConfig(name="ViT-H-14", pretrained="")
    stage = StageConfig("head", 1, lr_head=1e-2, warmup=0.0)
    teacher, preprocess = build_teacher(tower, read_tower(tower.name), load_pretrained=False)
    assert sum(p.numel() for p in teacher.parameters()) == pytest.approx(632e6, rel=0.002)
    assert (teacher.embedding_dim, preprocess.size) == (1024, 224)
    training = catalog.select(split="train")
    scheduled = ScheduledStage(stage, 0, 1, ViewConfig(), 0)
    module = TeacherModule(scheduled, HeadConfig(), teacher, preprocess, training, catalog.select(split="validation"))
    before = {name: p.detach().sum().item() for name, p in teacher.named_parameters()}
    head = module.head.weight.detach().clone()
    trainer = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(module, training_loader(ImageDataset(training, preprocess), LoaderConfig(batch_size=2), 0))
    assert trainer.global_step == 1
    assert not torch.equal(head, module.head.weight)
    assert {name: p.detach().sum().item() for name, p in teacher.named_parameters()} == before
    with torch.inference_mode():
        out = teacher.eval()(torch.randn(1, 3, 224, 224))
    assert out.shape == (1, 1024)
    assert out.norm().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not readable JSON"),
        (" " * (2 << 20), "more than 1048576 bytes"),
        ('{"embed_dim": 16, "vision_cfg": [1]}', "vision_cfg must be an object"),
        ('{"embed_dim": 1e9, "vision_cfg": {}}', "embed_dim: expected 0 to 65536"),
        ('{"embed_dim": 16, "vision_cfg": {"layers": 1000}}', "layers: expected 0 to 512"),
        ('{"embed_dim": 16, "vision_cfg": {"layers": [3, 4, 10000, 3]}}', "layers: expected 0 to 512"),
        ('{"embed_dim": 16, "vision_cfg": {"layers": -1}}', "layers: expected 0 to 512"),
        ('{"embed_dim": 16, "vision_cfg": {"width": -100000}}', "width: expected 0 to 65536"),
        ('{"embed_dim": 16, "vision_cfg": {"timm_model_name": "hf-hub:a/b"}}', "timm_model_name names a hub"),
    ],
)
def test_untrusted_tower_files_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tower.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_tower(str(tmp_path / "tower.json"))
