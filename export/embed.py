"""``vpr embed``: embed a catalogue with any model, by a backend that also serves it."""

from functools import partial
from pathlib import Path

from export.backends.pytorch import load_module
from export.backends.registry import MODEL_KINDS, BackendUnavailable, Model, default_threads, models_of
from export.config import EmbedConfig
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.distributed import rank_and_world
from vpr.common.errors import UserError
from vpr.common.gpus import select_gpu_of_rank
from vpr.common.hardware import lacks_vnni
from vpr.retrieval import config as retrieval
from vpr.retrieval.embed import embed_with
from vpr.retrieval.embed_job import EmbedModel, torch_model
from vpr.retrieval.embeddings import Forward

# In this order, the first that runs here. An engine has one backend, that of its builder.
_PREFERRED = ("onnxruntime-cuda", "openvino", "onnxruntime-cpu", "tensorrt", "tensorrt-rtx")


def embed_catalog(config: EmbedConfig) -> Path:
    """Embed a catalogue and write it as an artifact of kind ``embeddings``.

    The embeddings of a teacher or student by PyTorch are those of ``vpr teacher embed`` and ``vpr student embed``.
    :class:`UserError` if no backend can run the model here.
    """
    return embed_with(config, load_model)


def load_model(config: retrieval.EmbedConfig) -> EmbedModel:
    """Choose how to run a model; worker processes import this function."""
    assert isinstance(config, EmbedConfig)
    artifact = load_artifact(config.model, MODEL_KINDS)
    if artifact.card.kind in ("teacher", "student") and config.backend == "auto":
        return torch_model(load_module(artifact), artifact)
    select_gpu_of_rank()
    model = choose_backend(artifact, config.backend)
    return EmbedModel(artifact, partial(_open, model), {"backend": model.backend})


def choose_backend(artifact: Artifact, backend: str = "auto") -> Model:
    """Return a model with the backend of this name, or with the first one that runs here.

    ``auto`` leaves out OpenVINO for INT8 on processors without VNNI, where its sums saturate.

    Raises:
        UserError: The backend runs no such artifacts, or no backend can run here.
    """
    names: tuple[str, ...] = _PREFERRED if backend == "auto" else (backend,)
    is_int8 = str(artifact.card.config.get("precision", "")).startswith("int8")
    if backend == "auto" and is_int8 and lacks_vnni():
        names = tuple(name for name in names if name != "openvino")
    models = {model.backend: model for model in models_of(artifact, names)}
    if not models:
        problem = f"{backend} runs no artifacts of kind {artifact.card.kind}"
        raise UserError(f"backend: {problem}. Leave --backend out to choose one that does.")
    reasons = []
    for name in (name for name in names if name in models):
        reason = models[name].runner.missing()
        if reason is None:
            return models[name]
        reasons.append(f"{name}: {reason}")
    raise UserError(f"{artifact.path}: no backend can run it here ({'; '.join(reasons)}). See `vpr doctor`.")


def _open(model: Model) -> Forward:
    """Load a model with this process's share of the processors."""
    try:
        return model.open(max(default_threads() // rank_and_world()[1], 1))
    except BackendUnavailable as error:
        raise UserError(f"{model.artifact.path}: {error}") from None
