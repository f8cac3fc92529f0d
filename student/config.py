"""Configuration of a distillation. Imports no heavy library."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from student.loss_config import LABEL_LOSSES, RELATIONS
from student.loss_config import LossConfig as LossConfig  # with the other sections
from vpr.artifacts.paths import CARD_NAME
from vpr.common.errors import UserError, check_numbers
from vpr.data.config import LoaderConfig
from vpr.imaging.config import ViewConfig
from vpr.inference.config import DEFAULT_EXCLUDED_LAYERS
from vpr.training.config import RunConfig

Preset = Literal["auto", "sample", "tiny", "small", "base"]
Activation = Literal["gelu", "gelu-tanh", "quick-gelu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

# Widths and depths of DeiT-Ti, -S and -B (Touvron et al., "Training data-efficient image transformers", ICML 2021,
# table 1). "sample" is for images of 64 pixels.
PRESETS: dict[str, dict[str, int]] = {
    "sample": {"image_size": 64, "patch_size": 8, "dim": 192, "depth": 6, "heads": 3, "mlp_dim": 384},
    "tiny": {"image_size": 224, "patch_size": 16, "dim": 192, "depth": 12, "heads": 3, "mlp_dim": 768},
    "small": {"image_size": 224, "patch_size": 16, "dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536},
    "base": {"image_size": 224, "patch_size": 16, "dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
}

_DIM_HEAD = 64  # of all presets
# Sizes that a preset fills in, or a start with the preset ``auto``.
SIZES = ("image_size", "patch_size", "dim", "depth", "heads", "dim_head", "mlp_dim")
# How the layers compute. A student computes as its start does.
LAYER_KEYS = ("qkv_bias", "layer_scale", "patch_norms", "pre_norm", "pooled_norm", "activation", "norm_eps")

# A shape may come from an untrusted card: these bounds limit the memory that it can allocate.
_BOUNDS = {
    "image_size": (1, 1024),
    "patch_size": (1, 64),
    "dim": (1, 4096),
    "depth": (1, 64),
    "heads": (1, 64),
    "dim_head": (1, 256),
    "mlp_dim": (1, 16384),
    "embedding_dim": (0, 8192),
    "norm_eps": (1e-12, 0.1),
}

_NETWORK_STEM = re.compile(r"timm/[A-Za-z0-9_]{1,100}")
_MAX_TOKENS, _MAX_REGISTERS = 4096, 64


@dataclass(frozen=True)
class StudentConfig:
    """Shape of the student. The preset replaces every size that is 0.

    Attributes:
        preset: Base shape: ``tiny``, ``small`` and ``base`` are DeiT's for images of 224 pixels, ``sample`` is smaller.
            ``auto`` is the shape of the model in ``start``, or ``sample`` without one.
        image_size: Side of the input in pixels, a multiple of the patch.
        patch_size: Side of a patch in pixels. The convolutional stem needs a power of two.
        dim: Width of the tokens.
        depth: Number of blocks.
        heads: Number of attention heads.
        dim_head: Width of an attention head, 64 in every preset.
        mlp_dim: Width of the hidden layer of each MLP.
        embedding_dim: Width of the embedding. 0 takes the teacher's.
        pool: Pooling: the ``mean`` of the tokens, the ``cls`` token, or ``map`` for attention with a learned query, as
            in SigLIP. ``auto`` is that of ``start``, or ``mean`` without one.
        stem: Layers from pixels to tokens. ``patch`` is vit-pytorch's linear patch embedding. ``conv`` replaces it by
            3x3 convolutions of stride 2, which small data needs (Xiao et al., "Early Convolutions Help Transformers
            See Better", NeurIPS 2021, section 4). ``timm/NAME`` is a convolutional network of timm up to its pooling;
            its features become the tokens. ``patch_size`` is then the number of pixels that a feature covers.
        family: Network of vit-pytorch. ``vit`` is ``ViT``. ``small-data`` is ``vit_for_small_dataset``: shifted
            patches, and attention with a learned temperature that excludes the token itself (Lee et al., "Vision
            Transformer for Small-Size Datasets", 2021).
        registers: Number of extra tokens that attend and are dropped before pooling (Darcet et al., "Vision
            Transformers Need Registers", ICLR 2024). 0 takes those of ``start``.
        dropout: Dropout rate of attention and MLP.
        gradient_checkpointing: Recompute each block for its gradient, which saves memory.
        qkv_bias: Biases of queries, keys and values. This key and the next ones follow ``start`` if there is one.
        layer_scale: Learned scale of each block's output (Touvron et al., "Going deeper with Image Transformers",
            ICCV 2021, equation 4).
        patch_norms: vit-pytorch's two norms of the linear patch embedding, which pretrained ViTs do not have.
        pre_norm: Norm of the tokens before the first block, as in CLIP.
        pooled_norm: Last norm after the pooling instead of before it.
        activation: Activation of each MLP. OpenAI's CLIP computes ``quick-gelu``.
        norm_eps: Epsilon of the norms.
    """

    preset: Preset = "sample"
    image_size: int = 0
    patch_size: int = 0
    dim: int = 0
    depth: int = 0
    heads: int = 0
    dim_head: int = 0
    mlp_dim: int = 0
    embedding_dim: int = 0
    pool: Literal["auto", "mean", "cls", "map"] = "mean"
    stem: str = "patch"
    family: Literal["vit", "small-data"] = "vit"
    registers: int = 0
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    qkv_bias: bool = False
    layer_scale: bool = False
    patch_norms: bool = True
    pre_norm: bool = False
    pooled_norm: bool = False
    activation: Activation = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.preset != "auto" and self.preset not in PRESETS:
            raise UserError(f"model.preset: expected one of auto, {', '.join(PRESETS)}, got '{self.preset}'.")
        if self.preset != "auto":
            for name, value in {**PRESETS[self.preset], "dim_head": _DIM_HEAD}.items():
                if getattr(self, name) == 0:
                    object.__setattr__(self, name, value)
        # The preset `auto` keeps zeros until the start is known.
        unknown = {key for key in SIZES if getattr(self, key) == 0}
        check_numbers(self, "model.", **{key: bounds for key, bounds in _BOUNDS.items() if key not in unknown})
        if self.activation not in ACTIVATIONS:
            raise UserError(f"model.activation: expected one of {', '.join(ACTIVATIONS)}, got '{self.activation}'.")
        if self.stem not in ("patch", "conv") and not _NETWORK_STEM.fullmatch(self.stem):
            raise UserError(f"model.stem: expected patch, conv or timm/NAME, got '{self.stem}'.")
        self._check_grid()
        if not 0 <= self.registers <= _MAX_REGISTERS:
            raise UserError(f"model.registers: expected 0 to {_MAX_REGISTERS}, got {self.registers}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout: expected 0 to below 1, got {self.dropout}.")
        if self.family == "small-data":
            changed = [key for key in LAYER_KEYS if getattr(self, key) != getattr(StudentConfig, key)]
            changed += ["pool"] if self.pool == "map" else []
            for key in [*changed, *(["stem"] if self.has_network_stem else [])]:
                raise UserError(f"model.{key}: the family 'small-data' does not support it. Set model.family to vit.")

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return LAYER_KEYS

    def _check_grid(self) -> None:
        """Raise :class:`UserError` for an image that the patches do not fill, or for too many of them."""
        if not self.image_size or not self.patch_size:
            return
        if self.image_size % self.patch_size:
            raise UserError(f"model.image_size: expected a multiple of patch {self.patch_size}, got {self.image_size}.")
        if (self.image_size // self.patch_size) ** 2 > _MAX_TOKENS:
            raise UserError(f"model.patch_size: {self.patch_size} gives more than {_MAX_TOKENS} tokens. Raise it.")
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise UserError(f"model.patch_size: the convolutional stem needs a power of two, got {self.patch_size}.")

    @property
    def has_network_stem(self) -> bool:
        """Whether a network of timm makes the tokens."""
        return self.stem not in ("patch", "conv")

    @property
    def is_complete(self) -> bool:
        """Whether every size is known, so that a network can be built."""
        return self.pool != "auto" and all(getattr(self, name) for name in SIZES)


@dataclass(frozen=True)
class DimensionConfig:
    """Reduction from the teacher's embedding width D to the student's width d.

    Attributes:
        method: Method of the reduction. ``none`` requires d = D. ``pca`` projects the teacher to its principal
            directions. ``cosine`` learns the projection that preserves cosines best (after Wang et al., "CosPress",
            TMLR 2025, with a linear map). ``projector`` learns a projection of the student up to D and drops it
            after training.
        images: Number of teacher embeddings to fit the projection on.
        steps: Number of optimiser steps of ``cosine``.
    """

    method: Literal["none", "pca", "cosine", "projector"] = "none"
    images: int = 16384
    steps: int = 1000

    def __post_init__(self) -> None:
        check_numbers(self, "dimension.", images=(1, 1 << 20), steps=(1, 1 << 20))

    @property
    def projects_teacher(self) -> bool:
        """Whether the method projects the teacher's embeddings."""
        return self.method in ("pca", "cosine")


_MAX_VIEWS = 10_000


@dataclass(frozen=True)
class TargetsConfig:
    """Source of the teacher's embeddings.

    Attributes:
        mode: When the teacher runs. ``cached`` embeds all views once before training. ``online`` runs the teacher next
            to the student, on new views in every epoch.
        views: Number of cached views of each image. Epochs cycle through them.
        shard: Number of images in a file of the cache.
        bank: Number of teacher embeddings to compute similarities to: a sample of the cache, online the latest ones.
        seed: Seed of the cached views, so that students of all seeds share a cache. Mode ``online`` draws the views
            with the seed of the training.
        mixup: Parameter a of the Beta(a, a) that mixes pairs of images for teacher and student alike. 0 turns it off;
            it needs mode ``online`` (Beyer et al., "Knowledge distillation: a good teacher is patient and
            consistent", CVPR 2022, section 3).
    """

    mode: Literal["cached", "online"] = "cached"
    views: int = 8
    shard: int = 16384
    bank: int = 4096
    mixup: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, "targets.", views=(1, _MAX_VIEWS), shard=(1, 1 << 24), bank=(1, 1 << 20))
        check_numbers(self, "targets.", seed=(0, (1 << 31) - 1))
        if self.mixup and not 0.05 <= self.mixup <= 100:
            raise UserError(f"targets.mixup: expected 0 (off) or 0.05 to 100, got {self.mixup}.")
        if self.mixup and self.mode == "cached":
            raise UserError("targets.mixup: the cache holds no mixed images. Set targets.mode to online.")


@dataclass(frozen=True)
class QuantiseConfig:
    """Quantisation-aware training (QAT).

    Attributes:
        ranges: ``ranges`` artifact of the graph of the student in ``start``. Empty trains without Q/DQ.
        exclude_layers: Prefixes of layers to leave in float, also in the INT8 graph; a convolutional stem must be one.
    """

    ranges: str = ""
    exclude_layers: tuple[str, ...] = DEFAULT_EXCLUDED_LAYERS


@dataclass(frozen=True)
class DistillConfig:
    """Configuration of ``vpr student distill``.

    Attributes:
        teacher: Teacher artifact. Several are fused into ``<output>-teacher``, see ``vpr teacher fuse``; the fused
            embedding has the student's width, by default at most 256.
        catalog: Catalogue artifact. ``train`` gives the images, ``validation`` selects the epoch. Only
            ``losses.margin`` and ``losses.logits`` use the labels.
        output: Folder of the student artifact. The teacher's embeddings are cached in ``<output>-views``.
        cache: Folder of the cached teacher embeddings instead, for students that share it. One of other settings is
            rejected, not replaced.
        assistant: Student artifact that replaces the teacher, as in teacher -> base -> small.
        start: Model that initialises the student: a ViT by name, such as ``timm/deit_small_patch16_224`` or
            ``open_clip/ViT-B-16``, or the artifact of a student or of a teacher with a ViT. A student of the same
            shape computes the same features. A smaller student takes a selection of the weights. A convolutional
            network, such as ``timm/tf_efficientnet_lite0``, becomes the stem.
        start_weights: Weights of a model that ``start`` names: a tag of its library, a ``.safetensors`` file, or a
            teacher artifact.
        unlabelled: Folders of additional images without labels, or their catalogues (reader ``images``). Images of
            scored products are left out.
        unlabelled_cosine: Cosine to a scored image, by the teacher, from which an unlabelled image counts as one of its
            product. 0 measures it on the validation images: at most 1 % of them reach it with another product's image.
        model: Shape of the student.
        views: Augmentation, the same for teacher and student.
        targets: Source of the teacher's embeddings.
        losses: Weights of the losses.
        dimension: Reduction from the teacher's embedding width to the student's.
        quantise: Quantisation-aware training.
        epochs: Number of passes over the images.
        steps: Optimiser steps in place of ``epochs``, as many on a small catalogue as on a large one; the training ends
            with the epoch that reaches them. 0 trains ``epochs``.
        lr: Peak learning rate.
        layer_decay: Factor of the learning rate from each layer to the one below it, from the head down to the stem.
            Pretrained starts keep more of what they know with less than 1.
        fit_head: What a new head after ``start`` begins with. ``features`` keeps the cosines of the features of
            ``start``, ``teacher`` predicts the teacher's embeddings best, by ridge regression, and ``none`` is random.
            A start that has a head keeps it.
        freeze_statistics: A convolutional network in ``start`` keeps its BatchNorm statistics, because those of few
            images, augmented, are not those of the images to search.
        warmup: Share of the training for the warm-up of the learning rate.
        weight_decay: Weight decay of matrices. Biases and norms have none.
        loader: Batches and workers.
        run: Precision, processes and logging of the training run.
        allow_leak: Train even if validation or test share products or images with training. The card records the leak.
        require_licence: Reject models without a known licence, of which the student would inherit that it is unknown.
        dry_run: Print the plan, train for one step on two images and stop.
        seed: Seed of weights, order and views.
    """

    teacher: tuple[str, ...]
    catalog: str
    output: str
    cache: str = ""
    assistant: str = ""
    start: str = ""
    start_weights: str = ""
    unlabelled: tuple[str, ...] = ()
    unlabelled_cosine: float = 0.0
    model: StudentConfig = StudentConfig(preset="auto", pool="auto")
    views: ViewConfig = ViewConfig()
    targets: TargetsConfig = TargetsConfig()
    losses: LossConfig = LossConfig()
    dimension: DimensionConfig = DimensionConfig()
    quantise: QuantiseConfig = QuantiseConfig()
    epochs: int = 30
    steps: int = 0
    lr: float = 1e-3
    layer_decay: float = 1.0
    fit_head: Literal["features", "teacher", "none"] = "features"
    freeze_statistics: bool = True
    warmup: float = 0.1
    weight_decay: float = 0.05
    loader: LoaderConfig = LoaderConfig()
    run: RunConfig = RunConfig(validate_every=2)
    allow_leak: bool = False
    require_licence: bool = False
    dry_run: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(
            self,
            unlabelled_cosine=(0, 1),
            epochs=(1, None),
            steps=(0, None),
            lr=(0, 10),
            layer_decay=(0, 1),
            weight_decay=(0, 100),
            warmup=(0, 1),
        )
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed: expected 0 to below 2^31, got {self.seed}.")
        if not self.teacher or "" in self.teacher:
            raise UserError("teacher: no teacher is given. Name one or more.")
        if len(self.teacher) > 1:
            self._check_several_teachers()
        if self.run.strategy == "fsdp":
            raise UserError("run.strategy: distillation does not support fsdp. Use ddp or auto.")
        if self.start_weights and (not self.start or self._start_is_artifact):
            raise UserError("start_weights: apply to a model by name. Set start to one, such as timm/NAME.")
        if not self.start:
            preset: Preset = "sample" if self.model.preset == "auto" else self.model.preset
            pool = "mean" if self.model.pool == "auto" else self.model.pool
            object.__setattr__(self, "model", replace(self.model, preset=preset, pool=pool))
        if self.quantise.ranges and (not self.start or self.names_start):
            raise UserError("quantise.ranges: QAT fine-tunes a trained student. Set start to it.")
        if self.cache and Path(self.cache).resolve() == Path(self.output).resolve():
            raise UserError(f"cache: {self.cache} is also the output. Choose another folder.")
        self._check_losses()

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("start_weights", "layer_decay", "unlabelled_cosine", "steps")

    def derived_values(self) -> dict[str, Any]:
        """Return what cards record of the unlabelled images: near-duplicates by their hash were left out before."""
        return {"unlabelled_by": "embedding"} if self.unlabelled else {}

    def _check_several_teachers(self) -> None:
        """Raise :class:`UserError` if the fusion of teachers would not be used as it is."""
        if self.assistant:
            raise UserError("teacher: the assistant replaces the teachers. Name one, such as the fused teacher.")
        if not self.losses.needs_teacher:
            raise UserError("teacher: the losses use labels only. Name one teacher.")
        if self.dimension.method not in ("none", "cosine"):
            problem = f"the fusion of several teachers preserves cosines, got {self.dimension.method}"
            raise UserError(f"dimension.method: {problem}. Set it to cosine, or fuse them with vpr teacher fuse first.")

    @property
    def view_seed(self) -> int:
        """Seed of the views that student and teacher see."""
        return self.targets.seed if self.losses.needs_teacher and self.targets.mode == "cached" else self.seed

    @property
    def fits_head(self) -> bool:
        """Whether a new head is fitted, which needs a teacher."""
        return self.fit_head != "none" and self.losses.needs_teacher and not self.losses.logits

    @property
    def names_start(self) -> bool:
        """Whether ``start`` is the name of a library's model, not an artifact."""
        is_name = bool(self.start_weights) or self.start.startswith(("timm/", "open_clip/"))
        return bool(self.start) and is_name and not self._start_is_artifact

    @property
    def _start_is_artifact(self) -> bool:
        return (Path(self.start) / CARD_NAME).is_file()

    def _check_losses(self) -> None:
        """Raise :class:`UserError` if a loss does not work with the other settings."""
        weights = self.losses.weights()
        for name in self.losses.tokens:
            if self.targets.mode != "online":
                raise UserError(f"losses.{name}: needs the teacher's tokens. Set targets.mode to online.")
            if len(self.teacher) > 1:
                raise UserError(f"losses.{name}: several teachers share no grid of tokens. Name one, or set it to 0.")
            if self.run.compile:
                raise UserError(f"losses.{name}: a compiled network gives no tokens. Leave out run.compile.")
        if self.targets.mixup and weights.keys() & set(LABEL_LOSSES):
            raise UserError("targets.mixup: mixed images have no label. Set losses.margin and losses.logits to 0.")
        if "logits" in weights:
            if self.targets.mode == "online":
                raise UserError("losses.logits: needs every product's mean embedding. Set targets.mode to cached.")
            if self.dimension.method != "none":
                raise UserError("losses.logits: needs the teacher's full embeddings. Set dimension.method to none.")
            if self.unlabelled:
                raise UserError("losses.logits: needs a label for every image. Remove unlabelled.")
        if self.losses.nested and self.losses.compares_embeddings and self.dimension.method == "projector":
            problem = "the projector reads all dimensions of the student"
            raise UserError(f"losses.nested: {problem}. Set dimension.method to pca or cosine.")
        relations = weights.keys() & set(RELATIONS)
        if relations and self.loader.batch_size < 2:
            raise UserError(f"loader.batch_size: losses.{min(relations)} needs at least 2 images in a batch, got 1.")
