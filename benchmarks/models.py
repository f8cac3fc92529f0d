"""Models to measure."""

from collections.abc import Sequence

from export.backends.registry import MODEL_KINDS
from vpr.artifacts.store import Artifact, load_artifact
from vpr.common.errors import UserError


def load_models(paths: Sequence[str]) -> list[Artifact]:
    """Load the artifacts to measure; :class:`UserError` without paths, or if one artifact is given twice."""
    if not paths:
        raise UserError("models: expected one or more artifacts, got none. Pass --models PATH.")
    artifacts = [load_artifact(path, MODEL_KINDS) for path in paths]
    found: dict[str, Artifact] = {}
    for artifact in artifacts:
        if artifact.sha256 in found:
            first = found[artifact.sha256].path
            problem = f"{artifact.path} is given twice" if artifact.path == first else f"{artifact.path} equals {first}"
            raise UserError(f"models: {problem}. Pass each artifact once.")
        found[artifact.sha256] = artifact
    return artifacts
