"""The student: a ViT of vit-pytorch with scaled-dot-product attention and an L2-normalised output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from vit_pytorch import ViT
from vit_pytorch.vit import Attention
from vit_pytorch.vit_for_small_dataset import LSA
from vit_pytorch.vit_for_small_dataset import ViT as SmallDataViT

from student.config import StudentConfig
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError


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
    """Images to L2-normalised embeddings.

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
    """Multiply-adds of one image's forward pass, by PyTorch's own FLOP counter (two FLOPs each)."""
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
    with reraise_as_artifact_error(artifact):
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
