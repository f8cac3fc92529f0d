"""Whether an engine runs on this machine, and the command that rebuilds it if not."""

import shlex
from pathlib import Path
from typing import Any

from export.config import TARGETS, EngineConfig
from export.tensorrt.cuda_driver import Gpu
from vpr.artifacts.card import Card, CorruptArtifact, CorruptCard
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError
from vpr.common.flags import to_flags


def load_engine(path: Path | str) -> Artifact:
    """Load an ``engine`` artifact; :class:`UserError` if it is missing, damaged or of another kind."""
    try:
        return load_artifact(path, "engine")
    except CorruptCard:
        raise
    except CorruptArtifact as error:
        card = Card.model_validate_json((Path(path) / CARD_NAME).read_bytes())
        raise UserError(f"{str(error).rstrip('.')}. {_rebuild(Artifact(Path(path), card, ''))}") from None


def rebuild_command(artifact: Artifact, **changes: Any) -> str:
    """Return the command line that built an engine, with changed options."""
    values = {**artifact.card.config, "output": str(artifact.path), **changes}
    if values["backend"] == "tensorrt":  # it builds for the GPU of the machine
        values["target"] = EngineConfig.target
    return shlex.join(["vpr", "export", "engine", *to_flags(EngineConfig, values)])


def check_compatible(artifact: Artifact, version: str, gpu: Gpu) -> None:
    """Raise :class:`UserError` if an engine does not fit the installed version and the GPU, or has no weights."""
    config, targets = artifact.card.config, list(artifact.card.metrics["targets"])
    backend, built = str(config["backend"]), str(config["builder_version"])
    # The card says "this GPU" if CUDA did not name the GPU of the build.
    if gpu.architecture not in targets and targets != ["this GPU"]:
        raise UserError(
            f"{artifact.path}: built for {', '.join(targets)}, but this GPU is {gpu.name} ({gpu.architecture}). "
            f"{_rebuild(artifact, **_options_for(backend, gpu))}"
        )
    if not _can_load(built, version, bool(config.get("version_compatible"))):
        raise UserError(f"{artifact.path}: built with {backend} {built}, {version} is installed. {_rebuild(artifact)}")
    if config.get("weight_stripped"):  # a former option of `vpr export engine`
        remedy = _rebuild(artifact)
        raise UserError(f"{artifact.path}: the engine has no weights, and only TensorRT's refitter adds them. {remedy}")


def host_code_error(artifact: Artifact) -> UserError:
    """Return the error for a version-compatible engine that may not run its library.

    The engine is good, for example for Triton, so the command builds another one next to it.
    """
    build = rebuild_command(artifact, version_compatible=False, output=f"{artifact.path}-this-version")
    return UserError(
        f"{artifact.path}: built with --version-compatible, so it contains a library that would run on this machine. "
        f"If you built it, Python can open it with allow_host_code=True. Commands need an engine without one: {build}"
    )


def engine_load_error(artifact: Artifact, version: str, cuda: str, errors: list[str]) -> UserError:
    """Return the error for a plan that TensorRT does not load although the card is compatible.

    ``version`` is that of the installed TensorRT, ``cuda`` the version that the driver supports, as ``CUDA 12.4``, and
    ``errors`` are those that TensorRT logged.
    """
    backend = artifact.card.config["backend"]
    if any("driver version is insufficient" in error or "error: 35" in error for error in errors):
        return UserError(
            f"{artifact.path}: {backend} {version} needs a newer driver; this machine's driver supports {cuda}. "
            f"Update the driver, or install a {backend} for {cuda}. {_rebuild(artifact)}"
        )
    reason = " ".join(errors[0].split())[:200] if errors else "no reason given"
    plan = artifact.file("engine.plan")
    return UserError(f"{plan}: {backend} {version} cannot load it ({reason}). {_rebuild(artifact)}")


def _rebuild(artifact: Artifact, **changes: Any) -> str:
    """Return the last part of an error message: how to rebuild the engine."""
    return f"Rebuild: {rebuild_command(artifact, **changes)}"


def _options_for(backend: str, gpu: Gpu) -> dict[str, str]:
    """Return the build options for a GPU; TensorRT-RTX lacks an ahead-of-time target for some GPUs."""
    if backend == "tensorrt":
        return {}
    if gpu.architecture in TARGETS:
        return {"target": gpu.architecture}
    return {"backend": "tensorrt"}


def _can_load(built: str, version: str, version_compatible: bool) -> bool:
    """Return whether a TensorRT version loads an engine that another version built."""
    if not version_compatible:
        return built == version
    old, new = ([int(part) for part in text.split(".") if part.isdigit()] for text in (built, version))
    return old[:1] == new[:1] and old <= new
