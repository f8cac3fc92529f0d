"""Configuration of the teacher commands. Imports no heavy library, so help and errors are instant."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from teacher.loss_config import HeadConfig, MiningConfig, PairConfig, ProxyConfig, StageLosses
from teacher.tower_config import MAX_IMAGE_SIZE, LoraConfig, TowerConfig
from vpr.artifacts.paths import check_file
from vpr.common.errors import UserError, check_numbers
from vpr.data.config import LoaderConfig, ReadOptions, check_shares
from vpr.imaging.config import ViewConfig
from vpr.training.config import RunConfig


@dataclass(frozen=True)
class StageConfig:
    """Training stage: a number of epochs with its own trainable parts, rates, image size and optimiser.

    Attributes:
        train: Parts to train. ``head`` is the class directions and what is added to the tower (projection,
            BatchNorm); ``classes`` and ``projection`` are one of these two; ``tower`` is the tower; ``last`` is the
            last blocks of the tower and the head; ``all`` is both.
        epochs: Number of epochs.
        lr_head: Peak learning rate of the head.
        lr_tower: Peak learning rate of the tower's last layer.
        layer_decay: Factor on the learning rate from each layer of the tower to the layer before it.
        last_blocks: Number of blocks that ``train: last`` trains.
        optimizer: Optimiser; ``adamw``, or ``sgd`` with Nesterov ``momentum``.
        weight_decay: Weight decay of matrices; biases, norms and other vectors have none without ``decay_vectors``.
        warmup: Share of the stage with a rising learning rate.
        image_size: Side of the input in pixels; 0 keeps ``tower.image_size``. Position embeddings are resized.
        patch_stride: Stride of overlapping patches in pixels; 0 keeps ``tower.patch_stride``.
        batch_size: Images per step and process; 0 keeps ``loader.batch_size``.
        images_per_product: Images of a product in a batch; 0 keeps ``loader.images_per_product``.
        views: Augmentation of the stage; empty keeps the augmentation of the training.
        margin_weight: Weight of the margin softmax; empty keeps the weight of the training.
        head: Margin softmax of the stage; empty keeps that of the training.
        proxy: Proxy loss of the stage; empty keeps that of the training.
        pair: Pair loss of the stage; empty keeps that of the training.
        momentum: Nesterov momentum of ``sgd``; 0 is plain gradient descent.
        decay_vectors: Apply the weight decay to biases, norms and other vectors too.
        schedule: Learning rate after the warm-up: ``cosine`` falls with each step, ``epoch-cosine`` with each epoch,
            and ``steps`` by the factor ``gamma`` after each epoch of ``milestones``.
        milestones: Numbers of epochs after which ``steps`` lowers the rate; none keeps it constant.
        gamma: Factor of ``steps``.
        warmup_steps: Optimiser steps of the warm-up instead of the share; 0 takes the share.
        accumulate: Batches of an optimiser step; 0 keeps ``run.accumulate``.
        dropout: Share of the tower's output that is dropped; empty keeps ``tower.dropout``.
    """

    train: Literal["head", "classes", "projection", "tower", "last", "all"]
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
    images_per_product: int = 0
    views: ViewConfig | None = None
    margin_weight: float | None = None
    head: HeadConfig | None = None
    proxy: ProxyConfig | None = None
    pair: PairConfig | None = None
    momentum: float = 0.9
    decay_vectors: bool = False
    schedule: Literal["cosine", "epoch-cosine", "steps"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_steps: int = 0
    accumulate: int = 0
    dropout: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "stages.", epochs=(1, None))
        check_numbers(
            self, "stages.", gamma=(0, 1), warmup_steps=(0, None), accumulate=(0, None), last_blocks=(0, None)
        )
        if not 0 <= self.momentum < 1:
            raise UserError(f"stages.momentum: expected 0 to below 1, got {self.momentum}.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f"stages.dropout: expected 0 to below 1, got {self.dropout}.")
        if self.milestones and self.schedule != "steps":
            raise UserError(f"stages.milestones: {self.schedule} has none. Set stages.schedule to steps.")
        if not all(0 < epoch < self.epochs for epoch in self.milestones):
            expected = f"expected epochs from 1 to {self.epochs - 1}"
            raise UserError(f"stages.milestones: {expected}, got {list(self.milestones)}.")
        if (self.train == "last") != (self.last_blocks > 0):
            expected = "expected 1 or more with train: last and 0 otherwise"
            raise UserError(f"stages.last_blocks: {expected}, got {self.last_blocks} with train: {self.train}.")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"stages.layer_decay: expected above 0, at most 1, got {self.layer_decay}.")
        check_numbers(self, "stages.", warmup=(0, 1), lr_head=(0, 100), lr_tower=(0, 100), weight_decay=(0, 100))
        sizes = (0, MAX_IMAGE_SIZE)
        check_numbers(self, "stages.", image_size=sizes, patch_stride=sizes, batch_size=(0, (1 << 20) - 1))
        check_numbers(self, "stages.", images_per_product=(0, 10_000))

    def tower(self, tower: TowerConfig) -> TowerConfig:
        """Return the tower of the training with this stage's image size, patch stride and dropout."""
        size, stride = self.image_size or tower.image_size, self.patch_stride or tower.patch_stride
        dropout = tower.dropout if self.dropout is None else self.dropout
        return replace(tower, image_size=size, patch_stride=stride, dropout=dropout)

    def run(self, run: RunConfig) -> RunConfig:
        """Return the training loop of the training with this stage's accumulated batches."""
        return replace(run, accumulate=self.accumulate or run.accumulate)

    def later_keys(self) -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        keys = ("momentum", "decay_vectors", "schedule", "milestones", "gamma", "warmup_steps", "accumulate")
        return (*keys, "dropout")

    @property
    def trains_tower(self) -> bool:
        """Whether the stage trains a part of the tower."""
        return self.train in ("tower", "last", "all")

    @property
    def trains_classes(self) -> bool:
        """Whether the stage trains class directions and proxies."""
        return self.train not in ("tower", "projection")

    def loader(self, loader: LoaderConfig) -> LoaderConfig:
        """Return the batches of the training with this stage's batch size and images per product."""
        images = self.images_per_product or loader.images_per_product
        return replace(loader, batch_size=self.batch_size or loader.batch_size, images_per_product=images)


@dataclass(frozen=True)
class ScheduledStage:
    """Stage with the epochs ``before`` it and in ``total``, its augmentation, seed of views and dropout, and losses."""

    stage: StageConfig
    before: int
    total: int
    views: ViewConfig
    seed: int
    losses: StageLosses = StageLosses()


@dataclass(frozen=True)
class TrainConfig:
    """Training of a teacher.

    Attributes:
        catalog: Catalogue artifact; ``train`` is trained on, ``validation`` selects the best epoch.
        output: Path of the teacher artifact to write.
        recipe: Name of the recipe, shown by ``vpr teacher runs``.
        tower: Image tower.
        lora: Low-rank adapters on the linear layers of the tower.
        head: Margin softmax.
        margin_weight: Weight of the margin softmax; 0 trains without it.
        proxy: Loss against class proxies, added to the margin softmax.
        pair: Loss between the images of a batch or of a memory, added to the margin softmax.
        stages: Stages, each from the last weights of the previous one. The best epoch of the last is the teacher.
        views: Augmentation.
        loader: Batches.
        mining: Hard negatives in the batches.
        run: Settings of the training loop.
        allow_leak: Train although a product or image is both trained on and scored; the card records the leak.
        require_licence: Reject initial weights without a known licence.
        dry_run: Print the plan and the memory it needs, and stop.
        seed: Seed of weights, order, views and dropout.
    """

    catalog: str
    output: str
    recipe: str = ""
    tower: TowerConfig = TowerConfig()
    lora: LoraConfig = LoraConfig()
    head: HeadConfig = HeadConfig()
    margin_weight: float = 1.0
    proxy: ProxyConfig = ProxyConfig()
    pair: PairConfig = PairConfig()
    stages: tuple[StageConfig, ...] = (StageConfig("head", 1), StageConfig("all", 9))
    views: ViewConfig = ViewConfig()
    loader: LoaderConfig = LoaderConfig()
    mining: MiningConfig = MiningConfig()
    run: RunConfig = RunConfig()
    allow_leak: bool = False
    require_licence: bool = False
    dry_run: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("stages: expected one or more. Add a stage such as {train: all, epochs: 10}.")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed: expected 0 or more, below 2^31, got {self.seed}.")
        if self.lora.rank and not any(stage.trains_tower for stage in self.stages):
            raise UserError(
                "lora.rank: no stage trains the tower. Set it to 0, or add a stage with train: all or last."
            )
        for scheduled in self.schedule():  # checks the losses of each stage
            self._check_trained_parts(scheduled.stage, scheduled.losses)

    def derived_values(self) -> dict[str, str]:
        """Return what cards record of the dropout: stages that train the tower alone had none after it before."""
        has_dropout = any(stage.train == "tower" and stage.tower(self.tower).dropout for stage in self.stages)
        return {"dropout": "every stage"} if has_dropout else {}

    def _check_trained_parts(self, stage: StageConfig, losses: StageLosses) -> None:
        """Raise :class:`UserError` if a stage has nothing to train, or BatchNorm sees a single image."""
        has_projection = bool(self.tower.embedding_dim or self.tower.batch_norm)
        has_classes = losses.margin_weight > 0 or (losses.proxy.loss != "none" and losses.proxy.weight > 0)
        trained = stage.trains_tower or (stage.trains_classes and has_classes)
        if not trained and not (stage.train in ("head", "projection") and has_projection):
            problem = f"{stage.train} has no parameters, without tower.embedding_dim or a loss with classes"
            raise UserError(f"stages.train: {problem}. Set it to all or tower.")
        is_single = stage.loader(self.loader).batch_size == 1
        if self.tower.batch_norm and is_single and stage.train not in ("classes", "tower"):
            problem = "tower.batch_norm has no statistics of a single image"
            raise UserError(f"loader.batch_size: {problem}. Set it to 2 or more, or use --no-tower.batch-norm.")

    def schedule(self) -> list[ScheduledStage]:
        """Return the stages with their position in the training and their losses."""
        schedule, before, total = [], 0, sum(stage.epochs for stage in self.stages)
        for stage in self.stages:
            weight = self.margin_weight if stage.margin_weight is None else stage.margin_weight
            losses = StageLosses(stage.head or self.head, weight, stage.proxy or self.proxy, stage.pair or self.pair)
            schedule.append(ScheduledStage(stage, before, total, stage.views or self.views, self.seed, losses))
            before += stage.epochs
        return schedule


@dataclass(frozen=True)
class DataConfig:
    """Training catalogue of a teacher, joined from data sets.

    Attributes:
        output: Path of the catalogue artifact to write.
        products10k: Folder of Products-10K, whose train and test tables are both read; empty omits it.
        aicrowd: Folder of the AIcrowd Visual Product Recognition development set; empty omits it.
        csv: Further CSV tables with columns ``image`` and ``product``. Rows that ``split`` puts into validation or test
            stay there. Rows with a role of query or gallery and without a split are test rows.
        validation: Share of each source's products held out to select checkpoints. It divides no source that has
            validation rows.
        test: Share of each source's products held out for evaluation, likewise.
        seed: Seed of the hash of product ids that divides them.
        resplit: Divide all products by the shares, also those that have a split or a role in a CSV table.
        skip_unreadable: List unreadable images in ``set_aside.csv`` instead of stopping at the first.
        skip_invalid_rows: List rows without a product id, or with a broken box, in ``set_aside.csv`` too.
        columns: Names of the columns of ``csv``, as NAME=COLUMN, such as ``image=image_path product=product_id``.
        image_root: Folder that the image paths of ``csv`` are relative to; empty is the folder of each table.
        box_form: Meaning of a box's numbers in ``csv``: left, top, width, height (``xywh``), left, top, right, bottom
            (``xyxy``), or centre, width, height (``cxcywh``). ``auto`` follows the names of the columns.
        box_unit: Unit of a box's numbers in ``csv``: ``pixels``, or ``shares`` of the image's width and height.
        box_frame: Image that boxes of ``csv`` are about: ``upright`` by its EXIF orientation, or as ``stored``.
    """

    output: str
    products10k: str = ""
    aicrowd: str = ""
    csv: tuple[str, ...] = ()
    validation: float = 0.05
    test: float = 0.0
    seed: int = 0
    resplit: bool = False
    skip_unreadable: bool = False
    skip_invalid_rows: bool = False
    columns: tuple[str, ...] = ()
    image_root: str = ""
    box_form: Literal["auto", "xywh", "xyxy", "cxcywh"] = "auto"
    box_unit: Literal["pixels", "shares"] = "pixels"
    box_frame: Literal["auto", "upright", "stored"] = "auto"

    def __post_init__(self) -> None:
        check_shares(self.validation, self.test, self.seed, self.resplit)
        paths = [path.resolve() for _, path in self.sources()]
        if not paths:
            raise UserError("vpr teacher data: no source is given. Use --products10k, --aicrowd or --csv.")
        if len(set(paths)) < len(paths):
            raise UserError("vpr teacher data: a source is given twice. Name each source once.")

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have; at their default they are left out of new cards too."""
        return ("resplit", "skip_invalid_rows", "columns", "image_root", "box_form", "box_unit", "box_frame")

    def read_options(self) -> ReadOptions:
        """Return the options of the CSV reader."""
        return ReadOptions(self.columns, self.image_root, self.box_form, self.box_unit, self.box_frame)

    def sources(self) -> list[tuple[str, Path]]:
        """Return reader and path of each source, in the order in which they are joined."""
        folders = [(reader, getattr(self, reader)) for reader in ("products10k", "aicrowd")]
        tables = [("csv", table) for table in self.csv]
        return [(reader, Path(path)) for reader, path in [*folders, *tables] if path]


@dataclass(frozen=True)
class SoupConfig:
    """Weight average of teachers, or of one teacher with its zero-shot weights.

    Attributes:
        models: Teacher artifacts of one network, trained on one catalogue; ``wise-ft`` takes a single teacher.
        catalog: Catalogue artifact that they were trained on; its ``validation`` split selects the weights.
        output: Path of the soup to write, a teacher artifact.
        method: Method of averaging. ``uniform`` averages all; ``greedy`` adds teachers, best first, and keeps each that
            does not lower validation recall@1; ``wise-ft`` interpolates with the zero-shot weights.
        alphas: Weights of the fine-tuned teacher that ``wise-ft`` evaluates.
        batch_size: Images per batch.
        workers: Decoding processes, used if the images do not fit in memory.
        seed: Seed of the images that BatchNorm statistics are estimated on.
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
        expected = "one" if self.method == "wise-ft" else "two or more"
        if (len(self.models) == 1) != (self.method == "wise-ft") or not self.models:
            raise UserError(f"models: {self.method} expects {expected}, got {len(self.models)}.")
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise UserError(f"alphas: expected one or more numbers from 0 to 1, got {list(self.alphas)}.")
        check_numbers(self, batch_size=(2, 1 << 20), workers=(0, 512), seed=(0, (1 << 31) - 1))
        if Path(self.output).resolve() in [Path(model).resolve() for model in self.models]:
            raise UserError(f"output: {self.output} is one of the models and would be replaced. Choose another path.")


@dataclass(frozen=True)
class FuseConfig:
    """Fusion of several teachers into one.

    Attributes:
        models: Teacher artifacts, trained on one catalogue.
        catalog: Catalogue artifact that they were trained on. Its ``train`` split fits whitening and reduction; its
            ``validation`` split scores the teachers and their fusion.
        output: Path of the fused teacher to write, a teacher artifact.
        embedding_dim: Width of the embedding. 0 keeps the concatenation of the teachers' embeddings.
        shrinkage: Share of equal variance in every direction that is added to the covariance before whitening. More of
            it amplifies the directions of least variance less.
        images: Number of training images to fit on, drawn at random.
        steps: Number of optimiser steps of the reduction that preserves cosines.
        batch_size: Images per batch.
        threads: Number of background decoding threads.
        seed: Seed of the images and of the reduction.
    """

    models: tuple[str, ...]
    catalog: str
    output: str
    embedding_dim: int = 256
    shrinkage: float = 0.1
    images: int = 16384
    steps: int = 1000
    batch_size: int = 64
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= len(self.models) <= 8:
            raise UserError(f"models: expected two to eight teachers, got {len(self.models)}.")
        check_numbers(self, embedding_dim=(0, 8192), shrinkage=(1e-6, 1), images=(2, 1 << 20), steps=(1, 1 << 20))
        check_numbers(self, batch_size=(1, 1 << 20), threads=(0, 64), seed=(0, (1 << 31) - 1))
        if Path(self.output).resolve() in [Path(model).resolve() for model in self.models]:
            raise UserError(f"output: {self.output} is one of the models and would be replaced. Choose another path.")


@dataclass(frozen=True)
class RunsConfig:
    """List of training runs.

    Attributes:
        folder: Folder to search, with its subfolders except hidden ones and links.
        output: CSV file for the table; empty only prints the table.
    """

    folder: str = "runs"
    output: str = ""

    def __post_init__(self) -> None:
        check_file("output", self.output)
