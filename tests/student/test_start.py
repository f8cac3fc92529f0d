from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from calibration.activation_stats import measure_activations
from calibration.onnx_layers import weighted_nodes
from calibration.smoothquant import search_smoothing, smooth, smoothing_by_module
from export.parity import parity
from export.qdq import quantise, quantised_nodes
from export.to_onnx import run_graph, trace
from student.config import DistillConfig, StudentConfig, TargetsConfig
from student.distill import distill
from student.model import Student, load_student
from student.pretrained_vit import read_vit, vit_shape, vit_weights
from student.start import Start, load_start, read_start, resolve_model
from student.weight_selection import init_from_start
from teacher.config import TowerConfig
from teacher.model import build_teacher
from teacher.registry import read_tower
from tests.student.towers import (
    OPEN_CLIP,
    TIMM,
    library_features,
    open_clip_tower,
    randomise,
    student_features,
    timm_tower,
)
from tests.teacher.test_naming import vit as hugging_face_names
from vpr.artifacts.card import Embedding
from vpr.artifacts.store import load_artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.data.config import LoaderConfig
from vpr.imaging.preprocess import Preprocess
from vpr.training.config import RunConfig

AUTO = StudentConfig(preset="auto", pool="auto")


def tower_of(name: str) -> Any:
    return open_clip_tower(name) if name in OPEN_CLIP else timm_tower(name)


def start_of(visual: Any) -> Start:
    vit = read_vit(visual)
    reference = getattr(visual, "trunk", visual)
    return Start("a tower", vit_shape(vit), vit_weights(vit), {}, "vit", reference=reference)


def build(start: Start, **changes: Any) -> Student:
    """Return a student of random weights, with the shape that the start and the changes decide."""
    torch.manual_seed(1)
    model = resolve_model(replace(AUTO, **{"embedding_dim": 24, **changes}), start)
    return Student(model).eval()


def pixels_for(student: Student, count: int = 3) -> torch.Tensor:
    size = student.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def configure(start: str, weights: str = "", **values: Any) -> DistillConfig:
    return DistillConfig(("no-teacher",), "no-catalog", "no-output", start=start, start_weights=weights, **values)


@pytest.fixture(scope="module")
def test_vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """timm's smallest ViT in its own size, and its weights in a file."""
    trunk = randomise(timm.create_model("test_vit", num_classes=0))
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(trunk.state_dict(), path)
    return trunk, path


@pytest.mark.parametrize("name", [*TIMM, *OPEN_CLIP])
def test_features_equal_those_of_the_library(name: str) -> None:
    visual = tower_of(name)
    expected_of, start = (lambda x: library_features(visual, x)), start_of(visual)
    student = build(start)
    x = pixels_for(student)
    expected = expected_of(x)
    visual.proj = None
    count, difference = init_from_start(student, start)
    actual = student_features(student, x)
    assert expected.std() > 0.1
    assert (actual - expected).abs().max() <= 1e-5
    assert difference is not None
    assert difference <= 1e-5
    head = sum(value.numel() for name, value in student.state_dict().items() if name.startswith("vit.mlp_head"))
    # Only the head of timm's towers is new; the first 24 rows of CLIP's projection are selected.
    assert count == sum(value.numel() for value in student.state_dict().values()) - (head if name in TIMM else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/deit_tiny_patch16_224", 0),
        ("timm/deit_small_patch16_224", 0),
        ("timm/deit_base_patch16_224", 0),
        ("timm/vit_tiny_patch16_224", 0),
        ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", 0),
        ("timm/vit_base_patch16_224.augreg_in21k_ft_in1k", 0),
        ("timm/vit_small_patch14_dinov2", 0),
        ("timm/vit_small_patch14_reg4_dinov2", 224),
        ("timm/vit_base_patch14_dinov2", 224),
        ("timm/vit_base_patch14_reg4_dinov2", 224),
        ("timm/vit_xsmall_patch16_clip_224", 0),
        ("timm/vit_medium_patch32_clip_224", 0),
        ("timm/vit_base_patch16_siglip_224", 0),
        *((f"open_clip/{name}", 0) for name in OPEN_CLIP),
    ],
)
def test_published_networks_equal_the_library(name: str, size: int, tmp_path: Path) -> None:
    """In the published sizes, by the name of the model and a file of its weights."""
    network = TowerConfig(name, "", mean=(0.5,) * 3, std=(0.5,) * 3)
    visual: Any = build_teacher(network, read_tower(name), load_pretrained=False)[0].visual
    randomise(visual)
    state = {f"visual.{key}": value.contiguous() for key, value in visual.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    del state
    start = load_start(configure(name, str(tmp_path / "weights.safetensors"), model=replace(AUTO, image_size=size)))
    assert start is not None
    student = build(start, image_size=size)
    _, difference = init_from_start(student, start)
    assert difference is not None
    assert difference <= 1e-5
    if not size:
        x = pixels_for(student, 1)
        features = library_features(visual, x)
        assert (student_features(student, x) - features).abs().max() <= 1e-5
        assert (graph_features(trace(student, student.config.image_size, 20), x) - features).abs().max() <= 1e-5


def test_another_network_is_found_by_its_features() -> None:
    """Weights that fit by name and shape may still be of a network that computes something else."""
    visual = timm_tower("vit_small_patch14_dinov2")
    start = start_of(visual)
    student = build(start)
    visual.trunk.blocks[1].mlp.act = torch.nn.ReLU()
    with pytest.raises(UserError, match="the student's features differ from those of a tower by"):
        init_from_start(student, start)


@pytest.mark.parametrize(("name", "dim"), [("deit_tiny_patch16_224", 192), ("ViT-B-32-quickgelu", 96)])
def test_head_of_the_same_width_keeps_the_embedding(name: str, dim: int) -> None:
    visual = tower_of(name)
    start = start_of(visual)
    student = build(start, embedding_dim=dim)
    x = pixels_for(student)
    with torch.no_grad():
        expected = F.normalize(visual(x), dim=1)
    visual.proj = None
    init_from_start(student, start)
    with torch.no_grad():
        assert (student(x) - expected).abs().max() <= 1e-5


def graph_features(graph: onnx.ModelProto, x: torch.Tensor) -> torch.Tensor:
    """Return the pooled features in an exported graph: the input of the head's product."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    head = next(node for node in model.graph.node if node.name.startswith("vit.mlp_head/"))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(head.input[0]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([head.input[0]], {model.graph.input[0].name: x.numpy()})[0])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vit_small_patch14_reg4_dinov2"),
        pytest.param("vit_base_patch16_siglip_224", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("deit_tiny_patch16_224", *OPEN_CLIP)),
    ],
)
def test_graphs_equal_the_library_in_fp32_and_follow_it_in_int8(name: str) -> None:
    """FP32 by the exporter; INT8 with smoothing, Q/DQ and the ranges of the inputs."""
    visual = tower_of(name)
    start = start_of(visual)
    dim = 96 if name in OPEN_CLIP else start.shape.dim
    student = build(start, embedding_dim=dim)
    x = pixels_for(student, 8)
    with torch.no_grad():
        expected = F.normalize(visual(x), dim=1).numpy()
    features = library_features(visual, x)
    visual.proj = None
    init_from_start(student, start)
    graph = trace(student, student.config.image_size, 20)
    assert (graph_features(graph, x) - features).abs().max() <= 1e-5
    assert np.abs(run_graph(graph, x.numpy(), 3) - expected).max() <= 1e-5
    activations = measure_activations(graph, [x.numpy()])
    smoothings = smoothing_by_module(search_smoothing(graph, activations))
    assert any(module.endswith("to_out.0") for module in smoothings)
    smoothed = smooth(graph, smoothings)
    assert np.abs(run_graph(smoothed, x.numpy()) - expected).max() <= 1e-5
    measured = measure_activations(smoothed, [x.numpy()])
    thresholds = {node.input[0]: float(measured[node.input[0]].channel_max.max()) for node in weighted_nodes(smoothed)}
    layers = quantised_nodes(smoothed)
    assert len(layers) >= 4 * student.config.depth
    quantised = run_graph(quantise(smoothed, thresholds, layers), x.numpy())
    assert parity(expected, quantised)["cosine_mean"] > 0.98


def test_positions_and_patches_are_resampled_as_timm_does(test_vit: tuple[Any, Path]) -> None:
    trunk, path = test_vit
    for size, patch in ((96, 16), (80, 8)):
        expected = timm.create_model("test_vit", num_classes=0, img_size=size, patch_size=patch).eval()
        expected.load_state_dict(checkpoint_filter_fn(trunk.state_dict(), expected))
        model = replace(AUTO, image_size=size, patch_size=patch)
        start = load_start(configure("timm/test_vit", str(path), model=model))
        assert start is not None
        student = Student(resolve_model(replace(model, embedding_dim=8), start))
        _, difference = init_from_start(student, start)
        x = pixels_for(student)
        with torch.no_grad():
            assert (student_features(student, x) - expected(x)).abs().max() <= 1e-5
        # Patches of another size leave no network of timm to compare with.
        assert (difference is None) == (patch != 16)


def test_weights_are_read_in_every_naming(test_vit: tuple[Any, Path], tmp_path: Path) -> None:
    trunk, path = test_vit
    names = {"hugging face": hugging_face_names(trunk.state_dict())}
    names["wrapped"] = {f"module.{name}": value for name, value in trunk.state_dict().items()}
    expected = load_start(configure("timm/test_vit", str(path)))
    assert expected is not None
    for naming, state in names.items():
        file = tmp_path / f"{naming}.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, file)
        start = load_start(configure("timm/test_vit", str(file)))
        assert start is not None
        assert start.weights.keys() == expected.weights.keys()
        assert all(torch.equal(start.weights[name], value) for name, value in expected.weights.items())
    assert expected.statistics == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert expected.licences == ("unknown",)
    assert set(expected.values) == {"start_tower", "start_sha256"}


def test_smaller_student_loses_no_biases() -> None:
    """Rows of queries, keys and values, their biases, and columns of the output come from the same heads."""
    visual = timm_tower("deit_small_patch16_224", depth=3)
    start = start_of(visual)
    student = build(start, dim=192, heads=3, depth=2, mlp_dim=768)
    count, difference = init_from_start(student, start)
    state = student.state_dict()
    assert difference is None
    head = state["vit.mlp_head.weight"].numel() + state["vit.mlp_head.bias"].numel()
    assert count == sum(value.numel() for value in state.values()) - head
    rows = torch.cat([torch.arange(64) + 64 * (2 * head + 6 * part) for part in range(3) for head in range(3)])
    attention = visual.trunk.blocks[1].attn
    assert torch.equal(state["vit.transformer.layers.1.0.to_qkv.bias"], attention.qkv.bias[rows])
    assert torch.equal(state["vit.transformer.layers.1.0.to_qkv.weight"], attention.qkv.weight[rows][:, ::2])
    assert torch.equal(state["vit.transformer.layers.1.0.to_out.0.weight"], attention.proj.weight[::2][:, rows[:192]])


def test_smaller_student_of_a_map_pooling_keeps_its_heads() -> None:
    visual = timm_tower("vit_base_patch16_siglip_224", embed_dim=256, num_heads=4)
    start = start_of(visual)
    student = build(start, dim=128, heads=2, mlp_dim=512)
    init_from_start(student, start)
    pool, state = visual.trunk.attn_pool, student.state_dict()
    heads = torch.cat([torch.arange(64), torch.arange(128, 192)])
    with torch.no_grad():
        query = pool.q(pool.latent).flatten()
    assert torch.equal(state["vit.transformer.pool.query"], query[heads])
    assert torch.equal(state["vit.transformer.pool.to_kv.bias"], pool.kv.bias[torch.cat([heads, heads + 256])])
    assert torch.equal(state["vit.transformer.pool.to_out.weight"], pool.proj.weight[::2][:, heads])


def test_student_of_a_student_keeps_its_layers(tmp_path: Path) -> None:
    """A student artifact of a pretrained ViT is a start too, whole or smaller, without its library."""
    visual = timm_tower("vit_small_patch14_reg4_dinov2")
    start = start_of(visual)
    student = build(start)
    x = pixels_for(student)
    expected = library_features(visual, x)
    init_from_start(student, start)
    with write_artifact(tmp_path / "student", "student", {"model": asdict(student.config)}) as draft:
        save_file(student.state_dict(), draft.path / "model.safetensors")
        draft.preprocess = Preprocess(size=42, mean=(0.5, 0.5, 0.5))
        draft.embedding = Embedding(dim=24, normalised=True, dtype="float32")
    loaded, artifact = load_student(tmp_path / "student")
    assert (student_features(loaded, x) - expected).abs().max() <= 1e-5
    again = read_start(artifact)
    assert again.statistics["mean"] == (0.5, 0.5, 0.5)
    same = build(again, embedding_dim=24)
    assert init_from_start(same, again) == (sum(value.numel() for value in same.state_dict().values()), None)
    assert torch.equal(same(x), loaded(x))
    tiny = replace(StudentConfig("tiny", image_size=42, patch_size=14, depth=2, embedding_dim=24), pool="auto")
    smaller = resolve_model(tiny, again)
    assert (smaller.qkv_bias, smaller.layer_scale, smaller.registers, smaller.pool) == (True, True, 4, "cls")
    narrow = Student(smaller)
    assert init_from_start(narrow, again)[0] == sum(value.numel() for value in narrow.state_dict().values())


def write_teacher(path: Path, catalog: Catalog | None = None, **projection: Any) -> Any:
    """Write a teacher of timm's smallest ViT with random values, and return the network."""
    tower, network = read_tower("timm/test_vit"), TowerConfig("timm/test_vit", "", 32, **projection)
    teacher, preprocess = build_teacher(network, tower, load_pretrained=False)
    randomise(teacher)
    for name, value in teacher.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.5)
    with write_artifact(path, "teacher", {"network": asdict(network), "tower_config": tower}) as draft:
        save_file(teacher.state_dict(), draft.path / "model.safetensors")
        draft.preprocess = preprocess
        draft.embedding = Embedding(dim=teacher.embedding_dim, normalised=True, dtype="float32")
        draft.catalog = None if catalog is None else catalog.summary()
    return teacher


@pytest.mark.parametrize("projection", [{"embedding_dim": 16}, {"embedding_dim": 16, "batch_norm": True}, {}])
def test_student_of_a_teacher_computes_its_embedding(tmp_path: Path, projection: dict[str, Any]) -> None:
    teacher = write_teacher(tmp_path / "teacher", **projection)
    start = read_start(load_artifact(tmp_path / "teacher"))
    student = build(start, embedding_dim=teacher.embedding_dim)
    init_from_start(student, start)
    x = pixels_for(student)
    with torch.no_grad():
        assert (student(x) - teacher(x)).abs().max() <= 1e-5


def test_distillation_from_a_library_model(
    catalog: Catalog, test_vit: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trunk, path = test_vit
    caplog.set_level("INFO")
    write_teacher(tmp_path / "teacher", embedding_dim=16)
    assert catalog.artifact is not None
    # A learning rate of almost nothing keeps the weights of the start.
    changed = DistillConfig(
        (str(tmp_path / "teacher"),),
        str(catalog.artifact.path),
        str(tmp_path / "student"),
        start="timm/test_vit",
        start_weights=str(path),
        model=replace(AUTO, image_size=32),
        targets=TargetsConfig(views=1, bank=32),
        epochs=1,
        lr=1e-12,
        loader=LoaderConfig(batch_size=32, keep_in_memory=True),
        run=RunConfig(precision="32-true"),
    )
    student, artifact = load_student(distill(changed))
    assert "features before the head equal those of timm/test_vit" in caplog.text
    card = json.loads((artifact.path / "card.json").read_text())
    assert card["config"]["model"]["dim"] == 64
    assert card["config"]["model"]["qkv_bias"] is True
    assert card["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert card["config"]["start_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    expected = timm.create_model("test_vit", num_classes=0, img_size=32).eval()
    expected.load_state_dict(checkpoint_filter_fn(trunk.state_dict(), expected))
    x = pixels_for(student)
    with torch.no_grad():
        assert (student_features(student, x) - expected(x)).abs().max() <= 1e-4
    caplog.clear()
    distill(changed)
    assert "up to date" in caplog.text


def test_card_without_the_new_keys_is_a_plain_student(tmp_path: Path) -> None:
    keys = ("image_size", "patch_size", "dim", "depth", "heads", "dim_head", "mlp_dim", "embedding_dim")
    shape = dict(zip(keys, (32, 8, 64, 2, 2, 32, 96, 16), strict=True))
    old = {"preset": "sample", **shape, "pool": "mean", "stem": "patch", "family": "vit", "registers": 0}
    old |= {"dropout": 0.0, "gradient_checkpointing": False}
    student = Student(StudentConfig(**shape)).eval()  # type: ignore[arg-type]
    with write_artifact(tmp_path / "student", "student", {"model": old}) as draft:
        save_file(student.state_dict(), draft.path / "model.safetensors")
        draft.embedding = Embedding(dim=16, normalised=True, dtype="float32")
    loaded, _ = load_student(tmp_path / "student")
    x = torch.randn(2, 3, 32, 32)
    assert loaded.config == student.config
    assert torch.equal(loaded(x), student(x))


@pytest.mark.parametrize(
    ("start", "model", "message"),
    [
        ("timm/test_vitt", {}, r"start: 'timm/test_vitt' is no model of timm\. Nearest names: timm/test_vit"),
        (
            "timm/swin_tiny_patch4_window7_224",
            {},
            r"is a SwinTransformer, not a plain ViT of timm or open_clip\. Use a plain",
        ),
        ("timm/test_vit3", {}, "start: timm/test_vit3 pools its class or register tokens with the others"),
        ("timm/test_vit", {"dim": 96}, r"smaller than the student, with dim 64 of 96\. Lower model\.dim"),
        ("timm/test_vit", {"depth": 7}, "with depth 6 of 7"),
        ("timm/test_vit", {"preset": "tiny"}, "smaller than the student, with dim 64 of 192"),
        (
            "timm/test_vit",
            {"stem": "conv"},
            r"model\.stem: start timm/test_vit has patch, got conv\. Set it to patch",
        ),
        ("timm/test_vit", {"activation": "quick-gelu"}, r"model\.activation: start timm/test_vit has gelu"),
        ("timm/test_vit", {"image_size": 100}, r"model\.image_size: expected a multiple of patch 16, got 100"),
        ("timm/test_vit2", {}, "start_weights: the weights "),
        ("timm/test_vit.no_tag", {}, r"start: timm/test_vit has no tag 'no_tag'\. Choose from: r160_in1k"),
    ],
)
def test_wrong_start_is_one_line(test_vit: tuple[Any, Path], start: str, model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_start(configure(start, str(test_vit[1]), model=replace(AUTO, **model)))
    assert "tower.name" not in str(error.value)
    assert "tower.pretrained" not in str(error.value)


def test_wrong_weights_are_one_line(test_vit: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"start_weights: no weights of timm/test_vit are given\. Set it to a tag"):
        load_start(configure("timm/test_vit"))
    with pytest.raises(UserError, match=r"start_weights: .*nothing\.safetensors does not exist"):
        load_start(configure("timm/test_vit", str(tmp_path / "nothing.safetensors")))
    with pytest.raises(UserError, match=r"start_weights: timm/test_vit has no tag 'laion'"):
        load_start(configure("timm/test_vit", "laion"))
    state = load_file(test_vit[1])
    cut = tmp_path / "cut.safetensors"
    save_file({**state, "pos_embed": state["pos_embed"][:, :72].contiguous()}, cut)
    with pytest.raises(UserError, match=r"the 72 positions 'pos_embed' are no square grid and cannot be resampled"):
        load_start(configure("timm/test_vit", str(cut)))
    save_file({name: value for name, value in state.items() if name != "norm.weight"}, cut)
    with pytest.raises(UserError, match=r"start_weights: the weights lack 'trunk\.norm\.weight'\. Set start to their"):
        load_start(configure("timm/test_vit", str(cut)))


def test_weights_without_a_name_are_rejected() -> None:
    with pytest.raises(UserError, match=r"start_weights: apply to a model by name\. Set start to one"):
        configure("", "weights.safetensors")
    with pytest.raises(UserError, match="QAT fine-tunes a trained student"):
        configure("timm/test_vit", "x.safetensors", quantise=replace(configure("").quantise, ranges="ranges"))
    assert configure("").model == replace(StudentConfig(), preset="sample")
