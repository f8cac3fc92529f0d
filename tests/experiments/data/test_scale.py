from __future__ import annotations

import pytest

from experiments.data.scale import build_cost


def test_cost_of_a_small_catalogue() -> None:
    """The figures are of the catalogue that was built: its rate of images is what its seconds say."""
    figures, rows = build_cost("command", count=400)
    ratio, memory = (figure.value for figure in figures)
    assert ratio is not None
    assert memory is not None
    assert 0.05 < memory < 2
    seconds = [400 / float(row["images/s"]) for row in rows]
    assert ratio == pytest.approx(seconds[2] / seconds[0], rel=0.05)
    assert seconds[2] > seconds[1]  # a build decodes, and more
