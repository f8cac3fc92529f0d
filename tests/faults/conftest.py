from __future__ import annotations

import pytest

from benchmarks.faults import Road

LAST = "int8"  # engines and reports take longer


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """Every stage's unbroken run."""
    return Road(tmp_path_factory.mktemp("road"), LAST)
