"""The frame of every command that writes an artifact: skip if up to date, keep a run folder, write, announce."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpr.artifacts.card import Kind, Parent
from vpr.artifacts.run_folder import run_folder
from vpr.artifacts.store import Artifact
from vpr.artifacts.writer import ArtifactWriter, find_changes, find_up_to_date, write_artifact
from vpr.common.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class Stage:
    """One artifact that a command makes from its parents."""

    output: str
    kind: Kind
    config: Mapping[str, Any]  # JSON values that decide the result
    parents: list[Parent]
    required_file: str = ""  # an older result must have it, where several commands write the kind

    @property
    def path(self) -> Path:
        """Directory of the artifact."""
        return Path(self.output)

    @property
    def run_folder(self) -> Path:
        """Folder of logs and unfinished files, next to the output."""
        return run_folder(self.output, dict(self.config), self.parents)

    def find(self) -> Artifact | None:
        """Return the finished artifact or None; raise :class:`UserError` if the output may not be written."""
        artifact = find_up_to_date(self.output, self.kind, self.config, self.parents, self.required_file)
        if artifact is not None:
            log.info(f"{self.output}: up to date")
        elif changes := find_changes(self.output, self.kind, self.config, self.parents):
            log.info(f"{self.output} is replaced: {changes} changed")
        return artifact

    def write(self) -> AbstractContextManager[ArtifactWriter]:
        """Write the artifact, see :func:`vpr.artifacts.writer.write_artifact`."""
        return write_artifact(self.output, self.kind, self.config, self.parents)
