from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vpr.artifacts.store import Artifact


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Artifact]:
    """Write an engine artifact with arbitrary bytes as its plan; the double ignores them."""
    from tests.export.tensorrt.recorded import VERSION
    from vpr.artifacts.store import load_artifact
    from vpr.artifacts.writer import write_artifact

    def make(targets: tuple[str, ...] = ("sm86",), **config: Any) -> Artifact:
        values = {"onnx": "runs/fp16", "backend": "tensorrt", "builder_version": VERSION, "target": "sm86"}
        values |= {"min_batch": 1, "opt_batch": 4, "max_batch": 8, **config}
        with write_artifact(tmp_path / "engine", "engine", values) as draft:
            (draft.path / "engine.plan").write_bytes(b"plan" * 100)
            draft.metrics = {"precision": "fp16", "targets": list(targets)}
        return load_artifact(tmp_path / "engine")

    return make
