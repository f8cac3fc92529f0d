from __future__ import annotations

import copy

import pytest
import torch
from vit_pytorch import ViT

from student.model import ConvStem, Student, StudentConfig, count_multiply_adds, count_parameters, use_sdpa


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("dim", "heads", "dim_head"), [(64, 2, 32), (64, 1, 64), (48, 3, 24)])
def test_sdpa_keeps_weights_and_outputs_of_vit_pytorch(pool: str, dim: int, heads: int, dim_head: int) -> None:
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": dim, "depth": 3, "mlp_dim": 96}
    published = ViT(**shape, heads=heads, dim_head=dim_head, pool=pool).eval()
    swapped = copy.deepcopy(published)
    use_sdpa(swapped)
    assert list(published.state_dict()) == list(swapped.state_dict())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(swapped(x), published(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_output_has_unit_length_and_does_not_depend_on_the_batch(stem: str) -> None:
    torch.manual_seed(0)
    student = Student(StudentConfig(image_size=32, dim=64, depth=2, heads=2, dim_head=32, stem=stem)).eval()
    x = torch.randn(5, 3, 32, 32)
    out = student(x)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(student(x[2:3]), out[2:3], atol=1e-6, rtol=1e-5)


def test_the_convolutional_stem_gives_as_many_tokens_as_patches() -> None:
    assert ConvStem(8, 64)(torch.zeros(2, 3, 48, 48)).shape == (2, 36, 64)
    with pytest.raises(ValueError, match="power of two"):
        ConvStem(12, 64)


def test_counts_agree_with_arithmetic() -> None:
    config = StudentConfig(image_size=32, patch_size=8, dim=64, depth=2, heads=2, dim_head=32, mlp_dim=128)
    student, tokens = Student(config), 16
    linears = 64 * 192 + 64 * 64 + 2 * 64 * 128
    attention = 2 * tokens * 64
    assert count_multiply_adds(student, 32) == tokens * (192 * 64 + 2 * (linears + attention)) + 64 * 256
    assert count_parameters(student) == sum(v.numel() for v in student.state_dict().values())
