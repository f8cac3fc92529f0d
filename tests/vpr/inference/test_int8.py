from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.inference.int8 import LEVELS, activation_scale, read_ranges, weight_scales

ENTRY = {"threshold": 3.0, "linears": ["a.to_qkv"]}


def _write_ranges(path: Path, entries: Any, arrays: dict[str, np.ndarray] | None = None) -> Artifact:
    with write_artifact(path, "ranges", {}) as draft:
        (draft.path / "ranges.json").write_text(json.dumps(entries))
        save_file(arrays or {}, draft.path / "adjustments.safetensors")
    return load_artifact(path)


def test_ranges_are_read(tmp_path: Path) -> None:
    ones = np.ones(4, np.float32)
    ranges = read_ranges(_write_ranges(tmp_path / "r", {"x": ENTRY}, {"smooth:a.to_qkv": ones, "bias:a.to_out": -ones}))
    assert (ranges.thresholds, ranges.linears) == ({"x": 3.0}, {"x": ["a.to_qkv"]})
    assert list(ranges.smoothing) == ["a.to_qkv"]
    assert list(ranges.corrections) == ["a.to_out"]


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), float("inf"), 1e308, 127 * 65504 * 1.01])
def test_threshold_without_a_finite_scale_is_rejected(tmp_path: Path, threshold: float) -> None:
    with pytest.raises(UserError, match="the threshold of 'x' is .*, not a positive number within FP16's range"):
        read_ranges(_write_ranges(tmp_path / "r", {"x": {**ENTRY, "threshold": threshold}}))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), st.floats(), max_size=4))
def test_ranges_are_read_exactly_or_rejected(thresholds: dict[str, float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact = _write_ranges(Path(folder) / "r", {name: {"threshold": value} for name, value in thresholds.items()})
        if all(0 < value <= 127 * 65504 for value in thresholds.values()):
            assert read_ranges(artifact).thresholds == thresholds
        else:
            with pytest.raises(UserError, match="not a positive number within FP16's range"):
                read_ranges(artifact)


@settings(max_examples=100)
@given(st.floats(2.0**-7, 127 * 60000.0))
def test_scale_is_rounded_to_the_nearest_fp16(threshold: float) -> None:
    scale, exact = activation_scale(threshold), threshold / 127
    neighbours = (np.nextafter(np.float16(scale), np.float16(side)) for side in (0, 65504))
    assert np.float32(np.float16(scale)) == scale
    assert all(abs(float(scale) - exact) <= abs(float(neighbour) - exact) for neighbour in neighbours)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0, 1]), st.integers(0, 2**32 - 1), st.floats(1e-9, 1e5))
def test_weights_are_clipped_by_fp16_rounding_at_most(
    rows: int, columns: int, axis: int, seed: int, size: float
) -> None:
    weight = (size * np.random.default_rng(seed).normal(size=(rows, columns))).astype(np.float32)
    scales = weight_scales(weight, axis)
    largest = np.abs(weight.astype(np.float64)).max(axis=1 - axis)
    assert scales.shape == ((rows, columns)[axis],)
    assert (scales > 0).all()
    assert (largest <= scales * LEVELS * (1 + 2.0**-11)).all()


def test_largest_threshold_has_a_finite_scale(tmp_path: Path) -> None:
    ranges = read_ranges(_write_ranges(tmp_path / "r", {"x": {**ENTRY, "threshold": 127 * 65504}}))
    assert activation_scale(ranges.thresholds["x"]) == 65504


@pytest.mark.parametrize(
    "entries", [[], {"x": 3.0}, {"x": {}}, {"x": {"threshold": "large"}}, {"x": {**ENTRY, "linears": 3}}, None]
)
def test_json_of_another_form_is_rejected(tmp_path: Path, entries: Any) -> None:
    with pytest.raises(UserError, match="not a usable ranges"):
        read_ranges(_write_ranges(tmp_path / "r", entries))


@pytest.mark.parametrize(
    "array",
    [np.zeros(4, np.float32), np.full(4, np.nan, np.float32), np.full(4, np.inf, np.float32), np.ones(4, np.int64)],
)
def test_invalid_smoothing_factors_are_rejected(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"'smooth:a' of adjustments\.safetensors"):
        read_ranges(_write_ranges(tmp_path / "r", {"x": ENTRY}, {"smooth:a": array}))
