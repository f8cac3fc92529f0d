from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.student.ablation import Setting, compute_retention
from experiments.student.dimension import synthetic_teacher
from experiments.student.sizes import GOALS, SIZES, Point, _retention_figure, draw
from student.model import Student
from vpr.inference.model_size import count_multiply_adds
from vpr.retrieval.metrics import evaluate_similarities


def point(width: int, share: float, kept: float) -> Point:
    return Point(
        width, 10_000 * width, 1_000_000 * width, share, 0.5, (kept, (kept - 0.1, kept + 0.1)), 2.0, 1.0, 3.0, 4.0
    )


def test_retention_has_paired_interval() -> None:
    rng = np.random.default_rng(0)
    teacher_hits = rng.random(500) < 0.8
    products = np.arange(500).astype(str)  # one query of each
    similarities = np.ones((500, 500), dtype=np.float32)
    np.fill_diagonal(similarities, np.where(teacher_hits, 2, 0))  # a miss ranks last
    teacher = evaluate_similarities(similarities, products, products)
    assert compute_retention(teacher_hits.astype(float), teacher) == (1.0, (1.0, 1.0))
    half = teacher_hits & (rng.random(500) < 0.5)
    value, interval = compute_retention(half.astype(float), teacher)
    assert interval is not None
    low, high = interval
    assert value == pytest.approx(half.sum() / teacher_hits.sum())
    assert low < value < high
    # The standard deviation of a share p of n hits is sqrt(p (1 - p) / n).
    assert (high - low) / 4 == pytest.approx(np.sqrt(value * (1 - value) / teacher_hits.sum()), rel=0.15)


def test_synthetic_teacher_has_its_spectrum() -> None:
    fitted, scored, products = synthetic_teacher(1.0, 0.5, 0)
    assert len(scored) == len(products)
    values = np.linalg.svd(fitted.astype(np.float64), compute_uv=False) ** 2
    # Normalisation shrinks the strongest directions most, so weaker ones are compared.
    np.testing.assert_allclose(values[[15, 31, 63]] / values[7], [1 / 2, 1 / 4, 1 / 8], rtol=0.12)


def test_largest_student_within_share_is_drawn(tmp_path: Path) -> None:
    points = [point(96, 0.1, 0.7), point(128, 0.2, 0.8), point(192, 0.4, 0.9), point(256, 0.8, 1.0)]
    setting = Setting("s", tmp_path, tmp_path, tmp_path, 1, 1, "command")
    assert [_retention_figure(points, share, goal, setting).value for share, goal in GOALS.items()] == [0.9, 0.8]
    draw(points, tmp_path / "sizes.svg")
    text = (tmp_path / "sizes.svg").read_text()
    assert all(f">{p.width} wide<" in text for p in points)


def test_curve_brackets_the_shares() -> None:
    """A quarter and a half of the sample teacher's 201.6 million multiply-adds."""
    adds = [count_multiply_adds(Student(replace(shape, embedding_dim=256)), 96) / 201.6e6 for shape in SIZES.values()]
    assert adds == sorted(adds, reverse=True)
    assert 1 > adds[0] > 0.5 > adds[1] > 0.25 > adds[2]
