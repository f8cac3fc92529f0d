"""The student: a ViT of vit-pytorch with scaled-dot-product attention and an L2-normalised output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vit_pytorch import ViT
from vit_pytorch.vit import Attention
from vit_pytorch.vit_for_small_dataset import LSA
from vit_pytorch.vit_for_small_dataset import ViT as SmallDataViT

from vpr.artifacts.store import Artifact, load_artifact, reading
from vpr.common.errors import UserError, check_numbers

Preset = Literal["sample", "tiny", "small", "base"]

# Widths and depths of DeiT-Ti, -S and -B (Touvron et al., "Training data-efficient image transformers", ICML 2021,
# table 1); "sample" is for pictures of 64 pixels.
PRESETS: dict[Preset, dict[str, int]] = {
    "sample": {"image_size": 64, "patch_size": 8, "dim": 192, "depth": 6, "heads": 3, "mlp_dim": 384},
    "tiny": {"image_size": 224, "patch_size": 16, "dim": 192, "depth": 12, "heads": 3, "mlp_dim": 768},
    "small": {"image_size": 224, "patch_size": 16, "dim": 384, "depth": 12, "heads": 6, "mlp_dim": 1536},
    "base": {"image_size": 224, "patch_size": 16, "dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072},
}
# A shape comes from a card too: these bound what it can make a reader allocate.
_BOUNDS = {
    "image_size": (1, 1024),
    "patch_size": (1, 64),
    "dim": (1, 4096),
    "depth": (1, 64),
    "heads": (1, 64),
    "dim_head": (1, 256),
    "mlp_dim": (1, 16384),
    "embedding_dim": (0, 8192),
}
_MOST_TOKENS, _MOST_REGISTERS = 4096, 64


@dataclass(frozen=True)
class StudentConfig:
    """Shape of the student. A number that is 0 is taken from the preset.

    Attributes:
        preset: ``tiny``, ``small`` and ``base`` have DeiT's widths for pictures of 224 pixels.
        image_size: side of the input, pixels; a multiple of the patch.
        patch_size: side of a patch, pixels; a power of two with the convolutional stem.
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads.
        dim_head: width of a head.
        mlp_dim: width of the hidden layer of a block's MLP.
        embedding_dim: width of the output; 0 is that of the signal it is distilled from.
        pool: ``mean`` over the tokens, or the ``cls`` token.
        stem: ``patch`` is vit-pytorch's own linear patch embedding; ``conv`` replaces it by
            3x3 convolutions of stride 2 (Xiao et al., "Early Convolutions Help Transformers See
            Better", NeurIPS 2021, section 4), which small data needs.
        family: ``vit``, or vit-pytorch's ``vit_for_small_dataset``: shifted patches and attention that leaves
            out a token itself, with a learned temperature (Lee et al., "Vision Transformer for Small-Size
            Datasets", 2021).
        registers: tokens that take part in attention and are dropped before pooling (Darcet et al., "Vision
            Transformers Need Registers", ICLR 2024).
        dropout: in attention and MLP.
        gradient_checkpointing: compute each block again for its gradient, which needs less memory.
    """

    preset: Preset = "sample"
    image_size: int = 0
    patch_size: int = 0
    dim: int = 0
    depth: int = 0
    heads: int = 0
    dim_head: int = 64
    mlp_dim: int = 0
    embedding_dim: int = 0
    pool: Literal["mean", "cls"] = "mean"
    stem: Literal["patch", "conv"] = "patch"
    family: Literal["vit", "small-data"] = "vit"
    registers: int = 0
    dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"model.preset: '{self.preset}': choose from {', '.join(PRESETS)}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
        check_numbers(self, "model.", **_BOUNDS)
        if self.image_size % self.patch_size:
            raise UserError(f"model.image_size: {self.image_size} is no multiple of the patch of {self.patch_size}")
        if (self.image_size // self.patch_size) ** 2 > _MOST_TOKENS:
            raise UserError(f"model.patch_size: {self.patch_size} makes more than {_MOST_TOKENS} tokens: raise it")
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise UserError(f"model.patch_size: {self.patch_size}: the convolutional stem needs a power of two")
        if not 0 <= self.registers <= _MOST_REGISTERS or not 0 <= self.dropout < 1:
            raise UserError(f"model: give 0 to {_MOST_REGISTERS} registers, and dropout from 0 to below 1")


class SdpaAttention(nn.Module):
    """vit-pytorch's ``Attention`` or ``LSA`` computed by ``scaled_dot_product_attention``.

    It has the same parameters under the same names and gives the same output. The scale is applied
    before the product, the form that TensorRT fuses, and it exports as one operator.

    Args:
        attention: the original; its layers are taken over.
        tokens: how many it will see; ``LSA`` hides each from itself.
    """

    others: Tensor | None

    def __init__(self, attention: Attention | LSA, tokens: int) -> None:
        super().__init__()
        self.heads = attention.heads
        self.norm = attention.norm
        self.to_qkv = attention.to_qkv
        self.to_out = attention.to_out
        self.dropout = attention.dropout.p
        self.temperature = attention.temperature if isinstance(attention, LSA) else None
        others = ~torch.eye(tokens, dtype=torch.bool) if isinstance(attention, LSA) else None
        self.register_buffer("others", others, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        batch, tokens, _ = x.shape
        qkv = self.to_qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, scale = qkv[0], None
        if self.temperature is not None:
            query, scale = query * self.temperature.exp().to(query.dtype), 1.0
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, qkv[1], qkv[2], self.others, dropout, scale=scale)
        return self.to_out(out.transpose(1, 2).reshape(batch, tokens, -1))


class Blocks(nn.Module):
    """A vit-pytorch ``Transformer`` under its own names, with register tokens and gradient checkpointing.

    Args:
        transformer: the original; its layers are taken over.
        tokens: how many it will see, without registers.
        dim: width of the tokens.
        registers: tokens added before the first block and dropped after the last.
        checkpointing: compute each block again for its gradient.
    """

    registers: nn.Parameter | None

    layers: nn.ModuleList

    def __init__(self, transformer: Any, tokens: int, dim: int, registers: int, checkpointing: bool) -> None:
        super().__init__()
        self.layers = transformer.layers
        self.norm = getattr(transformer, "norm", None) or nn.Identity()
        for layer in transformer.layers:
            layer[0] = SdpaAttention(layer[0], tokens + registers)
        self.registers = nn.Parameter(torch.randn(registers, dim) * 0.02) if registers else None
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, dim) to the same shape."""
        tokens = x.shape[1]
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(x.shape[0], -1, -1)], dim=1)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(_block, layer, x, use_reentrant=False)
            else:
                x = _block(layer, x)
        return self.norm(x[:, :tokens] if self.registers is not None else x)


def _block(layer: Any, x: Tensor) -> Tensor:
    attention, mlp = layer
    x = attention(x) + x
    return mlp(x) + x


class ConvStem(nn.Module):
    """Convolutions of stride 2 from pixels to tokens, in place of the linear patch embedding."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
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
        config: shape of the network, with its ``embedding_dim``.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        if not config.embedding_dim:
            raise UserError("model.embedding_dim: 0: a student needs one: give the width of the signal")
        self.config = config
        self.vit = build_vit(SmallDataViT if config.family == "small-data" else ViT, config)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, size, size) float, preprocessed, to (batch, embedding_dim) of unit length."""
        return F.normalize(self.vit(x).float(), dim=1)


def build_vit(kind: Any, config: StudentConfig) -> Any:
    """A network of one of vit-pytorch's classes, with our attention, blocks and stem in their places.

    Args:
        kind: ``ViT``, ``DistillableViT``, or ``ViT`` of ``vit_for_small_dataset``.
        config: shape of the network.
    """
    vit = kind(
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
    nn.init.trunc_normal_(vit.pos_embedding, std=0.02)
    if config.stem == "conv":
        vit.to_patch_embedding = ConvStem(config.patch_size, config.dim)
    tokens = vit.pos_embedding.shape[-2]
    vit.transformer = Blocks(vit.transformer, tokens, config.dim, config.registers, config.gradient_checkpointing)
    return vit


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
        config = StudentConfig(**artifact.card.config["model"])
        weights = load_file(artifact.file("model.safetensors"))
        # A card may describe a network of any size: none is allocated that its weights do not fill.
        with torch.device("meta"):
            described = {name: tensor.shape for name, tensor in Student(config).state_dict().items()}
        if described != {name: tensor.shape for name, tensor in weights.items()}:
            raise UserError("its weights are not those of the network that its card describes")
        if artifact.card.embedding is None or artifact.card.embedding.dim != config.embedding_dim:
            raise UserError(f"its card does not say the {config.embedding_dim} dimensions of its network")
        model = Student(config)
        model.load_state_dict(weights)
    return model.eval(), artifact
