"""Proxy and pair losses of pytorch-metric-learning, computed over the batches of all processes."""

from typing import Any

import torch
from torch import Tensor, nn

from teacher.loss_config import PairConfig, ProxyConfig
from vpr.common.distributed import all_gather_cat, rank_and_world


class _AllGather(torch.autograd.Function):
    """Concatenation over the processes; a process receives the sum of all processes' gradients of its part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_gather_cat(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (rank, world), total = rank_and_world(), gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(world)[rank]


def all_gather_with_gradients(value: Tensor) -> Tensor:
    """Concatenate the same-shaped tensors of all processes along the first axis, with gradients.

    If all processes compute the same loss of the result, the mean over processes that DDP and FSDP take is the
    gradient of one process with the joint batch. (torch.distributed.nn.functional.all_gather is deprecated.)
    """
    return value if rank_and_world()[1] == 1 else _AllGather.apply(value)


class ProxyLoss(nn.Module):
    """Loss of embeddings against class proxies, which are its only parameters."""

    def __init__(self, dim: int, classes: int, config: ProxyConfig) -> None:
        super().__init__()
        self.loss = _build_proxy_loss(dim, classes, config)
        # Proxy-Anchor weights the images of a class against each other, SoftTriple is a mean over images.
        self._needs_full_batch = config.loss == "proxy-anchor"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of L2-normalised (batch, dim) float32 embeddings with (batch,) int64 labels."""
        if self._needs_full_batch:
            embeddings, labels = all_gather_with_gradients(embeddings), all_gather_cat(labels)
        return self.loss(embeddings, labels)


class PairLoss:
    """Loss of the similarities in the joint batch of all processes, or between that batch and a memory.

    It has no parameters and is no module: DDP would send the memory, which is equal in all processes, in every step.
    """

    def __init__(self, dim: int, config: PairConfig) -> None:
        from pytorch_metric_learning.losses import CrossBatchMemory

        self._loss, self._miner = _build_pair_loss(config), _build_miner(config) if config.miner else None
        self._memory: Any = None
        if config.memory:
            self._memory = CrossBatchMemory(self._loss, dim, config.memory, self._miner)

    def __call__(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of L2-normalised (batch, dim) float32 embeddings with (batch,) int64 labels.

        All processes compute the same value. A batch enters the memory before it is compared, without pairs of an image
        with itself.
        """
        embeddings, labels = all_gather_with_gradients(embeddings), all_gather_cat(labels)
        if self._memory is not None:
            return self._memory(embeddings, labels)
        pairs = self._miner(embeddings, labels) if self._miner is not None else None
        return self._loss(embeddings, labels, pairs)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory for a checkpoint; empty without one."""
        if self._memory is None:
            return {}
        return {
            "embeddings": self._memory.embedding_memory.cpu().clone(),
            "labels": self._memory.label_memory.cpu().clone(),
            "next": self._memory.queue_idx,
            "is_full": self._memory.has_been_filled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the memory from a checkpoint."""
        if self._memory is None:
            return
        self._memory.embedding_memory, self._memory.label_memory = state["embeddings"], state["labels"]
        self._memory.queue_idx, self._memory.has_been_filled = state["next"], state["is_full"]


def _build_proxy_loss(dim: int, classes: int, config: ProxyConfig) -> nn.Module:
    from pytorch_metric_learning.losses import ProxyAnchorLoss, SoftTripleLoss

    if config.loss == "proxy-anchor":
        return ProxyAnchorLoss(classes, dim, margin=config.margin, alpha=config.scale)
    return SoftTripleLoss(
        classes, dim, centers_per_class=config.centres, la=config.scale, gamma=config.gamma, margin=config.margin
    )


def _build_pair_loss(config: PairConfig) -> nn.Module:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import ContrastiveLoss, MultiSimilarityLoss

    if config.loss == "multi-similarity":
        return MultiSimilarityLoss(alpha=config.alpha, beta=config.beta, base=config.base)
    margins = {"pos_margin": config.positive_margin, "neg_margin": config.negative_margin}
    return ContrastiveLoss(**margins, distance=CosineSimilarity())


def _build_miner(config: PairConfig) -> nn.Module:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.miners import BatchEasyHardMiner, MultiSimilarityMiner

    if config.loss == "multi-similarity":
        return MultiSimilarityMiner(epsilon=config.epsilon)
    return BatchEasyHardMiner(config.positives, config.negatives, distance=CosineSimilarity())
