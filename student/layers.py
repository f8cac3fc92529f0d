"""Layers of pretrained ViTs that vit-pytorch lacks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vit_pytorch.vit import FeedForward

from student.config import StudentConfig


class LayerScale(nn.Module):
    """Learned scale of each channel; 1 at first, so that a new block computes as without it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        return x * self.gamma


class QuickGelu(nn.Module):
    """The approximation of GELU by a sigmoid that OpenAI's CLIP computes."""

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to the same shape."""
        return x * torch.sigmoid(1.702 * x)


class AttentionPooling(nn.Module):
    """Attention of one learned query over the tokens, and an MLP, as in SigLIP.

    ``query`` is stored as projected (heads * dim_head,), because the projection of a constant is a constant.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.query = nn.Parameter(torch.randn(inner) * 0.02)
        self.to_kv = nn.Linear(config.dim, 2 * inner)
        self.to_out = nn.Linear(inner, config.dim)
        self.mlp = FeedForward(config.dim, config.mlp_dim, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to (batch, 1, dim)."""
        batch, tokens, _ = x.shape
        key, value = self.to_kv(x).view(batch, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = self.query.view(1, self.heads, 1, -1).expand(batch, -1, -1, -1)
        out = F.scaled_dot_product_attention(query, key, value)
        x = self.to_out(out.transpose(1, 2).reshape(batch, 1, -1))
        return x + self.mlp(x)


def adapt_block(layer: Any, config: StudentConfig) -> None:
    """Add biases and LayerScale to a block of vit-pytorch in place, and set its activation."""
    attention, mlp = layer
    if config.qkv_bias:
        attention.to_qkv = nn.Linear(attention.to_qkv.in_features, attention.to_qkv.out_features)
    if config.layer_scale:
        attention.to_out = nn.Sequential(*_layers_of(attention.to_out), LayerScale(config.dim))
        mlp.net.append(LayerScale(config.dim))
    set_activation(mlp, config)


def set_activation(mlp: Any, config: StudentConfig) -> None:
    """Set the activation of an MLP of vit-pytorch in place."""
    if config.activation == "quick-gelu":
        mlp.net[2] = QuickGelu()
    elif config.activation == "gelu-tanh":
        mlp.net[2] = nn.GELU(approximate="tanh")


def _layers_of(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.Sequential) else [module]
