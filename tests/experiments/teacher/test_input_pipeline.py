from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from experiments.teacher.input_pipeline import consumption_rate, delivery_rate
from teacher.config import TowerConfig
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.imaging.decode import decode_bytes
from vpr.imaging.preprocess import Preprocess


@pytest.mark.slow
def test_rates_count_images(catalog: Catalog) -> None:
    training = catalog.select(split="train")
    assert delivery_rate(training, Preprocess(size=32), LoaderConfig(16, workers=1), 0.2) > 16
    assert consumption_rate(training, TowerConfig("sample", "", 32), 16, 0.2) > 1


def test_large_jpeg_is_decoded_at_reduced_scale() -> None:
    """The decoder returns a smaller image with at least twice the needed side."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((3000, 4000, 3), dtype=np.uint8)).save(stream, "JPEG")
    assert decode_bytes(stream.getvalue(), "phone.jpg").size == (4000, 3000)
    assert decode_bytes(stream.getvalue(), "phone.jpg", shortest=224).size == (1000, 750)
    assert decode_bytes(stream.getvalue(), "phone.jpg", shortest=96).size == (500, 375)
