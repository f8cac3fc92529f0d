"""The student: a vit-pytorch ``ViT`` with scaled-dot-product attention and an L2-normalised output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from vit_pytorch import ViT
from vit_pytorch.vit import Attention

from vpr.artifact import Artifact, load_artifact, reading


@dataclass(frozen=True)
class StudentConfig:
    """Shape of the student.

    Attributes:
        image_size: side of the input, pixels.
        patch_size: side of a patch, pixels; a power of two with the convolutional stem.
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads.
        dim_head: width of a head.
        mlp_dim: width of the hidden layer of a block's MLP.
        embedding_dim: width of the output.
        pool: ``mean`` over the tokens, or the ``cls`` token.
        stem: ``patch`` is vit-pytorch's own linear patch embedding; ``conv`` replaces it by
            3x3 convolutions of stride 2 (Xiao et al., "Early Convolutions Help Transformers See
            Better", NeurIPS 2021, section 4), which small data needs.
        dropout: in attention and MLP.
    """

    image_size: int = 64
    patch_size: int = 8
    dim: int = 192
    depth: int = 6
    heads: int = 3
    dim_head: int = 64
    mlp_dim: int = 384
    embedding_dim: int = 256
    pool: Literal["mean", "cls"] = "mean"
    stem: Literal["patch", "conv"] = "patch"
    dropout: float = 0.0


class SdpaAttention(nn.Module):
    """vit-pytorch's ``Attention`` computed by ``scaled_dot_product_attention``.

    It has the same parameters under the same names and gives the same output. The scale is applied
    before the product, the form that TensorRT fuses, and it exports as one operator.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.norm = attention.norm
        self.to_qkv = attention.to_qkv
        self.to_out = attention.to_out
        self.dropout = attention.dropout.p

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        batch, tokens, _ = x.shape
        qkv = self.to_qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], dropout_p=self.dropout if self.training else 0.0)
        return self.to_out(out.transpose(1, 2).reshape(batch, tokens, -1))


class ConvStem(nn.Module):
    """Convolutions of stride 2 from pixels to tokens, in place of the linear patch embedding."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if 1 << halvings != patch_size or halvings == 0:
            raise ValueError(f"patch_size {patch_size}: the convolutional stem needs a power of two of at least 2")
        widths = [3] + [max(dim >> (halvings - 1 - i), 24) for i in range(halvings)]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.project = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) to (batch, tokens, dim)."""
        return self.project(self.layers(x)).flatten(2).transpose(1, 2)


class Student(nn.Module):
    """Pictures to L2-normalised embeddings.

    Args:
        config: shape of the network.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = ViT(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=config.embedding_dim,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            mlp_dim=config.mlp_dim,
            pool=config.pool,
            dim_head=config.dim_head,
            dropout=config.dropout,
        )
        # vit-pytorch draws positions with a standard deviation of 1, which drowns the pixels at first.
        nn.init.trunc_normal_(self.vit.pos_embedding, std=0.02)
        if config.stem == "conv":
            self.vit.to_patch_embedding = ConvStem(config.patch_size, config.dim)
        use_sdpa(self.vit)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) float, preprocessed, to (batch, embedding_dim) of unit length."""
        return F.normalize(self.vit(x).float(), dim=1)


def use_sdpa(vit: ViT) -> None:
    """Swap every attention of a vit-pytorch ``ViT`` for :class:`SdpaAttention`, weights kept."""
    for layer in vit.transformer.layers:
        if not isinstance(layer[0], SdpaAttention):
            layer[0] = SdpaAttention(layer[0])


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_multiply_adds(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of one picture's forward pass, by PyTorch's own FLOP counter (two FLOPs each)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    model.eval()
    device = next(model.parameters()).device
    # The counter knows the products of the plain attention, not the fused CPU kernel.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size, device=device))
    model.train(training)
    return counter.get_total_flops() // 2


def load_student(path: Path | str) -> tuple[Student, Artifact]:
    """Load a student artifact: the network in evaluation mode, and the artifact."""
    artifact = load_artifact(path, "student")
    with reading(artifact):
        model = Student(StudentConfig(**artifact.card.config["model"]))
        model.load_state_dict(load_file(artifact.file("model.safetensors")))
    return model.eval(), artifact
