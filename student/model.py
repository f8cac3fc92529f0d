"""Student network: a ViT of vit-pytorch with scaled-dot-product attention and L2-normalised output."""

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
from student.layers import AttentionPooling, adapt_block, set_activation
from student.network_stem import NetworkStem
from vpr.artifacts.store import Artifact, load_artifact, reraise_as_artifact_error
from vpr.common.errors import UserError

_MOST_TOKENS = 256  # that attend by plain products in training on a CPU


class SdpaAttention(nn.Module):
    """vit-pytorch's ``Attention`` or ``LSA`` computed by ``scaled_dot_product_attention``.

    Parameters, their names and the output are the same. The scale is applied before the product, the form that
    TensorRT fuses, and the attention exports as one operator. ``LSA`` hides each of the ``tokens`` from itself.
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
        """Map (batch, tokens, dim) to the same shape."""
        batch, tokens, _ = x.shape
        qkv = self.to_qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # An index fills a gradient of all three with zeros, for each of them. Graphs keep the index that engines fuse.
        query, key, value = qkv.unbind() if self.training else (qkv[0], qkv[1], qkv[2])
        scale = None
        if self.temperature is not None:
            query, scale = query * self.temperature.exp().to(query.dtype), 1.0
        dropout = self.dropout if self.training else 0.0
        attend = _attend_by_products if _is_fused_backward_slow(query) else F.scaled_dot_product_attention
        out = attend(query, key, value, self.others, dropout, scale=scale)
        return self.to_out(out.transpose(1, 2).reshape(batch, tokens, -1))


def _is_fused_backward_slow(query: Tensor) -> bool:
    """Return whether the backward pass of the fused attention is slower than that of two products and a softmax.

    On a CPU with AMX, PyTorch 2.12 took 6 times as long in bfloat16 with 36 tokens, and twice as long with 196. In
    float32 the fused one is about as fast. With more tokens, the products would take much memory.
    """
    is_short = query.shape[-2] <= _MOST_TOKENS
    return is_short and query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu"


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None
) -> Tensor:
    """Return what ``scaled_dot_product_attention`` returns, (batch, heads, tokens, dim), by plain products."""
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    products = query @ key.transpose(-1, -2)
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf)
    return F.dropout(products.softmax(dim=-1), dropout) @ value


class TransformerBlocks(nn.Module):
    """vit-pytorch's ``Transformer`` with register tokens and gradient checkpointing, under the same names.

    Its layers are reused. ``tokens`` counts the tokens without the registers, which are added before the first block
    and dropped after the last. With the pooling ``map`` the output is one token.
    """

    registers: nn.Parameter | None
    layers: nn.ModuleList

    def __init__(self, transformer: Any, tokens: int, config: StudentConfig) -> None:
        super().__init__()
        dim, registers = config.dim, config.registers
        self.layers = transformer.layers
        self.norm = getattr(transformer, "norm", None) or nn.Identity()
        for layer in transformer.layers:
            adapt_block(layer, config)
            layer[0] = SdpaAttention(layer[0], tokens + registers)
        self.registers = nn.Parameter(torch.randn(registers, dim) * 0.02) if registers else None
        self.pre_norm = nn.LayerNorm(dim) if config.pre_norm else None
        self.pool = AttentionPooling(config) if config.pool == "map" else None
        if self.pool is not None:
            set_activation(self.pool.mlp, config)
        self.checkpointing = config.gradient_checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to the same shape, or to (batch, 1, dim) with the pooling ``map``."""
        tokens = x.shape[1]
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(x.shape[0], -1, -1)], dim=1)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        for layer in self.layers:
            if self.checkpointing and self.training:
                x = checkpoint(_apply_block, layer, x, use_reentrant=False)
            else:
                x = _apply_block(layer, x)
        x = self.norm(x[:, :tokens] if self.registers is not None else x)
        return x if self.pool is None else self.pool(x)


def _apply_block(layer: Any, x: Tensor) -> Tensor:
    attention, mlp = layer
    x = attention(x) + x
    return mlp(x) + x


class ConvStem(nn.Module):
    """Convolutions of stride 2 from pixels to tokens, in place of the linear patch embedding.

    ``patch_size`` is the number of pixels that a token covers along each side, a power of two.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        widths = [3] + [max(dim >> (halvings - 1 - i), 24) for i in range(halvings)]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.project = nn.Conv2d(widths[-1], dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 3, size, size) to (batch, tokens, dim)."""
        return self.project(self.layers(x)).flatten(2).transpose(1, 2)


class Student(nn.Module):
    """Network from images to L2-normalised embeddings; ``embedding_dim`` 0 raises :class:`UserError`."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        if not config.embedding_dim:
            raise UserError("model.embedding_dim: expected 1 or more, got 0. Set it to the teacher's width.")
        self.config = config
        self.vit = build_vit(SmallDataViT if config.family == "small-data" else ViT, config)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 3, size, size) preprocessed images to (batch, embedding_dim) of unit length."""
        return F.normalize(self.vit(x).float(), dim=1)


def build_vit(kind: Any, config: StudentConfig) -> Any:
    """Build a network of vit-pytorch (``ViT``, ``DistillableViT``, ...) and replace its attention, blocks and stem.

    The input of its ``to_latent`` has the pooled tokens, and the input of ``mlp_head`` the features of the trunk.
    """
    if not config.is_complete:
        raise UserError("model.preset: 'auto' takes the shape of start, which is not set. Choose another preset.")
    keys = ("image_size", "patch_size", "dim", "depth", "heads", "mlp_dim", "dim_head", "dropout")
    # vit-pytorch's mean of the one token that the pooling `map` returns is that token.
    pool = "mean" if config.pool == "map" else config.pool
    vit = kind(num_classes=config.embedding_dim, pool=pool, **{key: getattr(config, key) for key in keys})
    # vit-pytorch draws positions with a standard deviation of 1, which hides the pixels at first.
    nn.init.trunc_normal_(vit.pos_embedding, std=0.02)
    if config.stem == "conv":
        vit.to_patch_embedding = ConvStem(config.patch_size, config.dim)
    elif not config.patch_norms:
        vit.to_patch_embedding[1] = vit.to_patch_embedding[3] = nn.Identity()
    vit.transformer = TransformerBlocks(vit.transformer, vit.pos_embedding.shape[-2], config)
    if config.pooled_norm:
        vit.to_latent, vit.transformer.norm = vit.transformer.norm, nn.Identity()
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.norm_eps
    if config.has_network_stem:  # last, since its norms keep their epsilons
        vit.to_patch_embedding = NetworkStem(config.stem, config.patch_size, config.dim)
    return vit


def read_student(artifact: Artifact) -> tuple[StudentConfig, dict[str, Tensor]]:
    """Return the shape and the weights of a student artifact; raise :class:`UserError` if they do not fit."""
    with reraise_as_artifact_error(artifact):
        config = StudentConfig(**artifact.card.config["model"])
        weights = load_file(artifact.file("model.safetensors"))
        # A card may describe a network of any size, so the shapes are compared before memory is allocated.
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in Student(config).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in weights.items()}:
            raise UserError("the weights do not fit the network of the card")
    return config, weights


def load_student(path: Path | str, artifact: Artifact | None = None) -> tuple[Student, Artifact]:
    """Load a student artifact, if it is not loaded already: the network in evaluation mode, and the artifact."""
    artifact = artifact or load_artifact(path, "student")
    config, weights = read_student(artifact)
    with reraise_as_artifact_error(artifact):
        if artifact.card.embedding is None or artifact.card.embedding.dim != config.embedding_dim:
            raise UserError(f"the card does not name the {config.embedding_dim} dimensions of the network")
        model = Student(config)
        model.load_state_dict(weights)
    return model.eval(), artifact
