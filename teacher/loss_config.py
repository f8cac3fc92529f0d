"""Configuration of the teacher's losses. Imports no heavy library, so help and errors are instant."""

import math
from dataclasses import dataclass
from typing import Literal

from vpr.common.errors import UserError, check_numbers

_MAX_NESTED, _MAX_PREFIXES = 8192, 16


def check_nested(key: str, dimensions: tuple[int, ...]) -> None:
    """Raise :class:`UserError` with ``key`` if nested dimensions are not a few ascending numbers."""
    is_ascending = list(dimensions) == sorted(set(dimensions))
    if not is_ascending or not all(1 <= dim <= _MAX_NESTED for dim in dimensions):
        expected = f"expected different numbers from 1 to {_MAX_NESTED} in ascending order"
        raise UserError(f"{key}: {expected}, got {' '.join(map(str, dimensions))}.")
    if len(dimensions) > _MAX_PREFIXES:
        raise UserError(f"{key}: expected at most {_MAX_PREFIXES} numbers, got {len(dimensions)}.")


@dataclass(frozen=True)
class HeadConfig:
    """Margin softmax of the training head.

    Attributes:
        loss: Kind of margin; ``arcface`` widens the angle (margins in radians), ``cosface`` lowers the cosine.
        scale: Inverse temperature s of the logits.
        margin: Margin at the start of the training.
        margin_end: Margin at the end of the training.
        margin_step: Growth of the margin per epoch, up to ``margin_end``; 0 grows it evenly over the training.
        min_margin_ratio: Share of the margin for the largest class; smaller ones have more, by the fourth root of size.
        sub_centres: Directions per class.
        label_smoothing: Share of the target that is spread over all classes.
        class_weight_power: Power p of the weight n^-p of an image whose class has n images; 0 weights all alike.
        nested: Ascending numbers of dimensions, such as 64 128, below the embedding's. The loss also applies to the
            first 64 and 128 dimensions, renormalised, with the first dimensions of the same class directions (Kusupati
            et al., "Matryoshka Representation Learning", NeurIPS 2022, MRL-E).
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
    nested: tuple[int, ...] = ()

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("nested",)

    def __post_init__(self) -> None:
        largest = math.pi / 2 if self.loss == "arcface" else 2.0
        if not 0 <= self.margin <= self.margin_end <= largest:
            margins = f"margin {self.margin} and margin_end {self.margin_end}"
            raise UserError(f"head.margin: expected 0 <= margin <= margin_end <= {largest:.3g}, got {margins}.")
        check_numbers(self, "head.", sub_centres=(1, 100))
        if not 0 < self.scale <= 1000:
            raise UserError(f"head.scale: expected above 0, at most 1000, got {self.scale}.")
        check_numbers(self, "head.", min_margin_ratio=(0, 1), label_smoothing=(0, 1), class_weight_power=(0, 1))
        if not 0 <= self.margin_step < math.inf:
            raise UserError(f"head.margin_step: expected a finite number of 0 or more, got {self.margin_step}.")
        check_nested("head.nested", self.nested)


@dataclass(frozen=True)
class ProxyConfig:
    """Loss of embeddings against learned proxies of the classes.

    Attributes:
        loss: ``soft-triple`` (Qian et al., ICCV 2019) or ``proxy-anchor`` (Kim et al., CVPR 2020); ``none`` adds none.
        weight: Weight in the sum of the losses.
        centres: Proxies per class of ``soft-triple``.
        scale: Factor on the similarities, lambda of ``soft-triple`` and alpha of ``proxy-anchor``.
        gamma: Temperature of the choice between the centres of a class in ``soft-triple``.
        margin: Margin between classes, a cosine.
        lr: Peak learning rate of the proxies.
        weight_decay: Weight decay of the proxies.
    """

    loss: Literal["none", "soft-triple", "proxy-anchor"] = "none"
    weight: float = 1.0
    centres: int = 10
    scale: float = 32.0
    gamma: float = 0.1
    margin: float = 0.1
    lr: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, "proxy.", weight=(0, 1000), centres=(1, 100), scale=(1e-3, 1000), gamma=(1e-3, 100))
        check_numbers(self, "proxy.", margin=(0, 2), lr=(0, 100), weight_decay=(0, 100))


@dataclass(frozen=True)
class PairConfig:
    """Loss of the similarities between images, in a batch or between a batch and a memory of earlier batches.

    Attributes:
        loss: ``contrastive``, or ``multi-similarity`` (Wang et al., CVPR 2019); ``none`` adds none.
        weight: Weight in the sum of the losses.
        miner: Select pairs: BatchEasyHard for ``contrastive``, Multi-Similarity's miner for ``multi-similarity``.
        positives: Positive of an image that BatchEasyHard selects: its most similar (``easy``), the least similar of
            those more similar than the negative (``semihard``), its least similar (``hard``), or all.
        negatives: Negative of an image that BatchEasyHard selects: its most similar (``hard``), the most similar of
            those less similar than the positive (``semihard``), its least similar (``easy``), or all.
        positive_margin: Cosine above which ``contrastive`` ignores a positive pair.
        negative_margin: Cosine below which ``contrastive`` ignores a negative pair.
        alpha: Exponent of the positive pairs of ``multi-similarity``.
        beta: Exponent of the negative pairs of ``multi-similarity``.
        base: Cosine around which ``multi-similarity`` weights the pairs.
        epsilon: Slack in cosine of Multi-Similarity's miner.
        memory: Embeddings of earlier images of all processes that a batch is compared with (cross-batch memory, Wang et
            al., CVPR 2020); 0 compares within the batch. Each stage starts with an empty memory.
    """

    loss: Literal["none", "contrastive", "multi-similarity"] = "none"
    weight: float = 1.0
    miner: bool = True
    positives: Literal["easy", "semihard", "hard", "all"] = "easy"
    negatives: Literal["semihard", "hard", "easy", "all"] = "semihard"
    positive_margin: float = 0.9
    negative_margin: float = 0.5
    alpha: float = 2.0
    beta: float = 50.0
    base: float = 0.5
    epsilon: float = 0.1
    memory: int = 0

    def __post_init__(self) -> None:
        cosine = (-1, 1)
        check_numbers(self, "pair.", weight=(0, 1000), positive_margin=cosine, negative_margin=cosine, base=cosine)
        check_numbers(self, "pair.", alpha=(1e-3, 1000), beta=(1e-3, 1000), epsilon=(0, 2), memory=(0, 1 << 24))
        mines = self.loss == "contrastive" and self.miner
        if mines and self.negatives == "semihard" and self.positives in ("all", "semihard"):
            raise UserError("pair.negatives: semihard needs one positive. Set pair.positives to easy or hard.")
        if mines and (self.positives, self.negatives) == ("semihard", "all"):
            raise UserError("pair.positives: semihard needs one negative. Set pair.negatives to hard or easy.")
        if mines and self.memory and self.positives in ("easy", "semihard"):
            problem = "the most similar image in a memory is the image itself"
            raise UserError(f"pair.positives: {problem}. Set it to hard, or use --no-pair.miner.")


@dataclass(frozen=True)
class MiningConfig:
    """Hard negatives: batches of products that the current embeddings confuse.

    Attributes:
        every: Epochs of a stage between two searches, each over the embeddings of the last epoch; 0 mines none.
        products: Most similar products that a product shares a batch with.
    """

    every: int = 0
    products: int = 3

    def __post_init__(self) -> None:
        check_numbers(self, "mining.", every=(0, 10_000), products=(1, 1000))


@dataclass(frozen=True)
class StageLosses:
    """Losses of a stage; ``margin_weight`` is the weight of the margin softmax ``head``."""

    head: HeadConfig = HeadConfig()
    margin_weight: float = 1.0
    proxy: ProxyConfig = ProxyConfig()
    pair: PairConfig = PairConfig()

    def __post_init__(self) -> None:
        check_numbers(self, "", margin_weight=(0, 1000))
        if not self.weights():
            raise UserError("margin_weight: no loss has a weight above 0. Raise it, or choose proxy.loss or pair.loss.")
        if self.head.nested and not self.margin_weight:
            raise UserError("head.nested: only the margin softmax supports it. Raise margin_weight.")

    def weights(self) -> dict[str, float]:
        """Return the weights of the losses above 0, by the name that they are logged under."""
        weights = {"margin": self.margin_weight}
        for section in (self.proxy, self.pair):
            weights[section.loss.replace("-", "_")] = 0.0 if section.loss == "none" else section.weight
        return {name: weight for name, weight in weights.items() if weight}

    def check_products(self, counts: list[int], repeated: int) -> None:
        """Check that the training split has products, and images of a product, that the losses compare.

        Without them, a loss is 0 and nothing is learned.

        Args:
            counts: Number of training images of each product.
            repeated: Images of a product that the batches of an epoch have at least, by repetition.

        Raises:
            UserError: There is one product, or a memory that never holds two images of a product.
        """
        if len(counts) < 2:
            problem = "the training split has one product, and every loss compares products"
            raise UserError(f"catalog: {problem}. Add products, or move some from validation or test.")
        has_memory = self.pair.loss != "none" and self.pair.weight and self.pair.memory
        if has_memory and max(*counts, repeated) < 2:
            problem = "no product of the training split has two images, so the memory has no pair of one product"
            raise UserError(f"pair.memory: {problem}. Set loader.images_per_product to 2, or pair.loss to none.")

    def check_batch(self, images: int, images_per_product: int, per_epoch: int) -> None:
        """Check that a batch of ``images`` over all processes has the pairs that the pair loss compares.

        Args:
            images: Images of a batch.
            images_per_product: Images of a product in a batch; 0 for independent images.
            per_epoch: Images of all batches of an epoch.

        Raises:
            UserError: A batch has no positive or no negative pair, or the memory is smaller than a batch or larger than
                an epoch.
        """
        if self.pair.loss == "none" or not self.pair.weight:
            return
        if self.pair.memory:
            if self.pair.memory < images:
                expected = f"expected at least {images}, the images of a batch"
                raise UserError(f"pair.memory: {expected}, got {self.pair.memory}. Raise it or lower the batch size.")
            if self.pair.memory > per_epoch:
                # It would hold an image several times: as its own positive, with embeddings of several epochs.
                expected = f"expected at most {per_epoch}, the images of an epoch"
                raise UserError(f"pair.memory: {expected}, got {self.pair.memory}. Lower it.")
            return
        if images_per_product < 2:
            problem = f"{self.pair.loss} compares images of one product, and a batch has no such pair"
            raise UserError(f"loader.images_per_product: {problem}. Set it to 2 or more, or set pair.memory.")
        if images < 2 * images_per_product:
            problem = f"a batch of {images} images has one product, and {self.pair.loss} compares products"
            raise UserError(f"loader.batch_size: {problem}. Set it to {2 * images_per_product} or more.")
