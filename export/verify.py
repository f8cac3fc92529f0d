"""``vpr export verify``: compare a client's embeddings with an artifact's golden vectors, and name what departs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.backends.registry import BackendUnavailable, default_threads, models_of
from export.diagnosis import Diagnosis, PipelineVectors, diagnose
from export.endpoint import embed_by_endpoint
from export.golden import GOLDEN, Golden, load_golden
from export.verify_config import VerifyConfig
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.arrays import read_array
from vpr.common.errors import CheckFailed, UserError
from vpr.common.log import get_logger
from vpr.imaging.pipelines import describe
from vpr.retrieval.embeddings import Forward

log = get_logger(__name__)

_MAX_BYTES = 64 << 20
_UNIT = 1e-3


@dataclass(frozen=True)
class Agreement:
    """Result of ``vpr export verify`` for a client that agrees.

    Attributes:
        cosines: Cosine of the client's embedding to the golden one, by image.
        is_normalised: Whether the client's vectors have length 1.
    """

    cosines: dict[str, float]
    is_normalised: bool


def verify(config: VerifyConfig) -> Agreement:
    """Compare a client with an artifact and print the cosine of each image.

    Raises:
        CheckFailed: The client's pipeline gives other embeddings; the message names the steps that depart.
        UserError: The artifact has no golden vectors, the file has another shape, or the endpoint does not answer.
    """
    artifact = load_artifact(config.artifact, ("onnx", "engine", "serving"))
    golden = load_golden(artifact)
    source = config.vectors or config.endpoint
    if config.vectors:
        values = _read_vectors(Path(config.vectors), artifact, golden)
    else:
        images = list(golden.images.values())
        answers = embed_by_endpoint(config.endpoint, images, golden.inputs, artifact, config.seconds)
        values = _to_array(config.endpoint, answers, golden)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise UserError(
            f"{source}: a vector is zero or not finite. Embed the images of {artifact.path / GOLDEN} again."
        )
    is_normalised = bool(np.abs(lengths - 1).max() <= _UNIT)
    assert artifact.card.preprocess is not None
    forward = _open(artifact)
    vectors = PipelineVectors(golden, artifact.card.preprocess, forward) if forward else None
    diagnosis = diagnose(golden, (values / lengths).astype(np.float32), vectors)
    _print(diagnosis)
    if not is_normalised:
        log.warning(f"{source}: the vectors are not of length 1. Normalise them before a search by inner product.")
    if not diagnosis.agrees:
        raise CheckFailed(f"{source}: {_explain(diagnosis, artifact, forward is not None)}")
    log.info(f"{source}: agrees with {artifact.path}, lowest cosine {min(diagnosis.cosines.values()):.5f}")
    return Agreement(diagnosis.cosines, is_normalised)


def _read_vectors(path: Path, artifact: Artifact, golden: Golden) -> NDArray[np.float64]:
    """Read a client's ``.npy`` file as (images, dim) float64."""
    folder = artifact.path / GOLDEN
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise ValueError("not a plain file of at most 64 MiB")
        values = read_array(path)
        if values.dtype.kind not in "fiu":
            raise ValueError("no array of numbers")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = f"Write the embeddings of the images in {folder} with numpy.save"
        raise UserError(f"vectors: {path} is no .npy file of numbers ({reason}). {fix}.") from None
    if values.shape != golden.embeddings.shape:
        names = f"the {len(golden.images)} images in {folder}"
        raise UserError(
            f"vectors: expected {golden.embeddings.shape} for {names}, in the order of their names, "
            f"got {values.shape} in {path}."
        )
    return values.astype(np.float64)


def _to_array(endpoint: str, answers: list[Any], golden: Golden) -> NDArray[np.float64]:
    """Return the vectors of an endpoint as (images, dim) float64."""
    try:
        values = np.array(answers, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"endpoint: {endpoint} answered with vectors that are no numbers or differ in size.") from None
    if values.shape != golden.embeddings.shape:
        dims = values.shape[1:]
        expected = golden.embeddings.shape[1]
        raise UserError(f"endpoint: expected vectors of {expected} numbers from {endpoint}, got {dims}.")
    return values


def _open(artifact: Artifact) -> Forward | None:
    """Return the artifact's model as a function, or None if nothing here can run it."""
    if artifact.card.kind == "serving":
        return _open_serving(artifact)
    for model in models_of(artifact, ("onnxruntime-cpu", "tensorrt", "tensorrt-rtx")):
        try:
            return model.open(default_threads())
        except BackendUnavailable as reason:
            log.info(f"{artifact.path}: not run here: {reason}")
    return None


def _open_serving(artifact: Artifact) -> Forward | None:
    """Return the graph of a model repository as a function, or None for an engine."""
    import onnx

    from vpr.inference.onnx_graph import GraphSession, check_graph

    files = [name for name in artifact.card.files if name.endswith("/1/model.onnx")]
    if not files or any(name.endswith("/1/model.weights") for name in artifact.card.files):
        reason = "its weights are above 2 GB: verify with the graph it was made from" if files else "an engine"
        log.info(f"{artifact.path}: not run here: {reason}")
        return None
    with reraise_as_artifact_error(artifact):
        graph = onnx.load(artifact.file(files[0]), load_external_data=False)
        check_graph(graph, artifact.card)
        return GraphSession(graph, default_threads()).embed


def _explain(diagnosis: Diagnosis, artifact: Artifact, has_model: bool) -> str:
    """Return the steps that depart as one sentence."""
    cosines = diagnosis.cosines
    image = min(cosines, key=cosines.__getitem__)
    lowest = f"lowest cosine {cosines[image]:.4f} ({image})"
    steps = [f"{step} ({describe(step, value)})" for step, value in diagnosis.pipeline.departures.items()]
    if diagnosis.order is not None:
        steps.insert(0, "order (the rows are not in the order of the file names)")
    if not steps:
        reason = "no known pipeline explains it" if has_model else "its model cannot run here to find the step"
        fix = "" if has_model else " Verify with the graph that it was made from."
        return f"departs from {artifact.path}, {lowest}: {reason}.{fix}"
    text = f"departs from {artifact.path} in {', '.join(steps)}, {lowest}"
    if diagnosis.alternatives:
        text += f"; on these images the same as {', '.join(diagnosis.alternatives)}"
    rest = min(diagnosis.explained.values())
    return f"{text}. With that the lowest cosine is {rest:.4f}."


def _print(diagnosis: Diagnosis) -> None:
    """Print the cosine of each image to the golden embedding, and to that of the nearest pipeline if it departs."""
    from rich.console import Console
    from rich.table import Table

    departs = bool(diagnosis.pipeline.departures) or diagnosis.order is not None
    table = Table("image", "cosine", *(["as explained"] if departs else []), box=None)
    for name, cosine in diagnosis.cosines.items():
        table.add_row(name, f"{cosine:.5f}", *([f"{diagnosis.explained[name]:.5f}"] if departs else []))
    Console(width=max(80, Console().width)).print(table)
