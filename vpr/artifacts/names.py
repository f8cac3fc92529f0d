"""Names of artifacts in a table, where two may have the same name in different folders."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from vpr.artifacts.card import Parent
from vpr.artifacts.store import Artifact


def with_distinct_names(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return the artifacts with the names of their rows: where names are equal, the end of the path.

    The end is as short as possible: ``exp1/student`` and ``exp2/student``. One artifact given twice keeps one name.
    """
    names = [artifact.card.name for artifact in artifacts]
    parts = [artifact.path.resolve().parts for artifact in artifacts]
    clashing: set[int] = set()
    for length in range(1, max(map(len, parts), default=0) + 1):
        counts = Counter(names)
        clashing |= {index for index, name in enumerate(names) if counts[name] > 1}
        if max(counts.values()) == 1:
            break
        for index in clashing:
            names[index] = "/".join(parts[index][-length:]).replace("//", "/")
    return [
        replace(artifact, card=artifact.card.model_copy(update={"name": name}))
        for artifact, name in zip(artifacts, names, strict=True)
    ]


def tell_apart(first: Parent, second: Parent) -> tuple[str, str]:
    """Return the quoted names of two artifacts; equal ones with the start of their checksums."""
    if first.name != second.name:
        return f"'{first.name}'", f"'{second.name}'"
    return f"'{first.name}' ({first.sha256[:12]})", f"'{second.name}' ({second.sha256[:12]})"
