"""Configuration of a teacher's image tower and of the conversion of its weights. Imports no heavy library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vpr.artifacts.paths import check_file
from vpr.common.errors import UserError, check_numbers

MAX_LICENCE = 100  # characters, equal to the limit of `Card`
MAX_IMAGE_SIZE = 2048  # side in pixels, equal to the limit of `Preprocess`


@dataclass(frozen=True)
class TowerConfig:
    """Image tower and its projection to the embedding.

    Attributes:
        name: ``timm/NAME``, ``open_clip/NAME``, an open_clip name alone such as ``ViT-H-14``, a JSON file in the form
            of open_clip, or ``sample`` or ``sample-vit``. ``timm/NAME.TAG`` takes the statistics of the tag.
        pretrained: Initial weights; empty draws random weights. Otherwise a tag of the library such as
            ``laion2b_s32b_b79k``, a local ``.safetensors`` file, or a teacher artifact of the same tower. A teacher
            also initialises projection and BatchNorm where their shapes match.
        image_size: Side of the input in pixels; 0 keeps the size of the tower.
        patch_stride: Stride of a ViT's patches in pixels, below their side for overlapping patches; 0 does not overlap.
        keep_projection: Keep CLIP's projection (ViT-H-14: 1280 to 1024).
        dropout: Share of the tower's output that is dropped in training.
        embedding_dim: Dimension of a new linear projection; 0 adds no projection.
        batch_norm: Apply BatchNorm to the embedding before it is L2-normalised.
        gradient_checkpointing: Recompute the activations of a block in the backward pass instead of keeping them.
        squash: Squash the image to a square instead of cropping its centre.
        mean: Mean of each channel, for values in 0…1; empty takes that of the weights.
        std: Standard deviation of each channel, for values in 0…1; empty takes that of the weights.
        interpolation: Filter of the resize; empty takes that of the weights.
        projection_bias: Add a bias to the new linear projection.
        licence: Licence of the initial weights for the card, such as ``apache-2.0``; empty takes that of the tag.
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
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: Literal["", "bicubic", "bilinear"] = ""
    licence: str = ""
    projection_bias: bool = False

    def later_keys(self) -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("projection_bias",)

    def __post_init__(self) -> None:
        sizes = (("image_size", 16, MAX_IMAGE_SIZE), ("patch_stride", 1, MAX_IMAGE_SIZE), ("embedding_dim", 1, 1 << 16))
        for name, smallest, largest in sizes:
            value = getattr(self, name)
            if value != 0 and not smallest <= value <= largest:
                raise UserError(f"tower.{name}: expected 0, or {smallest} to {largest}, got {value}.")
        for name, low in (("mean", -10.0), ("std", 1e-3)):  # the limits of `Preprocess`
            values = getattr(self, name)
            if values and (len(values) != 3 or not all(low <= value <= 10 for value in values)):
                expected = f"expected three numbers from {low:g} to 10, for red, green and blue"
                raise UserError(f"tower.{name}: {expected}, got {list(values)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"tower.dropout: expected 0 to below 1, got {self.dropout}.")
        if len(self.licence) > MAX_LICENCE or not self.licence.isprintable() or self.licence != self.licence.strip():
            expected = f"expected an SPDX identifier or one line of at most {MAX_LICENCE} characters"
            raise UserError(f"tower.licence: {expected} without spaces at its ends, got {self.licence!r}.")
        if self.licence.lower() in ("unknown", "none"):
            raise UserError(f"tower.licence: '{self.licence}' is no licence. Leave it empty if it is not known.")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA) that are trained in place of the tower's weights, and merged into them at the end.

    Attributes:
        rank: Rank of the adapters; 0 trains the weights. Adapters are trained at ``lr_tower``, which should then be
            about 1e-4.
        alpha: Scale of the adapters: their product is multiplied by alpha / rank.
        dropout: Share of the adapters' inputs that is dropped in training.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, "lora.", rank=(0, 1 << 16))
        if not 0 < self.alpha <= 10_000:
            raise UserError(f"lora.alpha: expected above 0, at most 10000, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: expected 0 to below 1, got {self.dropout}.")


@dataclass(frozen=True)
class ConvertConfig:
    """Conversion of a PyTorch checkpoint to safetensors.

    Attributes:
        checkpoint: Checkpoint to read, ``.pt``, ``.pth`` or ``.bin``; loaded with ``weights_only``.
        output: Safetensors file to write.
        key: Entry of the checkpoint with the weights, such as ``teacher``; empty takes the first usual name.
        keep_head: Keep the classifier.
    """

    checkpoint: str
    output: str
    key: str = ""
    keep_head: bool = False

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".safetensors":
            raise UserError(f"output: expected a name that ends in .safetensors, got {self.output}.")
        check_file("output", self.output)
        if Path(self.output).resolve() == Path(self.checkpoint).resolve():
            raise UserError(f"output: {self.output} is the checkpoint and would be replaced. Choose another name.")
