"""Embeddings of ONNX graphs by another ONNX Runtime: this file imports nothing of the project.

``python experiments/external/run_graphs.py FOLDER GRAPH.onnx ...`` runs each graph of the folder on ``pixels.npy``
there, writes ``GRAPH.npy`` and prints the version. ``make oldest-runtime`` installs the oldest one that is supported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main(folder: Path, names: list[str]) -> None:
    """Run the graphs with the default settings, as a server does."""
    pixels = np.load(folder / "pixels.npy", allow_pickle=False)
    for name in names:
        session = ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {session.get_inputs()[0].name: pixels})
        np.save(folder / Path(name).with_suffix(".npy"), outputs[0], allow_pickle=False)
    print(ort.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
