from __future__ import annotations

from collections.abc import Generator

import pytest

from calibration.ranges import METHODS


@pytest.fixture(scope="module", autouse=True)
def all_methods() -> Generator[None]:
    """Calibrate with every method, which the other tests do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.calibrate.METHODS", METHODS)
        yield
