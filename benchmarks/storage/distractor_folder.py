"""Distractors from a folder of images: catalogue and embeddings are written next to the output and kept for a rerun."""

from dataclasses import replace
from pathlib import Path

from benchmarks.config import StorageConfig
from export.backends.registry import MODEL_KINDS
from export.config import EmbedConfig
from export.embed import embed_catalog
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.build_catalog import build_catalog
from vpr.data.config import CatalogConfig
from vpr.retrieval.embeddings import Embeddings


def embed_distractors(config: StorageConfig, embeddings: Embeddings, reference: Embeddings) -> StorageConfig:
    """Return the configuration with embeddings in place of a folder of distractors.

    Other distractors stay as they are. The folder is read as ``vpr catalog --reader images`` does, and embedded as
    ``vpr embed`` does, so a killed job resumes. Both artifacts are in ``OUTPUT.distractors``.

    Raises:
        UserError: A model is missing, is not that of the embeddings or has no folder to embed, or the folder does not
            exist or has no readable images.
    """
    models = {"model": (config.model, embeddings), "reference_model": (config.reference_model, reference)}
    path = Path(config.distractors)
    if not config.distractors or path.suffix == ".npy" or (path / CARD_NAME).is_file():
        if unused := [key for key, (model, _) in models.items() if model]:
            raise UserError(f"{unused[0]}: it embeds a folder of distractors, and none is given. Leave it out.")
        return config
    if not path.is_dir():
        remedy = "Pass a folder of images, an embeddings artifact or a .npy file."
        raise UserError(f"distractors: {path} is not a folder. {remedy}")
    if config.reference_distractors:
        problem = f"distractors is the folder {path}, which reference_model embeds too"
        raise UserError(f"reference_distractors: {problem}. Leave it out, and set --reference-model.")
    if not config.reference:
        models.pop("reference_model")
    for key, (model, expected) in models.items():
        _check_model(key, model, expected)
    folder = f"{Path(config.output)}.distractors"
    catalog = build_catalog(CatalogConfig("images", f"{folder}/catalog", root=str(path)))
    written = {key: _embed(model, catalog, f"{folder}/{key}", of) for key, (model, of) in models.items()}
    return replace(
        config,
        distractors=written["model"],
        reference_distractors=written.get("reference_model", ""),
        model="",
        reference_model="",
    )


def _check_model(key: str, model: str, embeddings: Embeddings) -> None:
    flag = f"--{key.replace('_', '-')}"
    if not model:
        problem = f"distractors is a folder of images, and {embeddings.model.name} has to embed them"
        raise UserError(f"{key}: {problem}. Set {flag} to its artifact.")
    artifact = load_artifact(model, MODEL_KINDS)
    if artifact.sha256 != embeddings.model.sha256:
        problem = f"{model} is not '{embeddings.model.name}', which made {embeddings.artifact.path}"
        raise UserError(f"{key}: {problem}. Set {flag} to that model.")


def _embed(model: str, catalog: Path, output: str, embeddings: Embeddings) -> str:
    """Embed a catalogue in as many dimensions as the embeddings have."""
    width, of_model = embeddings.vectors.shape[1], load_artifact(model, MODEL_KINDS).card.embedding
    dimensions = width if of_model is not None and of_model.dim > width else 0
    return str(embed_catalog(EmbedConfig(model, str(catalog), output, dimensions=dimensions)))
