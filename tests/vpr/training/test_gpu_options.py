"""Behaviour of the training loop on a GPU, as far as a CPU can show it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vpr.training.test_loop import PREPROCESS, Tiny
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.data.loaders import ImageDataset, training_loader, validation_loader
from vpr.training.compile import reraise_compile_errors
from vpr.training.config import RunConfig
from vpr.training.ema import Ema
from vpr.training.loop import _share_signals_rarely, best_precision, fit


class FusedTiny(Tiny):
    """Module with the optimiser and the logging of a training on a GPU."""

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = (self.net(self.normalise(batch["pixels"])) - 1).square().mean()
        self.log_losses({"loss": loss}, len(batch["rows"]))
        self.check_finite(loss, batch_index)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


def fit_fused(catalog: Catalog, folder: Path, config: RunConfig, module: Tiny | None = None, epochs: int = 1) -> Tiny:
    training, validation = (ImageDataset(catalog.select(split=s), PREPROCESS, True) for s in ("train", "validation"))
    loader = LoaderConfig(batch_size=2)
    loaders = training_loader(training, loader, 0), validation_loader(validation, loader)
    module = module or FusedTiny(validation.catalog, 0.0)
    fit(module, loaders, module.net, folder, epochs, config)
    return module


class Network(torch.nn.Module):
    """Layers and a GELU. The layers alone call library functions, which need no compiler."""

    def __init__(self, layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.layers(x))


class CountReads(TorchDispatchMode):
    """Count the values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.name().startswith("aten::_local_scalar_dense")
        return function(*args, **(kwargs or {}))


class CountedTiny(FusedTiny):
    """Module that notes how many values have been read when a batch begins."""

    def __init__(self, validation: Catalog, reads: CountReads) -> None:
        super().__init__(validation, 0.0)
        self.reads, self.counts = reads, list[int]()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.counts.append(self.reads.count)


def test_loop_reads_the_loss_every_tenth_step_only(catalog: Catalog, tmp_path: Path) -> None:
    """Trainer, clipping, fused optimiser, moving average, callbacks and loggers read nothing else."""
    reads = CountReads()
    module = CountedTiny(catalog.select(split="validation"), reads)
    with reads:
        fit_fused(catalog, tmp_path, RunConfig("32-true", ema=0.9), module)
    by_step = torch.tensor(module.counts).diff().tolist()
    assert len(by_step) == 31
    # Batches 0, 10, 20 and 30 check that the loss is finite; batches 9, 19 and 29 log it.
    assert [step for step, count in enumerate(by_step) if count] == [0, 9, 10, 19, 20, 29, 30]
    assert max(by_step) == 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fused_optimiser_is_clipped(precision: Any, catalog: Catalog, tmp_path: Path) -> None:
    norms: list[float] = []

    class Watched(FusedTiny):
        def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))

    module = Watched(catalog.select(split="validation"), 0.0)
    fit_fused(catalog, tmp_path, RunConfig(precision, clip=1e-3), module)
    assert norms
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("device", "scaler", "mesh", "kind", "is_fused"),
    [
        ("cuda", None, None, torch.optim.AdamW, True),
        ("cuda", None, None, torch.optim.SGD, True),
        ("cuda", "scaler", None, torch.optim.AdamW, None),
        ("cuda", None, "mesh", torch.optim.AdamW, True),
        ("cuda", None, "mesh", torch.optim.SGD, None),
        ("cpu", None, None, torch.optim.AdamW, True),
        ("cpu", None, None, torch.optim.SGD, True),
        ("cpu", None, "mesh", torch.optim.AdamW, None),
    ],
)
def test_fused_optimisers(
    device: str, scaler: Any, mesh: Any, kind: Any, is_fused: bool | None, catalog: Catalog
) -> None:
    module = Tiny(catalog)
    strategy = SimpleNamespace(root_device=torch.device(device))
    plugin: Any = SimpleNamespace(scaler=scaler)
    module._trainer = SimpleNamespace(precision_plugin=plugin, strategy=strategy)  # type: ignore[assignment]
    module._device_mesh = mesh
    groups = [{"params": list(module.parameters()), "lr": 0.1}]
    assert module.build_optimizer(kind, groups).defaults["fused"] is is_fused


def test_processes_exchange_losses_once_per_epoch(catalog: Catalog) -> None:
    module, logged = Tiny(catalog), dict[str, dict[str, Any]]()
    module._trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
    module.log_dict = lambda values, **options: logged.update(dict.fromkeys(values, options))  # type: ignore[method-assign]
    module.log_losses({"loss": torch.zeros(())}, 4)
    assert logged["loss_step"]["on_step"]
    assert not logged["loss_step"].get("sync_dist", False)
    assert logged["loss_epoch"]["sync_dist"]
    assert not logged["loss_epoch"]["on_step"]


def test_processes_exchange_signals_every_tenth_batch() -> None:
    shared: list[int] = []
    loop = SimpleNamespace(batch_idx=-1)
    loop._broadcast_sigterm_tensor = lambda: shared.append(loop.batch_idx + 1)
    _share_signals_rarely(SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop)))  # type: ignore[arg-type]
    for batch in range(25):
        loop._broadcast_sigterm_tensor()
        loop.batch_idx = batch
    assert shared == [0, 10, 20]


@pytest.mark.parametrize(("major", "minor", "precision"), [(7, 5, "32-true"), (8, 0, "bf16-mixed")])
def test_bf16_needs_hardware_that_multiplies_it(
    major: int, minor: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own check runs, on a recorded GPU; Turing (7.5) stores bf16 but does not multiply it."""
    properties = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert best_precision() == precision


def test_average_of_all_types_of_values() -> None:
    """Compare the grouped update with one for each tensor, in floats, halves and integers."""
    module = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    for name, dtype in (("a", torch.float32), ("b", torch.float16), ("c", torch.float64)):
        module.register_buffer(name, torch.randn(7, generator=generator).to(dtype))
    module.register_buffer("steps", torch.tensor(3))
    ema = Ema(0.9)
    ema.on_train_start(None, module)  # type: ignore[arg-type]
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    for step in range(1, 4):
        for name, value in module.state_dict().items():
            value.add_(1)
            decay = min(0.9, step / (9 + step))
            expected[name] = value.clone() if name == "steps" else torch.lerp(expected[name], value, 1 - decay)
        ema.on_train_batch_end(SimpleNamespace(global_step=step), module)  # type: ignore[arg-type]
    for name, value in expected.items():
        assert torch.equal(ema.shadow[name], value), name


def test_compiled_networks_are_not_sharded() -> None:
    with pytest.raises(UserError, match=r"run\.compile: sharded networks cannot be compiled"):
        RunConfig(strategy="fsdp", compile=True)


def test_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", ("missing-compiler",))
    expected = r"run\.compile: PyTorch cannot compile the network \(No working C\+\+ compiler.* Install g\+\+"
    with pytest.raises(UserError, match=expected), reraise_compile_errors():
        cpp_builder.get_cpp_compiler()
    with pytest.raises(ValueError, match="a bug"), reraise_compile_errors():
        raise ValueError("a bug")


@pytest.mark.slow
def test_compiled_training_equals_eager_training(catalog: Catalog, tmp_path: Path) -> None:
    weights = []
    for is_compiled in (False, True):
        torch.compiler.reset()
        module = FusedTiny(catalog.select(split="validation"), 0.0)
        module.net = Network(module.net)  # type: ignore[assignment]
        fit_fused(catalog, tmp_path / str(is_compiled), RunConfig("32-true", compile=is_compiled), module, epochs=2)
        weights.append(module.net.layers[2].weight.detach())  # type: ignore[union-attr, index]
        assert set(module.net.state_dict()) == {"layers.2.weight", "layers.2.bias"}  # the names of the weights stay
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)
