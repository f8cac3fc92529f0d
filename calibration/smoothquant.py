"""SmoothQuant and bias correction: what changes in the float weights before they are quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from calibration.activation_stats import Activations
from calibration.onnx_layers import Linear, find_linears, replace_constant
from calibration.ranges import MagnitudeHistogram, threshold
from vpr.common.errors import UserError
from vpr.inference.int8 import LEVELS, activation_scale, weight_scales
from vpr.inference.onnx_graph import reraise_as_graph_error

ALPHAS = tuple(round(0.05 * step, 2) for step in range(21))
_SMALLEST = 1e-5


@dataclass(frozen=True)
class Smoothing:
    """One fold: channels of a linear's input are divided, its rows multiplied by the same.

    Attributes:
        linear: module whose input is smoothed.
        source: what takes the division: node of a LayerNormalization, or of the linear that makes values of
            attention.
        alpha: share of the difficulty that moves from activations to weights; None where nothing was gained.
        gain: error of the linear's output after, over before.
        factors: (channels,) float32.
    """

    linear: str
    source: str
    alpha: float | None
    gain: float
    factors: NDArray[np.float32]


def search_smoothing(graph: onnx.ModelProto, seen: dict[str, Activations]) -> list[Smoothing]:
    """For each linear whose input can be scaled without a trace, the alpha of least error at its output.

    ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (Xiao et al., "SmoothQuant", ICML 2023, eq. 4). The input of a
    linear after LayerNormalization is scaled there; that of attention's output projection in the columns of
    the linear that makes the values, since attention mixes tokens and leaves channels apart.

    Args:
        graph: FP32.
        seen: its activations.
    """
    found = []
    for linear, source in _foldable(graph):
        inputs = seen[linear.input]
        plain = output_error(inputs.rows, linear.weight, octav_threshold(inputs.rows))
        best = Smoothing(linear.module, source, None, 1.0, np.ones(len(linear.weight), np.float32))
        for alpha in ALPHAS:
            divisors = smoothing_factors(inputs.largest, linear.weight, alpha)
            rows, weight = inputs.rows / divisors, linear.weight * divisors[:, None]
            gain = output_error(rows, weight, octav_threshold(rows)) / max(plain, 1e-30)
            if gain < best.gain:
                best = Smoothing(linear.module, source, alpha, gain, divisors)
        found.append(best)
    return found


def smoothing_by_module(smoothings: list[Smoothing]) -> dict[str, NDArray[np.float32]]:
    """Those that gain, by the module of their linear."""
    return {one.linear: one.factors for one in smoothings if one.alpha is not None}


def smoothing_factors(largest: NDArray[np.float32], weight: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """(channels,) float32 s of equation 4 from the largest |x| of each channel and the (channels, out) weight.

    Scaled so that their geometric mean is 1, which changes no quantised value and keeps FP16's range.
    """
    tops = np.maximum(np.abs(weight).max(axis=1), _SMALLEST).astype(np.float64)
    factors = np.maximum(largest, _SMALLEST).astype(np.float64) ** alpha / tops ** (1 - alpha)
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)


@reraise_as_graph_error("smoothing")
def smooth(graph: onnx.ModelProto, factors: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """A copy of an FP32 graph with factors folded in; it computes the same embeddings.

    Args:
        graph: FP32.
        factors: (channels,) float32 by the module of the linear whose input they divide.

    Raises:
        UserError: factors that do not belong to this graph.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    places = {linear.module: (linear, source) for linear, source in _foldable(graph)}
    for module, divisors in factors.items():
        if module not in places or divisors.shape != (len(places[module][0].weight),):
            raise UserError(f"ranges: smoothing of '{module}' does not fit this graph: calibrate it again")
        linears = {linear.module: linear for linear in find_linears(model)}
        linear = linears[module]
        scaled = linear.weight * divisors[:, None]
        replace_constant(model, linear.node, linear.matrix, scaled.T if linear.axis == 0 else scaled)
        source = next(node for node in model.graph.node if node.name == places[module][1])
        if source.op_type == "LayerNormalization":
            constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
            for name in list(source.input)[1:]:
                replace_constant(model, source.name, name, (constants[name] / divisors).astype(np.float32))
        else:
            values = next(each for each in linears.values() if each.node == source.name)
            shrunk = values.weight.copy()
            shrunk[:, -len(divisors) :] /= divisors
            replace_constant(model, values.node, values.matrix, shrunk.T if values.axis == 0 else shrunk)
    return model


def output_error(rows: NDArray[np.float32], weight: NDArray[np.float32], limit: float) -> float:
    """Mean squared difference of a linear's output in INT8 from that in FP32.

    Args:
        rows: (n, in) float32 inputs.
        weight: (in, out) float32.
        limit: magnitude of the input that maps to 127.
    """
    return float(((fake_quantize_activation(rows, limit) @ fake_quantise_weight(weight) - rows @ weight) ** 2).mean())


def correct_bias(rows: NDArray[np.float32], weight: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """(out,) float32 to take from the bias, so that the output's mean is that of FP32.

    ``E[Q(x)] Q(W) - E[x] W`` (Nagel et al., "Data-free quantization", ICCV 2019, eq. 17, measured).
    """
    expected = rows.mean(axis=0, dtype=np.float64) @ weight.astype(np.float64)
    found = fake_quantize_activation(rows, limit).mean(axis=0, dtype=np.float64) @ fake_quantise_weight(weight).astype(
        np.float64
    )
    return (found - expected).astype(np.float32)


def fake_quantize_activation(values: NDArray[np.float32], limit: float) -> NDArray[np.float32]:
    """Activations through Q/DQ, as the graph's."""
    scale = activation_scale(limit)
    return (np.clip(np.rint(values / scale), -LEVELS - 1, LEVELS) * scale).astype(np.float32)


def fake_quantise_weight(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """An (in, out) weight through Q/DQ, one scale per output, as the graph's."""
    scales = weight_scales(weight, axis=1)
    return (np.clip(np.rint(weight / scales), -LEVELS, LEVELS) * scales).astype(np.float32)


def octav_threshold(rows: NDArray[np.float32]) -> float:
    """The threshold by which smoothed inputs are compared: quick to find, and near the best."""
    histogram = MagnitudeHistogram()
    histogram.add(rows)
    return threshold(histogram, "octav")


def _foldable(graph: onnx.ModelProto) -> list[tuple[Linear, str]]:
    """Linears whose input can be scaled, each with the node that takes the division."""
    linears = find_linears(graph)
    makers = {output: node for node in graph.graph.node for output in node.output}
    readers: dict[str, int] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    modules = {linear.module: linear for linear in linears}
    found = []
    for linear in linears:
        maker = makers.get(linear.input)
        block = linear.module.removesuffix(".to_out.0")
        values = modules.get(f"{block}.to_qkv")
        if maker is not None and maker.op_type == "LayerNormalization" and readers[linear.input] == 1:
            found.append((linear, maker.name))
            continue
        # The last third of to_qkv makes the values, in the order in which to_out reads them.
        thirds = values is not None and values.bias is None and values.weight.shape[1] == 3 * len(linear.weight)
        if values is not None and thirds and block != linear.module:
            found.append((linear, values.node))
    return found
