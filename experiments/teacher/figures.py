"""``make figures TOPIC=teacher``: the teacher's figures, into ``docs/results/teacher.json``.

``PARTS="grocery"`` measures this part only. The environment variable ``VPR_DATA`` is the folder of ``grocery``, which
the parts ``grocery``, ``wrong-labels`` and ``photos`` need. ``photos`` needs ``make photos-weights``, too.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from experiments.figures import Figure, command_of, measure, record, record_unmeasured
from experiments.teacher.ablation import ablate, grocery_data, sample_teacher
from experiments.teacher.input_pipeline import pipeline_figures
from experiments.teacher.photos import open_photos, photo_figures
from experiments.teacher.training_step import TeacherStepConfig, teacher_step, unmeasured
from experiments.teacher.two_processes import DistributedRun, train_spread
from experiments.teacher.wrong_labels import wrong_label_figures
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig

# Relative: paths are part of an artifact's configuration.
_FOLDER, _SAMPLE = Path("runs/figures-teacher"), Path("runs/demo/catalog")


def measure_grocery() -> None:
    """Record heads, averages, soups and re-ranking on photographs of products that no stage has seen."""
    data = grocery_data()
    start = sample_teacher("sample", _sample(), "runs/demo/teacher")  # in place of CLIP's weights
    record("teacher", [], {"grocery": ablate(data, start, _FOLDER / "grocery")})


def measure_wrong_labels() -> None:
    """Record how many injected wrong labels ``vpr catalog check`` finds among photographs."""
    root = str(grocery_data() / "grocery" / "train")
    catalog = load_catalog(build_catalog(CatalogConfig("folder", str(_FOLDER / "wrong-labels" / "catalog"), root)))
    record("teacher", *wrong_label_figures(catalog, _FOLDER / "weights"))


def measure_photos() -> None:
    """Record fine-tuned, fused and cleaned teachers on photographs of products that no training has seen."""
    record("teacher", *photo_figures(open_photos(grocery_data(), _FOLDER / "photos")))


def measure_pipeline() -> None:
    """Record the images that two loader workers deliver, against those that the sample tower consumes."""
    record("teacher", pipeline_figures(_sample()), {})


def measure_processes() -> None:
    """Record losses of a training in two processes against a single one, fp32, over 50 steps."""
    command = command_of("teacher", "processes")
    with tempfile.TemporaryDirectory() as folder:
        single = _train(Path(folder), 1, "auto")
        figures = []
        for strategy in ("ddp", "fsdp"):
            two = _train(Path(folder), 2, strategy)
            last = max(single.losses)
            largest = max(abs(two.losses[step] - loss) for step, loss in single.losses.items())
            final = abs(two.losses[last] - single.losses[last])
            name = f"{strategy.upper()} in two processes against one"
            figures += [
                Figure(f"{name}: loss after {last + 1} steps, difference", final, "", 1e-4, "<=", command, None, (0,)),
                Figure(
                    f"{name}: largest difference of the logged losses", largest, "", None, "<=", command, None, (0,)
                ),
            ]
    record("teacher", figures, {})


def measure_gpu() -> None:
    """Record ViT-H-14's step on this machine's GPU in ``gpu.json``; without a GPU, that it is not measured."""
    config = TeacherStepConfig()
    if torch.cuda.is_available():
        record("gpu", *teacher_step(config))
    else:
        record_unmeasured(unmeasured(config), "ViT-H-14's step")


PARTS = {
    "grocery": measure_grocery,
    "wrong-labels": measure_wrong_labels,
    "photos": measure_photos,
    "pipeline": measure_pipeline,
    "processes": measure_processes,
    "gpu": measure_gpu,
}


def _train(folder: Path, processes: int, strategy: str) -> DistributedRun:
    arguments = ["--catalog", str(_sample()), "--tower.name", "sample-vit", "--tower.pretrained", ""]
    arguments += ["--stages", "{train: all, epochs: 1, lr_head: 2.0e-3, lr_tower: 1.0e-3}"]
    arguments += ["--run.precision", "32-true", "--loader.keep-in-memory"]
    # One epoch of the sample's 6,989 training images in batches of 136 is 51 steps; the 50th is logged.
    return train_spread(arguments, folder / f"{strategy}-{processes}", processes, 136, strategy)  # type: ignore[arg-type]


def _sample() -> Path:
    return build_catalog(CatalogConfig("sample", str(_SAMPLE)))


if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
