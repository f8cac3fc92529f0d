from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from teacher.averaging import average
from teacher.config import SoupConfig, TowerConfig
from teacher.model import Teacher, build_teacher, load_teacher, read_tower
from teacher.scorer import Scorer, Weights, recalibrate_batch_norm
from teacher.soup import common_embedding, soup
from tests.catalogs import write_catalog
from vpr.artifacts.card import Embedding
from vpr.artifacts.store import Artifact, load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.cli import main
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import embed, read_batches, score_split, torch_forward

VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1},
}
NORMED = TowerConfig(name="sample", pretrained="", image_size=32)


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> TowerConfig:
    """Tower without BatchNorm, initialised from random open_clip weights."""
    folder = tmp_path_factory.mktemp("tower")
    (folder / "vit.json").write_text(json.dumps(VIT))
    return TowerConfig(name=str(folder / "vit.json"), pretrained=str(clip_weights(VIT, folder / "vit.safetensors")))


def clip_weights(tower: dict[str, Any], path: Path) -> Path:
    """Write random weights and BatchNorm means of an open_clip model."""
    open_clip.factory._MODEL_CONFIGS["test-tower"] = tower
    torch.manual_seed(5)
    state = open_clip.create_model("test-tower", load_weights=False).state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def initial_weights(config: TowerConfig) -> Weights:
    torch.manual_seed(3)
    return build_teacher(config, read_tower(config.name), load_pretrained=True)[0].state_dict()


def add_noise(weights: Weights, seed: int, size: float) -> Weights:
    """Add noise of ``size`` times each matrix's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + size * value.std() * torch.randn(value.shape, generator=generator) if value.ndim > 1 else value
        for name, value in weights.items()
    }


def reflect(weights: Weights, noisy: Weights) -> Weights:
    """Return the reflection of noisy weights, so that the mean of both is ``weights``."""
    return {name: 2 * value - noisy[name] if value.ndim > 1 else value for name, value in weights.items()}


def write_teacher(path: Path, config: TowerConfig, weights: Weights, catalog: Catalog, **extra: Any) -> str:
    """Write a teacher artifact; ``in_config`` and ``in_catalog`` override values of its card."""
    tower = read_tower(config.name)
    model, preprocess = build_teacher(config, tower, load_pretrained=False)
    model.load_state_dict(weights)
    values = {"tower": asdict(config), "network": asdict(config), "tower_config": tower}
    assert catalog.artifact is not None
    parents = [catalog.artifact.as_parent("catalog")]
    with write_artifact(path, "teacher", {**values, **extra.get("in_config", {})}, parents) as writer:
        save_file({name: value.contiguous() for name, value in weights.items()}, writer.path / "model.safetensors")
        writer.preprocess = preprocess
        writer.embedding = Embedding(dim=model.embedding_dim, normalised=True, dtype="float32")
        writer.catalog = {**catalog.summary(), **extra.get("in_catalog", {})}
        writer.metrics = {"val_recall_at_1": 0.5}
    return str(path)


def make_config(catalog: Catalog, output: Path, *models: str, **changes: Any) -> SoupConfig:
    assert catalog.artifact is not None
    method = "wise-ft" if len(models) == 1 else "greedy"
    return SoupConfig(models, str(catalog.artifact.path), str(output), **{"method": method, **changes})


def validation_recall(weights: Weights, config: TowerConfig, catalog: Catalog) -> float:
    """Return validation recall@1 by embedding the catalogue."""
    model, preprocess = build_teacher(config, read_tower(config.name), load_pretrained=False)
    model.load_state_dict(weights)
    part = catalog.select(split="validation")
    return score_split(part, embed(part, preprocess, torch_forward(model.eval()))).recall_at_1


def metrics(path: Path) -> dict[str, Any]:
    return load_artifact(path, "teacher").card.metrics


def test_average_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        {"w": torch.randn(3, 4, generator=generator), "n": torch.tensor(number), "b": torch.full((2,), 1e-8 + number)}
        for number in (7, 2, 4)
    ]
    shares = [0.5, 0.3, 0.2]
    copies = [{name: value.clone() for name, value in part.items()} for part in parts]
    mean = average(iter(parts), shares)
    for name in ("w", "b"):
        flat = [part[name].flatten().tolist() for part in parts]
        expected = [
            sum(share * value for share, value in zip(shares, values, strict=True))
            for values in zip(*flat, strict=True)
        ]
        torch.testing.assert_close(
            mean[name].flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0
        )
    assert mean["n"].item() == 7  # counters are copied from the first
    assert all(torch.equal(part[name], copy[name]) for part, copy in zip(parts, copies, strict=True) for name in part)


def test_batch_norm_statistics_equal_a_numpy_pass() -> None:
    """The second layer's statistics depend on the first; neither sees dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(4)).eval()
    first, second = model[1], model[4]
    assert isinstance(first, nn.BatchNorm1d)
    assert isinstance(second, nn.BatchNorm1d)
    first.weight.data.uniform_(0.5, 2)
    first.bias.data.normal_()
    momentum = first.momentum
    batches = [torch.randn(6, 5) * scale for scale in (1, 3, 0.5)]
    recalibrate_batch_norm(model, [first, second], batches)
    weight, bias = model[0].weight.double().detach().numpy(), model[0].bias.double().detach().numpy()
    gain, shift = first.weight.double().detach().numpy(), first.bias.double().detach().numpy()
    means, variances = ([], []), ([], [])  # type: ignore[var-annotated]
    for batch in batches:
        x = batch.double().numpy() @ weight.T + bias
        mean, biased = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
        y = np.maximum((x - mean) / np.sqrt(biased + first.eps) * gain + shift, 0)
        for layer, values in enumerate((x, y)):
            means[layer].append(values.mean(0))
            variances[layer].append(((values - values.mean(0)) ** 2).sum(0) / (len(values) - 1))
    for layer, norm in enumerate((first, second)):
        np.testing.assert_allclose(norm.running_mean, np.mean(means[layer], axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.running_var, np.mean(variances[layer], axis=0), rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in model.modules())
    assert first.momentum == momentum


def test_soup_statistics_come_from_training_images(catalog: Catalog, tmp_path: Path) -> None:
    """Compare with ``update_bn`` of torch, in one batch of all images."""
    start = initial_weights(NORMED)
    models = [write_teacher(tmp_path / str(s), NORMED, add_noise(start, s, 0.3), catalog) for s in (1, 2)]
    soup(make_config(catalog, tmp_path / "soup", *models, method="uniform", batch_size=64))
    loaded, artifact = load_teacher(tmp_path / "soup")
    expected, preprocess = build_teacher(NORMED, read_tower("sample"), load_pretrained=False)
    weights = [load_file(Path(model) / "model.safetensors") for model in models]
    expected.load_state_dict({name: (value + weights[1][name]) / 2 for name, value in weights[0].items()})
    train = catalog.select(split="train")
    update_bn((torch.from_numpy(batch) for batch in read_batches(train, preprocess, 64)), expected)
    for name, value in expected.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert artifact.card.metrics["val_recall_at_1"] == validation_recall(loaded.state_dict(), NORMED, catalog)


def zero_shot_case(kind: str, vit: TowerConfig, folder: Path) -> TowerConfig:
    if kind == "vit":
        return replace(vit, embedding_dim=24)
    return replace(NORMED, pretrained=str(clip_weights(read_tower("sample"), folder / "clip.safetensors")))


@pytest.mark.parametrize("kind", ["vit", "batch norm"])
def test_wise_ft_includes_both_ends(kind: str, vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    config = zero_shot_case(kind, vit, tmp_path)
    tuned = add_noise(initial_weights(config), 1, 0.5)
    if kind == "batch norm":
        tuned = {name: value + 0.01 if name.endswith("running_mean") else value for name, value in tuned.items()}
    model = write_teacher(tmp_path / "tuned", config, tuned, catalog)
    for alpha in (0.0, 1.0):
        soup(make_config(catalog, tmp_path / f"soup-{alpha}", model, alphas=(alpha,)))
    at_one, _ = load_teacher(tmp_path / "soup-1.0")
    assert all(torch.equal(value, tuned[name]) for name, value in at_one.state_dict().items())

    tower = read_tower(config.name)
    open_clip.factory._MODEL_CONFIGS["test-tower"] = tower
    clip = open_clip.create_model("test-tower", pretrained=config.pretrained, force_image_size=32).eval()
    x = torch.randn(4, 3, 32, 32)
    at_zero, _ = load_teacher(tmp_path / "soup-0.0")
    with torch.inference_mode():
        expected = clip.visual(x)
        if "project.linear.weight" in tuned:  # has no zero-shot weights, stays fine-tuned
            expected = expected @ tuned["project.linear.weight"].T
        torch.testing.assert_close(at_zero(x), nn.functional.normalize(expected, dim=1))


def test_wise_ft_selects_the_best_alpha(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    """Zero-shot and fine-tuned weights are off a good network in opposite directions."""
    good = initial_weights(vit)
    off = add_noise(good, 1, 4.0)
    visual = {name: value.contiguous() for name, value in off.items() if name.startswith("visual.")}
    clip = load_file(vit.pretrained) | visual
    save_file(clip, tmp_path / "off.safetensors")
    config = replace(vit, pretrained=str(tmp_path / "off.safetensors"))
    model = write_teacher(tmp_path / "tuned", config, reflect(good, off), catalog)
    soup(make_config(catalog, tmp_path / "soup", model, alphas=(0.0, 0.25, 0.5, 1.0)))
    card_metrics = metrics(tmp_path / "soup")
    rows = {row["alpha"]: row for row in card_metrics["candidates"]}
    tuned = load_file(Path(model) / "model.safetensors")
    for alpha, row in rows.items():
        expected = {name: (1 - alpha) * off[name] + alpha * value for name, value in tuned.items()}
        assert row["val_recall_at_1"] == pytest.approx(validation_recall(expected, config, catalog))
    best = max(row["val_recall_at_1"] for row in rows.values())
    assert card_metrics["alpha"] == 0.5
    assert rows[0.5]["val_recall_at_1"] == best > max(rows[0.0]["val_recall_at_1"], rows[1.0]["val_recall_at_1"])
    assert (
        validation_recall(load_file(tmp_path / "soup" / "model.safetensors"), config, catalog)
        == card_metrics["val_recall_at_1"]
    )


def test_uniform_soup_is_the_mean(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    start = initial_weights(vit)
    parts = [add_noise(start, seed, 0.5) for seed in (1, 2, 3)]
    models = [write_teacher(tmp_path / str(i), vit, part, catalog) for i, part in enumerate(parts)]
    soup(make_config(catalog, tmp_path / "soup", *models, method="uniform"))
    weights = load_file(tmp_path / "soup" / "model.safetensors")
    for name, value in weights.items():
        expected = np.mean([part[name].double().numpy() for part in parts], axis=0).astype(np.float32)
        torch.testing.assert_close(value, torch.from_numpy(expected), rtol=1e-6, atol=0)
    rows = metrics(tmp_path / "soup")["candidates"]
    assert [row["models"] for row in rows] == [[models[0]], [models[1]], [models[2]], models]
    recalls = [row["val_recall_at_1"] for row in rows]
    assert recalls == [validation_recall(part, vit, catalog) for part in [*parts, weights]]


def test_greedy_soup_leaves_out_a_harmful_model(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    """Average two models whose mean is better than both; leave out one with large noise."""
    good = initial_weights(vit)
    first = add_noise(good, 1, 4.0)
    harmful = {name: -20 * value for name, value in add_noise(good, 9, 4.0).items()}
    named = {"harmful": harmful, "first": first, "second": reflect(good, first)}
    models = [write_teacher(tmp_path / name, vit, weights, catalog) for name, weights in named.items()]
    soup(make_config(catalog, tmp_path / "soup", *models))
    card_metrics = metrics(tmp_path / "soup")
    assert sorted(card_metrics["models"]) == [str(tmp_path / "first"), str(tmp_path / "second")]
    for name, value in load_file(tmp_path / "soup" / "model.safetensors").items():
        torch.testing.assert_close(value, (named["first"][name] + named["second"][name]) / 2)
    assert len(card_metrics["candidates"]) == 3 + 2


def test_greedy_soup_keeps_ties_with_equal_shares(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    start = initial_weights(vit)
    parts = [add_noise(start, seed, 1e-3) for seed in (1, 2, 3, 4)]
    models = [write_teacher(tmp_path / str(i), vit, part, catalog) for i, part in enumerate(parts)]
    soup(make_config(catalog, tmp_path / "soup", *models))
    card_metrics = metrics(tmp_path / "soup")
    assert len({row["val_recall_at_1"] for row in card_metrics["candidates"]}) == 1
    assert sorted(card_metrics["models"]) == models
    for name, value in load_file(tmp_path / "soup" / "model.safetensors").items():
        expected = np.mean([part[name].double().numpy() for part in parts], axis=0)
        torch.testing.assert_close(value.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_soup_is_not_below_its_best_member(
    seed: int, vit: TowerConfig, catalog: Catalog, tmp_path: Path
) -> None:
    start = initial_weights(vit)
    sizes = (0.5, 3.0, 1.0)
    models = [
        write_teacher(tmp_path / str(i), vit, add_noise(start, 10 * seed + i, size), catalog)
        for i, size in enumerate(sizes)
    ]
    soup(make_config(catalog, tmp_path / "soup", *models))
    card_metrics = metrics(tmp_path / "soup")
    members = [row["val_recall_at_1"] for row in card_metrics["candidates"][:3]]
    assert card_metrics["val_recall_at_1"] >= max(members)
    weights = load_file(tmp_path / "soup" / "model.safetensors")
    assert validation_recall(weights, vit, catalog) == card_metrics["val_recall_at_1"]


def test_greedy_soup_of_one_keeps_its_statistics(catalog: Catalog, tmp_path: Path) -> None:
    start = initial_weights(NORMED)
    broken = {name: -30 * value if value.ndim > 1 else value for name, value in add_noise(start, 2, 3.0).items()}
    models = [write_teacher(tmp_path / n, NORMED, w, catalog) for n, w in (("start", start), ("broken", broken))]
    soup(make_config(catalog, tmp_path / "soup", *models))
    card_metrics = metrics(tmp_path / "soup")
    weights = load_file(tmp_path / "soup" / "model.safetensors")
    assert card_metrics["models"] == models[:1]
    assert all(torch.equal(value, start[name]) for name, value in weights.items())
    assert validation_recall(weights, NORMED, catalog) == card_metrics["val_recall_at_1"]


def test_soup_is_a_teacher_and_is_not_repeated(
    vit: TowerConfig, catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = initial_weights(vit)
    models = [write_teacher(tmp_path / str(s), vit, add_noise(start, s, 0.3), catalog) for s in (1, 2)]
    assert catalog.artifact is not None
    arguments = ["--models", *models, "--method", "greedy", "--output", str(tmp_path / "soup")]
    main(["teacher", "soup", *arguments, "--catalog", str(catalog.artifact.path)])
    assert capsys.readouterr().err.count("recall@1") == 2 + 1 + 1
    model, artifact = load_teacher(tmp_path / "soup")
    card = artifact.card
    assert [parent.role for parent in card.parents] == ["teacher", "teacher", "catalog"]
    assert card.config["network"] == load_artifact(models[0]).card.config["network"]
    assert card.config["recipe"] == "greedy soup"
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    before = (tmp_path / "soup" / "card.json").stat().st_mtime_ns
    main(["teacher", "soup", *arguments, "--catalog", str(catalog.artifact.path)])
    assert (tmp_path / "soup" / "card.json").stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().err


def test_models_may_differ_in_training_settings(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    start = initial_weights(vit)
    first = write_teacher(tmp_path / "first", vit, start, catalog)
    network = {"network": {**asdict(vit), "gradient_checkpointing": True}}
    second = write_teacher(tmp_path / "second", vit, add_noise(start, 1, 0.1), catalog, in_config=network)
    soup(make_config(catalog, tmp_path / "soup", first, second))
    assert metrics(tmp_path / "soup")["val_recall_at_1"] > 0


def test_allowed_leak_is_inherited(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    rows = catalog.table.to_pylist()
    scored_row = next(row for row in rows if row["split"] == "test")
    leaking = Catalog(
        catalog.table.from_pylist([*rows, {**scored_row, "split": "train"}], catalog.table.schema), catalog.root
    )
    path = write_catalog(tmp_path / "catalog", leaking)
    leaking = replace(leaking, artifact=load_artifact(path))
    start, leak = initial_weights(vit), {"train in test": {"products": 1}}
    first = write_teacher(tmp_path / "first", vit, start, leaking, in_catalog={"leak": leak})
    second = write_teacher(tmp_path / "second", vit, add_noise(start, 1, 0.1), leaking)
    soup(make_config(leaking, tmp_path / "soup", first, second))
    card = load_artifact(tmp_path / "soup").card
    assert card.catalog is not None
    assert card.catalog["leak"] == leak
    third = write_teacher(tmp_path / "third", vit, add_noise(start, 2, 0.1), leaking)
    with pytest.raises(UserError, match="leak: 1 products"):
        soup(make_config(leaking, tmp_path / "other", second, third))
    assert not (tmp_path / "other").exists()


def other_tower(config: TowerConfig) -> dict[str, Any]:
    return {"in_config": {"tower_config": {**read_tower(config.name), "embed_dim": 33}}}


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (lambda c: {"in_config": {"network": {**asdict(c), "embedding_dim": 8}}}, r"network\.embedding_dim differs"),
        (
            lambda c: {"in_config": {"network": {**asdict(c), "pretrained": "x"}}},
            r"network\.pretrained differs.*'x', not",
        ),
        (other_tower, "second: tower_config differs from .*first. Soups need identical networks"),
        (lambda c: {"in_catalog": {"sha256": "0"}}, "second: trained on another catalogue than --catalog"),
    ],
)
def test_models_that_do_not_match_are_rejected(
    card: Callable[[TowerConfig], dict[str, Any]], message: str, vit: TowerConfig, catalog: Catalog, tmp_path: Path
) -> None:
    start = initial_weights(vit)
    first = write_teacher(tmp_path / "first", vit, start, catalog)
    second = write_teacher(tmp_path / "second", vit, add_noise(start, 1, 0.1), catalog, **card(vit))
    with pytest.raises(UserError, match=message):
        soup(make_config(catalog, tmp_path / "soup", first, second))


def test_old_cards_and_repeated_models_are_rejected(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    first = write_teacher(tmp_path / "first", vit, initial_weights(vit), catalog)
    with pytest.raises(UserError, match="are the same. Name each once"):
        soup(make_config(catalog, tmp_path / "soup", first, f"{first}/../first"))
    with write_artifact(tmp_path / "older", "teacher", {"tower": {}}):
        pass
    with pytest.raises(UserError, match="older: the card has no 'network'. Train the teacher again"):
        soup(make_config(catalog, tmp_path / "soup", first, str(tmp_path / "older")))


def test_weights_that_contradict_the_card_are_rejected(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    start = initial_weights(vit)
    first = write_teacher(tmp_path / "first", vit, start, catalog)
    good = load_artifact(first).card
    with write_artifact(tmp_path / "second", "teacher", good.config, []) as writer:
        save_file({"visual.proj": torch.zeros(2, 2)}, writer.path / "model.safetensors")
        writer.preprocess, writer.embedding, writer.catalog = good.preprocess, good.embedding, good.catalog
    with pytest.raises(UserError, match="second: .*teacher"):
        soup(make_config(catalog, tmp_path / "soup", first, str(tmp_path / "second")))


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("", r"trained from random weights \(tower\.pretrained is empty\)"),
        ("absent.safetensors", "does not exist"),
    ],
)
def test_wise_ft_needs_zero_shot_weights(
    pretrained: str, message: str, vit: TowerConfig, catalog: Catalog, tmp_path: Path
) -> None:
    config = replace(vit, pretrained=pretrained)
    model = write_teacher(tmp_path / "tuned", config, initial_weights(vit), catalog)
    with pytest.raises(UserError, match=message):
        soup(make_config(catalog, tmp_path / "soup", model))
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": ()}, "models: greedy expects two or more, got 0"),
        ({"models": ("a",)}, "models: greedy expects two or more, got 1"),
        ({"method": "wise-ft"}, "models: wise-ft expects one, got 2"),
        ({"alphas": ()}, "alphas: "),
        ({"alphas": (0.5, 1.5)}, r"alphas: expected .*, got \[0\.5, 1\.5\]"),
        ({"alphas": (float("nan"),)}, "alphas: "),
        ({"batch_size": 1}, "batch_size: expected .+ got 1"),
        ({"workers": -1}, "workers: expected .+ got -1"),
        ({"seed": -1}, "seed: expected .+ got -1"),
        ({"output": "x/../b"}, "output: x/../b is one of the models and would be replaced"),
    ],
)
def test_values_out_of_range_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SoupConfig(**{"models": ("a", "b"), "catalog": "c", "output": "o", **values})


def test_catalogue_without_validation_is_rejected(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    part = catalog.select(split="train")
    train = replace(part, artifact=load_artifact(write_catalog(tmp_path / "catalog", part)))
    start = initial_weights(vit)
    models = [write_teacher(tmp_path / str(s), vit, add_noise(start, s, 0.1), train) for s in (1, 2)]
    with pytest.raises(UserError, match="a validation split is required"):
        soup(make_config(train, tmp_path / "soup", *models))


def test_sample_tower_has_batch_norm() -> None:
    """The tests of BatchNorm statistics depend on this."""
    model, _ = build_teacher(NORMED, read_tower("sample"), load_pretrained=False)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert all(isinstance(norm.running_mean, Tensor) for norm in norms)


def test_result_does_not_depend_on_kept_pixels(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = initial_weights(NORMED)
    models = [write_teacher(tmp_path / str(s), NORMED, add_noise(start, s, 0.3), catalog) for s in (1, 2)]
    soup(make_config(catalog, tmp_path / "kept", *models, method="uniform", batch_size=16))
    monkeypatch.setattr("teacher.scorer._MAX_KEPT_BYTES", 0)
    soup(make_config(catalog, tmp_path / "read", *models, method="uniform", batch_size=16))
    kept, read = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "read"))
    assert all(torch.equal(value, read[name]) for name, value in kept.items())
    assert metrics(tmp_path / "kept")["candidates"] == metrics(tmp_path / "read")["candidates"]


def test_head_statistics_are_recalibrated_alone(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zero-shot tower below a fine-tuned BatchNorm keeps its statistics."""
    model = write_teacher(tmp_path / "model", NORMED, initial_weights(NORMED), catalog)

    def load_with_norm(path: str) -> tuple[Teacher, Artifact]:
        teacher, artifact = load_teacher(path)
        teacher.project = nn.Sequential(teacher.project, nn.BatchNorm1d(teacher.embedding_dim)).eval()
        return teacher, artifact

    monkeypatch.setattr("teacher.scorer.load_teacher", load_with_norm)
    scorer = Scorer(model, catalog, 64, 0, 0)
    before = scorer.weights()
    scorer.evaluate(before, recalibrate_bn="head")
    after = scorer.weights()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {f"project.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    train = catalog.select(split="train")
    batches = read_batches(train, scorer.preprocess, 64)
    with torch.inference_mode():
        outputs = torch.cat([scorer.model.visual(torch.from_numpy(batch)) for batch in batches]).double()
    torch.testing.assert_close(after["project.1.running_mean"].double(), outputs.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after["project.1.running_var"].double(), outputs.var(0), rtol=1e-4, atol=1e-5)


def test_soup_lists_the_prefixes_that_all_members_have(vit: TowerConfig, catalog: Catalog, tmp_path: Path) -> None:
    artifact = load_artifact(write_teacher(tmp_path / "a", vit, initial_weights(vit), catalog))
    assert artifact.card.embedding is not None
    members = []
    for nested in ([4, 8], [8, 16]):
        embedding = artifact.card.embedding.model_copy(update={"nested": nested})
        members.append(replace(artifact, card=artifact.card.model_copy(update={"embedding": embedding})))
    assert common_embedding(members) == artifact.card.embedding.model_copy(update={"nested": [8]})
    assert common_embedding([artifact, members[0]]) == artifact.card.embedding
