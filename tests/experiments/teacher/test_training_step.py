from __future__ import annotations

import pytest
import torch

from experiments.teacher.training_step import TeacherStep, TeacherStepConfig, main, step_flops, teacher_step
from experiments.training_step import count_flops, largest_batch, matmul_rate
from teacher.config import TowerConfig
from teacher.model import build_teacher, read_tower
from vpr.common.errors import UserError

SMALL = TeacherStepConfig("sample-vit", 10, batch=2, steps=2, warmup=1, device="cpu")


def forward_flops(name: str) -> int:
    shadow, preprocess = build_teacher(TowerConfig(name, ""), read_tower(name), False, "meta")
    return count_flops(shadow.eval(), preprocess.size)


def test_vit_flops_equal_explicit_sum() -> None:
    tokens, width, layers, patches = 65, 128, 4, 64
    block = 2 * tokens * 12 * width * width + 4 * tokens * tokens * width
    expected = 2 * patches * 3 * 8 * 8 * width + layers * block + 2 * width * width
    assert forward_flops("sample-vit") == pytest.approx(expected, rel=0.01)


def test_vit_h_14_flops_equal_open_clip() -> None:
    assert forward_flops("ViT-H-14") == pytest.approx(334.6e9, rel=0.001)


def test_trained_part_counts_three_times() -> None:
    assert step_flops(100, 1, "head") == 103
    assert step_flops(100, 1, "full") == 303


@pytest.mark.parametrize("limit", [1, 2, 3, 63, 64, 100, 1000, 5000])
def test_largest_batch_is_found(limit: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    batch, top = largest_batch(fits, 2000), min(limit, 2000)
    assert top - top // 32 <= batch <= top if top > 63 else batch == top
    assert max(tried) <= 2000
    assert len(tried) < 20


def test_gpu_too_small_for_one_image_is_an_error() -> None:
    with pytest.raises(UserError, match="not even one image fits"):
        largest_batch(lambda batch: False, 8)


def test_out_of_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    step = TeacherStep("full", SMALL)
    assert step.fits(2)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(TeacherStep, "__call__", fail)
    assert not step.fits(2)


@pytest.mark.parametrize("mode", ["head", "full"])
def test_only_the_trained_part_changes(mode: str) -> None:
    step = TeacherStep(mode, SMALL)  # type: ignore[arg-type]
    step.set_batch(4)
    tower, head = [p.clone() for p in step.teacher.parameters()], step.head.weight.clone()
    step(0)
    has_changed = any(not torch.equal(old, new) for old, new in zip(tower, step.teacher.parameters(), strict=True))
    assert has_changed == (mode == "full")
    assert not torch.equal(head, step.head.weight)


def test_small_tower_is_measured_on_cpu() -> None:
    figures, tables = teacher_step(SMALL)
    assert all(figure.value and figure.value > 0 for figure in figures)
    assert [row["trains"] for row in tables["teacher-step"]] == ["head", "full"]
    assert figures[0].command.startswith("python -m experiments.teacher.training_step --tower sample-vit --classes 10")


def test_cpu_needs_a_batch() -> None:
    with pytest.raises(UserError, match="--batch 8"):
        TeacherStepConfig(device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")
def test_gpu_matrix_products_are_measured() -> None:
    assert matmul_rate((4096, 4096, 4096), "cuda") > 1e12
