"""Switch off the usage reports of libraries."""

from __future__ import annotations

import os
import sys


def disable_telemetry() -> None:
    """Have libraries send no word of their use; asked for before one of them is imported.

    OpenVINO 2026.4 tells Google Analytics of each import; without the package that does so, it takes a stub of its own.
    Ray tells its makers of each start.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None cannot be imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
