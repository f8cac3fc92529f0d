"""Script that test_distributed.py runs by torchrun: train a small module on noise and write weights and losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vpr.common.distributed import all_gather_cat, destroy_process_group, is_first, rank_and_world
from vpr.data.catalog import SCHEMA, Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import EpochSampler
from vpr.imaging.preprocess import Preprocess
from vpr.training.config import RunConfig
from vpr.training.loop import RecallModule, fit

BATCHES, BATCH, SIZE = 5, 16, 16


def make_catalog() -> Catalog:
    """Return 24 rows of 6 products, without images."""
    rows = [
        {"image": f"{n}.jpg", "product": str(n % 6), "role": "gallery" if n < 12 else "query", "split": "validation"}
        for n in range(24)
    ]
    return Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), Path())


class NoiseDataset(Dataset[dict[str, Tensor]]):
    """Seeded noise."""

    def __init__(self, count: int, seed: int) -> None:
        noise = np.random.default_rng(seed).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)
        self.pixels = torch.from_numpy(noise)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"rows": torch.tensor(rows), "pixels": self.pixels[rows]}


def make_loaders() -> tuple[DataLoader[dict[str, Tensor]], DataLoader[dict[str, Tensor]]]:
    """Return this process's share of the training and validation batches."""
    rank, world = rank_and_world()
    products = np.array([str(n % 6) for n in range(BATCHES * BATCH)])
    sampler = EpochSampler(products, LoaderConfig(batch_size=BATCH // world), 0, rank, world)
    validation = make_catalog()
    rows = range(rank * len(validation) // world, (rank + 1) * len(validation) // world)
    return (
        DataLoader(NoiseDataset(len(products), 0), BATCH // world, sampler=sampler, collate_fn=_identity),
        DataLoader(NoiseDataset(len(validation), 1), len(rows), sampler=rows, collate_fn=_identity),
    )


def _identity(batch: Any) -> Any:
    return batch


class Block(nn.Module):
    """Residual block large enough to be sharded separately."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(768, 704), nn.Linear(704, 768)
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.dtypes = {self.up.weight.dtype, self.down.bias.dtype, x.dtype}
        return x + self.down(torch.relu(self.up(x)))


class TwoBlockModule(RecallModule):
    """Two blocks and a loss that pulls every output to 1."""

    def __init__(self) -> None:
        super().__init__(Preprocess(size=SIZE), make_catalog(), sharded=("net",))
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Sequential(Block(), Block()), nn.Linear(768, 8))
        self.losses: list[float] = []

    def embed(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = (self.net(self.normalise(batch["pixels"])) - 1).square().mean()
        self.losses.append(float(all_gather_cat(loss.detach()[None]).mean()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(folder: Path, strategy: str, epochs: int, ema: float, precision: str) -> None:
    """Train, or resume the training run in ``folder``."""
    module = TwoBlockModule()
    result = fit(module, make_loaders(), module.net, folder, epochs, RunConfig(precision, strategy, ema=ema))
    if is_first():
        save_file(result.last, folder / "last.safetensors")
        dtypes = sorted(str(dtype) for dtype in module.net[1][0].dtypes)
        values = {"losses": module.losses, "best": result.best, "dtypes": dtypes}
        (folder / "losses.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
    destroy_process_group()
