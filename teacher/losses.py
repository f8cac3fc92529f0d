"""Losses of a training stage, and the class directions and proxies that only training needs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.head import MarginHead
from teacher.loss_config import StageLosses
from teacher.pair_loss import PairLoss, ProxyLoss
from vpr.common.errors import UserError
from vpr.training.loop import decay_groups

_BYTES_PER_PAIR = 64  # similarities, masks, sorted copies and int64 indices of the pairs, counted at batch 128


class TrainingHead(nn.Module):
    """Weighted sum of the margin softmax, a proxy loss and a pair loss.

    ``counts`` is the (classes,) int64 number of training images. The parameters are the class directions and proxies.
    """

    def __init__(self, dim: int, counts: Tensor, losses: StageLosses) -> None:
        super().__init__()
        self.losses = losses
        self.dim = dim
        weights = losses.weights()
        if losses.head.nested and losses.head.nested[-1] >= dim:
            problem = f"expected less than the teacher's {dim} dimensions, got {losses.head.nested[-1]}"
            raise UserError(f"head.nested: {problem}. Lower it.")
        self.margin = MarginHead(dim, counts, losses.head) if "margin" in weights else None
        has_proxy, has_pair = (bool(s.weight) and s.loss != "none" for s in (losses.proxy, losses.pair))
        self.proxy = ProxyLoss(dim, len(counts), losses.proxy) if has_proxy else None
        self.pair = PairLoss(dim, losses.pair) if has_pair else None

    def forward(self, embeddings: Tensor, labels: Tensor, progress: float, epoch: int) -> dict[str, Tensor]:
        """Return the unweighted losses by name, computed in float32; ``margin_64`` is that of a nested prefix.

        Args:
            embeddings: (batch, dim) L2-normalised embeddings.
            labels: (batch,) int64 classes.
            progress: Completed share of the training, 0 to 1.
            epoch: Epoch from 0.
        """
        named = {}
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            if self.margin is not None:
                named["margin"] = self.margin(embeddings, labels, progress, epoch)
                for width in self.losses.head.nested:
                    prefix = F.normalize(embeddings[:, :width], dim=1)
                    named[f"margin_{width}"] = self.margin(prefix, labels, progress, epoch)
            for section, loss in ((self.losses.proxy, self.proxy), (self.losses.pair, self.pair)):
                if loss is not None:
                    named[section.loss.replace("-", "_")] = loss(embeddings, labels)
        return named

    def total(self, named: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses that :meth:`forward` returns."""
        weights = self.losses.weights()
        weights |= {f"margin_{width}": self.losses.margin_weight for width in self.losses.head.nested}
        return torch.stack([weights[name] * loss for name, loss in named.items()]).sum()

    def parameter_groups(self, lr: float, weight_decay: float, decay_vectors: bool = False) -> list[dict[str, Any]]:
        """Return optimiser groups; the proxies have their configured rate and decay, the directions those given."""
        groups: list[dict[str, Any]] = []
        if self.margin is not None:
            groups += decay_groups(list(self.margin.parameters()), lr, weight_decay, decay_vectors)
        if self.proxy is not None:
            config = self.losses.proxy
            groups += decay_groups(list(self.proxy.parameters()), config.lr, config.weight_decay)
        return groups

    def pair_bytes(self, images: int) -> int:
        """Return the bytes of the pair loss for a batch of ``images`` over all processes, and of its memory."""
        if self.pair is None:
            return 0
        memory = self.losses.pair.memory
        return _BYTES_PER_PAIR * images * (memory or images) + 4 * memory * self.dim
