"""Low-rank adapters (LoRA) on the linear layers of a tower, trained in place of its weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022: ``W + alpha / rank * B A``. The adapted
layers are those of ``peft``. What a training writes has the adapters merged, so it has the names of a plain tower.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from teacher.model import Teacher
from teacher.tower_config import LoraConfig
from vpr.common.errors import UserError

_ADAPTER = "default"  # peft's name of the only adapter
_DOWN, _UP, _BASE = f"lora_A.{_ADAPTER}.weight", f"lora_B.{_ADAPTER}.weight", "base_layer."


class LinearAttention(nn.Module):
    """Self-attention of ``nn.MultiheadAttention`` with its joint projection of query, key and value as a linear layer.

    ``nn.MultiheadAttention`` uses its weights without a layer, so an adapter cannot be put around it. peft's wrapper
    adds the adapter to the weights before each pass and subtracts it afterwards: rounding then changes the frozen
    weights, each block keeps a merged copy for the backward pass, and dropout is not possible.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        width, weight = attention.embed_dim, attention.in_proj_weight
        self.num_heads = attention.num_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=attention.in_proj_bias is not None, device="meta")
        self.in_proj.weight = weight
        if attention.in_proj_bias is not None:
            self.in_proj.bias = attention.in_proj_bias
        self.out_proj = nn.Linear(width, width, bias=attention.out_proj.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Map (batch, tokens, width) to the same shape; ``key`` and ``value`` are ``x``."""
        assert key is x
        assert value is x
        assert not need_weights
        joint = self.in_proj(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, tokens, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2)), None


@dataclass(frozen=True)
class Adapters:
    """Adapters of a tower.

    Attributes:
        scaling: Factor alpha / rank on the product of the two matrices.
        attentions: Names in the tower of attentions that :class:`LinearAttention` replaced.
        layers: Names in the tower of the adapted layers.
        dropouts: Dropout of the adapters' inputs, active in training.
    """

    scaling: float
    attentions: frozenset[str]
    layers: tuple[str, ...]
    dropouts: tuple[nn.Module, ...]

    def merge(self, state: dict[str, Tensor], prefix: str = "visual.") -> dict[str, Tensor]:
        """Return weights with the adapters added, under the names that they had before :func:`add_adapters`.

        ``prefix`` is that of the tower in the names of ``state``. The sums are computed in float32.
        """
        merged = {}
        for name, value in state.items():
            if name.endswith((_DOWN, _UP)):
                continue
            stem, base, kind = name.rpartition(_BASE)
            if base and kind == "weight":
                delta = state[stem + _UP].float() @ state[stem + _DOWN].float()
                value = (value.float() + self.scaling * delta).to(value.dtype)
            merged[self._plain_name(stem + kind if base else name, prefix)] = value
        return merged

    def _plain_name(self, name: str, prefix: str) -> str:
        layer, _, kind = name.removeprefix(prefix).rpartition(".in_proj.")
        return f"{prefix}{layer}.in_proj_{kind}" if layer in self.attentions else name


def add_adapters(teacher: Teacher, config: LoraConfig, size: int) -> Adapters:
    """Freeze the tower and add adapters to those of its linear layers that are trainable; ``size`` is in pixels.

    Layers added to the tower stay as they are. The teacher's outputs do not change, because the matrix B starts at 0.
    A linear layer of which the tower uses only the weight has no adapter.

    Raises:
        UserError: No linear layer can be adapted, or the rank is larger than a side of one.
    """
    visual: Any = teacher.visual
    attentions = _replace_attentions(visual)
    linears = _linears_of_images(visual, size)
    layers = {name: layer for name, layer in linears.items() if layer.weight.requires_grad}
    if not layers:
        raise UserError("lora.rank: the trained part of the tower has no linear layer to adapt. Set it to 0.")
    narrow = min(layers, key=lambda name: min(layers[name].weight.shape))
    side = min(layers[narrow].weight.shape)
    if config.rank > side:
        raise UserError(f"lora.rank: expected at most {side}, the smaller side of {narrow}, got {config.rank}.")
    device = next(visual.parameters()).device
    visual.requires_grad_(False)
    _inject(visual, config, list(layers))
    adapted = [visual.get_submodule(name) for name in layers]
    for layer in adapted:
        layer.cast_input_dtype_enabled = False  # else autocast's 16-bit inputs are copied to float32
    if device.type == "meta":
        visual.to(device)  # peft leaves the adapters of weights on `meta` on the CPU
    dropouts = tuple(layer.lora_dropout for layer in adapted)
    return Adapters(config.alpha / config.rank, frozenset(attentions), tuple(layers), dropouts)


def _inject(visual: nn.Module, config: LoraConfig, names: list[str]) -> None:
    import peft  # takes seconds, so only a training with adapters imports it

    # A list would match the ends of names too; a pattern has to match all of a name.
    pattern = "|".join(re.escape(name) for name in names)
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=pattern, **settings), visual, _ADAPTER)


def _replace_attentions(visual: nn.Module) -> list[str]:
    """Replace the self-attentions of open_clip's blocks and return their names; poolings keep theirs."""
    from open_clip.transformer import ResidualAttentionBlock

    blocks = {n: m for n, m in visual.named_modules() if isinstance(m, ResidualAttentionBlock)}
    blocks = {n: m for n, m in blocks.items() if m.attn.batch_first and not hasattr(m, "ln_1_kv")}
    for block in blocks.values():
        block.attn = LinearAttention(block.attn)  # type: ignore[assignment]
    return [f"{name}.attn" for name in blocks]


def _linears_of_images(visual: nn.Module, size: int) -> dict[str, nn.Linear]:
    """Return the linear layers called on features of the images, by name, from a pass of tensors without memory.

    Some towers use only the weight of a layer (``qkv`` of SwinV2 and BEiT), where an adapter would have no effect.
    Layers of other inputs are small, such as SwinV2's of the two coordinates of a position.
    """
    linears = {name: module for name, module in visual.named_modules() if isinstance(module, nn.Linear)}
    called: set[nn.Module] = set()

    def add_if_of_images(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].requires_grad:  # in this pass only the images have a gradient
            called.add(module)

    hooks = [module.register_forward_pre_hook(add_if_of_images) for module in linears.values()]
    was_training = visual.training
    visual.eval()
    try:
        with FakeTensorMode(), torch.enable_grad():
            values = (*visual.named_parameters(), *visual.named_buffers())
            state = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in values}
            torch.func.functional_call(visual, state, (torch.empty(2, 3, size, size, requires_grad=True),))
    finally:
        visual.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in linears.items() if module in called}
