"""Tokens of a teacher, recorded while it computes its embedding.

Tokens are the last features of the tower before its pooling, as the library returns them: those of a ViT after its last
norm, without class and register tokens, and those of a convolutional network as they are.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teacher.fused import FusedTeacher
from teacher.model import Teacher


@dataclass(frozen=True)
class TokenGrid:
    """Shape of the tokens of an image.

    Attributes:
        rows: Number of tokens along the height of the image.
        columns: Number of tokens along its width.
        width: Number of channels of a token.
    """

    rows: int
    columns: int
    width: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns} of {self.width} channels"


class NoGridError(Exception):
    """A network has no grid of tokens; the message is the reason."""


@dataclass(frozen=True)
class TokenTap:
    """Place in a network where its tokens appear.

    Attributes:
        owner: Module that computes them.
        method: Method of ``owner`` that returns the features; ``forward`` for a layer.
        to_map: Function from these features to (batch, width, rows, columns) tokens.
    """

    owner: nn.Module
    method: str
    to_map: Callable[[Any], Tensor]

    @contextmanager
    def watch(self, use: Callable[[Tensor], None]) -> Iterator[None]:
        """Give the tokens of every forward pass inside the block to ``use``; the network computes as without it.

        ``forward_features`` of a tower of timm is a method and has no hook of PyTorch, so the method is wrapped.
        """
        compute = getattr(self.owner, self.method)

        def compute_and_use(*arguments: Any, **named: Any) -> Any:
            features = compute(*arguments, **named)
            use(self.to_map(features))
            return features

        setattr(self.owner, self.method, compute_and_use)  # an attribute of the object hides the method of its class
        try:
            yield
        finally:
            delattr(self.owner, self.method)


def find_tap(network: nn.Module) -> TokenTap:
    """Return the place where the tokens of a teacher appear.

    Raises:
        NoGridError: The teacher joins several networks, or its tower is of an unknown kind.
    """
    visual: Any = network.visual if isinstance(network, Teacher) else None
    if hasattr(visual, "trunk"):
        return TokenTap(visual.trunk, "forward_features", partial(_map_of_timm, visual.trunk))
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return TokenTap(visual.layer4, "forward", lambda features: features)
    if isinstance(visual, VisionTransformer):
        return TokenTap(visual.transformer, "forward", partial(_map_of_vit, visual))
    raise NoGridError("it joins several networks" if isinstance(network, FusedTeacher) else "it is of an unknown kind")


def measure_grid(network: nn.Module, tap: TokenTap, size: int) -> TokenGrid:
    """Return the shape of a network's tokens, measured on one black image of ``size`` pixels.

    Raises:
        NoGridError: The features are no grid of tokens.
    """
    maps: list[Tensor] = []
    device = next(network.parameters()).device
    with torch.inference_mode(), tap.watch(maps.append):
        network(torch.zeros(1, 3, size, size, device=device))
    if not maps:
        raise NoGridError("its features are no grid")
    _, width, rows, columns = maps[-1].shape
    return TokenGrid(rows, columns, width)


def tokens_to_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Map (batch, rows * columns, width) tokens, row after row, to (batch, width, rows, columns)."""
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def _map_of_vit(visual: Any, features: Tensor) -> Tensor:
    """Return the tokens of a ViT of open_clip; CoCa's attention pools tokens without a norm of their width."""
    tokens = features[:, 1:]
    if visual.attn_pool is None:
        tokens = visual.ln_post(tokens)
    return tokens_to_map(tokens, *visual.grid_size)


def _map_of_timm(trunk: Any, features: Any) -> Tensor:
    if not isinstance(features, Tensor):
        raise NoGridError("its features are no grid")
    if hasattr(trunk, "reroll"):  # Hiera computes in another order than row after row
        features = trunk.reroll(features, trunk.stage_ends[-1])
    if features.ndim == 4:
        channels = trunk.num_features
        ends_with_channels = features.shape[1] != channels and features.shape[3] == channels
        if ends_with_channels or getattr(trunk, "output_fmt", "") == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features
    if features.ndim != 3:
        raise NoGridError("its features are no grid")
    tokens = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
    side = math.isqrt(tokens.shape[1])
    if not side or side * side != tokens.shape[1]:
        raise NoGridError("its features are no grid")
    return tokens_to_map(tokens, side, side)
