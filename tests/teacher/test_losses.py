from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses, miners
from torch import Tensor

from teacher.config import StageConfig, TrainConfig
from teacher.head import MarginHead
from teacher.loss_config import HeadConfig, MiningConfig, PairConfig, ProxyConfig, StageLosses
from teacher.losses import TrainingHead
from teacher.pair_loss import PairLoss, ProxyLoss
from tests.teacher.saved_tensors import saved_storages
from vpr.common.errors import UserError

DIM, CLASSES = 16, 10


def make_batch(size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random embeddings with gradients and labels of four images per class."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(size, DIM, generator=generator)).requires_grad_()
    classes = torch.randperm(CLASSES, generator=generator)[: size // 4]
    return embeddings, classes.repeat_interleave(4)


def assert_equal_with_gradients(loss: Tensor, expected: Tensor, *tensors: Tensor) -> None:
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert loss.item() > 0
    for gradient, other in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        ProxyConfig("soft-triple", centres=12, scale=35.0, gamma=0.264, margin=0.492),
        ProxyConfig("proxy-anchor", scale=32.0, margin=0.1),
    ],
    ids=lambda config: config.loss,
)
def test_proxy_losses_equal_pytorch_metric_learning(config: ProxyConfig) -> None:
    embeddings, labels = make_batch()
    loss = ProxyLoss(DIM, CLASSES, config)
    (proxies,) = loss.parameters()
    reference: Any
    if config.loss == "soft-triple":
        reference = losses.SoftTripleLoss(CLASSES, DIM, 12, 35.0, 0.264, 0.492)
        reference.fc = proxies
    else:
        reference = losses.ProxyAnchorLoss(CLASSES, DIM, 0.1, 32.0)
        reference.proxies = proxies
    assert_equal_with_gradients(loss(embeddings, labels), reference(embeddings, labels), embeddings, proxies)


COSINE = distances.CosineSimilarity()


@pytest.mark.parametrize(
    ("config", "reference", "miner"),
    [
        (PairConfig("multi-similarity"), losses.MultiSimilarityLoss(2, 50, 0.5), miners.MultiSimilarityMiner(0.1)),
        (PairConfig("multi-similarity", miner=False), losses.MultiSimilarityLoss(2, 50, 0.5), None),
        (
            PairConfig("contrastive"),
            losses.ContrastiveLoss(0.9, 0.5, distance=COSINE),
            miners.BatchEasyHardMiner("easy", "semihard", distance=COSINE),
        ),
        (
            PairConfig("contrastive", positives="hard", negatives="hard", negative_margin=0.0),
            losses.ContrastiveLoss(0.9, 0.0, distance=COSINE),
            miners.BatchEasyHardMiner("hard", "hard", distance=COSINE),
        ),
        (PairConfig("contrastive", miner=False), losses.ContrastiveLoss(0.9, 0.5, distance=COSINE), None),
    ],
    ids=["multi-similarity", "multi-similarity unmined", "easy-semihard", "hard-hard", "contrastive unmined"],
)
def test_pair_losses_equal_pytorch_metric_learning(config: PairConfig, reference: Any, miner: Any) -> None:
    embeddings, labels = make_batch()
    pairs = miner(embeddings, labels) if miner else None
    assert_equal_with_gradients(
        PairLoss(DIM, config)(embeddings, labels), reference(embeddings, labels, pairs), embeddings
    )


@pytest.mark.parametrize("miner", [False, True])
@pytest.mark.parametrize("loss", ["contrastive", "multi-similarity"])
def test_memory_equals_a_batch_with_the_last_images(loss: Any, miner: bool) -> None:
    """Compare with a loss against the last 80 of 160 embeddings, without the pairs of an image with itself."""
    config = PairConfig(loss, miner=miner, positives="hard", negatives="hard", negative_margin=0.0, memory=80)
    memory, plain = PairLoss(DIM, config), PairLoss(DIM, config)
    history: list[tuple[Tensor, Tensor]] = []
    for step in range(5):
        embeddings, labels = make_batch(seed=step)
        history.append((embeddings.detach(), labels))
        references, reference_labels = (torch.cat(parts)[-80:] for parts in zip(*history, strict=True))
        a, p, b, n = (
            plain._miner(embeddings, labels, references, reference_labels)
            if miner
            else all_pairs(labels, reference_labels)
        )
        own = len(references) - len(embeddings)
        keep = p - own != a
        pairs = (a[keep], p[keep], b, n)
        expected = plain._loss(embeddings, labels, pairs, references, reference_labels)
        assert_equal_with_gradients(memory(embeddings, labels), expected, embeddings)


def all_pairs(labels: Tensor, references: Tensor) -> tuple[Tensor, ...]:
    same = labels[:, None] == references
    return (*torch.where(same), *torch.where(~same))


def test_restored_memory_continues_alike() -> None:
    config = PairConfig("contrastive", miner=False, memory=80)
    first, second = PairLoss(DIM, config), PairLoss(DIM, config)
    for step in range(4):
        first(*make_batch(seed=step))
    second.load_state_dict(first.state_dict())
    for step in range(4, 8):
        batch = make_batch(seed=step)
        assert torch.equal(first(*batch), second(*batch))


def test_losses_are_named_and_weighted() -> None:
    embeddings, labels = make_batch()
    config = StageLosses(
        HeadConfig(scale=16.0), 0.5, ProxyConfig("soft-triple", weight=2.0), PairConfig("multi-similarity", weight=3.0)
    )
    head = TrainingHead(DIM, torch.arange(1, CLASSES + 1), config)
    named = head(embeddings, labels, 0.0, 0)
    assert list(named) == ["margin", "soft_triple", "multi_similarity"]
    expected = 0.5 * named["margin"] + 2 * named["soft_triple"] + 3 * named["multi_similarity"]
    assert head.total(named).item() == pytest.approx(expected.item())
    with torch.autocast("cpu", torch.bfloat16):
        again = head(embeddings, labels, 0.0, 0)
    assert all(torch.equal(again[name], named[name]) for name in named)


def test_head_of_the_margin_alone_is_the_margin_head() -> None:
    embeddings, labels = make_batch()
    counts = torch.arange(1, CLASSES + 1)
    torch.manual_seed(0)
    head = TrainingHead(DIM, counts, StageLosses())
    torch.manual_seed(0)
    expected = MarginHead(DIM, counts, HeadConfig())(embeddings, labels, 0.5, 1)
    assert torch.equal(head.total(head(embeddings, labels, 0.5, 1)), expected)
    assert head.pair_bytes(128) == 0


def test_margin_of_a_prefix_is_that_of_a_narrow_head() -> None:
    """The class directions of a prefix are the first dimensions of the full ones, scaled to length 1."""
    embeddings, labels = make_batch()
    counts = torch.arange(1, CLASSES + 1)
    config = HeadConfig(scale=16.0, nested=(4, 8))
    head = TrainingHead(DIM, counts, StageLosses(config, 0.5))
    assert head.margin is not None
    named = head(embeddings, labels, 0.5, 1)
    assert list(named) == ["margin", "margin_4", "margin_8"]
    for width in (4, 8):
        narrow = MarginHead(width, counts, HeadConfig(scale=16.0))
        narrow.weight.data = head.margin.weight.data[:, :width].clone()
        prefix = embeddings[:, :width] / embeddings[:, :width].square().sum(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(named[f"margin_{width}"], narrow(prefix, labels, 0.5, 1))
    assert head.total(named).item() == pytest.approx(0.5 * sum(loss.item() for loss in named.values()))
    (gradient,) = torch.autograd.grad(named["margin_4"], head.margin.weight)
    assert gradient[:, :4].any()
    assert not gradient[:, 4:].any()


def test_wrong_prefixes_of_a_head_are_rejected() -> None:
    with pytest.raises(UserError, match=r"head\.nested: .* ascending order, got 8 4\."):
        HeadConfig(nested=(8, 4))
    with pytest.raises(UserError, match=r"head\.nested: only the margin softmax supports it"):
        StageLosses(HeadConfig(nested=(4,)), 0.0, pair=PairConfig("contrastive"))
    with pytest.raises(UserError, match=rf"head\.nested: expected less than the teacher's {DIM} dimensions, got {DIM}"):
        TrainingHead(DIM, torch.ones(CLASSES, dtype=torch.int64), StageLosses(HeadConfig(nested=(4, DIM))))


def test_proxies_have_their_rate_and_decay() -> None:
    config = StageLosses(proxy=ProxyConfig("soft-triple", lr=1.9e-3, weight_decay=1.5e-3))
    head = TrainingHead(DIM, torch.ones(CLASSES, dtype=torch.int64), config)
    margin, proxy = head.parameter_groups(3e-4, 0.01)
    assert (margin["lr"], margin["weight_decay"]) == (3e-4, 0.01)
    assert (proxy["lr"], proxy["weight_decay"]) == (1.9e-3, 1.5e-3)
    assert proxy["params"][0].numel() == DIM * CLASSES * 10


@pytest.mark.parametrize("memory", [0, 2048])
@pytest.mark.parametrize(("loss", "miner"), [("contrastive", True), ("contrastive", False), ("multi-similarity", True)])
def test_planned_bytes_of_pairs_hold_what_autograd_saves(loss: Any, miner: bool, memory: int) -> None:
    config = PairConfig(loss, miner=miner, positives="hard", negatives="hard", memory=memory)
    head = TrainingHead(DIM, torch.ones(64, dtype=torch.int64), StageLosses(margin_weight=0.0, pair=config))
    embeddings = F.normalize(torch.randn(128, DIM)).requires_grad_()
    labels = torch.arange(32).repeat_interleave(4)
    for _ in range(16):  # fills the memory
        head(embeddings, labels, 0.0, 0)
    with saved_storages() as storages:
        head(embeddings, labels, 0.0, 0)
    assert sum(storage.nbytes() for storage in storages.values()) <= head.pair_bytes(128) + 100_000


PAIR = PairConfig("contrastive")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProxyConfig("soft-triple", centres=0), r"proxy\.centres: expected 1 to 100, got 0"),
        (lambda: ProxyConfig(weight=-1.0), r"proxy\.weight: expected 0 to 1000, got -1\.0"),
        (lambda: ProxyConfig(gamma=float("nan")), r"proxy\.gamma: .*nan"),
        (lambda: PairConfig(positive_margin=1.5), r"pair\.positive_margin: expected -1 to 1, got 1\.5"),
        (lambda: PairConfig(memory=-1), r"pair\.memory: .*-1"),
        (lambda: PairConfig("contrastive", positives="all"), r"pair\.negatives: semihard needs one positive"),
        (lambda: PairConfig("contrastive", memory=8), r"pair\.positives: .*the image itself.*hard"),
        (lambda: MiningConfig(every=-1), r"mining\.every: .*-1"),
        (lambda: StageLosses(margin_weight=0.0), "margin_weight: no loss has a weight above 0"),
        (lambda: TrainConfig("c", "o", stages=(StageConfig("all", 1, margin_weight=0.0),)), "margin_weight: no loss"),
        (
            lambda: StageLosses(pair=PAIR).check_batch(64, 0, 640),
            r"loader\.images_per_product: contrastive .*no such pair",
        ),
        (lambda: StageLosses(pair=PAIR).check_batch(64, 1, 640), r"loader\.images_per_product: .*Set it to 2 or more"),
        (
            lambda: StageLosses(pair=PAIR).check_batch(4, 4, 640),
            r"loader\.batch_size: .*has one product.*8 or more",
        ),
        (
            lambda: StageLosses(pair=PairConfig("multi-similarity", memory=63)).check_batch(64, 2, 640),
            r"pair\.memory: expected at least 64, the images of a batch, got 63",
        ),
        (
            lambda: StageLosses(pair=PairConfig("multi-similarity", memory=641)).check_batch(64, 2, 640),
            r"pair\.memory: expected at most 640, the images of an epoch, got 641",
        ),
    ],
)
def test_values_out_of_range_are_rejected(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_batches_with_pairs_are_accepted() -> None:
    StageLosses(pair=PAIR).check_batch(8, 4, 640)
    StageLosses(pair=PairConfig("multi-similarity", memory=640)).check_batch(64, 0, 640)
    StageLosses(proxy=ProxyConfig("soft-triple")).check_batch(4, 0, 640)


def test_losses_without_a_pair_of_products_or_images_are_rejected() -> None:
    """Both losses would be 0 in each step (pytorch-metric-learning#272 and #744)."""
    with pytest.raises(UserError, match=r"^catalog: the training split has one product, .*\. Add products"):
        StageLosses().check_products([8], 0)
    memory = StageLosses(pair=PairConfig("multi-similarity", memory=64))
    with pytest.raises(
        UserError, match=r"^pair\.memory: no product .* has two images, .*Set loader\.images_per_product"
    ):
        memory.check_products([1, 1, 1], 1)
    memory.check_products([1, 2, 1], 0)
    memory.check_products([1, 1, 1], 2)
    StageLosses().check_products([1, 1], 0)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", ["contrastive", "multi-similarity"])
def test_pairs_that_are_all_satisfied_give_zero(loss: Any, precision: torch.dtype) -> None:
    """No pair is selected, also in 16 bits (pytorch-metric-learning#107 and #233)."""
    labels = torch.arange(4).repeat_interleave(2)
    embeddings = torch.eye(DIM)[labels].to(precision).requires_grad_()
    head = TrainingHead(DIM, torch.full((4,), 2), StageLosses(margin_weight=0, pair=PairConfig(loss)))
    with torch.autocast("cpu", torch.bfloat16):
        total = head.total(head(embeddings, labels, 0.0, 0))
    total.backward()
    assert (total.item(), total.dtype) == (0.0, torch.float32)
    assert embeddings.grad is not None
    assert not embeddings.grad.any()
