"""Usage reports of libraries."""

import os
import sys


def disable_telemetry() -> None:
    """Disable the telemetry of ONNX Runtime, OpenVINO and Ray. Call before importing any of them.

    ONNX Runtime 1.31 reports each process and session to Microsoft, with hashes of models, and stores an identifier of
    the machine in the user's cache folder. OpenVINO 2026.4 reports each import to Google Analytics, unless the package
    ``openvino_telemetry`` is missing. Ray reports each start. Variables that are set already are kept.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None cannot be imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
