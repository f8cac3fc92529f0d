from __future__ import annotations

import pytest
import torch

from benchmarks.teacher_step import (
    Measured,
    StepConfig,
    figures,
    largest_batch,
    matmul_ceiling,
    measure_steps,
    step_flops,
)
from vpr.errors import UserError


def test_flops_of_a_vit_equal_the_written_out_sum() -> None:
    tokens, width, layers, dim, classes = 65, 128, 4, 128, 1000
    patches = 64 * 3 * 8 * 8 * width
    block = tokens * 12 * width * width + 2 * tokens * tokens * width
    tower = 2 * (patches + layers * block + width * dim)
    head = 3 * 2 * dim * classes
    config = StepConfig("sample-vit", classes)
    assert step_flops(config, "head") == pytest.approx(tower + head, rel=0.01)
    assert step_flops(config, "all") == pytest.approx(3 * tower + head, rel=0.01)


def test_vit_h_14_needs_what_open_clip_says() -> None:
    """open_clip's model profile: 334.6 GFLOPs for a picture."""
    assert step_flops(StepConfig(classes=1), "head") == pytest.approx(334.6e9, rel=0.02)


@pytest.mark.parametrize("limit", [2, 3, 7, 100, 257, 1000])
def test_the_largest_batch_is_found_to_within_an_eighth(limit: int) -> None:
    found = largest_batch(lambda size: size <= limit)
    assert found <= limit
    assert found > limit * 0.85 or found == limit - 1
    assert largest_batch(lambda size: size <= 1) == 0


def test_a_small_tower_is_measured_on_the_cpu() -> None:
    config = StepConfig("sample-vit", 50, "cpu", batch=4, steps=2)
    ceiling, (head, full) = measure_steps(config)
    assert ceiling > 1e8
    assert (head.part, full.part) == ("head", "all")
    assert head.images_per_second > 0
    assert full.flops > head.flops
    assert 0 < full.images_per_second * full.flops / ceiling < 2


def test_figures_state_utilisation_against_its_goal() -> None:
    measured = [Measured("all", 64, 0.5, 1e12, 3 << 30)]
    rows = {figure.name.split(": ")[1]: figure for figure in figures(2.56e14, measured, "ViT-H-14")}
    assert rows["images/s"].value == 128
    assert rows["model FLOP utilisation"].value == pytest.approx(0.5)
    assert rows["model FLOP utilisation"].met is True
    assert rows["peak memory"].value == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="PyTorch finds no GPU here"):
        measure_steps(StepConfig())


@pytest.mark.gpu
def test_the_ceiling_of_a_gpu_is_measured() -> None:
    assert matmul_ceiling("cuda") > 1e12
