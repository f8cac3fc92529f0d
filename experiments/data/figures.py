"""``make figures TOPIC=data``: figures of data sets, views and recipes, into ``docs/results/data.json``.

``PARTS="cases"`` measures this part only. The environment variable ``VPR_DATA`` is the folder of ``grocery``, which
the part ``sharpness`` needs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.data.cases import case_figures, growth_figures, recipe_figures
from experiments.data.found_products import found_figures
from experiments.data.scale import build_cost
from experiments.data.view_seeds import compare_views
from experiments.demo.seeds import SEEDS
from experiments.figures import Figure, Row, command_of, measure, record
from experiments.teacher.ablation import grocery_data, sample_teacher
from experiments.teacher.view_sharpness import epoch_seconds, sample_files, sharpness_by_zoom
from vpr.data.build_catalog import build_catalog
from vpr.data.config import CatalogConfig
from vpr.imaging.config import ViewConfig

_SAMPLE = Path("runs/demo/catalog")  # relative: paths are part of an artifact's configuration
_ZOOM = 1.5  # of the stated goal


def measure_cases() -> None:
    """Record how many of the known cases of misread data have the right result."""
    figures, rows = case_figures(command_of("data", "cases"))
    record("data", figures, {"cases": rows})


def measure_growth() -> None:
    """Record how many random catalogues that grow score what an earlier version has seen."""
    record("data", growth_figures(command_of("data", "growth")), {})


def measure_recipes() -> None:
    """Record how many recipes have the numbers of their source."""
    figures, rows = recipe_figures(command_of("data", "recipes"))
    record("data", figures, {"recipes": rows})


def measure_sharpness() -> None:
    """Record the sharpness of training views against scored photographs, by zoom."""
    files = sample_files(grocery_data() / "grocery" / "train")
    command = command_of("data", "sharpness")
    rows: list[Row] = []
    figures: list[Figure] = []
    for zoom, (before, alone, mixed) in sharpness_by_zoom(files).items():
        rows.append(_sharpness_row(zoom, before, alone, mixed))
        if zoom == _ZOOM:
            name = f"sharpness of training views at zoom {zoom:g} against scored images"
            figures.append(Figure(name, round(alone, 4), "", 0.95, ">=", command))
    seconds = [epoch_seconds(files, ViewConfig(), is_enlarged) for is_enlarged in (True, False)]
    name = "epoch of the sample's teacher on photographs, images decoded for sharp views over those of a view's side"
    figures.append(Figure(name, round(seconds[0] / seconds[1], 3), "times", 1.15, "<=", command))
    record("data", figures, {"sharpness": rows})


def measure_views() -> None:
    """Record recall of teacher and student of the demo with three seeds, with these views and with blurred ones."""
    figures, rows = compare_views(Path("runs/demo"), SEEDS, command_of("data", "views"))
    record("data", figures, {"views": rows})


def measure_unlabelled() -> None:
    """Record how many images of scored products the teacher of the demo finds among unlabelled images."""
    catalog = build_catalog(CatalogConfig("sample", str(_SAMPLE)))
    teacher = sample_teacher("sample", catalog, "runs/demo/teacher")
    figures, rows = found_figures(catalog, teacher, command_of("data", "unlabelled"))
    record("data", figures, {"unlabelled": rows})


def measure_scale() -> None:
    """Record what a catalogue of 200,000 images costs beside decoding them; the images take 3 GB."""
    figures, rows = build_cost(command_of("data", "scale"))
    record("data", figures, {"scale": rows})


PARTS = {
    "cases": measure_cases,
    "growth": measure_growth,
    "recipes": measure_recipes,
    "sharpness": measure_sharpness,
    "views": measure_views,
    "unlabelled": measure_unlabelled,
    "scale": measure_scale,
}


def _sharpness_row(zoom: float, before: float, alone: float, mixed: float) -> Row:
    return {
        "zoom": f"{zoom:g}",
        "decoded at the view's size": f"{before:.2f}",
        "decoded for this zoom": f"{alone:.2f}",
        "decoded for zooms up to 1.6": f"{mixed:.2f}",
    }


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
