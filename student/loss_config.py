"""Configuration of the losses of a distillation. Imports no heavy library."""

from dataclasses import dataclass, fields

from teacher.loss_config import HeadConfig, check_nested
from vpr.common.errors import UserError

TEACHER_LOSSES = ("cosine", "mse", "similarity_kl", "affinity", "rkd_distance", "rkd_angle", "contrastive", "logits")
# Losses of the tokens of each image, of which the embedding is pooled.
TOKEN_LOSSES = ("token_similarity", "token_feature")
LABEL_LOSSES = ("margin", "logits")
# Losses of the relations between images: they compare similarities or distances, not embeddings.
RELATIONS = ("affinity", "rkd_distance", "rkd_angle")


@dataclass(frozen=True)
class LossConfig:
    """Weight of each loss. A weight of 0 turns its loss off.

    Losses that relate images see the batch of one process.

    Attributes:
        cosine: Weight of 1 - cosine of student and teacher.
        mse: Weight of the squared distance of the unit vectors.
        similarity_kl: Weight of the KL divergence of the similarities to a bank of teacher embeddings.
        affinity: Weight of the KL divergence of the similarities within the batch.
        rkd_distance: Weight of the relative distances within the batch.
        rkd_angle: Weight of the angles of image triples, from the first 128 images of the batch.
        contrastive: Weight of the contrastive loss between each image and the teacher's embeddings of the batch.
        margin: Weight of a margin softmax over the products, from labels without the teacher.
        token_similarity: Weight of the KL divergence of the similarities among the tokens of an image. It needs
            ``targets.mode: online``, as all losses of tokens.
        token_feature: Weight of the difference between projected tokens and the teacher's standardised ones.
        logits: Weight of vit-pytorch's ``DistillWrapper``, a baseline that excludes other losses. Logits of the teacher
            are its similarities to the products' mean embeddings.
        temperature: Temperature of the softened similarities.
        contrastive_temperature: Temperature of the contrastive loss.
        token_temperature: Temperature of the similarities among tokens.
        logits_alpha: Share of the teacher in ``logits``. The remainder is cross-entropy with the labels.
        logits_temperature: Temperature of ``logits``.
        head: Head of ``margin``. Its scale also scales the teacher's logits.
        nested: Ascending numbers of dimensions, such as 32 64 128, below the embedding's. All losses but those of
            tokens also apply to the first 32, 64 and 128 dimensions, renormalised, so that these are embeddings
            themselves (Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022). The targets are rotated to
            their principal directions, so that a prefix of a target is the best target of its width.
        nested_weights: Weight of the losses of each of these prefixes; empty weights each by 1.
    """

    cosine: float = 1.0
    mse: float = 0.0
    similarity_kl: float = 1.0
    affinity: float = 0.0
    rkd_distance: float = 0.0
    rkd_angle: float = 0.0
    contrastive: float = 1.0
    token_similarity: float = 0.0
    token_feature: float = 0.0
    margin: float = 0.0
    logits: float = 0.0
    temperature: float = 0.05
    contrastive_temperature: float = 0.07
    token_temperature: float = 0.07
    logits_alpha: float = 0.5
    logits_temperature: float = 1.0
    head: HeadConfig = HeadConfig(scale=16.0, margin=0.0, margin_end=0.2)
    nested: tuple[int, ...] = ()
    nested_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("temperature") and not 1e-3 <= value <= 100:
                raise UserError(f"losses.{field.name}: expected 0.001 to 100, got {value}.")
            if isinstance(value, float) and not 0 <= value <= 1e6:
                raise UserError(f"losses.{field.name}: expected 0 or more, got {value}.")
        if not 0 <= self.logits_alpha <= 1:
            raise UserError(f"losses.logits_alpha: expected 0 to 1, got {self.logits_alpha}.")
        if not self.weights():
            raise UserError("losses: all weights are 0. Set at least one, for example losses.cosine to 1.")
        if self.logits and len(self.weights()) > 1:
            others = ", ".join(name for name in self.weights() if name != "logits")
            raise UserError(f"losses.logits: this baseline excludes other losses. Set these to 0: {others}.")
        self._check_nested()
        if self.tokens and not self.weights().keys() - set(TOKEN_LOSSES):
            problem = "it trains the tokens, and nothing trains the embedding"
            raise UserError(f"losses.{self.tokens[0]}: {problem}. Set another weight too, such as losses.cosine to 1.")

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("nested", "nested_weights", *TOKEN_LOSSES, "token_temperature")

    def _check_nested(self) -> None:
        """Raise :class:`UserError` for prefixes that are not ascending, or weights that do not belong to them."""
        check_nested("losses.nested", self.nested)
        if self.head.nested:
            raise UserError("losses.head.nested: the margin of a student follows losses.nested. Set that instead.")
        if self.nested_weights and len(self.nested_weights) != len(self.nested):
            problem = f"expected one weight for each of the {len(self.nested)} prefixes, got {len(self.nested_weights)}"
            raise UserError(f"losses.nested_weights: {problem}.")
        if not all(0 <= weight <= 1e6 for weight in self.nested_weights):
            weights = " ".join(f"{weight:g}" for weight in self.nested_weights)
            raise UserError(f"losses.nested_weights: expected 0 or more each, got {weights}.")
        if self.nested and self.logits:
            raise UserError("losses.nested: the baseline logits does not support it. Set losses.logits to 0.")

    @property
    def prefixes(self) -> dict[int, float]:
        """Weight above 0 by the number of dimensions of each nested prefix, ascending."""
        weights = self.nested_weights or (1.0,) * len(self.nested)
        return {dim: weight for dim, weight in zip(self.nested, weights, strict=True) if weight > 0}

    def weights(self) -> dict[str, float]:
        """Return the weights above 0 by the name of the loss."""
        names = (*TEACHER_LOSSES, *TOKEN_LOSSES, "margin")
        return {name: getattr(self, name) for name in names if getattr(self, name) > 0}

    @property
    def tokens(self) -> tuple[str, ...]:
        """Names of the losses of tokens that have a weight."""
        return tuple(name for name in TOKEN_LOSSES if getattr(self, name) > 0)

    @property
    def compares_embeddings(self) -> bool:
        """Whether any loss compares the student's embeddings with the teacher's, which takes one width for both."""
        return any(name in TEACHER_LOSSES and name not in RELATIONS for name in self.weights())

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss compares the student with the teacher."""
        return any(name in (*TEACHER_LOSSES, *TOKEN_LOSSES) for name in self.weights())
