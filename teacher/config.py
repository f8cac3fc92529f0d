"""Configuration of the teacher commands. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vpr.artifacts.paths import check_file
from vpr.common.errors import UserError, check_numbers
from vpr.data.config import LoaderConfig, check_shares
from vpr.imaging.config import ViewConfig
from vpr.training.config import RunConfig


@dataclass(frozen=True)
class HeadConfig:
    """The margin softmax.

    Attributes:
        loss: ``arcface`` widens the angle (margins in radians), ``cosface`` lowers the cosine.
        scale: inverse temperature s.
        margin: at the start of the training.
        margin_end: at its end.
        margin_step: growth per epoch up to ``margin_end``; 0 grows evenly over the whole training.
        min_margin_ratio: the class of most images has this share of the margin, that of fewest the whole, others lie
            between by the fourth root of their size; 1 gives every class the same.
        sub_centres: directions per class.
        label_smoothing: share of the target that is spread over all classes.
        class_weight_power: images of a class of n weigh n to the minus this; 0 weighs all alike.
    """

    loss: Literal["arcface", "cosface"] = "arcface"
    scale: float = 30.0
    margin: float = 0.3
    margin_end: float = 0.8
    margin_step: float = 0.0
    min_margin_ratio: float = 1.0
    sub_centres: int = 1
    label_smoothing: float = 0.0
    class_weight_power: float = 0.0

    def __post_init__(self) -> None:
        most = math.pi / 2 if self.loss == "arcface" else 2.0
        if not 0 <= self.margin <= self.margin_end <= most:
            raise UserError(
                f"head.margin: {self.margin} to {self.margin_end}: give 0 or more, not falling, at most {most:.3g}"
            )
        check_numbers(self, "head.", sub_centres=(1, 100))
        if not 0 < self.scale <= 1000:
            raise UserError(f"head.scale: {self.scale}: give a number above 0, at most 1000")
        check_numbers(self, "head.", min_margin_ratio=(0, 1), label_smoothing=(0, 1), class_weight_power=(0, 1))
        if not 0 <= self.margin_step < math.inf:
            raise UserError(f"head.margin_step: {self.margin_step}: give 0 or more")


MAX_IMAGE_SIZE = 2048  # of an image, pixels; `Preprocess` has the same


@dataclass(frozen=True)
class TowerConfig:
    """Which image tower, and how its output becomes the embedding.

    Attributes:
        name: an ``open_clip`` model such as ``ViT-H-14``, a JSON file in open_clip's form, or the
            name of one in ``teacher/towers`` (``sample``, ``sample-vit``).
        pretrained: a tag of ``open_clip`` such as ``laion2b_s32b_b79k``, a local ``.safetensors``
            file, a teacher artifact of the same tower (what is added to it starts from that teacher's too, where
            it is of the same shape), or empty for random weights.
        image_size: side of the input in pixels; 0 keeps the tower's own.
        patch_stride: distance of the patches of a ViT in pixels, less than their side to let them overlap; 0 does not.
        keep_projection: keep CLIP's own projection (ViT-H-14: 1280 to 1024).
        dropout: share of the tower's output that is dropped in training.
        embedding_dim: a new linear projection to this many dimensions; 0 adds none.
        batch_norm: BatchNorm of the embedding before it is scaled to unit length.
        gradient_checkpointing: compute a block's activations again in the backward pass instead of keeping them.
        squash: squash the whole image to the square instead of cropping its centre.
    """

    name: str = "ViT-H-14"
    pretrained: str = "laion2b_s32b_b79k"
    image_size: int = 0
    patch_stride: int = 0
    keep_projection: bool = True
    dropout: float = 0.0
    embedding_dim: int = 0
    batch_norm: bool = False
    gradient_checkpointing: bool = False
    squash: bool = True

    def __post_init__(self) -> None:
        sides = (("image_size", 16, MAX_IMAGE_SIZE), ("patch_stride", 1, MAX_IMAGE_SIZE), ("embedding_dim", 1, 1 << 16))
        for name, least, most in sides:
            value = getattr(self, name)
            if value != 0 and not least <= value <= most:
                raise UserError(f"tower.{name}: {value}: give 0, or {least} to {most}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"tower.dropout: {self.dropout}: give a share from 0 to below 1")


MAX_VALUES = {
    "lr_head": 100.0,
    "lr_tower": 100.0,
    "weight_decay": 100.0,
    "image_size": MAX_IMAGE_SIZE + 1,
    "patch_stride": MAX_IMAGE_SIZE + 1,
    "batch_size": 1 << 20,
}


@dataclass(frozen=True)
class StageConfig:
    """A stretch of epochs with its own parts, rates and image size; its optimiser starts anew.

    Attributes:
        train: ``head`` is the class directions and what is added to the tower (projection, BatchNorm); ``tower``
            the tower alone; ``last`` the last blocks of the tower and the head; ``all`` everything.
        epochs: length.
        lr_head: peak learning rate of the head.
        lr_tower: peak learning rate of the tower's last layer.
        layer_decay: factor on the learning rate from each layer of the tower to the one before it.
        last_blocks: how many blocks ``last`` trains.
        optimizer: ``adamw``, or ``sgd`` with Nesterov momentum .9.
        weight_decay: of matrices; biases, norms and other vectors have none.
        warmup: share of the stage spent warming up.
        image_size: side of the input, pixels; 0 keeps the tower's. Position embeddings are resized.
        patch_stride: of overlapping patches, pixels; 0 keeps the tower's.
        batch_size: images per step and process; 0 keeps the loader's.
        views: augmentation; none keeps the training's.
    """

    train: Literal["head", "tower", "last", "all"]
    epochs: int
    lr_head: float = 3e-4
    lr_tower: float = 3e-7
    layer_decay: float = 1.0
    last_blocks: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    warmup: float = 0.1
    image_size: int = 0
    patch_stride: int = 0
    batch_size: int = 0
    views: ViewConfig | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "stages.", epochs=(1, None))
        if (self.train == "last") != (self.last_blocks > 0):
            raise UserError(f"stages.last_blocks: {self.last_blocks} with train: {self.train}: they go together")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.warmup <= 1:
            raise UserError("stages: layer_decay is above 0 and at most 1, warmup a share from 0 to 1")
        for name in ("lr_head", "lr_tower", "weight_decay", "image_size", "patch_stride", "batch_size"):
            if not 0 <= getattr(self, name) < MAX_VALUES[name]:
                largest = MAX_VALUES[name]
                raise UserError(f"stages.{name}: {getattr(self, name)}: give 0 or more, below {largest:g}")

    def tower(self, tower: TowerConfig) -> TowerConfig:
        """The training's tower with what this stage changes of it."""
        size, stride = self.image_size or tower.image_size, self.patch_stride or tower.patch_stride
        return replace(tower, image_size=size, patch_stride=stride)


@dataclass(frozen=True)
class ScheduledStage:
    """Where a stage lies in the training.

    Attributes:
        stage: what it does.
        before: epochs of the stages before it.
        total: epochs of all stages.
        views: its augmentation.
        seed: of views and dropout.
    """

    stage: StageConfig
    before: int
    total: int
    views: ViewConfig
    seed: int


@dataclass(frozen=True)
class TrainConfig:
    """A teacher's training.

    Attributes:
        catalog: catalogue artifact; its ``train`` split is trained on, ``validation`` chooses the epoch.
        output: where the teacher is written.
        recipe: name that ``vpr teacher runs`` shows.
        tower: the image tower.
        head: the margin.
        stages: one after the other; each starts from the last weights of the one before, and the teacher is the
            best epoch of the last one.
        views: augmentation.
        loader: batches.
        run: how it is carried out.
        allow_leak: train even if a scored product or image is inside; the card then says so.
        dry_run: print the plan and the memory it needs, and stop.
        seed: of weights, order, views and dropout.
    """

    catalog: str
    output: str
    recipe: str = ""
    tower: TowerConfig = TowerConfig()
    head: HeadConfig = HeadConfig()
    stages: tuple[StageConfig, ...] = (StageConfig("head", 1), StageConfig("all", 9))
    views: ViewConfig = ViewConfig()
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig = RunConfig()
    allow_leak: bool = False
    dry_run: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("stages: none: give at least one, such as {train: all, epochs: 10}")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed: {self.seed}: give 0 or more, below 2^31")

    def places(self) -> list[ScheduledStage]:
        """The stages with where each begins."""
        places, before, total = [], 0, sum(stage.epochs for stage in self.stages)
        for stage in self.stages:
            places.append(ScheduledStage(stage, before, total, stage.views or self.views, self.seed))
            before += stage.epochs
        return places


@dataclass(frozen=True)
class DataConfig:
    """What a teacher is trained on.

    Attributes:
        output: where the catalogue is written.
        products10k: folder of Products-10K; its train and test tables are both read. Empty leaves it out.
        aicrowd: folder of the AIcrowd Visual Product Recognition development set. Empty leaves it out.
        csv: further tables with columns ``image`` and ``product``; a table whose ``split`` column names
            validation or test rows keeps its own split.
        validation: share of each source's products held out to choose checkpoints.
        test: share of each source's products held out to be scored.
        seed: of the splits.
        skip_unreadable: set unreadable images aside in ``set_aside.csv`` instead of refusing.
    """

    output: str
    products10k: str = ""
    aicrowd: str = ""
    csv: tuple[str, ...] = ()
    validation: float = 0.05
    test: float = 0.0
    seed: int = 0
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        check_shares(self.validation, self.test, self.seed)
        places = [path.resolve() for _, path in self.sources()]
        if not places:
            raise UserError("vpr teacher data: no source: give --products10k, --aicrowd or --csv")
        if len(set(places)) < len(places):
            raise UserError("vpr teacher data: one source is given twice: name each once")

    def sources(self) -> list[tuple[str, Path]]:
        """Reader and place of each source, in the order in which they are joined."""
        folders = [(reader, getattr(self, reader)) for reader in ("products10k", "aicrowd")]
        return [(reader, Path(path)) for reader, path in [*folders, *(("csv", t) for t in self.csv)] if path]


@dataclass(frozen=True)
class SoupConfig:
    """Which weights are joined, and how.

    Attributes:
        models: teacher artifacts of one network, trained on one catalogue; ``wise-ft`` takes a single one.
        catalog: the catalogue that they were trained on; its ``validation`` split chooses.
        output: where the soup is written, itself a teacher.
        method: ``uniform`` averages all; ``greedy`` adds one after the other, best first, keeping each that does not
            lower validation recall@1; ``wise-ft`` interpolates with the zero-shot weights.
        alphas: shares of the fine-tuned weights that ``wise-ft`` tries.
        batch_size: images at a time.
        workers: processes that decode, where the images do not fit in memory.
        seed: of the images that BatchNorm statistics are estimated on.
    """

    models: tuple[str, ...]
    catalog: str
    output: str
    method: Literal["uniform", "greedy", "wise-ft"] = "greedy"
    alphas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    batch_size: int = 64
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        wanted = "exactly one" if self.method == "wise-ft" else "at least two"
        if (len(self.models) == 1) != (self.method == "wise-ft") or not self.models:
            raise UserError(f"models: {len(self.models)} given, {self.method} takes {wanted}: see --method")
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise UserError(f"alphas: {list(self.alphas)}: give one or more shares from 0 to 1")
        check_numbers(self, batch_size=(2, None), workers=(0, None), seed=(0, None))
        if Path(self.output).resolve() in [Path(model).resolve() for model in self.models]:
            raise UserError(f"output: {self.output} is one of the models and would be replaced: choose another")


@dataclass(frozen=True)
class RunsConfig:
    """What to list.

    Attributes:
        folder: looked through with everything below it, hidden folders and links aside.
        output: CSV file of the table; empty prints it only.
    """

    folder: str = "runs"
    output: str = ""

    def __post_init__(self) -> None:
        check_file("output", self.output)
