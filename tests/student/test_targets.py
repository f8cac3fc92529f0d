from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from student.config import TargetsConfig
from student.targets import CachedTargets, Mixup, OnlineTargets, TwoSizeDataset
from student.teacher_cache import build_teacher_cache
from student.teacher_model import load_teacher_model
from teacher.model import load_teacher
from vpr.artifacts.store import load_artifact
from vpr.data.catalog import Catalog
from vpr.imaging.augment import draw_views
from vpr.imaging.config import ViewConfig
from vpr.imaging.preprocess import Preprocess


@pytest.fixture(scope="module")
def cached(teacher: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> CachedTargets:
    config, training = TargetsConfig(views=2, bank=32), catalog.select(split="train")
    path = str(tmp_path_factory.mktemp("cache") / "views")
    cache = build_teacher_cache(path, load_teacher_model(load_artifact(teacher)), training, ViewConfig(), config, 3)
    return CachedTargets(cache, config, None, 3)


def batch_of(catalog: Catalog, sizes: tuple[int, int], rows: list[int]) -> dict[str, torch.Tensor]:
    student, teacher = (Preprocess(size=size) for size in sizes)
    return TwoSizeDataset(catalog.select(split="train"), student, teacher, views=[ViewConfig()]).__getitems__(rows)


@pytest.mark.parametrize("size", [32, 48])
def test_online_targets_equal_cached_targets(size: int, cached: CachedTargets, teacher: Path, catalog: Catalog) -> None:
    """Compare on the same views, also if student and teacher differ in their image size."""
    model, artifact = load_teacher(teacher)
    assert artifact.card.preprocess is not None
    batch = batch_of(catalog, (size, 32), list(range(8, 24)))
    assert ("teacher_pixels" in batch) == (size != 32)
    online = OnlineTargets(model, artifact.card.preprocess, TargetsConfig(mode="online", bank=24), 256, None)
    cpu = torch.device("cpu")
    cached.start_epoch(1, cpu)
    online.start_epoch(1, cpu)
    parameters = draw_views(ViewConfig(), 3, batch["rows"], torch.ones_like(batch["rows"]))
    expected, bank = cached.targets_for(batch, parameters, 1, None)
    vectors, queue = online.targets_for(batch, parameters, 1, None)
    assert (vectors * expected).sum(dim=1).min() > 0.995  # bf16 in other batches, and float16 storage
    assert bank.shape == (32, 256)
    assert torch.equal(queue, vectors)


def test_queue_holds_the_latest_embeddings() -> None:
    online = OnlineTargets(nn.Identity(), Preprocess(size=16), TargetsConfig(mode="online", bank=5), 2, None)
    vectors = torch.arange(16.0).view(8, 2)
    for part in vectors.split(2):
        online._enqueue(part)
    assert online.queue[:, 0].tolist() == [12, 14, 8, 10, 4]
    assert int(online.filled) == 5
    assert set(online.state_dict()) == {"queue", "filled"}  # Checkpoints hold the queue but no teacher.


def test_epochs_cycle_views_and_resample_banks(cached: CachedTargets) -> None:
    assert [cached.choose_view(epoch) for epoch in range(4)] == [0, 1, 0, 1]
    banks = []
    for epoch in (0, 1, 0):
        cached.start_epoch(epoch, torch.device("cpu"))
        banks.append(cached.bank)
    assert torch.equal(banks[0], banks[2])
    assert not torch.equal(banks[0], banks[1])
    torch.testing.assert_close(banks[0].norm(dim=1), torch.ones(32))


def test_mixup_is_the_same_for_both_sizes() -> None:
    torch.manual_seed(0)
    mix = Mixup(1.0, 6)
    x, y = torch.rand(6, 3, 4, 4), torch.rand(6, 3, 8, 8)
    for pixels in (x, y):
        expected = torch.stack(
            [mix.share * pixels[i] + (1 - mix.share) * pixels[int(mix.partner[i])] for i in range(6)]
        )
        torch.testing.assert_close(mix(pixels), expected)
    assert 0 < mix.share < 1
    assert sorted(mix.partner.tolist()) == list(range(6))


@pytest.mark.parametrize("a", [0.2, 1.0, 4.0])
def test_mixup_shares_follow_a_beta(a: float) -> None:
    torch.manual_seed(1)
    shares = torch.tensor([Mixup(a, 2).share for _ in range(4000)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.1)


def test_targets_and_bank_are_projected(cached: CachedTargets, catalog: Catalog) -> None:
    projection = torch.linalg.qr(torch.randn(256, 10, generator=torch.Generator().manual_seed(0)))[0]
    projected = CachedTargets(cached.cache, cached.config, projection, 3)
    for targets in (projected, cached):
        targets.start_epoch(0, torch.device("cpu"))
    batch = {"rows": torch.arange(4)}
    full, _ = cached.targets_for(batch, torch.empty(0), 0, None)
    vectors, bank = projected.targets_for(batch, torch.empty(0), 0, None)
    torch.testing.assert_close(vectors, F.normalize(full @ projection, dim=1))
    torch.testing.assert_close(bank, F.normalize(cached.bank @ projection, dim=1))
