"""Every ``vpr`` command on tiny inputs, in an order in which each finds its inputs.

Fuzzing, faults, offline and hostile tests all take their command lines from :data:`COMMANDS`.
"""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vpr import cli

_PRODUCTS, _VIEWS, _SIDE = 8, 4, 32
_TRAINING = "--run.precision 32-true --loader.batch-size 8 --catalog {catalog}"
# Two stages of several epochs and small files of targets: a kill then falls into work that resumes.
_TEACHER = (
    f"teacher train {_TRAINING} --loader.workers 1 --tower.name sample --tower.pretrained '' --tower.image-size 32"
    " --stages '{train: head, epochs: 2, lr_head: 1.0e-3}'"
    " '{train: all, epochs: 3, lr_head: 1.0e-3, lr_tower: 1.0e-3}'"
)
_STUDENT = (
    "--model.image-size 32 --model.patch-size 8 --model.dim 32 --model.depth 1 --model.heads 2 --model.dim-head 16"
    " --model.mlp-dim 64"
)
_EMBED = "student embed --model {student} --batch-size 2 --images-per-part 2"


@dataclass(frozen=True)
class Command:
    """A ``vpr`` command on tiny inputs.

    Attributes:
        line: Words after ``vpr`` as they are typed, without the output. ``{name}`` means the path of an input of
            :func:`write_inputs`, or of the output of an earlier command.
        output: Name of the output; empty for a command that writes none.
    """

    line: str
    output: str = ""

    @property
    def verb(self) -> str:
        """The command's name in :data:`vpr.cli.COMMANDS`."""
        return verb_of(self.line)

    def words(self, paths: Mapping[str, str], output: str = "") -> list[str]:
        """Return the words after ``vpr``.

        Args:
            paths: Path of each name of the line.
            output: Path of the output.
        """
        words = shlex.split(self.line)
        for name, path in paths.items():
            words = [word.replace(f"{{{name}}}", path) for word in words]
        return [*words, "--output", output] if output else words


COMMANDS = (
    Command("catalog --reader folder --root {images} --validation 0.25 --test 0.25 --seed 2", "catalog"),
    Command("catalog relocate --catalog {catalog} --root {images}"),
    Command("catalog --reader webdataset --root {tars}", "shards"),
    Command("teacher data --csv {images.csv} --validation 0.25 --test 0.25 --seed 2", "data"),
    Command("teacher convert --checkpoint {tower.pt}", "tower.safetensors"),
    Command(_TEACHER, "teacher"),
    Command(f"{_TEACHER} --views.rotate 5", "other-teacher"),
    Command("teacher soup --models {teacher} {other-teacher} --catalog {catalog}", "soup"),
    Command("teacher fuse --models {teacher} {other-teacher} --catalog {catalog} --embedding-dim 8 --steps 2", "fused"),
    Command("teacher choose --towers sample-vit --catalog {catalog} --batch-size 8"),
    Command("teacher embed --model {teacher} --catalog {catalog}", "teacher-embeddings"),
    Command("teacher runs --folder ."),
    Command(
        f"student distill {_TRAINING} --teacher {{teacher}} {_STUDENT} --model.embedding-dim 16"
        " --targets.views 2 --targets.shard 8 --dimension.method pca --losses.nested 4 8 --epochs 5",
        "student",
    ),
    Command(f"{_EMBED} --catalog {{catalog}}", "embeddings"),
    Command(f"{_EMBED} --catalog {{shards}}", "shard-embeddings"),
    Command(f"{_EMBED} --catalog {{catalog}} --dimensions 8", "cut-embeddings"),
    Command("catalog check --embeddings {embeddings} --catalog {catalog}", "findings"),
    Command("export onnx --student {student} --catalog {catalog} --images 8", "fp32"),
    Command("export onnx --student {student} --precision fp16 --images 8", "fp16"),
    Command("export onnx --student {student} --input uint8 --layout NHWC --images 8", "uint8"),
    Command("export onnx --model {teacher} --images 8", "teacher-fp32"),
    Command("export onnx --student {student} --dimensions 8 --images 8", "cut-fp32"),
    Command("embed --model {fp32} --catalog {catalog} --batch-size 2 --images-per-part 2", "graph-embeddings"),
    Command("calibrate --onnx {fp32} --catalog {catalog} --count 8 --correct", "plain-ranges"),
    Command("calibrate --onnx {fp32} --catalog {catalog} --count 8 --correct --smooth", "ranges"),
    Command("export int8 --onnx {fp32} --ranges {ranges}", "int8"),
    Command("export int8 --onnx {fp32} --ranges {ranges} --scope full", "int8-full"),
    Command("export int8 --onnx {fp32} --ranges {ranges} --base fp32 --dtype fp8", "fp8"),
    Command("export engine --onnx {int8} --backend tensorrt-rtx --target sm86", "engine"),
    Command("export serving --model {fp32} --gallery {embeddings} --device cpu", "serving"),
    Command("export parity --student {student} --models {fp32} {int8} --catalog {catalog} --layers", "parity"),
    Command("export verify --artifact {fp32} --vectors {fp32}/golden/embeddings.npy"),
    Command("bench recall --models {fp32} {int8} {engine} --catalog {catalog}", "recall"),
    Command("bench skew --model {fp32} --catalog {catalog} --pipelines colour.bgr resize.nearest", "skew"),
    Command("bench latency --models {int8} --batches 1 --seconds 0.2 --starts 1", "latency"),
    Command(
        "bench storage --embeddings {embeddings} --sizes 1000 --formats int8 --indexes flat --seconds 0.1", "storage"
    ),
    Command(
        "bench report --models {teacher} {student} {int8} --catalog {catalog} --batches 1 --seconds 0.05", "report"
    ),
    Command("bench compare {report} {report}"),
    Command(
        "gallery threshold --embeddings {embeddings} --split '' --max-false-accept 0.9 --confidence 0.5", "threshold"
    ),
    Command("gallery create --embeddings {embeddings} --split train --threshold {threshold}", "stock"),
    Command("gallery add --gallery {stock} --embeddings {embeddings} --split test"),
    Command("gallery update --gallery {stock} --embeddings {embeddings}"),
    Command("gallery remove --gallery {stock} --products 1 --skip-missing"),
    Command("gallery search --gallery {stock} --queries {embeddings} --k 3", "stock.csv"),
    Command("gallery verify --gallery {stock} --embeddings {embeddings}"),
    Command("gallery compact --gallery {stock}"),
    Command("gallery info --gallery {stock}"),
    Command("gallery export --gallery {stock}", "stock-embeddings"),
    Command(
        "gallery plan-migration --gallery {stock} --old {embeddings} --new {teacher-embeddings}",
        "plan",
    ),
    Command("gallery create --embeddings {embeddings} --split test", "old-stock"),
    Command("gallery migrate --gallery {old-stock} --plan {plan} --model {teacher} --catalogs {catalog} --rows 2"),
    Command("search --queries {embeddings} --gallery {embeddings} --k 3 --threshold {threshold}", "neighbours.csv"),
    Command("search serve --models {int8} --catalog {catalog} --port 0"),
    Command("search serve --galleries {stock} --models {student} --catalogs {catalog} --port 0"),
    Command("doctor"),
    Command("recipes list"),
    Command("recipes show teacher/sample"),
    Command("recipes copy teacher/sample"),
    Command("completion bash"),
    Command("demo", "demo"),
)
BY_OUTPUT = {command.output: command for command in COMMANDS if command.output}


def verb_of(line: str) -> str:
    """Return the name in :data:`vpr.cli.COMMANDS` with which a command line starts."""
    return max((verb for verb in cli.COMMANDS if f"{line} ".startswith(f"{verb} ")), key=len)


def paths_in(folder: Path | str) -> dict[str, str]:
    """Return the path of every input and output by its name, all directly in one folder."""
    return {name: str(Path(folder, name)) for name in ("images", "images.csv", "tars", "tower.pt", *BY_OUTPUT)}


def run_in(folder: Path, name: str, output: Path | None = None, **inputs: str) -> object:
    """Run the command with this output in this process, and return the result of its function.

    Args:
        folder: Folder of the inputs.
        name: Name of the output in :data:`COMMANDS`.
        output: Path of the output; None writes it into the folder.
        inputs: Paths of inputs that are not in the folder.

    Raises:
        UserError: The command rejects its input.
    """
    return cli.run(BY_OUTPUT[name].words({**paths_in(folder), **inputs}, str(output or folder / name)))


def write_inputs(folder: Path) -> None:
    """Write images in a folder per product, their CSV table and WebDataset shards, and a checkpoint of PyTorch."""
    import torch

    write_images(folder / "images")
    torch.save({"state_dict": {"conv1.weight": torch.ones(4, 3, 8, 8)}, "epoch": 3}, folder / "tower.pt")
    images = sorted((folder / "images").rglob("*.png"))
    rows = [f"{image.relative_to(folder).as_posix()},{image.parent.name}\n" for image in images]
    (folder / "images.csv").write_text("".join(["image,product\n", *rows]), encoding="utf-8")
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


def write_images(folder: Path) -> None:
    """Write a folder per product with noisy views of the product's texture."""
    rng = np.random.default_rng(0)
    for product in range(_PRODUCTS):
        (folder / str(product)).mkdir(parents=True)
        texture = rng.integers(0, 200, (_SIDE, _SIDE, 3))
        for view in range(_VIEWS):
            noisy = texture + rng.integers(0, 50, texture.shape)
            Image.fromarray(noisy.astype(np.uint8)).save(folder / str(product) / f"{view}.png")
