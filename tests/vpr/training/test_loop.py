from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, training_loader, validation_loader
from vpr.imaging.preprocess import Preprocess
from vpr.training.callbacks import AtomicCheckpoint
from vpr.training.config import RunConfig
from vpr.training.loop import RecallModule, decay_groups, fit, warmup_cosine

PREPROCESS = Preprocess(size=16)


class Tiny(RecallModule):
    """Pools an image and projects it; its loss pulls the vectors to one direction."""

    def __init__(self, validation: Catalog, dropout: float = 0.2) -> None:
        super().__init__(PREPROCESS, validation)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8), nn.Dropout(dropout))
        self.seen: list[tuple[int, float]] = []
        self.sizes: list[int] = []
        self.weights: list[Tensor] = []
        self.validated: list[Tensor] = []

    def embed(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        self.seed_step(0, self.current_epoch, number)
        loss = (self.net(self.normalise(batch["pixels"])) - 1).square().mean()
        self.seen.append((self.global_step, loss.item()))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch["rows"]))
        self.sizes.append(len(batch["rows"]))
        return self.of_step(loss, number)

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(self.net[2].weight.detach().clone())

    def on_validation_epoch_end(self) -> None:
        self.validated.append(self.net[2].weight.detach().clone())
        super().on_validation_epoch_end()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def run(
    catalog: Catalog, folder: Path, epochs: int, config: RunConfig, batch: int = 16, dropout: float = 0.2
) -> tuple[Tiny, Any]:
    training, validation = (ImageDataset(catalog.select(split=s), PREPROCESS, True) for s in ("train", "validation"))
    module = Tiny(validation.catalog, dropout)
    loader = LoaderConfig(batch_size=batch)
    loaders = training_loader(training, loader, 0), validation_loader(validation, loader)
    return module, fit(module, loaders, module.net, folder, epochs, config)


def test_the_average_follows_its_formula_and_is_what_is_validated(catalog: Catalog, tmp_path: Path) -> None:
    module, fitted = run(catalog, tmp_path, 2, RunConfig("32-true", ema=0.7))
    torch.manual_seed(0)
    average = Tiny(catalog).net[2].weight.detach().double()
    after = []
    for n, weight in enumerate(module.weights):
        decay = min(0.7, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight.double()
        after.append(average.float())
    per_epoch = len(module.weights) // 2
    torch.testing.assert_close(module.validated, [after[per_epoch - 1], after[-1]], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fitted.last["net.2.weight"], after[-1], rtol=1e-5, atol=1e-7)
    # The training itself goes on from the plain weights.
    torch.testing.assert_close(module.net[2].weight.detach(), module.weights[-1])


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_a_resumed_run_with_dropout_is_bit_equal(ema: float, catalog: Catalog, tmp_path: Path) -> None:
    config = RunConfig("32-true", ema=ema)
    _, whole = run(catalog, tmp_path / "whole", 4, config)
    run(catalog, tmp_path / "broken", 2, config)
    module, resumed = run(catalog, tmp_path / "broken", 4, config)
    assert module.seen[0][0] == 2 * 4
    for name, value in whole.last.items():
        assert torch.equal(value, resumed.last[name]), name
    assert (whole.best, whole.epoch, whole.steps) == (resumed.best, resumed.epoch, resumed.steps)


def test_a_finished_run_gives_its_weights_without_training_again(catalog: Catalog, tmp_path: Path) -> None:
    config = RunConfig("32-true", ema=0.7)
    _, first = run(catalog, tmp_path, 2, config)
    module, second = run(catalog, tmp_path, 2, config)
    assert module.seen == []
    assert all(torch.equal(first.last[name], second.last[name]) for name in first.last)
    assert (first.best, first.epoch) == (second.best, second.epoch)


def test_the_last_epoch_is_validated_whatever_the_interval(catalog: Catalog, tmp_path: Path) -> None:
    module, fitted = run(catalog, tmp_path, 3, RunConfig("32-true", validate_every=2))
    assert len(module.validated) == 2
    assert torch.equal(module.validated[-1], module.weights[-1])
    assert fitted.epoch in (2, 3)
    assert load_file(tmp_path / "best.safetensors")["2.weight"].shape == (8, 48)


def test_the_printed_loss_is_the_epoch_s_mean(
    catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _ = run(catalog, tmp_path, 3, RunConfig("32-true", validate_every=2))
    *lines, after = capsys.readouterr().err.splitlines()
    per_epoch = len(module.seen) // 3
    for number, line in enumerate(lines):
        part = slice(number * per_epoch, (number + 1) * per_epoch)
        mean = np.average([loss for _, loss in module.seen[part]], weights=module.sizes[part])
        assert line.startswith(f"  epoch {number + 1}/3  loss {mean:.3f}")
    assert [("val_recall_at_1" in line) for line in lines] == [False, True, False]
    assert "the last weights  val_recall_at_1 " in after


def test_accumulated_batches_make_the_step_of_one_large_batch(catalog: Catalog, tmp_path: Path) -> None:
    _, accumulated = run(catalog, tmp_path / "two", 2, RunConfig("32-true", accumulate=2), batch=16, dropout=0)
    _, large = run(catalog, tmp_path / "one", 2, RunConfig("32-true"), batch=32, dropout=0)
    assert accumulated.steps == large.steps == 2 * 2
    torch.testing.assert_close(accumulated.last, large.last, rtol=1e-5, atol=1e-7)


def test_the_last_step_of_an_epoch_takes_the_mean_of_what_is_left(catalog: Catalog, tmp_path: Path) -> None:
    module, fitted = run(catalog, tmp_path, 1, RunConfig("32-true", accumulate=3, clip=0.0), dropout=0)
    net = Tiny(catalog, 0).net
    training = ImageDataset(catalog.select(split="train"), PREPROCESS, True)
    batches = list(training_loader(training, LoaderConfig(batch_size=16), 0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for part in (batches[:3], batches[3:]):
        losses = [(net(module.normalise(batch["pixels"])) - 1).square().mean() for batch in part]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert fitted.steps == 2
    torch.testing.assert_close(fitted.last["net.2.weight"], net[2].weight.detach(), rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_the_training(catalog: Catalog, tmp_path: Path) -> None:
    training = ImageDataset(catalog.select(split="train"), PREPROCESS, True)
    module = Tiny(catalog.select(split="validation"))
    with torch.no_grad():
        module.net[2].bias.fill_(torch.inf)
    loader = training_loader(training, LoaderConfig(batch_size=16), 0)
    with pytest.raises(UserError, match="not finite at step 0: lower the learning rate"):
        fit(module, (loader, loader), module.net, tmp_path, 1, RunConfig("32-true"))


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpoint().save_checkpoint({"step": 1}, path)
    with pytest.raises(AttributeError):  # what cannot be written stands for a kill half way
        AtomicCheckpoint().save_checkpoint({"step": 2, "lost": lambda: 0}, path)
    assert AtomicCheckpoint().load_checkpoint(path, weights_only=True) == {"step": 1}


class _Opener:
    """What a pickle that runs code holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    torch.save({"epoch": _Opener(tmp_path / "owned")}, tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError, match=r"Weights only load failed"):
        run(catalog, tmp_path, 2, RunConfig("32-true"))
    assert not (tmp_path / "owned").exists()


def test_rates_warm_up_and_fall_to_nothing() -> None:
    rates = [warmup_cosine(step, 20, 5) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert np.diff(rates[5:]).max() < 0
    assert rates[20] == pytest.approx(0)


def test_vectors_have_no_decay_and_frozen_parameters_no_group() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    matrices, vectors = decay_groups(list(module.parameters()), 0.1, 0.05)
    assert [p.ndim for p in matrices["params"]] == [2]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    token = nn.Parameter(torch.zeros(1, 1, 8))
    assert [group["weight_decay"] for group in decay_groups([token], 0.1, 0.05)] == [0.0]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(
    tracker: str, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"lightning.pytorch.loggers.{tracker}._{tracker.upper()}_AVAILABLE", False)
    with pytest.raises(UserError, match=rf"run\.tracker: {tracker} is not installed: pip install {tracker}"):
        run(catalog, tmp_path, 1, RunConfig("32-true", tracker=tracker))


def test_csv_and_tensorboard_logs_are_always_there(catalog: Catalog, tmp_path: Path) -> None:
    run(catalog, tmp_path, 1, RunConfig("32-true"))
    run(catalog, tmp_path, 2, RunConfig("32-true"))
    assert "val_recall_at_1" in (tmp_path / "csv-0" / "metrics.csv").read_text()
    assert "val_recall_at_1" in (tmp_path / "csv-1" / "metrics.csv").read_text()
    assert list((tmp_path / "tb").glob("events.out.tfevents*"))
