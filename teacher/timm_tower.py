"""Image towers of timm, without their classifier."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from vpr.common.errors import UserError

# What models raise for settings or images that they do not support.
_INVALID = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class TimmTower(nn.Module):
    """Model of timm from (batch, 3, size, size) to (batch, width).

    It has the attributes of open_clip's adapter of timm models: ``trunk``, ``image_size`` and an empty ``head``.
    """

    def __init__(self, trunk: Any, image_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential()
        self.image_size = image_size

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features before the classifier."""
        return self.trunk(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass; raise an error of the model if it does not support that."""
        self.trunk.set_grad_checkpointing(enable)


def describe(name: str, model: str, tag: str) -> dict[str, Any]:
    """Return the configuration of a model as in :func:`teacher.registry.read_tower`; its weights are not allocated.

    Raises:
        UserError: The model is no image tower of square inputs.
    """
    size = _input_size(name, model, tag)
    try:
        width = _output_width(create_trunk(model, size, size, "meta"), size)
    except _INVALID as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"tower.name: {name} cannot be built ({reason}). Choose another model.") from None
    if not width:
        raise UserError(f"tower.name: {name} returns no vector of an image. Choose another model.")
    vision = {"timm_model_name": model, "image_size": size}
    return {"library": "timm", "embed_dim": width, "vision_cfg": vision, **({"tag": tag} if tag else {})}


def create_tower(tower: dict[str, Any], image_size: int, device: str) -> TimmTower:
    """Create the tower of a configuration with random weights; ``image_size`` 0 keeps its own size.

    Raises:
        UserError: The model is unknown or does not take this image size.
    """
    vision = tower["vision_cfg"]
    model, own_size = vision["timm_model_name"], int(vision["image_size"])
    if not timm.is_model(model):  # the configuration may be from a card; timm would download `hf-hub:` names
        raise UserError(f"tower.name: '{model}' is no model of timm {timm.__version__}. Update timm.")
    size = image_size or own_size
    if size != own_size:
        try:
            fits = _output_width(create_trunk(model, size, own_size, "meta"), size) == tower["embed_dim"]
        except _INVALID:
            fits = False
        if not fits:
            fix = f"Set it to 0 for the size of the model, {own_size}"
            raise UserError(f"tower.image_size: timm/{model} does not take images of {size} pixels. {fix}.")
    return TimmTower(create_trunk(model, size, own_size, device), size)


def create_trunk(model: str, size: int, own_size: int, device: str) -> nn.Module:
    """Create a model without its classifier on a device; convolutional networks take any size."""
    with torch.device(device):  # created there directly: a meta tower never allocates weights
        if size == own_size:
            return timm.create_model(model, num_classes=0)
        try:
            return timm.create_model(model, num_classes=0, img_size=size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            return timm.create_model(model, num_classes=0)


def _input_size(name: str, model: str, tag: str) -> int:
    published: Any = timm.get_pretrained_cfg(f"{model}.{tag}" if tag else model)
    channels, height, width = published.input_size
    if channels != 3 or height != width:
        shape = f"{channels} channels, {width}x{height} pixels"
        raise UserError(f"tower.name: {name} expects {shape}, not a square RGB image. Choose another model.")
    return int(height)


def _output_width(trunk: nn.Module, size: int) -> int:
    """Return the width of a model on the device ``meta``, or 0 if its output is no vector for each image."""
    output = trunk.eval()(torch.empty(2, 3, size, size, device="meta"))
    is_vector = isinstance(output, Tensor) and output.ndim == 2 and output.shape[0] == 2
    return int(output.shape[1]) if is_vector else 0
