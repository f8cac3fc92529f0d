"""Stem of a student: a convolutional network of timm, whose last features become the tokens of the ViT."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from student.config import StudentConfig
from vpr.common.errors import UserError

PREFIX = "timm/"  # of the stems in ``StudentConfig.stem`` that name a network
_MIN_DIM, _DIM_HEAD = 192, 64
_PROBE = 64  # pixels, a multiple of every reduction that is accepted
_FIX = "Choose a convolutional network, such as timm/tf_efficientnet_lite0."
# What models raise for images that they do not support.
_INVALID = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Features:
    """Last features of a network: channels, and the number of pixels that one of them covers along each side."""

    channels: int
    reduction: int


class NetworkStem(nn.Module):
    """Convolutional network of timm up to its pooling, and a projection of its features to tokens.

    This is the hybrid of Dosovitskiy et al. ("An Image is Worth 16x16 Words", ICLR 2021, section 3.1): a network that
    is pretrained on many images makes the tokens, so that few images suffice to train the blocks.
    """

    def __init__(self, name: str, patch_size: int, dim: int) -> None:
        super().__init__()
        self.network, features = create_network(name)
        if features.reduction != patch_size:
            raise UserError(f"model.patch_size: expected {features.reduction} for the stem {name}, got {patch_size}.")
        self.project = nn.Conv2d(features.channels, dim, 1)
        nn.init.orthogonal_(self.project.weight.flatten(1))  # keeps the angles between features as well as it can
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 3, size, size) to (batch, tokens, dim)."""
        return self.project(self.network.forward_features(x)).flatten(2).transpose(1, 2)  # type: ignore[operator]


def create_network(name: str) -> tuple[nn.Module, Features]:
    """Create a network ``timm/NAME`` with random weights, without the layers after its last features.

    Raises:
        UserError: timm has no such network, or it returns no features of a grid.
    """
    import timm

    model = name.removeprefix(PREFIX)
    if not timm.is_model(model):  # the name may be from a card; timm would download `hf-hub:` names
        raise UserError(f"model.stem: '{model}' is no model of timm {timm.__version__}. Choose another stem.")
    features, unused = _probe(model)
    network: Any = timm.create_model(model, num_classes=0)
    for path in unused:
        parent, _, attribute = path.rpartition(".")
        setattr(network.get_submodule(parent), attribute, nn.Identity())
    return network, features


def is_network(tower: dict[str, Any]) -> bool:
    """Return whether a tower is a network of timm whose last features are a grid.

    ``tower`` comes from :func:`teacher.registry.read_tower`, or from the card of a teacher.
    """
    import timm

    model = tower["vision_cfg"].get("timm_model_name", "")
    if not model or not timm.is_model(model):
        return False
    try:
        _probe(model)
    except UserError:
        return False
    return True


def network_shape(tower: dict[str, Any], image_size: int) -> StudentConfig:
    """Return the shape of a student on a network of timm: one block of a quarter of its width.

    The image size is that of the network, rounded to a multiple of the reduction.
    """
    model = tower["vision_cfg"]["timm_model_name"]
    features, _ = _probe(model)
    dim = max(_MIN_DIM, features.channels // 4 // _DIM_HEAD * _DIM_HEAD)
    return StudentConfig(
        preset="auto",
        image_size=max(1, round(image_size / features.reduction)) * features.reduction,
        patch_size=features.reduction,
        dim=dim,
        depth=1,
        heads=dim // _DIM_HEAD,
        dim_head=_DIM_HEAD,
        mlp_dim=2 * dim,
        pooled_norm=True,
        stem=f"{PREFIX}{model}",
    )


def network_weights(visual: Any) -> dict[str, Tensor]:
    """Return the weights of a teacher's network under the names of a student."""
    state = visual.trunk.state_dict()
    return {f"vit.to_patch_embedding.network.{name}": value.detach() for name, value in state.items()}


def _probe(model: str) -> tuple[Features, list[str]]:
    """Return the features of a network, and its layers that they do not need; no weights are allocated."""
    import timm

    name, used = f"{PREFIX}{model}", set[nn.Module]()
    try:
        with torch.device("meta"):
            network: Any = timm.create_model(model, num_classes=0)
        for module in network.modules():
            module.register_forward_hook(lambda module, _inputs, _output: used.add(module))
        output = network.eval().forward_features(torch.empty(2, 3, _PROBE, _PROBE, device="meta"))
    except _INVALID as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"model.stem: {name} cannot be a stem ({reason}). {_FIX}") from None
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2] != output.shape[3] or output.shape[2] < 1:
        raise UserError(f"model.stem: {name} does not return features of a grid. {_FIX}")
    if _PROBE % output.shape[2]:
        raise UserError(f"model.stem: {name} has features that do not cover a fixed number of pixels. {_FIX}")
    unused = [path for path, module in network.named_modules() if module not in used and _has_own_weights(module)]
    return Features(int(output.shape[1]), _PROBE // output.shape[2]), unused


def _has_own_weights(module: nn.Module) -> bool:
    return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])
