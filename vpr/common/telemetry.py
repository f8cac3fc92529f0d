"""Usage reports of libraries."""

import os
import sys


def disable_telemetry() -> None:
    """Disable OpenVINO and Ray telemetry. Call before importing either.

    OpenVINO 2026.4 reports each import to Google Analytics, unless the package ``openvino_telemetry`` is missing.
    Ray reports each start.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None cannot be imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
