"""Statistics of the activations at the inputs of linears, convolutions and attention, gathered in one pass."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.onnx_layers import attention_inputs, weighted_nodes
from calibration.ranges import MagnitudeHistogram
from vpr.common.errors import UserError
from vpr.inference.onnx_graph import session_with_outputs
from vpr.inference.onnx_session import INPUT

ROWS = 512


@dataclass
class Activations:
    """Statistics of one tensor. Memory does not grow with the number of images."""

    # histogram of the magnitudes of all values
    histogram: MagnitudeHistogram = field(default_factory=MagnitudeHistogram)
    # (channels,) float32, the largest |x| of each channel
    channel_max: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    # (at most 512, channels) float32, a uniform sample of all tokens
    rows: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    seen: int = 0  # number of tokens

    def add(self, values: NDArray[np.float32], rng: np.random.Generator) -> None:
        """Add a batch, (..., channels); of images, use only the magnitudes. ValueError if a value is not finite."""
        tokens = values.reshape(-1, values.shape[-1]).astype(np.float32, copy=False)
        self.histogram.add(tokens)
        batch_max = np.abs(tokens).max(axis=0)
        self.channel_max = batch_max if not self.seen else np.maximum(self.channel_max, batch_max)
        free = min(ROWS - len(self.rows), len(tokens))
        sample = tokens[:free] if not self.seen else np.concatenate([self.rows, tokens[:free]])
        sample = np.array(sample)  # a view would keep the batch in memory
        # Vitter's reservoir sampling, algorithm R: the t-th token replaces a random row with probability ROWS / t.
        remaining = tokens[free:]
        targets = rng.integers(0, self.seen + free + 1 + np.arange(len(remaining)))
        for row in np.flatnonzero(targets < ROWS).tolist():
            sample[targets[row]] = remaining[row]
        self.rows = sample
        self.seen += len(tokens)


def measure_activations(
    graph: onnx.ModelProto, batches: Iterable[NDArray[np.float32]], seed: int = 0
) -> dict[str, Activations]:
    """Return statistics of the inputs of all linears, convolutions and attention products, by tensor.

    ``batches`` are inputs of the FP32 graph, (n, 3, size, size) float32 each. ``seed`` is the seed of the sample of
    tokens. :class:`UserError` names a tensor that is not finite.
    """
    names = [*dict.fromkeys([*(node.input[0] for node in weighted_nodes(graph)), *attention_inputs(graph)])]
    session = session_with_outputs(graph, names)
    activations = {name: Activations() for name in names}
    rng = np.random.default_rng(seed)
    for batch in batches:
        for name, values in zip(names, session.run(names, {INPUT: batch}), strict=True):
            try:
                activations[name].add(np.asarray(values), rng)
            except ValueError:
                raise UserError(f"calibration: tensor '{name}' is not finite. Check the model's weights.") from None
    return activations
