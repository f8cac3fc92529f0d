"""Finished parts of a long measurement in a file, so that an interrupted one continues where it was."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any


class Progress:
    """Results by name, one line of JSON each.

    Args:
        path: File, which may exist from an interrupted measurement; None keeps nothing.

    Attributes:
        known: Results of the file; a line that a kill cut off is left out.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.known: dict[str, Any] = {}
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(json.JSONDecodeError):
                    name, result = json.loads(line)
                    self.known[name] = result

    def add(self, name: str, result: Any) -> None:
        """Append a result, after a line break: the last line may be cut off."""
        self.known[name] = result
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(f"\n{json.dumps([name, result])}")

    def finish(self) -> None:
        """Remove the file: the measurement is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
