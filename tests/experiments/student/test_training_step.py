from __future__ import annotations

import pytest
import torch

from experiments.student.training_step import (
    StudentStep,
    StudentStepConfig,
    main,
    needed_flops,
    student_step,
    unmeasured,
)
from tests.experiments.teacher.test_training_step import forward_flops
from vpr.common.errors import UserError
from vpr.inference.model_size import count_multiply_adds

SMALL = StudentStepConfig("sample", "sample-vit", batch=2, steps=2, warmup=1, device="cpu")


@pytest.mark.parametrize("mode", ["cached", pytest.param("online", marks=pytest.mark.slow)])
def test_only_the_student_changes(mode: str) -> None:
    step = StudentStep(mode, SMALL)  # type: ignore[arg-type]
    step.set_batch(4)
    before = [p.clone() for p in step.student.parameters()]
    step(0)
    assert any(not torch.equal(old, new) for old, new in zip(before, step.student.parameters(), strict=True))
    assert all(p.grad is None for p in step.teacher.parameters())
    assert step.fits(2)


def test_teacher_flops_count_where_it_runs() -> None:
    cached, online = (StudentStep(mode, SMALL) for mode in SMALL.modes)
    student_flops = 6 * count_multiply_adds(cached.student, 64)
    assert needed_flops(SMALL, cached) == student_flops
    assert needed_flops(SMALL, online) == student_flops + forward_flops("sample-vit")


def test_small_student_is_measured_on_cpu() -> None:
    figures, tables = student_step(SMALL)
    assert all(figure.value and figure.value > 0 for figure in figures)
    assert [row["signal"] for row in tables["student-step"]] == ["cached", "online"]
    assert [figure.name for figure in figures] == [figure.name for figure in unmeasured(SMALL)]


def test_cpu_needs_a_batch() -> None:
    with pytest.raises(UserError, match="--batch 8"):
        StudentStepConfig(device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
