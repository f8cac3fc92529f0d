"""What training images leave at the inputs of a graph's layers and of attention, gathered in one pass."""

from __future__ import annotations

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
    """What is known of a tensor; memory does not grow with the number of images.

    Attributes:
        histogram: of magnitudes, over all values.
        largest: (channels,) float32, the largest |x| of each channel.
        rows: (at most 512, channels) float32, tokens drawn evenly from all that were seen.
        seen: number of tokens.
    """

    histogram: MagnitudeHistogram = field(default_factory=MagnitudeHistogram)
    largest: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    seen: int = 0

    def add(self, values: NDArray[np.float32], rng: np.random.Generator) -> None:
        """Take in a batch, (..., channels); of an image or feature map, whose channels are not last, only magnitudes.

        Raises:
            ValueError: a value is not finite.
        """
        tokens = values.reshape(-1, values.shape[-1]).astype(np.float32, copy=False)
        self.histogram.add(tokens)
        top = np.abs(tokens).max(axis=0)
        self.largest = top if not self.seen else np.maximum(self.largest, top)
        free = min(ROWS - len(self.rows), len(tokens))
        kept = tokens[:free] if not self.seen else np.concatenate([self.rows, tokens[:free]])
        kept = np.array(kept)  # its own memory: a view would keep the whole batch alive
        # Vitter's reservoir, algorithm R: the t-th token takes the place of a random one with probability ROWS / t.
        rest = tokens[free:]
        turns = rng.integers(0, self.seen + free + 1 + np.arange(len(rest)))
        for row in np.flatnonzero(turns < ROWS).tolist():
            kept[turns[row]] = rest[row]
        self.rows = kept
        self.seen += len(tokens)


def measure_activations(
    graph: onnx.ModelProto, batches: Iterable[NDArray[np.float32]], seed: int = 0
) -> dict[str, Activations]:
    """Run images through an FP32 graph.

    Args:
        graph: FP32.
        batches: its inputs, (n, 3, size, size) float32 each.
        seed: of the draw of tokens.

    Returns:
        by the name of the tensor, the inputs of all linears, convolutions and products of attention.

    Raises:
        UserError: a tensor that is not finite, by name.
    """
    names = [*dict.fromkeys([*(node.input[0] for node in weighted_nodes(graph)), *attention_inputs(graph)])]
    session = session_with_outputs(graph, names)
    found = {name: Activations() for name in names}
    rng = np.random.default_rng(seed)
    for batch in batches:
        for name, values in zip(names, session.run(names, {INPUT: batch}), strict=True):
            try:
                found[name].add(np.asarray(values), rng)
            except ValueError:
                raise UserError(f"calibration: tensor '{name}' is not finite: check the student's weights") from None
    return found
