"""What a distillation is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from teacher.config import HeadConfig
from vpr.common.errors import UserError, check_numbers
from vpr.data.config import LoaderConfig
from vpr.imaging.config import ViewConfig
from vpr.inference.config import DEFAULT_EXCLUDED_LAYERS
from vpr.training.config import RunConfig

Preset = Literal["sample", "tiny", "small", "base"]

# Widths and depths of DeiT-Ti, -S and -B (Touvron et al., "Training data-efficient image transformers", ICML 2021,
# table 1); "sample" is for images of 64 pixels.
PRESETS: dict[Preset, dict[str, int]] = {
    "sample": {"image_size": 64, "patch_size": 8, "dim": 192, "depth": 6, "heads": 3, "mlp_dim": 384},
    "tiny": {"image_size": 224, "patch_size": 16, "dim": 192, "depth": 12, "heads": 3, "mlp_dim": 768},
    "small": {"image_size": 224, "patch_size": 16, "dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536},
    "base": {"image_size": 224, "patch_size": 16, "dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
}

# A shape comes from a card too: these bound what it can make a reader allocate.
_BOUNDS = {
    "image_size": (1, 1024),
    "patch_size": (1, 64),
    "dim": (1, 4096),
    "depth": (1, 64),
    "heads": (1, 64),
    "dim_head": (1, 256),
    "mlp_dim": (1, 16384),
    "embedding_dim": (0, 8192),
}

_MOST_TOKENS, _MOST_REGISTERS = 4096, 64


@dataclass(frozen=True)
class StudentConfig:
    """Shape of the student. A number that is 0 is taken from the preset.

    Attributes:
        preset: ``tiny``, ``small`` and ``base`` have DeiT's widths for images of 224 pixels.
        image_size: side of the input, pixels; a multiple of the patch.
        patch_size: side of a patch, pixels; a power of two with the convolutional stem.
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads.
        dim_head: width of a head.
        mlp_dim: width of the hidden layer of a block's MLP.
        embedding_dim: width of the output; 0 is that of the signal it is distilled from.
        pool: ``mean`` over the tokens, or the ``cls`` token.
        stem: ``patch`` is vit-pytorch's own linear patch embedding; ``conv`` replaces it by
            3x3 convolutions of stride 2 (Xiao et al., "Early Convolutions Help Transformers See
            Better", NeurIPS 2021, section 4), which small data needs.
        family: ``vit``, or vit-pytorch's ``vit_for_small_dataset``: shifted patches and attention that leaves
            out a token itself, with a learned temperature (Lee et al., "Vision Transformer for Small-Size
            Datasets", 2021).
        registers: tokens that take part in attention and are dropped before pooling (Darcet et al., "Vision
            Transformers Need Registers", ICLR 2024).
        dropout: in attention and MLP.
        gradient_checkpointing: compute each block again for its gradient, which needs less memory.
    """

    preset: Preset = "sample"
    image_size: int = 0
    patch_size: int = 0
    dim: int = 0
    depth: int = 0
    heads: int = 0
    dim_head: int = 64
    mlp_dim: int = 0
    embedding_dim: int = 0
    pool: Literal["mean", "cls"] = "mean"
    stem: Literal["patch", "conv"] = "patch"
    family: Literal["vit", "small-data"] = "vit"
    registers: int = 0
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"model.preset: '{self.preset}': choose from {', '.join(PRESETS)}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        check_numbers(self, "model.", **_BOUNDS)
        if self.image_size % self.patch_size:
            raise UserError(f"model.image_size: {self.image_size} is no multiple of the patch of {self.patch_size}")
        if (self.image_size // self.patch_size) ** 2 > _MOST_TOKENS:
            raise UserError(f"model.patch_size: {self.patch_size} makes more than {_MOST_TOKENS} tokens: raise it")
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise UserError(f"model.patch_size: {self.patch_size}: the convolutional stem needs a power of two")
        if not 0 <= self.registers <= _MOST_REGISTERS or not 0 <= self.dropout < 1:
            raise UserError(f"model: give 0 to {_MOST_REGISTERS} registers, and dropout from 0 to below 1")


FROM_TEACHER = (
    "cosine",
    "mse",
    "similarity_kl",
    "affinity",
    "rkd_distance",
    "rkd_angle",
    "contrastive",
    "logits",
)

FROM_LABELS = ("margin", "logits")


@dataclass(frozen=True)
class LossConfig:
    """Weight of each loss; 0 leaves it out. Relations and contrasts are those of one process's batch.

    Attributes:
        cosine: 1 - cosine of student and teacher.
        mse: squared distance of the unit vectors.
        similarity_kl: KL of the similarities to a bank of teacher embeddings.
        affinity: KL of the similarities within the batch.
        rkd_distance: relative distances within the batch.
        rkd_angle: angles of triples of the batch (of its first 128 images).
        contrastive: finding an image's teacher embedding among the batch's.
        margin: margin softmax over the products, from the labels and no teacher.
        logits: vit-pytorch's ``DistillWrapper`` with the teacher's similarities to the products' mean embeddings as
            its logits; a baseline, which goes with no other loss.
        temperature: of the softened similarities.
        contrastive_temperature: of the contrastive loss.
        logits_alpha: share of the teacher in ``logits``; the rest is cross-entropy with the labels.
        logits_temperature: of ``logits``.
        head: of ``margin``; its scale is that of the teacher's logits too.
    """

    cosine: float = 1.0
    mse: float = 0.0
    similarity_kl: float = 1.0
    affinity: float = 0.0
    rkd_distance: float = 0.0
    rkd_angle: float = 0.0
    contrastive: float = 0.0
    margin: float = 0.0
    logits: float = 0.0
    temperature: float = 0.05
    contrastive_temperature: float = 0.07
    logits_alpha: float = 0.5
    logits_temperature: float = 1.0
    head: HeadConfig = HeadConfig(scale=16.0, margin=0.0, margin_end=0.2)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("temperature") and not 1e-3 <= value <= 100:
                raise UserError(f"losses.{field.name}: {value}: give 0.001 to 100")
            if isinstance(value, float) and not 0 <= value <= 1e6:
                raise UserError(f"losses.{field.name}: {value}: give 0 or more")
        if not 0 <= self.logits_alpha <= 1:
            raise UserError(f"losses.logits_alpha: {self.logits_alpha}: give a share, 0 to 1")
        if not self.weights():
            raise UserError("losses: all weights are 0: give one loss a weight, such as cosine: 1")
        if self.logits and len(self.weights()) > 1:
            raise UserError("losses.logits: a baseline that goes with no other loss: set the others to 0")

    def weights(self) -> dict[str, float]:
        """The losses that are used."""
        return {name: getattr(self, name) for name in (*FROM_TEACHER, "margin") if getattr(self, name) > 0}

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss looks at the teacher."""
        return any(name in FROM_TEACHER for name in self.weights())


@dataclass(frozen=True)
class DimensionConfig:
    """How embeddings of the teacher's D dimensions teach a student of d.

    Attributes:
        method: ``pca`` projects the teacher to the directions of most energy, ``cosine`` learns the projection that
            keeps cosines best (after Wang et al., "CosPress", TMLR 2025, with a linear map), ``projector`` keeps the
            teacher whole and learns a projection of the student up to D, thrown away afterwards; ``none`` has d = D.
        images: teacher embeddings that a projection is fitted on.
        steps: of learning ``cosine``.
    """

    method: Literal["none", "pca", "cosine", "projector"] = "none"
    images: int = 16384
    steps: int = 1000

    def __post_init__(self) -> None:
        check_numbers(self, "dimension.", images=(1, 1 << 20), steps=(1, 1 << 20))

    @property
    def projects_teacher(self) -> bool:
        """Whether the student learns from projected embeddings."""
        return self.method in ("pca", "cosine")


_MOST_VIEWS = 10_000


@dataclass(frozen=True)
class TargetsConfig:
    """Where the teacher's embeddings come from.

    Attributes:
        mode: ``cached`` embeds the views once, before training; ``online`` runs the teacher beside the student, on
            new views in every epoch.
        views: cached views of each image; epochs go round them.
        shard: images in a file of the cache.
        bank: teacher embeddings that similarities are taken to: drawn from the cache anew in each epoch, or the
            latest ones online.
        mixup: a of the Beta(a, a) by which pairs of images are mixed, teacher's and student's alike; online
            alone, 0 mixes none (Beyer et al., "Knowledge distillation: a good teacher is patient and consistent",
            CVPR 2022, section 3).
    """

    mode: Literal["cached", "online"] = "cached"
    views: int = 8
    shard: int = 16384
    bank: int = 4096
    mixup: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, "targets.", views=(1, _MOST_VIEWS), shard=(1, 1 << 24), bank=(1, 1 << 20))
        if self.mixup and not 0.05 <= self.mixup <= 100:
            raise UserError(f"targets.mixup: {self.mixup}: give 0 (none), or 0.05 to 100")
        if self.mixup and self.mode == "cached":
            raise UserError("targets.mixup: a mixed image cannot be looked up: set targets.mode to online")


@dataclass(frozen=True)
class QuantiseConfig:
    """Quantisation-aware finishing.

    Attributes:
        ranges: ``ranges`` artifact of the graph of the student that ``start`` names; empty trains without Q/DQ.
        exclude_layers: linears whose names begin with one of these are not quantised, and ``vpr export int8`` leaves them too;
            a convolutional stem has to be among them.
    """

    ranges: str = ""
    exclude_layers: tuple[str, ...] = DEFAULT_EXCLUDED_LAYERS


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
        unlabelled: folders of further images (or catalogues of the reader ``images``), which need no labels.
        model: shape of the student.
        views: augmentation, the same for teacher and student.
        targets: how the teacher's embeddings come.
        losses: what is made small.
        dimension: how the teacher's dimension becomes the student's.
        quantise: train under the Q/DQ of an INT8 graph.
        epochs: passes over the images.
        lr: peak learning rate.
        warmup: share of the training spent warming up.
        weight_decay: of matrices; biases and norms have none.
        loader: batches.
        run: how it is carried out.
        allow_leak: distil even if a scored product or image is inside; the card then says so.
        dry_run: print the plan, take one step on two images, and stop.
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
    targets: TargetsConfig = TargetsConfig()
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
        if self.targets.mixup and weights.keys() & {"margin", "logits"}:
            raise UserError("targets.mixup: a mixed image has no one label: set losses.margin and logits to 0")
        if "logits" in weights:
            if self.targets.mode == "online":
                raise UserError("losses.logits: needs every product's mean embedding: set targets.mode to cached")
            if self.dimension.method != "none":
                raise UserError("losses.logits: compares in the teacher's dimension: set dimension.method to none")
            if self.unlabelled:
                raise UserError("losses.logits: needs a label of every image: leave unlabelled out")
        pairs = weights.keys() & {"affinity", "rkd_distance", "rkd_angle"}
        if pairs and self.loader.batch_size < 2:
            raise UserError(f"loader.batch_size: 1: {min(pairs)} relates the images of a batch: give 2 or more")
