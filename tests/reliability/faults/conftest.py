from __future__ import annotations

import pytest

from tests.reliability.faults.pipeline import Pipeline

LAST_STAGE = "int8"  # engines and reports take longer


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The uninterrupted run of every stage."""
    return Pipeline(tmp_path_factory.mktemp("pipeline"), LAST_STAGE)
