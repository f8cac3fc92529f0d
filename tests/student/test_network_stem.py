"""Students whose tokens are the last features of a convolutional network of timm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from export.to_onnx import run_graph, trace
from student.config import DistillConfig, StudentConfig
from student.model import Student, load_student
from student.network_stem import create_network, is_network, network_shape
from student.start import load_start, resolve_model
from student.weight_selection import init_from_start
from vpr.artifacts.card import Embedding
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError

# One of each kind of network; `test_` models are small.
NETWORKS = {
    "tf_efficientnet_lite0": 1280,
    "test_efficientnet": 256,
    "test_resnet": 96,
    "test_convnext": 64,
    "mobilenetv3_small_050": 288,
    "mobilenetv4_conv_small_050": 480,
    "regnety_002": 368,
    "repvit_m0_9": 384,
}
SHAPE: dict[str, Any] = {"dim": 64, "depth": 1, "heads": 2, "mlp_dim": 96, "embedding_dim": 24}
AUTO = StudentConfig(preset="auto", pool="auto", embedding_dim=24)


def build(model: str, image_size: int = 64) -> Student:
    torch.manual_seed(0)
    shape = {**SHAPE, "image_size": image_size, "patch_size": 32, "stem": f"timm/{model}"}
    return Student(StudentConfig(**shape))


def pixels(count: int = 2, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def randomise_statistics(network: Any) -> Any:
    """Give every batch norm statistics of its own, so that a dropped or misplaced buffer shows."""
    generator = torch.Generator().manual_seed(2)
    for name, value in network.named_buffers():
        if name.endswith("running_mean"):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        elif name.endswith("running_var"):
            value.copy_(1 + 0.2 * torch.rand(value.shape, generator=generator))
    return network.eval()


@pytest.mark.parametrize("model", NETWORKS)
def test_tokens_are_the_projected_features_of_the_network(model: str) -> None:
    student = build(model).eval()
    stem: Any = student.vit.to_patch_embedding
    library: Any = timm.create_model(model, num_classes=0).eval()
    library.load_state_dict(stem.network.state_dict(), strict=False)
    with torch.no_grad():
        features = library.forward_features(pixels())
        expected = torch.einsum("bchw,dc->bhwd", features, stem.project.weight.flatten(1)) + stem.project.bias
        tokens = stem(pixels())
    assert features.shape == (2, NETWORKS[model], 2, 2)
    torch.testing.assert_close(tokens, expected.flatten(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", NETWORKS)
def test_every_weight_is_trained(model: str) -> None:
    student = build(model).train()
    student(pixels()).square().sum().backward()
    assert [name for name, value in student.named_parameters() if value.grad is None] == []


def test_layers_after_the_features_are_left_out() -> None:
    names = create_network("timm/mobilenetv3_small_050")[0].state_dict()
    assert not [name for name in names if name.startswith(("conv_head", "norm_head", "classifier"))]
    assert [name for name in create_network("timm/tf_efficientnet_lite0")[0].state_dict() if "conv_head" in name]


def test_projection_keeps_angles() -> None:
    weight = build("test_resnet").vit.to_patch_embedding.project.weight.flatten(1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(64), atol=1e-5, rtol=0)


def test_epsilons_of_the_network_stay_its_own() -> None:
    norms = [module.eps for module in build("convnext_atto").modules() if isinstance(module, torch.nn.LayerNorm)]
    assert set(norms) == {1e-5, 1e-6}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return a network of timm with random weights, and their file."""
    torch.manual_seed(3)
    network = randomise_statistics(timm.create_model("test_resnet", num_classes=0))
    path = tmp_path_factory.mktemp("network") / "resnet.safetensors"
    save_file(network.state_dict(), path)
    return network, path


def test_start_gives_the_stem_the_weights_of_a_file(resnet: tuple[Any, Path]) -> None:
    network, path = resnet
    start = load_start(configure("timm/test_resnet", str(path)))
    assert start is not None
    model = resolve_model(replace(AUTO, image_size=96), start)
    assert (model.stem, model.patch_size, model.image_size, model.depth) == ("timm/test_resnet", 32, 96, 1)
    student = Student(model).eval()
    count, difference = init_from_start(student, start)
    assert difference is None
    assert count == sum(value.numel() for value in network.state_dict().values())
    with torch.no_grad():
        found = student.vit.to_patch_embedding.network.forward_features(pixels(size=96))
        torch.testing.assert_close(found, network.forward_features(pixels(size=96)), atol=0, rtol=0)


def test_statistics_and_licence_come_from_the_start(resnet: tuple[Any, Path]) -> None:
    start = load_start(configure("timm/test_resnet.r160_in1k", str(resnet[1])))
    assert start is not None
    assert start.statistics["mean"] == timm.get_pretrained_cfg("test_resnet.r160_in1k").mean
    assert start.licences


def test_sizes_of_the_blocks_can_be_chosen(resnet: tuple[Any, Path]) -> None:
    start = load_start(configure("timm/test_resnet", str(resnet[1])))
    assert start is not None
    model = resolve_model(replace(AUTO, dim=128, depth=3, heads=4, image_size=64), start)
    assert (model.dim, model.depth, model.heads) == (128, 3, 4)
    init_from_start(Student(model), start)


def test_artifact_builds_the_network_by_name(tmp_path: Path) -> None:
    student = build("test_efficientnet").eval()
    with write_artifact(tmp_path / "student", "student", {"model": vars(student.config)}) as draft:
        save_file(student.state_dict(), draft.path / "model.safetensors")
        draft.embedding = Embedding(dim=24, normalised=True, dtype="float32")
    loaded, artifact = load_student(tmp_path / "student")
    assert loaded.config == student.config
    assert torch.equal(loaded(pixels()), student(pixels()))
    start = load_start(configure(str(artifact.path)))
    assert start is not None
    assert replace(resolve_model(AUTO, start), preset="sample") == student.config


def test_graph_computes_the_same() -> None:
    student = randomise_statistics(build("test_efficientnet"))
    graph, batch = trace(student, 64, 20), pixels(3)
    with torch.no_grad():
        expected = student(batch)
    found = torch.from_numpy(run_graph(graph, batch.numpy()))
    assert float((found - expected).abs().max()) <= 1e-5
    assert F.cosine_similarity(found, expected).min() > 0.99999


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"stem": "timm/no_such_network"}, r"model\.stem: 'no_such_network' is no model of timm"),
        ({"stem": "timm/vit_tiny_patch16_224"}, r"model\.stem: timm/vit_tiny_patch16_224 cannot be a stem .* Choose a"),
        ({"stem": "timm/test_vit3"}, r"model\.stem: timm/test_vit3 "),
        ({"stem": "timm/hf-hub:someone/model"}, r"model\.stem: expected patch, conv or timm/NAME, got 'timm/hf-hub"),
        ({"stem": "timm/../model"}, r"model\.stem: expected patch, conv or timm/NAME"),
        ({"stem": "resnet18"}, r"model\.stem: expected patch, conv or timm/NAME, got 'resnet18'"),
        ({"stem": "timm/test_resnet", "patch_size": 16}, r"model\.patch_size: expected 32 for the stem timm/test_resn"),
        (
            {"stem": "timm/test_resnet", "family": "small-data"},
            "the family 'small-data' does not support",
        ),
    ],
)
def test_wrong_stem_is_one_line(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Student(StudentConfig(**{**SHAPE, "image_size": 64, "patch_size": 32, **model}))
    assert "\n" not in str(error.value)


def test_networks_are_told_from_other_towers() -> None:
    assert is_network({"vision_cfg": {"timm_model_name": "test_resnet"}})
    assert not is_network({"vision_cfg": {"timm_model_name": "test_vit"}})
    assert not is_network({"vision_cfg": {"timm_model_name": "hf-hub:someone/model"}})
    assert not is_network({"vision_cfg": {"layers": 12}})
    assert network_shape({"vision_cfg": {"timm_model_name": "test_resnet"}}, 160).image_size == 160


def configure(start: str, weights: str = "") -> DistillConfig:
    return DistillConfig(("no-teacher",), "no-catalog", "no-output", start=start, start_weights=weights)
