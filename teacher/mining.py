"""Hard negatives: the products that the current embeddings confuse, found from an epoch's training embeddings."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from teacher.loss_config import MiningConfig
from vpr.common.distributed import rank_and_world
from vpr.data.loaders import EpochSampler

_BLOCK = 1024  # products that are compared with all others at once


def most_similar(means: Tensor, count: int) -> Tensor:
    """Return the (products, min(count, products - 1)) most similar other products of each product, by cosine.

    ``means`` is the (products, dim) sum or mean of each product's embeddings. A product of zeros was not seen: it has
    no neighbours and is no neighbour. Missing neighbours are -1.
    """
    directions = F.normalize(means, dim=1)
    seen = directions.any(dim=1)
    count, neighbours = min(count, len(means) - 1), []
    for start in range(0, len(means), _BLOCK):
        rows = torch.arange(start, min(start + _BLOCK, len(means)), device=means.device)
        cosine = directions[rows] @ directions.T
        cosine.masked_fill_(~(seen[rows, None] & seen), -torch.inf)
        cosine[torch.arange(len(rows)), rows] = -torch.inf
        values, columns = cosine.topk(count)
        neighbours.append(columns.masked_fill(values == -torch.inf, -1))
    return torch.cat(neighbours)


class HardNegatives:
    """Collector of a mean embedding per product, which every n epochs gives the sampler the most similar products.

    The embeddings are those of the training steps, so that mining needs no further pass over the images.
    """

    def __init__(self, config: MiningConfig, sampler: EpochSampler, products: int) -> None:
        self._config, self._sampler, self._products = config, sampler, products
        self._sums: Tensor | None = None
        self._is_collecting = False

    def start_epoch(self, epoch: int) -> None:
        """Start to collect if the search follows this epoch (from 0)."""
        self._sums, self._is_collecting = None, (epoch + 1) % self._config.every == 0

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Collect (batch, dim) L2-normalised embeddings with their (batch,) int64 products."""
        if not self._is_collecting:
            return
        if self._sums is None:
            self._sums = embeddings.new_zeros(self._products, embeddings.shape[1], dtype=torch.float32)
        self._sums.index_add_(0, labels, embeddings.float())

    def end_epoch(self) -> None:
        """Search the collected embeddings of all processes, if there are any."""
        if self._sums is None:
            return
        if rank_and_world()[1] > 1:
            torch.distributed.all_reduce(self._sums)
        self._sampler.neighbours = most_similar(self._sums, self._config.products).cpu().numpy()
        self._sums = None

    def state_dict(self) -> dict[str, Any]:
        """Return the neighbours for a checkpoint; empty before the first search."""
        neighbours = self._sampler.neighbours
        return {} if neighbours is None else {"neighbours": torch.from_numpy(neighbours)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the neighbours from a checkpoint."""
        self._sampler.neighbours = state["neighbours"].numpy().astype(np.int64) if state else None
