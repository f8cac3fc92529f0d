from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vpr.imaging.philox import draw_uniform

WORD = st.integers(0, (1 << 64) - 1)


@settings(max_examples=60, deadline=None)
@given(seed=WORD, keys=st.lists(WORD, max_size=6), count=st.integers(1, 23))
def test_numbers_equal_those_of_numpy(seed: int, keys: list[int], count: int) -> None:
    drawn = draw_uniform(seed, np.array(keys, dtype=np.uint64), count)
    assert drawn.shape == (len(keys), count)
    for key, row in zip(keys, drawn, strict=True):
        philox = np.random.Philox(key=np.array([seed, key], dtype=np.uint64))
        np.testing.assert_array_equal(row, np.random.Generator(philox).random(count))
