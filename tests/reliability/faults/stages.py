"""Every stage on tiny inputs, as the commands that a person types, and what must come out of them again."""

from __future__ import annotations

import fnmatch
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.commands import write_images
from vpr.artifacts.card import Card
from vpr.artifacts.store import load_artifact

_TRAINING = ("--run.precision", "32-true", "--loader.batch-size", "8", "--catalog", "{catalog}")
_TEACHER_STAGES = [
    {"train": "head", "epochs": 2, "lr_head": 1e-3},
    {"train": "all", "epochs": 3, "lr_head": 1e-3, "lr_tower": 1e-3},
]
_STUDENT = ("--model.image-size", "32", "--model.patch-size", "8", "--model.dim", "32", "--model.depth", "1")
_HEADS = ("--model.heads", "2", "--model.dim-head", "16", "--model.mlp-dim", "64")
_EMBED = ("--model", "{student}", "--batch-size", "2", "--images-per-part", "2")
# What a run says of itself: another for each time that it was started, or at each time that it is run.
_LOGS = ("metrics*.csv", "*/csv-*", "*/tb/*")
_TIMES = ("seconds", "build_seconds")
# Of a report's row, what the clock has no part in.
_MEASURED = ("name", "backend", "precision", "params", "size_bytes", "recall_at_1", "recall_at_5", "map", "ci95")


@dataclass(frozen=True)
class Stage:
    """A command and its result.

    Attributes:
        name: of the artifact.
        verb: of ``vpr``.
        arguments: its flags without the output; ``{name}`` is the path of another stage's artifact, or of an input.
        loose: files of the artifact that are never the same twice; their part that is, is compared otherwise.
    """

    name: str
    verb: str
    arguments: tuple[str, ...]
    loose: tuple[str, ...] = ()

    def command(self, paths: dict[str, str], output: Path) -> list[str]:
        """Words behind ``vpr``; ``paths`` are those of the names in the arguments."""
        words = list(self.arguments)
        for name, path in paths.items():
            words = [word.replace(f"{{{name}}}", path) for word in words]
        return [*self.verb.split(), *words, "--output", str(output)]


# In the order in which each finds what it reads.
STAGES = (
    Stage("catalog", "catalog", ("--reader", "folder", "--root", "{images}", "--validation", ".25", "--test", ".25")),
    Stage("shards", "catalog", ("--reader", "webdataset", "--root", "{tars}")),
    Stage(
        "teacher",
        "teacher train",
        (*_TRAINING, "--loader.workers", "1", "--tower.name", "sample", "--tower.pretrained", "")
        + ("--tower.image-size", "32")
        + ("--stages", *map(json.dumps, _TEACHER_STAGES)),
    ),
    Stage(
        "student",
        "student distill",
        (*_TRAINING, "--teacher", "{teacher}", *_STUDENT, *_HEADS, "--model.embedding-dim", "16")
        + ("--targets.views", "2", "--targets.shard", "8", "--dimension.method", "pca", "--epochs", "5"),
    ),
    Stage("embeddings", "student embed", ("--catalog", "{catalog}", *_EMBED)),
    Stage("shard-embeddings", "student embed", ("--catalog", "{shards}", *_EMBED)),
    Stage("fp32", "export onnx", ("--student", "{student}", "--catalog", "{catalog}", "--images", "8")),
    Stage("ranges", "calibrate", ("--onnx", "{fp32}", "--catalog", "{catalog}", "--count", "8", "--smooth")),
    Stage("int8", "export int8", ("--onnx", "{fp32}", "--ranges", "{ranges}")),
    Stage("engine", "export engine", ("--onnx", "{int8}", "--backend", "tensorrt-rtx", "--target", "sm86")),
    Stage(
        "report",
        "bench report",
        ("--catalog", "{catalog}", "--models", "{fp32}", "--seconds", "0.05", "--batches", "1"),
        loose=("report.json", "report.md", "report.html"),
    ),
)


def write_inputs(folder: Path) -> dict[str, str]:
    """Images in folders and the same in tar files: their places by name."""
    write_images(folder / "images")
    (folder / "tars").mkdir()
    for number, part in enumerate(("[0-3]", "[4-7]")):
        with tarfile.open(folder / "tars" / f"{number}.tar", "w") as tar:
            for image in sorted((folder / "images").glob(f"{part}/*.png")):
                key = f"{image.parent.name}-{image.stem}"
                label = folder / f"{key}.cls"
                label.write_text(image.parent.name, encoding="ascii")
                tar.add(image, f"{key}.png")
                tar.add(label, f"{key}.cls")
                label.unlink()
    return {name: str(folder / name) for name in ("images", "tars")}


def difference(stage: Stage, unbroken: Path, other: Path) -> list[str]:
    """What an artifact has otherwise than the unbroken run's, by name.

    Its files are compared bit for bit but for logs and times.
    """
    first, second = (_content(stage, path) for path in (unbroken, other))
    return [name for name in first | second if first.get(name) != second.get(name)]


def _content(stage: Stage, path: Path) -> dict[str, Any]:
    card: Card = load_artifact(path).card
    content = card.model_dump(exclude={"created", "environment", "files", "metrics"})
    content["metrics"] = {key: value for key, value in card.metrics.items() if key not in _TIMES}
    skipped = (*_LOGS, *stage.loose)
    content |= {name: one for name, one in card.files.items() if not any(fnmatch.fnmatch(name, p) for p in skipped)}
    if "report.json" in stage.loose:
        rows = json.loads((path / "report.json").read_text(encoding="utf-8"))["rows"]
        content["rows"] = [{key: row[key] for key in _MEASURED} for row in rows]
    return content


def leftovers(unbroken: Path, other: Path) -> list[str]:
    """Files below ``other`` that are not below ``unbroken``, logs aside."""
    return sorted(_tree(other) - _tree(unbroken))


def _tree(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ("*/metrics*.csv", *_LOGS))}
