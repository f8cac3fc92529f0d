"""Script that test_two_processes.py runs by torchrun: train with pair and proxy losses and write the losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from teacher.loss_config import PairConfig, ProxyConfig
from teacher.pair_loss import PairLoss, ProxyLoss
from vpr.common.distributed import all_gather_cat, is_first, rank_and_world

BATCH, CLASSES, DIM, STEPS = 16, 12, 16, 50
CASES = {
    "memory, proxy-anchor": (PairConfig("contrastive", miner=False, memory=80), ProxyConfig("proxy-anchor")),
    "miner, soft-triple": (PairConfig("multi-similarity"), ProxyConfig("soft-triple", centres=3)),
    "memory and miner": (
        PairConfig("contrastive", positives="hard", negatives="hard", negative_margin=0.0, memory=96),
        ProxyConfig("soft-triple", centres=3),
    ),
}


class SmallModule(nn.Module):
    """Network of two layers, with the losses of a case."""

    def __init__(self, pair: PairConfig, proxy: ProxyConfig) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, DIM))
        self.proxy, self.pair = ProxyLoss(DIM, CLASSES, proxy), PairLoss(DIM, pair)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        embeddings = F.normalize(self.net(x), dim=1)
        return self.pair(embeddings, labels) + self.proxy(embeddings, labels)


def train(pair: PairConfig, proxy: ProxyConfig) -> dict[str, list[float]]:
    """Return the losses of the joint batches and the trained weights."""
    rank, world = rank_and_world()
    torch.manual_seed(0)
    module, centres = SmallModule(pair, proxy), torch.randn(CLASSES, 24)
    model = DistributedDataParallel(module) if world > 1 else module
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=1e-3), []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randperm(CLASSES, generator=generator)[: BATCH // 2].repeat_interleave(2)
        x = centres[labels] + 0.7 * torch.randn(BATCH, 24, generator=generator)
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        loss = model(x[part], labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(all_gather_cat(loss.detach()[None]).mean()))
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return {"losses": losses, "weights": weights.tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if rank_and_world()[1] > 1:
        torch.distributed.init_process_group("gloo")
    results = {name: train(*case) for name, case in CASES.items()}
    if is_first():
        Path(sys.argv[1]).write_text(json.dumps(results))
    if rank_and_world()[1] > 1:
        torch.distributed.destroy_process_group()
