from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vit_pytorch import ViT
from vit_pytorch.vit_for_small_dataset import ViT as SmallDataViT

from student.config import PRESETS, StudentConfig
from student.model import ConvStem, Student, load_student
from vpr.artifacts.card import Embedding
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.inference.model_size import count_multiply_adds, count_parameters


def published(config: StudentConfig) -> torch.nn.Module:
    """Build vit-pytorch's original network."""
    kind = SmallDataViT if config.family == "small-data" else ViT
    names = ("image_size", "patch_size", "dim", "depth", "heads", "mlp_dim", "pool", "dim_head", "dropout")
    return kind(num_classes=config.embedding_dim, **{name: getattr(config, name) for name in names})


@pytest.mark.parametrize("family", ["vit", "small-data"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("dim", "heads", "dim_head"), [(64, 2, 32), (64, 1, 64), (48, 3, 24)])
def test_sdpa_equals_vit_pytorch(family: str, pool: str, dim: int, heads: int, dim_head: int) -> None:
    torch.manual_seed(0)
    shape = {"dim": dim, "depth": 3, "heads": heads, "dim_head": dim_head, "mlp_dim": 96, "embedding_dim": 10}
    config = StudentConfig(image_size=32, pool=pool, family=family, **shape)
    original, student = published(config).eval(), Student(config).eval()
    student.vit.load_state_dict(original.state_dict())
    assert sorted(student.vit.state_dict()) == sorted(original.state_dict())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(student.vit(x), original(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["vit", "small-data"])
def test_bfloat16_attention_has_the_gradients_of_float64(family: str) -> None:
    """A training step on a CPU attends by plain products; both are as near to float64 as bfloat16 rounds."""
    torch.manual_seed(0)
    shape = {"image_size": 32, "dim": 64, "depth": 1, "heads": 2, "dim_head": 32, "mlp_dim": 96, "embedding_dim": 16}
    attention = Student(StudentConfig(family=family, **shape)).vit.transformer.layers[0][0].train()
    exact = copy.deepcopy(attention).double()
    x, direction = (
        torch.randn(2, 3, 17, 64) if attention.others is None else torch.randn(2, 3, len(attention.others), 64)
    )
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    out.float().backward(direction)
    expected = exact(x.double())
    expected.backward(direction.double())
    assert out.dtype == torch.bfloat16
    pairs = [
        (out, expected),
        *((a.grad, b.grad) for a, b in zip(attention.parameters(), exact.parameters(), strict=True)),
    ]
    for value, reference in pairs:
        assert (value.double() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("size", [96, 224, 336])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "base"])
def test_presets_equal_vit_pytorch(preset: str, size: int) -> None:
    torch.manual_seed(0)
    config = StudentConfig(preset, image_size=size, embedding_dim=64)
    original, student = published(config).eval(), Student(config).eval()
    student.vit.load_state_dict(original.state_dict())
    x = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(student.vit(x), original(x), atol=5e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [96, 224, 336])
def test_base_preset_equals_vit_pytorch(size: int) -> None:
    test_presets_equal_vit_pytorch("base", size)


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 5.7), ("small", 22.1), ("base", 86.6)])
def test_presets_have_the_sizes_of_deit(preset: str, millions: float) -> None:
    """DeiT's table counts a classifier of 1,000 classes, so the embedding has 1,000 dimensions."""
    with torch.device("meta"):
        student = Student(StudentConfig(preset, embedding_dim=1000))
    assert count_parameters(student) / 1e6 == pytest.approx(millions, rel=0.01)


def test_registers_attend_and_are_dropped() -> None:
    torch.manual_seed(0)
    shape = {"image_size": 32, "dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "mlp_dim": 96, "embedding_dim": 16}
    student = Student(StudentConfig(registers=4, **shape)).eval()
    blocks, x = student.vit.transformer, torch.randn(2, 16, 64)
    out = blocks(x)
    assert out.shape == x.shape
    with torch.no_grad():
        blocks.registers.normal_()
    assert not torch.allclose(blocks(x), out, atol=1e-3)
    plain = Student(StudentConfig(**shape)).eval()
    plain.load_state_dict({k: v for k, v in student.state_dict().items() if "registers" not in k})
    blocks.registers = None
    torch.testing.assert_close(student(torch.ones(1, 3, 32, 32)), plain(torch.ones(1, 3, 32, 32)))


@pytest.mark.parametrize("family", ["vit", "small-data"])
def test_checkpointing_keeps_the_gradients(family: str) -> None:
    shape = {"image_size": 32, "dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "mlp_dim": 96, "embedding_dim": 16}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = StudentConfig(family=family, dropout=0.1, gradient_checkpointing=checkpointing, **shape)
        student = Student(config).train()
        torch.manual_seed(1)
        student(torch.randn(4, 3, 32, 32))[:, 0].sum().backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "huge"}, "model.preset: expected one of auto, sample, tiny, small, base, got 'huge'"),
        ({"image_size": 100}, "model.image_size: expected a multiple of patch 8, got 100"),
        ({"depth": -1}, "model.depth: expected .+ got -1"),
        ({"dim": 1 << 20}, "model.dim: expected .+ got 1048576"),
        ({"image_size": 1024, "patch_size": 4}, "gives more than 4096 tokens"),
        ({"image_size": 48, "patch_size": 12, "stem": "conv"}, "needs a power of two"),
        ({"registers": 65}, "model.registers: expected 0 to 64, got 65"),
        ({"dropout": 1.0}, "model.dropout: expected 0 to below 1, got 1.0"),
        ({"norm_eps": 0.0}, "model.norm_eps: expected 1e-12 to 0.1, got 0.0"),
        ({"activation": "relu"}, "model.activation: expected one of gelu, gelu-tanh, quick-gelu, got 'relu'"),
        ({"family": "small-data", "qkv_bias": True}, "model.qkv_bias: the family 'small-data' does not support it"),
        ({"family": "small-data", "pool": "map"}, "model.pool: the family 'small-data' does not support it"),
    ],
)
def test_wrong_shapes_are_rejected_by_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StudentConfig(**values)


def test_incomplete_shape_builds_no_network() -> None:
    with pytest.raises(UserError, match=r"model\.preset: 'auto' takes the shape of start, which is not set"):
        Student(StudentConfig("auto", dim=64, embedding_dim=8))


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_output_is_normalised_for_any_batch(stem: str) -> None:
    torch.manual_seed(0)
    shape = {"dim": 64, "depth": 2, "heads": 2, "dim_head": 32, "embedding_dim": 24}
    student = Student(StudentConfig(image_size=32, stem=stem, **shape)).eval()
    x = torch.randn(5, 3, 32, 32)
    out = student(x)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(student(x[2:3]), out[2:3], atol=1e-6, rtol=1e-5)


def test_conv_stem_gives_one_token_per_patch() -> None:
    assert ConvStem(8, 64)(torch.zeros(2, 3, 48, 48)).shape == (2, 36, 64)


def test_counts_equal_arithmetic() -> None:
    config = StudentConfig(
        image_size=32, patch_size=8, dim=64, depth=2, heads=2, dim_head=32, mlp_dim=128, embedding_dim=256
    )
    student, tokens = Student(config), 16
    linears = 64 * 192 + 64 * 64 + 2 * 64 * 128
    attention = 2 * tokens * 64
    assert count_multiply_adds(student, 32) == tokens * (192 * 64 + 2 * (linears + attention)) + 64 * 256
    assert count_parameters(student) == sum(v.numel() for v in student.state_dict().values())


def test_huge_network_in_card_is_not_allocated(tmp_path: Path) -> None:
    """Each size is within its limit, but the network would have 100 GB of weights."""
    shape = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16, "mlp_dim": 64, "embedding_dim": 16}
    config = StudentConfig(image_size=32, **shape)
    huge = replace(config, dim=4096, depth=64, heads=64, dim_head=256, mlp_dim=16384)
    with write_artifact(tmp_path / "student", "student", {"model": asdict(huge)}) as draft:
        save_file(Student(config).state_dict(), draft.path / "model.safetensors")
    with pytest.raises(UserError, match="the weights do not fit the network of the card"):
        load_student(tmp_path / "student")


@pytest.mark.parametrize("dim", [None, 15, 2**40])
def test_wrong_dimension_in_card_is_rejected(tmp_path: Path, dim: int | None) -> None:
    shape = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16, "mlp_dim": 64, "embedding_dim": 16}
    config = StudentConfig(image_size=32, **shape)
    with write_artifact(tmp_path / "student", "student", {"model": asdict(config)}) as draft:
        save_file(Student(config).state_dict(), draft.path / "model.safetensors")
        draft.embedding = Embedding(dim=16, normalised=True, dtype="float32")
    assert load_student(tmp_path / "student")[0]
    card = json.loads((tmp_path / "student" / "card.json").read_bytes())
    card["embedding"] = dim and {**card["embedding"], "dim": dim}
    (tmp_path / "student" / "card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"does not name the 16 dimensions|key 'embedding\.dim'"):
        load_student(tmp_path / "student")
