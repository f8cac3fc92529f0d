from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper

from calibration.activation_stats import ROWS, Activations, measure_activations
from calibration.onnx_layers import find_linears
from calibration.ranges import MagnitudeHistogram
from calibration.smoothquant import (
    correct_bias,
    find_foldable,
    output_error,
    search_smoothing,
    smooth,
    smoothing_by_module,
    smoothing_factors,
)
from export.to_onnx import run_graph, trace
from student.model import Student
from tests.conftest import small_student
from vpr.common.errors import UserError


def _inputs(n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module", params=[20, 23])
def uneven(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """A student with some channels fifty times as large as the others, as in trained towers."""
    torch.manual_seed(0)
    model = Student(small_student("conv")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "net.0.weight")):
                parameter[::16] *= 50
            if name.endswith("to_qkv.weight"):
                parameter[-len(parameter) // 3 :: 16] *= 20
    return trace(model, 32, request.param)


def test_factors_follow_the_paper_up_to_their_mean() -> None:
    rng = np.random.default_rng(0)
    channel_max, weight = rng.uniform(0.1, 9, 12).astype(np.float32), rng.normal(size=(12, 7)).astype(np.float32)
    factors = smoothing_factors(channel_max, weight, 0.3)
    expected = [float(channel_max[j]) ** 0.3 / max(abs(float(w)) for w in weight[j]) ** 0.7 for j in range(12)]
    np.testing.assert_allclose(factors / factors[0], np.array(expected) / expected[0], rtol=1e-5)
    assert np.log(factors.astype(np.float64)).mean() == pytest.approx(0, abs=1e-6)


def test_smoothing_keeps_embeddings_and_lowers_errors(uneven: onnx.ModelProto) -> None:
    pixels = _inputs(12)
    activations = measure_activations(uneven, [pixels])
    smoothings = search_smoothing(uneven, activations)
    # In each block: queries, keys and values; attention's output; the first linear of the MLP.
    ends = ["0.to_qkv", "0.to_out.0", "1.net.1"]
    assert [smoothing.linear for smoothing in smoothings] == [
        f"vit.transformer.layers.{i}.{end}" for i in range(2) for end in ends
    ]
    smoothed = smooth(uneven, smoothing_by_module(smoothings))
    np.testing.assert_allclose(run_graph(smoothed, pixels), run_graph(uneven, pixels), atol=1e-5)
    remeasured = measure_activations(smoothed, [pixels])
    linears = {linear.module: linear for linear in find_linears(smoothed)}
    improved = [smoothing for smoothing in smoothings if smoothing.alpha is not None]
    assert len(improved) >= 5
    assert all(smoothing.error_ratio < 1 for smoothing in improved)
    assert min(smoothing.error_ratio for smoothing in improved) < 0.2
    for smoothing in improved:
        linear = linears[smoothing.linear]
        before = next(other for other in find_linears(uneven) if other.module == smoothing.linear)
        limit = float(np.abs(remeasured[linear.input].rows).max())
        unsmoothed = float(np.abs(activations[before.input].rows).max())
        after = output_error(remeasured[linear.input].rows, linear.weight, limit)
        # Unlike the search, both thresholds are the largest values, which favour neither graph.
        assert after <= 1.1 * output_error(activations[before.input].rows, before.weight, unsmoothed)


def test_shared_initialiser_changes_for_one_node_only(uneven: onnx.ModelProto) -> None:
    """Norms of equal weights may be one constant in the graph."""
    shared = onnx.ModelProto()
    shared.CopyFrom(uneven)
    norms = [node for node in shared.graph.node if node.op_type == "LayerNormalization"]
    for norm in norms[1:]:
        norm.input[1], norm.input[2] = norms[0].input[1], norms[0].input[2]
    module = next(linear.module for linear, source in find_foldable(shared) if source == norms[0].name)
    divisors = np.linspace(0.5, 2, 64).astype(np.float32)
    pixels = _inputs(4)
    embeddings = run_graph(smooth(shared, {module: divisors}), pixels)
    np.testing.assert_allclose(embeddings, run_graph(shared, pixels), atol=1e-5)


def test_factors_of_another_graph_are_rejected(uneven: onnx.ModelProto) -> None:
    with pytest.raises(UserError, match=r"the smoothing of 'vit\.nothing' does not fit this graph"):
        smooth(uneven, {"vit.nothing": np.ones(64, np.float32)})
    module = find_foldable(uneven)[0][0].module
    with pytest.raises(UserError, match="does not fit this graph"):
        smooth(uneven, {module: np.ones(63, np.float32)})


def test_correction_restores_the_fp32_mean_output() -> None:
    rng = np.random.default_rng(1)
    rows = F.gelu(torch.from_numpy(rng.normal(size=(4000, 32)))).numpy().astype(np.float32)
    weight = rng.normal(size=(32, 16)).astype(np.float32)
    scale = np.float32(np.float16(1.5 / 127))  # clips the tail, so that the mean moves
    steps = torch.fake_quantize_per_tensor_affine(torch.from_numpy(rows), float(scale), 0, -128, 127).double()
    channel = np.float16(np.abs(weight).max(axis=0).astype(np.float64) / 127).astype(np.float32)
    quantised_weight = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(weight), torch.from_numpy(channel), torch.zeros(16, dtype=torch.int32), 1, -127, 127
    ).double()
    moved = (steps @ quantised_weight).mean(0).numpy() - (rows.astype(np.float64) @ weight).mean(0)
    assert np.abs(moved).max() > 0.05
    np.testing.assert_allclose(correct_bias(rows, weight, 1.5), moved, atol=1e-5)


def test_token_sample_is_uniform_and_bounded() -> None:
    """Each of 4,096 tokens stays with the same probability, an eighth."""
    sampled = np.zeros(4096)
    for seed in range(60):
        activations, rng = Activations(), np.random.default_rng(seed)
        for batch in np.arange(4096, dtype=np.float32).reshape(16, 8, 32, 1):
            activations.add(batch + 1, rng)
        assert activations.rows.shape == (ROWS, 1)
        assert activations.seen == 4096
        assert activations.channel_max.tolist() == [4096.0]
        sampled[activations.rows[:, 0].astype(int) - 1] += 1
    quarters = sampled.reshape(4, -1).mean(axis=1) / 60
    np.testing.assert_allclose(quarters, ROWS / 4096, rtol=0.06)


def test_channel_maxima_agree_with_histogram(uneven: onnx.ModelProto) -> None:
    for activations in measure_activations(uneven, [_inputs(3), _inputs(5)]).values():
        histogram: MagnitudeHistogram = activations.histogram
        assert activations.channel_max.max() == np.float32(histogram.largest)
        assert histogram.counts.sum() == activations.seen * len(activations.channel_max)


def test_linears_have_their_biases(uneven: onnx.ModelProto) -> None:
    linears = find_linears(uneven)
    assert [linear.bias is None for linear in linears] == [linear.module.endswith("to_qkv") for linear in linears]
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in uneven.graph.initializer}
    for linear in linears:
        if linear.bias is not None:
            np.testing.assert_array_equal(linear.bias, constants[f"{linear.module}.bias"])
