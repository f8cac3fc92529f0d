"""Licences of models: those that a card records, and a warning where one forbids commercial use."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from export.backends.registry import MODEL_KINDS
from vpr.artifacts.card import UNKNOWN_LICENCE
from vpr.artifacts.store import load_artifact
from vpr.common.errors import CheckFailed, printable

# Patterns of licences that forbid commercial use, and the reason. They read names, not texts: a licence that matches
# none of them is not thereby permitted.
RESTRICTED = (
    (r"\bcc[- ]by[- ]nc", "Creative Commons NonCommercial"),
    (r"\bnon[-_ ]?commercial", "its name excludes commercial use"),
    (
        r"\bresearch([-_ ](use|purposes?))?[-_ ]only|\bresearch[-_ ]purposes?\b|\bonly[-_ ]for[-_ ]research",
        "research only",
    ),
    (r"^apple-amlr\b", "Apple Machine Learning Research Model licence: research purposes only"),
    (r"^seer-license\b", "SEER licence agreement, section 1a: non-commercial research purposes"),
    (r"(^|[-_ ])nc($|[-_ ])", "the name has the part NC, non-commercial"),
)


def restriction(licence: str) -> str:
    """Return the reason why a licence forbids commercial use; empty if its name does not show that it does."""
    return next((reason for pattern, reason in RESTRICTED if re.search(pattern, licence, re.IGNORECASE)), "")


def check_licences(models: Sequence[str], require: bool) -> dict[str, list[str]]:
    """Print the licences of models and return them by path; ``require`` rejects a model that has an unknown one.

    Raises:
        UserError: A path is no model, or a required licence is unknown.
        CheckFailed: A licence forbids commercial use.
    """
    artifacts = {path: load_artifact(path, (*MODEL_KINDS, "serving")) for path in models}
    for artifact in artifacts.values() if require else ():
        artifact.require_licence()
    licences = {path: artifact.card.licences for path, artifact in artifacts.items()}
    console = Console(width=max(100, Console().width))
    for path, names in licences.items():
        console.print(Text(printable(f"{path}: {', '.join(names) or UNKNOWN_LICENCE}")), soft_wrap=True)
    forbidden = [
        f"{path}: {name} forbids commercial use ({restriction(name)})"
        for path, names in licences.items()
        for name in names
        if restriction(name)
    ]
    if forbidden:
        raise CheckFailed(printable(f"warning: {'; '.join(forbidden)}. Start from other weights for commercial use."))
    return licences
