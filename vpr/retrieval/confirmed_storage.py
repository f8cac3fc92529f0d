"""Storage setting that ``vpr bench storage`` confirmed, and the index of a gallery that it describes."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from vpr.artifacts.card import Parent
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError
from vpr.retrieval.config import IndexTuning
from vpr.retrieval.embeddings import Embeddings, load_embeddings
from vpr.retrieval.vector_index import StorageSetting, Vectors, build_index, find_problem, is_possible

FILE = "storage.json"
RESULTS = 10  # results of a query that settings are measured with; fewer search a shorter short list
_SETTING = TypeAdapter(StorageSetting)
_KEYS = ("dims", "reduction", "format", "index", "rescoring")


@dataclass(frozen=True)
class ConfirmedStorage:
    """The cheapest confirmed setting of a size of gallery.

    Attributes:
        artifact: Report that confirmed it.
        setting: Setting of the index.
        tuning: Search effort.
        size: Number of vectors in the gallery that it was confirmed with.
        synthetic: How many of these were synthetic.
        max_recall_drop: Confirmed bound on the drop of recall@1 against exact float32 search.
        confidence: Confidence of the bound.
        products: Number of products that confirmed it.
        model: Name of the model of the stored vectors.
        reference: Name of the model of the exact search that the drop is measured against.
    """

    artifact: Artifact
    setting: StorageSetting
    tuning: IndexTuning
    size: int
    synthetic: int
    max_recall_drop: float
    confidence: float
    products: int
    model: str
    reference: str

    def build(self, training: Vectors, vectors: Vectors) -> Any:
        """Return a faiss index of (n, D) unit vectors, fitted on (m, D) training vectors."""
        return build_index(self.setting, training, vectors, self.tuning)


def load_confirmed_storage(path: str, model: Parent, images: int, dim: int) -> ConfirmedStorage:
    """Load the setting that was confirmed for a gallery of ``images`` vectors of ``dim`` dimensions, or the next size.

    Raises:
        UserError: The report is broken or of another model, it confirmed no setting, or only settings of smaller
            galleries.
    """
    artifact = load_artifact(path, "report")
    file = artifact.file(FILE)
    models = artifact.parents("model")
    if [parent.sha256 for parent in models] != [model.sha256]:
        names = ", ".join(parent.name for parent in models)
        problem = f"measured with '{names}', the gallery is of '{model.name}'"
        raise UserError(f"storage: {path}: {problem}. Run `vpr bench storage` with this model's embeddings.")
    with reraise_as_artifact_error(artifact):
        values = json.loads(file.read_text(encoding="utf-8"))
        decisions = sorted(values["decisions"], key=lambda decision: int(decision["size"]))
        sizes = [int(decision["size"]) for decision in decisions]
    if not decisions:
        remedy = "Run `vpr bench storage` with --max-recall-drop"
        raise UserError(f"storage: {path}: measured without a budget, so no setting is confirmed. {remedy}.")
    if images > sizes[-1]:
        problem = f"confirmed in a gallery of {sizes[-1]} vectors, this one has {images}"
        raise UserError(f"storage: {path}: {problem}. Run `vpr bench storage` with --sizes {images} or more.")
    decision = next(entry for entry, size in zip(decisions, sizes, strict=True) if size >= images)
    with reraise_as_artifact_error(artifact):
        if decision["chosen"] is None:
            raise UserError(f"storage: {path}: {decision['size']} vectors: {decision['outcome']}")
        return _read(artifact, values, decision, images, dim)


def load_training(storage: ConfirmedStorage, gallery: Embeddings, path: str) -> Vectors:
    """Return the (m, D) training vectors that the setting was fitted on when it was measured.

    Args:
        storage: Confirmed setting.
        gallery: Gallery of the hand-off; it has the training vectors if it was measured itself.
        path: Embeddings artifact with the training vectors; empty takes the gallery.

    Raises:
        UserError: The embeddings are not those that were measured, or have too few training vectors.
    """
    embeddings = load_embeddings(path) if path else gallery
    measured = storage.artifact.parents("embeddings")
    if [parent.sha256 for parent in measured] != [embeddings.artifact.sha256]:
        names = ", ".join(parent.name for parent in measured)
        problem = f"{embeddings.artifact.path} are not the embeddings '{names}' that {storage.artifact.path} measured"
        raise UserError(f"training: {problem}. Set --training to these.")
    splits = np.array([split or "" for split in embeddings.read_rows().table["split"].to_pylist()], dtype=np.str_)
    training = embeddings.vectors[splits == "train"]
    if problem := find_problem(storage.setting, training.shape[1], len(training)):
        raise UserError(f"training: {embeddings.artifact.path}: {problem}")
    return training


def _read(
    artifact: Artifact, values: dict[str, Any], decision: dict[str, Any], images: int, dim: int
) -> ConfirmedStorage:
    size, chosen = int(decision["size"]), decision["chosen"]
    row = next(row for row in values["rows"] if row["size"] == size and row["name"] == chosen)
    setting = _SETTING.validate_python({key: row.get(key) for key in _KEYS})
    if setting.name != chosen or not 1 <= setting.dims <= dim or not is_possible(setting.format, setting.index):
        raise ValueError(f"unknown setting '{chosen}'")
    if (setting.reduction is None) != (setting.dims == dim) or (setting.rescoring is None) == setting.is_rescored:
        raise ValueError(f"impossible setting '{chosen}'")
    gallery = next(gallery for gallery in values["galleries"] if gallery["size"] == size)
    max_drop, confidence = float(decision["max_recall_drop"]), float(decision["confidence"])
    if not 0 < max_drop < 1 or not 0 < confidence < 1:
        raise ValueError("the bound or its confidence is out of range")
    # More effort than there are vectors finds nothing else, and faiss would allocate memory for it.
    tuning = {key: min(int(value), max(images, RESULTS)) for key, value in artifact.card.config["tuning"].items()}
    return ConfirmedStorage(
        artifact,
        setting,
        IndexTuning(**tuning),
        size,
        int(gallery["synthetic_distractors"]),
        max_drop,
        confidence,
        int(decision["confirmation_products"]),
        artifact.parents("model")[0].name,
        str(values["reference"]),
    )
