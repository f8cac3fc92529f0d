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
    assert step_flops(100, 1, "full") == step_flops(100, 1, "checkpointed") == 303  # as of PaLM, appendix B


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


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")],
)
def test_out_of_memory_does_not_fit(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TeacherStep("full", SMALL)
    assert step.fits(2)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(TeacherStep, "__call__", fail)
    assert not step.fits(2)
    with pytest.raises(UserError, match=r"batch: 2 images of it do not fit into memory\. Choose a smaller --batch"):
        step.seconds(2, 1, 0, "of it")


def test_other_errors_of_a_step_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    step = TeacherStep("full", SMALL)
    monkeypatch.setattr(TeacherStep, "__call__", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        step.fits(2)


def test_fragmented_memory_lowers_the_timed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search fits 32 images, the timed steps only 28."""
    step, sizes = TeacherStep("head", SMALL), list[int]()

    def call(self: TeacherStep, number: int) -> None:
        sizes.append(len(self.rows))
        if len(self.rows) > 28 and sizes.count(32) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TeacherStep, "__call__", call)
    batch, seconds = step.time_largest(32, 3, 0, "of it")
    assert batch == 28
    assert seconds > 0
    assert sizes[-3:] == [28] * 3


def test_checkpointing_is_a_mode() -> None:
    assert _saved_bytes(TeacherStep("full", SMALL)) > 1.5 * _saved_bytes(TeacherStep("checkpointed", SMALL))


def _saved_bytes(step: TeacherStep) -> int:
    """Return the bytes that autograd keeps for the gradient of a step of four images."""
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    step.set_batch(4)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        step.loss(0)
    return sum(saved.values())


@pytest.mark.parametrize("mode", ["head", "full", "checkpointed"])
def test_only_the_trained_part_changes(mode: str) -> None:
    step = TeacherStep(mode, SMALL)  # type: ignore[arg-type]
    step.set_batch(4)
    tower, head = [p.clone() for p in step.teacher.parameters()], step.head.weight.clone()
    step(0)
    has_changed = any(not torch.equal(old, new) for old, new in zip(tower, step.teacher.parameters(), strict=True))
    assert has_changed == (mode != "head")
    assert not torch.equal(head, step.head.weight)


def test_small_tower_is_measured_on_cpu() -> None:
    figures, tables = teacher_step(SMALL)
    assert all(figure.value and figure.value > 0 for figure in figures)
    assert [row["trains"] for row in tables["teacher-step"]] == ["head", "full", "checkpointed"]
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
