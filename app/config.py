"""Configuration of the demo, the machine check and the search page, without heavy imports: help is quick."""

from dataclasses import dataclass

from vpr.common.errors import UserError


@dataclass(frozen=True)
class DemoConfig:
    """Settings of ``vpr demo``.

    Attributes:
        output: Folder of all artifacts; empty is ``runs/demo``, or ``runs/demo-full`` with ``full``.
        full: Use the longer recipes, up to an hour, instead of those for minutes.
    """

    output: str = ""
    full: bool = False


@dataclass(frozen=True)
class DoctorConfig:
    """Settings of ``vpr doctor``.

    Attributes:
        verbose: List the versions of all packages, not only of the main ones.
        models: Model artifacts; their licences are checked instead of the machine.
        require_licence: Reject models without a recorded licence.
    """

    verbose: bool = False
    models: tuple[str, ...] = ()
    require_licence: bool = False

    def __post_init__(self) -> None:
        if self.require_licence and not self.models:
            raise UserError("require_licence: there is no model to check. Pass --models PATH.")


@dataclass(frozen=True)
class ServeConfig:
    """Settings of ``vpr search serve``.

    Attributes:
        models: One or two artifacts: teacher, student, ONNX graph or engine. Each runs on its fastest backend here.
        catalog: Catalogue artifact.
        split: Split whose gallery images are searched; empty searches all splits.
        embeddings: Embeddings artifact of each model, written if it does not exist; empty embeds at every start.
        threshold: Artifact of ``vpr gallery threshold`` of each model; empty answers every image.
        top: Number of results to show, 1 to 100.
        port: Port on 127.0.0.1; 0 takes a free one.
    """

    models: tuple[str, ...]
    catalog: str
    split: str = "test"
    embeddings: tuple[str, ...] = ()
    threshold: tuple[str, ...] = ()
    top: int = 12
    port: int = 8000

    def __post_init__(self) -> None:
        if len(self.models) not in (1, 2):
            raise UserError(f"models: expected one artifact, or two to compare, got {len(self.models)}.")
        for key in ("embeddings", "threshold"):
            expected, actual = len(self.models), len(getattr(self, key))
            if actual not in (0, expected):
                raise UserError(f"{key}: expected {expected}, one for each model in the same order, got {actual}.")
        if not 1 <= self.top <= 100:
            raise UserError(f"top: expected 1 to 100, got {self.top}.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port: expected 1 to 65535, or 0 for a free one, got {self.port}.")
