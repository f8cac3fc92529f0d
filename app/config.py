"""Configuration of the demo, the machine check and the search page. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

from dataclasses import dataclass

from vpr.common.errors import UserError


@dataclass(frozen=True)
class DemoConfig:
    """Where and how long.

    Attributes:
        output: folder of all artifacts; empty is ``runs/demo``, or ``runs/demo-full`` with ``full``.
        full: the longer recipes (up to an hour) instead of those for minutes.
    """

    output: str = ""
    full: bool = False


@dataclass(frozen=True)
class DoctorConfig:
    """Nothing to choose.

    Attributes:
        verbose: list the version of every package, not only of the main ones.
    """

    verbose: bool = False


@dataclass(frozen=True)
class ServeConfig:
    """What the page searches, with what.

    Attributes:
        models: one or two artifacts: teacher, student, ONNX graph or engine; each runs on its backend that is fastest
            here.
        catalog: catalogue artifact.
        split: whose gallery images are searched; empty takes every split's.
        embeddings: for each model the artifact that keeps the catalogue's embeddings, made where it is not there yet;
            left out, the gallery is embedded at every start.
        top: results shown.
        port: on 127.0.0.1; 0 takes a free one.
    """

    models: tuple[str, ...]
    catalog: str
    split: str = "test"
    embeddings: tuple[str, ...] = ()
    top: int = 12
    port: int = 8000

    def __post_init__(self) -> None:
        if len(self.models) not in (1, 2):
            raise UserError(f"models: {len(self.models)} given: give one, or two to compare")
        if self.embeddings and len(self.embeddings) != len(self.models):
            raise UserError(f"embeddings: {len(self.embeddings)} given: give one for each model, in their order")
        if not 1 <= self.top <= 100:
            raise UserError(f"top: {self.top}: give 1 to 100")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port: {self.port}: give 1 to 65535, or 0 for a free one")
