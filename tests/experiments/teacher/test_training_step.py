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


def test_flops_of_a_vit_equal_the_written_out_sum() -> None:
    tokens, width, layers, patches = 65, 128, 4, 64
    block = 2 * tokens * 12 * width * width + 4 * tokens * tokens * width
    written = 2 * patches * 3 * 8 * 8 * width + layers * block + 2 * width * width
    assert forward_flops("sample-vit") == pytest.approx(written, rel=0.01)


def test_vit_h_14_needs_what_open_clip_says() -> None:
    assert forward_flops("ViT-H-14") == pytest.approx(334.6e9, rel=0.001)


def test_what_learns_is_counted_three_times_and_the_rest_once() -> None:
    assert step_flops(100, 1, "head") == 103
    assert step_flops(100, 1, "full") == 303


@pytest.mark.parametrize("limit", [1, 2, 3, 63, 64, 100, 1000, 5000])
def test_the_largest_batch_is_found(limit: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found, top = largest_batch(fits, 2000), min(limit, 2000)
    assert top - top // 32 <= found <= top if top > 63 else found == top
    assert max(tried) <= 2000
    assert len(tried) < 20


def test_a_gpu_too_small_for_one_image_is_said() -> None:
    with pytest.raises(UserError, match="not even one image fits"):
        largest_batch(lambda batch: False, 8)


def test_a_batch_without_room_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    step = TeacherStep("full", SMALL)
    assert step.fits(2)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(TeacherStep, "__call__", fail)
    assert not step.fits(2)


@pytest.mark.parametrize("mode", ["head", "full"])
def test_only_what_the_mode_names_learns(mode: str) -> None:
    step = TeacherStep(mode, SMALL)  # type: ignore[arg-type]
    step.set_batch(4)
    tower, head = [p.clone() for p in step.teacher.parameters()], step.head.weight.clone()
    step(0)
    moved = any(not torch.equal(old, new) for old, new in zip(tower, step.teacher.parameters(), strict=True))
    assert moved == (mode == "full")
    assert not torch.equal(head, step.head.weight)


def test_a_small_tower_is_measured_on_the_cpu() -> None:
    figures, tables = teacher_step(SMALL)
    assert all(figure.value and figure.value > 0 for figure in figures)
    assert [row["trains"] for row in tables["teacher-step"]] == ["head", "full"]
    assert figures[0].command.startswith("python -m experiments.teacher.training_step --tower sample-vit --classes 10")


def test_the_cpu_needs_a_batch() -> None:
    with pytest.raises(UserError, match="--batch 8"):
        TeacherStepConfig(device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")
def test_a_gpu_s_matrix_products_are_measured() -> None:
    assert matmul_rate((4096, 4096, 4096), "cuda") > 1e12
