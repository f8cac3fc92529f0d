from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.storage.measure import list_settings
from experiments.gallery import storage as experiment
from experiments.gallery.synthetic_embeddings import SyntheticProducts
from vpr.artifacts.store import load_artifact
from vpr.retrieval.confirmed_storage import FILE


def test_grid_can_reach_the_goal_of_bytes() -> None:
    """Codes and ids of the smallest settings are below an eighth of float32's bytes."""
    config = experiment.storage_config(Path("e"), Path("d.npy"), Path("o"))
    settings = list_settings(config, 256, 80_000)
    lists = [setting.dims for setting in settings if (setting.format, setting.index) == ("int8", "ivf")]
    assert sum(dims + 8 < 128 for dims in lists) == 2
    assert {setting.format for setting in settings} == {"float32", "int8", "rabitq3", "rabitq2", "pq", "binary"}


@pytest.mark.slow
def test_measurement_records_figures_also_without_a_confirmed_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: dict = {}

    def record(topic: str, figures: list, tables: dict) -> None:
        recorded.update(topic=topic, figures=figures, tables=tables)

    small = SyntheticProducts(training=150, validation=20, test=12, categories=5)
    for name, value in (("_FOLDER", tmp_path), ("_SIZES", (200, 400)), ("record", record)):
        monkeypatch.setattr(experiment, name, value)
    monkeypatch.setattr(experiment, "SyntheticProducts", lambda seed: small)
    experiment.measure_stored()
    report = load_artifact(tmp_path / "storage", "report")
    assert report.file(FILE).is_file()
    values = {figure.name.partition(": ")[2]: figure for figure in recorded["figures"]}
    bound = values["upper bound of the drop of recall@1 (95 % confidence)"]
    assert bound.goal == 0.01
    assert bound.value is None  # 20 products cannot confirm it
    assert bound.met is None
    assert sum("without a limit of time" in figure.name for figure in recorded["figures"]) == len(values)
    sizes = {row["vectors"] for row in recorded["tables"]["storage"]}
    assert sizes == {"200", "400"}
