"""Models to measure, and the names of their rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

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


def with_distinct_names(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return the artifacts with the name that their rows have: where names are equal, the end of the path.

    The end is as short as possible: ``exp1/student`` and ``exp2/student``.
    """
    names = [artifact.card.name for artifact in artifacts]
    clashing = [index for index, name in enumerate(names) if names.count(name) > 1]
    parts = {index: artifacts[index].path.resolve().parts for index in clashing}
    length = 1
    while clashing:
        for index in clashing:
            names[index] = "/".join(parts[index][-length:]).replace("//", "/")
        if max(Counter(names).values()) == 1:
            break
        clashing = [index for index, name in enumerate(names) if names.count(name) > 1 or index in clashing]
        parts |= {index: artifacts[index].path.resolve().parts for index in clashing}
        length += 1
    return [
        replace(artifact, card=artifact.card.model_copy(update={"name": name}))
        for artifact, name in zip(artifacts, names, strict=True)
    ]
