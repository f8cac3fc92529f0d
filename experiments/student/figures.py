"""``make figures TOPIC=student``: the student's figures, into ``docs/results/student.json``.

``PARTS="grocery"`` measures this part only. The environment variable ``VPR_DATA`` is the folder of ``grocery``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from experiments.figures import RESULTS, command_of, measure, record, record_unmeasured
from experiments.student.ablation import SMALL, Setting, ablate_students, distillation
from experiments.student.candidates import CANDIDATES, MORE_CANDIDATES, NETWORKS, Trial, candidate_figures
from experiments.student.dimension import dimension_figures
from experiments.student.epoch import epoch_figures
from experiments.student.families import compare_families
from experiments.student.lightly import compare_lightly
from experiments.student.nested import NestedSetting, nested_figures
from experiments.student.photos import Students, student_figures
from experiments.student.sizes import size_curve
from experiments.student.training_step import StudentStepConfig, student_step, unmeasured
from experiments.teacher.ablation import build_grocery, grocery_data, grocery_teacher, sample_teacher, shop_images
from experiments.teacher.photos import open_photos
from student.config import StudentConfig
from vpr.data.build_catalog import build_catalog
from vpr.data.config import CatalogConfig

# Relative: paths are part of an artifact's configuration.
_FOLDER, _FULL = Path("runs/figures-student"), Path("runs/demo-full")


def sample() -> Setting:
    """Return the demo's furniture renders and the teacher of the long demo."""
    catalog = build_catalog(CatalogConfig("sample", str(_FULL / "catalog")))
    teacher = sample_teacher("sample-full", catalog, _FULL / "teacher")
    return Setting("sample", teacher, catalog, _FOLDER / "sample", 8, 8, command_of("student", "sample"))


def grocery() -> Setting:
    """Return photographs of groceries; the teacher starts from the demo's, in place of CLIP's weights."""
    folder = Path("runs/figures-teacher/grocery")
    catalog = build_grocery(grocery_data(), folder)
    pretrained = sample_teacher(
        "sample", build_catalog(CatalogConfig("sample", "runs/demo/catalog")), "runs/demo/teacher"
    )
    teacher = grocery_teacher(folder, pretrained, _FOLDER / "grocery-teacher")
    return Setting("grocery", teacher, catalog, _FOLDER / "grocery", 24, 24, command_of("student", "grocery"), batch=64)


def measure_sample() -> None:
    """Record the ablation on furniture renders."""
    figures, table = ablate_students(sample())
    record("student", figures, {"sample": table})


def measure_grocery() -> None:
    """Record the ablation on photographs of products that no stage has seen."""
    figures, table = ablate_students(grocery())
    record("student", figures, {"grocery": table})


def sample_trial(part: str) -> Trial:
    """Return the first candidates for the defaults on furniture renders, with three seeds and the demo's teacher."""
    catalog = build_catalog(CatalogConfig("sample", "runs/demo/catalog"))
    teacher = sample_teacher("sample", catalog, "runs/demo/teacher")
    setting = Setting("sample", teacher, catalog, _FOLDER / "candidates-sample", 3, 3, command_of("student", part))
    return Trial(setting, dict(list(CANDIDATES.items())[:3]))


def grocery_trial(part: str) -> Trial:
    """Return candidates for the defaults on photographs, with three seeds; renders are the images without labels."""
    folder, command = _FOLDER / "candidates-grocery", command_of("student", part)
    setting = replace(grocery(), folder=folder, epochs=8, views=8, command=command)
    return Trial(setting, {**CANDIDATES, **MORE_CANDIDATES}, grocery_data() / "home3d" / "images")


def network_trial(part: str) -> Trial:
    """Return vit-pytorch's networks for small data at about equal multiply-adds, on the same photographs."""
    return replace(grocery_trial(part), candidates=NETWORKS)


def measure_candidates(name: str, build: Callable[[str], Trial]) -> None:
    """Record candidates for the defaults."""
    figures, table = candidate_figures(build(name))
    record("student", figures, {name: table})


def measure_lightly(name: str, build: Callable[[str], Trial]) -> None:
    """Record students that lightly-train distils from the same teacher and images."""
    figures, table = compare_lightly(build(name))
    record("student", figures, {name: table})


def measure_photos() -> None:
    """Record students of the teacher on photographs, beside towers of the same cost."""
    data = grocery_data()
    photos = open_photos(data, Path("runs/figures-teacher/photos"))
    students = Students(photos, shop_images(data), _FOLDER / "photos")
    record("student", *student_figures(students))


def measure_sizes() -> None:
    """Record retention and cost of four sizes on furniture renders, trained for longer than the ablation."""
    setting = replace(sample(), folder=_FOLDER / "sizes", epochs=24, views=12, command=command_of("student", "sizes"))
    figures, table = size_curve(setting, RESULTS / "student-sizes.svg")
    record("student", figures, {"sizes": table})


def measure_dimension() -> None:
    """Record the loss of a teacher with a known spectrum from 1024 to 256 dimensions."""
    figures, table = dimension_figures(command_of("student", "dimension"))
    record("student", figures, {"dimension": table})


def sample_nested() -> NestedSetting:
    """Return students of the demo's recipe and teacher."""
    trial = sample_trial("nested").setting
    return NestedSetting("sample", trial.teacher, trial.catalog, _FOLDER / "nested", trial.command)


def grocery_nested() -> NestedSetting:
    """Return students of photographs, in the size and for as long as the candidates for the defaults."""
    trial = grocery_trial("nested-grocery").setting
    model = ("--model.image-size", str(SMALL.image_size), "--model.patch-size", str(SMALL.patch_size))
    length = ("--epochs", str(trial.epochs), "--targets.views", str(trial.views))
    loader = ("--loader.batch-size", str(trial.batch), "--run.validate-every", str(trial.epochs))
    folder = _FOLDER / "nested-grocery"
    flags = (*model, *length, *loader)
    return NestedSetting("photographs", trial.teacher, trial.catalog, folder, trial.command, flags=flags)


def measure_nested(name: str, setting: NestedSetting) -> None:
    """Record prefixes of students with and without nested losses, against nested PCA, with three seeds."""
    figures, table = nested_figures(setting)
    record("student", figures, {name: table})


def measure_families() -> None:
    """Record which networks of vit-pytorch for small data export, and their speed; run nothing else meanwhile."""
    figures, table = compare_families(command_of("student", "families"))
    record("student", figures, {"families": table})


def measure_throughput() -> None:
    """Record cached epochs against bare passes, for the ablation's student and the demo's."""
    setting = replace(sample_trial("throughput").setting, folder=_FOLDER / "throughput", epochs=4, views=1)
    config, figures = distillation(setting, setting.folder / "none", replace(SMALL, embedding_dim=256), 0), []
    for model in (config.model, StudentConfig(stem="conv", embedding_dim=256)):
        with tempfile.TemporaryDirectory() as folder:
            figures += epoch_figures(replace(config, model=model), Path(folder), command_of("student", "throughput"))
    record("student", figures, {})


def measure_gpu() -> None:
    """Record the small student's step on this machine's GPU in ``gpu.json``; without a GPU, that it is not measured."""
    config = StudentStepConfig()
    if torch.cuda.is_available():
        record("gpu", *student_step(config))
    else:
        record_unmeasured(unmeasured(config), "student's step")


PARTS = {
    "dimension": measure_dimension,
    "nested": lambda: measure_nested("nested", sample_nested()),
    "nested-grocery": lambda: measure_nested("nested-grocery", grocery_nested()),
    "throughput": measure_throughput,
    "families": measure_families,
    "grocery": measure_grocery,
    "sample": measure_sample,
    "candidates-sample": lambda: measure_candidates("candidates-sample", sample_trial),
    "candidates-grocery": lambda: measure_candidates("candidates-grocery", grocery_trial),
    "networks-grocery": lambda: measure_candidates("networks-grocery", network_trial),
    "lightly-sample": lambda: measure_lightly("lightly-sample", sample_trial),
    "lightly-grocery": lambda: measure_lightly("lightly-grocery", grocery_trial),
    "photos": measure_photos,
    "sizes": measure_sizes,
    "gpu": measure_gpu,
}


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
