"""Whether an engine fits the machine that is to run it, and the command that builds one that does."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from export.config import TARGETS, EngineConfig
from export.tensorrt.cuda_driver import Gpu
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import Artifact, Card, CorruptArtifact, CorruptCard, load_artifact
from vpr.common.errors import UserError
from vpr.common.flags import to_flags


def load_engine(path: Path | str) -> Artifact:
    """Load an ``engine`` artifact; :class:`UserError` where it is none, is damaged or truncated."""
    try:
        return load_artifact(path, "engine")
    except CorruptCard:
        raise
    except CorruptArtifact as error:
        card = Card.model_validate_json((Path(path) / CARD_NAME).read_bytes())
        raise UserError(f"{error}: {rebuild_command(Artifact(Path(path), card, ''))}") from None


def rebuild_command(artifact: Artifact, **changes: Any) -> str:
    """The command line that built an engine, with some of its options changed."""
    values = {**artifact.card.config, "output": str(artifact.path), **changes}
    return shlex.join(["vpr", "export", "engine", *to_flags(EngineConfig, values)])


def check_compatible(artifact: Artifact, version: str, gpu: Gpu) -> None:
    """Compare what an engine's card says with the machine, before anything is loaded.

    Args:
        artifact: an engine.
        version: of the installed TensorRT or TensorRT-RTX.
        gpu: to run on.

    Raises:
        UserError: another GPU architecture, another version, or an engine without weights.
    """
    config, targets = artifact.card.config, list(artifact.card.metrics["targets"])
    backend, built = str(config["backend"]), str(config["builder_version"])
    # Engines that TensorRT built where nvidia-smi did not tell the GPU say "this GPU".
    if gpu.architecture not in targets and targets != ["this GPU"]:
        command = rebuild_command(artifact, **_built_for(backend, gpu))
        raise UserError(
            f"{artifact.path}: built for {', '.join(targets)}, this GPU is {gpu.name} ({gpu.architecture}): {command}"
        )
    if not _runs_on(built, version, bool(config.get("version_compatible"))):
        raise UserError(
            f"{artifact.path}: built with {backend} {built}, this machine has {version}: {rebuild_command(artifact)}"
        )
    if config.get("weight_stripped"):
        command = rebuild_command(artifact, weight_stripped=False)
        raise UserError(f"{artifact.path}: has no weights, which only TensorRT's refitter puts in: {command}")


def engine_load_error(artifact: Artifact, version: str, cuda: str, errors: list[str]) -> UserError:
    """Why TensorRT does not load a plan that the card fits.

    Args:
        artifact: an engine.
        version: of the installed TensorRT or TensorRT-RTX.
        cuda: what the driver supports, as ``CUDA 12.4``.
        errors: that TensorRT logged.
    """
    command, backend = rebuild_command(artifact), artifact.card.config["backend"]
    if any("driver version is insufficient" in error or "error: 35" in error for error in errors):
        return UserError(
            f"{backend} {version} needs a newer driver than this machine's, which is of {cuda}: "
            f"update the driver, or install a {backend} for {cuda} and rebuild: {command}"
        )
    reason = " ".join(errors[0].split())[:200] if errors else "no reason given"
    return UserError(f"{artifact.file('engine.plan')}: {backend} {version} refuses it ({reason}): {command}")


def _built_for(backend: str, gpu: Gpu) -> dict[str, str]:
    """Options of a build for a GPU; TensorRT-RTX has no ahead-of-time target for some."""
    if backend == "tensorrt":
        return {}
    if gpu.architecture in TARGETS:
        return {"target": gpu.architecture}
    return {"backend": "tensorrt", "target": EngineConfig.target}


def _runs_on(built: str, version: str, compatible: bool) -> bool:
    if not compatible:
        return built == version
    older, newer = ([int(part) for part in text.split(".") if part.isdigit()] for text in (built, version))
    return older[:1] == newer[:1] and older <= newer
