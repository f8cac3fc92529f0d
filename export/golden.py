"""Golden vectors of an exported artifact: eight images, the model's inputs and its embeddings of them.

They are stored in the folder ``golden`` of the artifact. A client without this toolkit compares its own with them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vpr.artifacts.store import Artifact, reraise_as_artifact_error
from vpr.artifacts.writer import ArtifactWriter
from vpr.common.arrays import read_array
from vpr.common.errors import UserError
from vpr.data import golden
from vpr.imaging.decode import decode_bytes
from vpr.imaging.preprocess import ModelInput, Preprocess
from vpr.retrieval.embeddings import Forward, l2_normalize

if TYPE_CHECKING:
    import onnx

GOLDEN = "golden"
_INPUTS, _EMBEDDINGS = "inputs.npy", "embeddings.npy"
_SUFFIXES = (".jpg", ".png")
_MAX_IMAGES = 64


@dataclass(frozen=True)
class Golden:
    """Golden vectors of an artifact.

    Attributes:
        images: Content of each image file by its name, in the order of the vectors.
        inputs: Inputs of the model as its card says, such as (images, 3, size, size) float32.
        embeddings: (images, dim) float32, L2-normalised.
    """

    images: dict[str, bytes]
    inputs: ModelInput
    embeddings: NDArray[np.float32]


def write_graph_golden(draft: ArtifactWriter, graph: onnx.ModelProto) -> None:
    """Write the golden vectors of a graph, computed by ONNX Runtime, into its artifact, which has its card filled."""
    from vpr.inference.onnx_graph import GraphSession

    assert draft.preprocess is not None
    write_golden(draft.path, draft.preprocess, GraphSession(graph).embed)


def write_golden(folder: Path, preprocess: Preprocess, forward: Forward) -> None:
    """Write the packed images, and the inputs and embeddings of a model, into the folder of its artifact."""
    target = folder / GOLDEN
    target.mkdir()
    images = {name: (golden.FOLDER / name).read_bytes() for name in golden.IMAGES}
    inputs = model_inputs(images, preprocess)
    # One at a time: the result does not depend on the batch, and any model takes a single image.
    embeddings = np.concatenate([forward(inputs[row : row + 1]) for row in range(len(inputs))])
    for name in (*golden.IMAGES, golden.ATTRIBUTION):
        shutil.copyfile(golden.FOLDER / name, target / name)
    np.save(target / _INPUTS, inputs, allow_pickle=False)
    np.save(target / _EMBEDDINGS, l2_normalize(embeddings.astype(np.float32)), allow_pickle=False)


def copy_golden(source: Artifact, folder: Path) -> None:
    """Copy the golden vectors of a graph or engine to an artifact made from it; nothing if it has none."""
    for name in (name for name in source.card.files if name.startswith(f"{GOLDEN}/")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.file(name), folder / name)


def model_inputs(images: dict[str, bytes], preprocess: Preprocess) -> ModelInput:
    """Return the model's inputs of image files by name."""
    decoded = (decode_bytes(data, name, shortest=preprocess.size) for name, data in images.items())
    return preprocess.model_input(np.stack([preprocess.pixels(image) for image in decoded]))


def load_golden(artifact: Artifact) -> Golden:
    """Load the golden vectors of an artifact.

    Raises:
        UserError: The artifact has none, as those of earlier versions, or they contradict the card.
    """
    card = artifact.card
    names = sorted(name for name in card.files if name.startswith(f"{GOLDEN}/") and name.endswith(_SUFFIXES))
    if not names or f"{GOLDEN}/{_EMBEDDINGS}" not in card.files:
        fix = "Export the model again to another --output"
        raise UserError(f"{artifact.path}: it has no golden vectors, as the artifacts of earlier versions. {fix}.")
    with reraise_as_artifact_error(artifact):
        if card.preprocess is None or card.embedding is None or len(names) > _MAX_IMAGES:
            raise ValueError("no preprocessing, no embedding or too many golden images")
        arrays = [read_array(artifact.file(f"{GOLDEN}/{name}")) for name in (_INPUTS, _EMBEDDINGS)]
        expected: list[tuple[tuple[int, ...], np.dtype[Any]]]
        expected = [((len(names), *card.preprocess.input_shape), np.dtype(card.preprocess.dtype))]
        expected += [((len(names), card.embedding.dim), np.dtype(np.float32))]
        if [(array.shape, array.dtype) for array in arrays] != expected:
            raise ValueError("golden vectors of another shape than the card's")
        images = {Path(name).name: artifact.file(name).read_bytes() for name in names}
        return Golden(images, arrays[0], l2_normalize(arrays[1]))


def has_golden(artifact: Artifact) -> bool:
    """Return whether an artifact has golden vectors."""
    return f"{GOLDEN}/{_EMBEDDINGS}" in artifact.card.files
