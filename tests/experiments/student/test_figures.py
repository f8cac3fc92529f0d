from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.student.ablation import Setting, retention
from experiments.student.dimension import teacher
from experiments.student.sizes import GOALS, SIZES, Point, _kept, draw
from student.model import Student, count_multiply_adds


def point(width: int, share: float, kept: float) -> Point:
    return Point(
        width, 10_000 * width, 1_000_000 * width, share, 0.5, (kept, kept - 0.1, kept + 0.1), 2.0, 1.0, 3.0, 4.0
    )


def test_retention_is_the_ratio_and_its_interval_is_paired() -> None:
    rng = np.random.default_rng(0)
    whole = rng.random(500) < 0.8
    assert retention(whole.astype(float), whole) == (1.0, 1.0, 1.0)
    half = whole & (rng.random(500) < 0.5)
    value, low, high = retention(half.astype(float), whole)
    assert value == pytest.approx(half.sum() / whole.sum())
    assert low < value < high
    # Of a share of hits p among n, the deviation is sqrt(p (1 - p) / n).
    assert (high - low) / 4 == pytest.approx(np.sqrt(value * (1 - value) / whole.sum()), rel=0.15)


def test_the_made_teacher_has_the_spectrum_it_is_said_to_have() -> None:
    fitted, scored, products = teacher(1.0, 0.5, 0)
    assert len(scored) == len(products)
    values = np.linalg.svd(fitted.astype(np.float64), compute_uv=False) ** 2
    # Unit length takes from the strongest directions most, so these are compared below them.
    np.testing.assert_allclose(values[[15, 31, 63]] / values[7], [1 / 2, 1 / 4, 1 / 8], rtol=0.12)


def test_each_share_is_shown_by_the_largest_student_within_it(tmp_path: Path) -> None:
    points = [point(96, 0.1, 0.7), point(128, 0.2, 0.8), point(192, 0.4, 0.9), point(256, 0.8, 1.0)]
    setting = Setting("s", tmp_path, tmp_path, tmp_path, 1, 1, "command")
    assert [_kept(points, share, goal, setting).value for share, goal in GOALS.items()] == [0.9, 0.8]
    draw(points, tmp_path / "sizes.svg")
    text = (tmp_path / "sizes.svg").read_text()
    assert all(f">{p.width} wide<" in text for p in points)


def test_the_curve_s_students_lie_on_both_sides_of_the_shares() -> None:
    """A quarter and a half of the sample teacher's 201.6 million multiply-adds."""
    adds = [count_multiply_adds(Student(replace(shape, embedding_dim=256)), 96) / 201.6e6 for shape in SIZES.values()]
    assert adds == sorted(adds, reverse=True)
    assert 1 > adds[0] > 0.5 > adds[1] > 0.25 > adds[2]
