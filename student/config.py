"""What a distillation is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from student.criterion import LossConfig
from student.dimension import DimensionConfig
from student.model import StudentConfig
from student.teacher_cache import SignalConfig
from vpr.common.errors import UserError, check_numbers
from vpr.data.loaders import LoaderConfig
from vpr.imaging.augment import ViewConfig
from vpr.inference.int8 import KEEP
from vpr.training.loop import RunConfig


@dataclass(frozen=True)
class QuantiseConfig:
    """Quantisation-aware finishing.

    Attributes:
        ranges: ``ranges`` artifact of the graph of the student that ``start`` names; empty trains without Q/DQ.
        keep: linears whose names begin with one of these are not quantised, and ``vpr export int8`` leaves them too;
            a convolutional stem has to be among them.
    """

    ranges: str = ""
    keep: tuple[str, ...] = KEEP


@dataclass(frozen=True)
class DistillConfig:
    """A distillation.

    Attributes:
        teacher: teacher artifact.
        catalog: catalogue artifact; its ``train`` split is used (labels by ``losses.margin`` and ``logits`` alone),
            ``validation`` chooses the epoch.
        output: where the student is written; the teacher's signal is kept beside it as ``<output>-views``.
        cache: where the signal is kept instead, for students that share one.
        assistant: student artifact that gives the signal in the teacher's place, as in teacher -> base -> small.
        start: larger student, or teacher with a ViT of open_clip, whose weights are selected from; a student of the
            same shape is taken over whole.
        unlabelled: folders of further pictures (or catalogues of the reader ``pictures``), which need no labels.
        model: shape of the student.
        views: augmentation, the same for teacher and student.
        signal: how the teacher's embeddings come.
        losses: what is made small.
        dimension: how the teacher's dimension becomes the student's.
        quantise: train under the Q/DQ of an INT8 graph.
        epochs: passes over the pictures.
        lr: peak learning rate.
        warmup: share of the training spent warming up.
        weight_decay: of matrices; biases and norms have none.
        loader: batches.
        run: how it is carried out.
        allow_leak: distil even if a scored product or picture is inside; the card then says so.
        dry_run: print the plan, take one step on two pictures, and stop.
        seed: of weights, order and views.
    """

    teacher: str
    catalog: str
    output: str
    cache: str = ""
    assistant: str = ""
    start: str = ""
    unlabelled: tuple[str, ...] = ()
    model: StudentConfig = StudentConfig()
    views: ViewConfig = ViewConfig()
    signal: SignalConfig = SignalConfig()
    losses: LossConfig = LossConfig()
    dimension: DimensionConfig = DimensionConfig()
    quantise: QuantiseConfig = QuantiseConfig()
    epochs: int = 30
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig = RunConfig(validate_every=2)
    allow_leak: bool = False
    dry_run: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, epochs=(1, None), lr=(0, 10), weight_decay=(0, 100), warmup=(0, 1))
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed: {self.seed}: give 0 or more, below 2^31")
        if self.run.strategy == "fsdp":
            raise UserError("run.strategy: a student fits on one device: set it to ddp, or auto")
        if self.quantise.ranges and not self.start:
            raise UserError("quantise.ranges: finishes a trained student: name it by start")
        if self.cache and Path(self.cache).resolve() == Path(self.output).resolve():
            raise UserError(f"cache: {self.cache} is the output: the signal needs a folder of its own")
        weights = self.losses.weights()
        if self.signal.mixup and weights.keys() & {"margin", "logits"}:
            raise UserError("signal.mixup: a mixed picture has no one label: set losses.margin and logits to 0")
        if "logits" in weights:
            if self.signal.mode == "online":
                raise UserError("losses.logits: needs every product's mean embedding: set signal.mode to cached")
            if self.dimension.method != "none":
                raise UserError("losses.logits: compares in the teacher's dimension: set dimension.method to none")
            if self.unlabelled:
                raise UserError("losses.logits: needs a label of every picture: leave unlabelled out")
        pairs = weights.keys() & {"affinity", "rkd_distance", "rkd_angle"}
        if pairs and self.loader.batch_size < 2:
            raise UserError(f"loader.batch_size: 1: {min(pairs)} relates the pictures of a batch: give 2 or more")
