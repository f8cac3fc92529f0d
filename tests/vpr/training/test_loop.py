from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments.figures import ROOT
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, training_loader, validation_loader
from vpr.imaging.preprocess import Preprocess
from vpr.training.callbacks import AtomicCheckpoint
from vpr.training.config import RunConfig
from vpr.training.loop import RecallModule, decay_groups, fit, training_and_validation, warmup_cosine

PREPROCESS = Preprocess(size=16)


class Tiny(RecallModule):
    """Pool an image and project it; the loss pulls all embeddings to one direction."""

    def __init__(self, validation: Catalog, dropout: float = 0.2) -> None:
        super().__init__(PREPROCESS, validation)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8), nn.Dropout(dropout))
        self.losses: list[tuple[int, float]] = []  # step, loss
        self.sizes: list[int] = []
        self.weights: list[Tensor] = []
        self.validated: list[Tensor] = []

    def embed(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.seed_step(0, self.current_epoch, batch_index)
        loss = (self.net(self.normalise(batch["pixels"])) - 1).square().mean()
        self.losses.append((self.global_step, loss.item()))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch["rows"]))
        self.sizes.append(len(batch["rows"]))
        self.check_finite(loss, batch_index)
        return self.rescale_for_accumulation(loss, batch_index)

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(self.net[2].weight.detach().clone())

    def on_validation_epoch_end(self) -> None:
        self.validated.append(self.net[2].weight.detach().clone())
        super().on_validation_epoch_end()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def train(
    catalog: Catalog, folder: Path, epochs: int, config: RunConfig, batch: int = 16, dropout: float = 0.2
) -> tuple[Tiny, Any]:
    training, validation = (ImageDataset(catalog.select(split=s), PREPROCESS, True) for s in ("train", "validation"))
    module = Tiny(validation.catalog, dropout)
    loader = LoaderConfig(batch_size=batch)
    loaders = training_loader(training, loader, 0), validation_loader(validation, loader)
    return module, fit(module, loaders, module.net, folder, epochs, config)


@pytest.mark.parametrize("role", ["gallery", "query"])
def test_validation_split_without_a_role_is_rejected(catalog: Catalog, role: str) -> None:
    without = Catalog(catalog.table.filter(catalog.roles != role), catalog.root)
    with pytest.raises(UserError, match=f"shop: its validation split has .* none with the role {role}"):
        training_and_validation(without, "shop")


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_convolutions_train_channels_last_and_are_stored_contiguous(
    ema: float, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = []

    def add_convolution(module: Tiny, validation: Catalog, dropout: float = 0.2) -> None:
        plain(module, validation, dropout)
        module.net[0] = nn.Sequential(nn.Conv2d(3, 3, 3), module.net[0])

    def check(module: Tiny, *_: Any) -> None:
        layouts.append(module.net[0][0].weight.is_contiguous(memory_format=torch.channels_last))

    plain = Tiny.__init__
    monkeypatch.setattr(Tiny, "__init__", add_convolution)
    monkeypatch.setattr(Tiny, "on_train_batch_end", check)
    _, fitted = train(catalog, tmp_path, 2, RunConfig("32-true", ema=ema))
    assert layouts
    assert all(layouts)
    assert fitted.last["net.0.0.weight"].shape == (3, 3, 3, 3)
    for state in (fitted.last, load_file(tmp_path / "best.safetensors")):
        assert all(value.is_contiguous() for value in state.values())


def test_validation_uses_the_moving_average(catalog: Catalog, tmp_path: Path) -> None:
    module, fitted = train(catalog, tmp_path, 2, RunConfig("32-true", ema=0.7))
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
    # Training continues from the plain weights, not from the average.
    torch.testing.assert_close(module.net[2].weight.detach(), module.weights[-1])


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_resumed_training_is_bit_equal(ema: float, catalog: Catalog, tmp_path: Path) -> None:
    config = RunConfig("32-true", ema=ema)
    _, expected = train(catalog, tmp_path / "uninterrupted", 4, config)
    train(catalog, tmp_path / "interrupted", 2, config)
    module, resumed = train(catalog, tmp_path / "interrupted", 4, config)
    assert module.losses[0][0] == 2 * 4
    for name, value in expected.last.items():
        assert torch.equal(value, resumed.last[name]), name
    assert (expected.best, expected.epoch, expected.steps) == (resumed.best, resumed.epoch, resumed.steps)


def test_training_resumed_between_validations_is_bit_equal(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning restored the schedule an epoch ahead if not every epoch is validated (pytorch-lightning#20495)."""

    def with_schedule(module: Tiny) -> Any:
        return module.with_schedule(torch.optim.SGD(module.parameters(), lr=0.05), lambda step: 1 / (1 + step))

    monkeypatch.setattr(Tiny, "configure_optimizers", with_schedule)
    config = RunConfig("32-true", validate_every=3)
    _, expected = train(catalog, tmp_path / "uninterrupted", 3, config)
    train(catalog, tmp_path / "interrupted", 1, replace(config, validate_every=1))
    _, resumed = train(catalog, tmp_path / "interrupted", 3, config)
    for name, value in expected.last.items():
        assert torch.equal(value, resumed.last[name]), name


def test_finished_training_is_not_repeated(catalog: Catalog, tmp_path: Path) -> None:
    config = RunConfig("32-true", ema=0.7)
    _, first = train(catalog, tmp_path, 2, config)
    module, second = train(catalog, tmp_path, 2, config)
    assert module.losses == []
    assert all(torch.equal(first.last[name], second.last[name]) for name in first.last)
    assert (first.best, first.epoch) == (second.best, second.epoch)


def test_last_epoch_is_always_validated(catalog: Catalog, tmp_path: Path) -> None:
    module, fitted = train(catalog, tmp_path, 3, RunConfig("32-true", validate_every=2))
    assert len(module.validated) == 2
    assert torch.equal(module.validated[-1], module.weights[-1])
    assert fitted.epoch in (2, 3)
    assert load_file(tmp_path / "best.safetensors")["2.weight"].shape == (8, 48)


@pytest.mark.parametrize(
    ("recalls", "epochs"), [([0.125, 0.25, 0.25, 0.125, 0.5, 0.5], 4), ([0.125, 0.25, 0.125, 0.5, 0.5, 0.25], 6)]
)
def test_training_ends_on_a_plateau(
    recalls: list[float], epochs: int, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two validations in a row without a higher recall; an equal one is not higher."""
    values = iter(recalls)
    monkeypatch.setattr(
        "vpr.training.loop.score_split", lambda *_: SimpleNamespace(recall_at_1=next(values), recall_at_5=1.0, map=1.0)
    )
    module, fitted = train(catalog, tmp_path, 8, RunConfig("32-true", patience=2, validate_every=1))
    assert len(module.validated) == epochs
    assert fitted.steps == len(module.losses) == epochs * 4
    assert (fitted.best, fitted.epoch) == (max(recalls[:epochs]), 1 + int(np.argmax(recalls[:epochs])))
    # Run again, it is complete: no step and no validation follow.
    again, second = train(catalog, tmp_path, 8, RunConfig("32-true", patience=2, validate_every=1))
    assert (again.losses, again.validated) == ([], [])
    assert (second.best, second.epoch, second.steps) == (fitted.best, fitted.epoch, fitted.steps)
    assert all(torch.equal(fitted.last[name], second.last[name]) for name in fitted.last)


def test_plateau_before_a_last_epoch_without_validation(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = SimpleNamespace(recall_at_1=0.5, recall_at_5=1.0, map=1.0)
    monkeypatch.setattr("vpr.training.loop.score_split", lambda *_: scores)
    module, fitted = train(catalog, tmp_path, 7, RunConfig("32-true", patience=1, validate_every=2))
    assert (len(module.validated), fitted.steps, fitted.epoch) == (2, 4 * 4, 2)


def test_logged_loss_is_the_epoch_mean(catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, _ = train(catalog, tmp_path, 3, RunConfig("32-true", validate_every=2))
    *lines, after = capsys.readouterr().err.splitlines()
    per_epoch = len(module.losses) // 3
    for number, line in enumerate(lines):
        part = slice(number * per_epoch, (number + 1) * per_epoch)
        mean = np.average([loss for _, loss in module.losses[part]], weights=module.sizes[part])
        assert line.startswith(f"  epoch {number + 1}/3  loss {mean:.3f}")
    assert ["recall@1" in line for line in lines] == [False, True, False]
    assert "last weights  recall@1 " in after


def test_accumulated_batches_equal_one_large_batch(catalog: Catalog, tmp_path: Path) -> None:
    _, accumulated = train(catalog, tmp_path / "two", 2, RunConfig("32-true", accumulate=2), batch=16, dropout=0)
    _, large = train(catalog, tmp_path / "one", 2, RunConfig("32-true"), batch=32, dropout=0)
    assert accumulated.steps == large.steps == 2 * 2
    torch.testing.assert_close(accumulated.last, large.last, rtol=1e-5, atol=1e-7)


def test_short_accumulation_window_is_a_mean(catalog: Catalog, tmp_path: Path) -> None:
    module, fitted = train(catalog, tmp_path, 1, RunConfig("32-true", accumulate=3, clip=0.0), dropout=0)
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


def test_non_finite_loss_stops_training(catalog: Catalog, tmp_path: Path) -> None:
    training = ImageDataset(catalog.select(split="train"), PREPROCESS, True)
    module = Tiny(catalog.select(split="validation"))
    with torch.no_grad():
        module.net[2].bias.fill_(torch.inf)
    loader = training_loader(training, LoaderConfig(batch_size=16), 0)
    with pytest.raises(UserError, match=r"not finite at step 0\. Lower the learning rate"):
        fit(module, (loader, loader), module.net, tmp_path, 1, RunConfig("32-true"))


def test_interrupted_training_stays_an_interrupt(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tiny, "on_train_batch_end", interrupt)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(catalog, tmp_path, 2, RunConfig())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from here on


def test_terminated_training_fails(catalog: Catalog, tmp_path: Path) -> None:
    """A scheduler that stops a job sends SIGTERM; the next command of a script must not run.

    The signal goes to a process that only trains, since it could end the process of all tests.
    """
    assert catalog.artifact is not None
    code = (
        "import signal, sys; from pathlib import Path; from tests.vpr.training.test_loop import RunConfig, Tiny, train;"
        "from vpr.data.catalog import load_catalog;"
        "Tiny.on_train_batch_end = lambda *_: signal.raise_signal(signal.SIGTERM);"
        "train(load_catalog(sys.argv[1]), Path(sys.argv[2]), 2, RunConfig())"
    )
    command = [sys.executable, "-c", code, str(catalog.artifact.path), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 143, ended.stderr


def test_checkpoint_write_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpoint().save_checkpoint({"step": 1}, path)
    with pytest.raises(AttributeError):  # an unpicklable object interrupts the write
        AtomicCheckpoint().save_checkpoint({"step": 2, "lost": lambda: 0}, path)
    assert AtomicCheckpoint().load_checkpoint(path, weights_only=True) == {"step": 1}


class _Opener:
    """Object whose unpickling runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_checkpoint_with_code_is_rejected(catalog: Catalog, tmp_path: Path) -> None:
    torch.save({"epoch": _Opener(tmp_path / "owned")}, tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError, match=r"Weights only load failed"):
        train(catalog, tmp_path, 2, RunConfig("32-true"))
    assert not (tmp_path / "owned").exists()


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    rates = [warmup_cosine(step, 20, 5) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert np.diff(rates[5:]).max() < 0
    assert rates[20] == pytest.approx(0)


def test_vectors_have_no_weight_decay() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    matrices, vectors = decay_groups(list(module.parameters()), 0.1, 0.05)
    assert [p.ndim for p in matrices["params"]] == [2]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.0)
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1]
    token = nn.Parameter(torch.zeros(1, 1, 8))
    assert [group["weight_decay"] for group in decay_groups([token], 0.1, 0.05)] == [0.0]


def test_checkpoint_names_callbacks_by_state_key(catalog: Catalog, tmp_path: Path) -> None:
    train(catalog, tmp_path, 1, RunConfig("32-true", ema=0.7))
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {"best_weights", "ema", "training_timer"} <= states.keys()


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_missing_tracker_is_reported(
    tracker: str, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"lightning.pytorch.loggers.{tracker}._{tracker.upper()}_AVAILABLE", False)
    with pytest.raises(UserError, match=rf"run\.tracker: {tracker} is not installed\. Run `pip install {tracker}`"):
        train(catalog, tmp_path, 1, RunConfig("32-true", tracker=tracker))


def test_csv_and_tensorboard_logs_are_written(catalog: Catalog, tmp_path: Path) -> None:
    train(catalog, tmp_path, 1, RunConfig("32-true"))
    train(catalog, tmp_path, 2, RunConfig("32-true"))
    assert "val_recall_at_1" in (tmp_path / "csv-0" / "metrics.csv").read_text()
    assert "val_recall_at_1" in (tmp_path / "csv-1" / "metrics.csv").read_text()
    assert list((tmp_path / "tb").glob("events.out.tfevents*"))
