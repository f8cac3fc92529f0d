"""Configuration of the demo, the machine check and the search page, without heavy imports: help is quick."""

from dataclasses import dataclass

from vpr.common.errors import UserError, check_numbers

_MAX_MODELS = 4  # of two galleries: that of each one, and that it will be migrated to


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
        catalog: Catalogue artifact with the images to search, without ``galleries``.
        split: Split of ``catalog`` whose gallery images are searched; empty searches all splits.
        embeddings: Embeddings artifact of each model, written if it does not exist; empty embeds at every start.
        threshold: Artifact of ``vpr gallery threshold`` of each model, or of each gallery in place of its stored one.
        top: Number of results to show, 1 to 100.
        port: Port on 127.0.0.1; 0 takes a free one.
        galleries: One or two galleries to search in place of a catalogue. ``models`` are then up to four, in any order:
            their models, and those that they will be migrated to.
        catalogs: Catalogues with the images of the galleries, to show them.
        probes: Partitions of the galleries' indexes to search; 0 compares with all images.
    """

    models: tuple[str, ...]
    catalog: str = ""
    split: str = "test"
    embeddings: tuple[str, ...] = ()
    threshold: tuple[str, ...] = ()
    top: int = 12
    port: int = 8000
    galleries: tuple[str, ...] = ()
    catalogs: tuple[str, ...] = ()
    probes: int = 0

    def __post_init__(self) -> None:
        if self.galleries and not 1 <= len(self.models) <= _MAX_MODELS:
            raise UserError(f"models: expected 1 to {_MAX_MODELS} artifacts, got {len(self.models)}.")
        if not self.galleries and len(self.models) not in (1, 2):
            raise UserError(f"models: expected one artifact, or two to compare, got {len(self.models)}.")
        if self.galleries:
            self._check_galleries()
        elif not self.catalog:
            raise UserError("catalog: expected a catalogue or galleries, got neither. Pass --catalog or --galleries.")
        elif self.catalogs or self.probes:
            key = "catalogs" if self.catalogs else "probes"
            raise UserError(f"{key}: it needs galleries. Pass --galleries, or leave out --{key}.")
        name, expected = ("gallery", len(self.galleries)) if self.galleries else ("model", len(self.models))
        for key in ("embeddings", "threshold"):
            actual = len(getattr(self, key))
            if actual not in (0, expected):
                raise UserError(f"{key}: expected {expected}, one for each {name} in the same order, got {actual}.")
        check_numbers(self, probes=(0, 1 << 16))
        if not 1 <= self.top <= 100:
            raise UserError(f"top: expected 1 to 100, got {self.top}.")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port: expected 1 to 65535, or 0 for a free one, got {self.port}.")

    def _check_galleries(self) -> None:
        if len(self.galleries) > 2:
            raise UserError(f"galleries: expected one, or two to compare, got {len(self.galleries)}.")
        if self.catalog:
            raise UserError("catalog: the galleries replace it. Pass the catalogues of their images as --catalogs.")
        if self.embeddings:
            raise UserError("embeddings: the galleries store them. Leave out --embeddings.")
