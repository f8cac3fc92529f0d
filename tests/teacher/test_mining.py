from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from teacher import mining
from teacher.loss_config import MiningConfig
from teacher.mining import HardNegatives, most_similar
from vpr.data.config import LoaderConfig
from vpr.data.loaders import EpochSampler


def make_sampler(products: int) -> EpochSampler:
    return EpochSampler(np.repeat([f"{number:02d}" for number in range(products)], 4), LoaderConfig(8), 0)


def means(products: int) -> Tensor:
    return torch.randn(products, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("block", [3, 1024])
def test_most_similar_products_equal_a_sort_of_all_cosines(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "_BLOCK", block)
    vectors = means(10)
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    np.testing.assert_array_equal(most_similar(vectors, 4).numpy(), np.argsort(-cosine, axis=1)[:, :4])


def test_unseen_products_have_no_neighbours() -> None:
    vectors = means(4)
    vectors[2] = 0
    found = most_similar(vectors, 8)
    assert found.shape == (4, 3)
    assert found[2].tolist() == [-1, -1, -1]
    assert 2 not in found
    assert (found[[0, 1, 3]] >= 0).sum(dim=1).tolist() == [2, 2, 2]


def test_search_follows_every_second_epoch() -> None:
    sampler, vectors = make_sampler(6), means(6).float()
    miner = HardNegatives(MiningConfig(every=2, products=2), sampler, 6)
    assert miner.state_dict() == {}
    for epoch in range(3):
        miner.start_epoch(epoch)
        for half in (slice(0, 3), slice(3, 6)):
            miner.add(vectors[half] + epoch, torch.arange(6)[half])
        miner.end_epoch()
        expected = None if epoch == 0 else most_similar(vectors + 1, 2).numpy()
        np.testing.assert_equal(sampler.neighbours, expected)
    other = make_sampler(6)
    restored = HardNegatives(MiningConfig(every=2, products=2), other, 6)
    restored.load_state_dict(miner.state_dict())
    np.testing.assert_equal(other.neighbours, sampler.neighbours)
    sampler.set_epoch(3)
    other.set_epoch(3)
    assert list(other) == list(sampler)
