"""``vpr export int8 --max-recall-drop``: the decision, its record, and the timing backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.activation_stats import measure_activations
from calibration.onnx_layers import attention_nodes, weighted_nodes
from export import candidates as candidates_module
from export.candidates import CandidateRunner, resolve_timing_backend
from export.config import Int8Config
from export.int8 import export_int8
from export.mixed_precision import _explain_faster, _name_sets, _pick_fastest
from export.qdq import quantise, quantised_nodes
from export.to_onnx import load_onnx, run_graph
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import Forward


@pytest.fixture(scope="module")
def decided(fp32: Path, ranges: Path, pairs_catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert pairs_catalog.artifact is not None
    return export_int8(
        Int8Config(
            str(fp32),
            str(ranges),
            str(tmp_path_factory.mktemp("budget") / "int8"),
            max_recall_drop=0.5,
            catalog=str(pairs_catalog.artifact.path),
            timing_backend="openvino",
            seconds=0.05,
        )
    )


def test_graph_matches_decision(decided: Path, graph: onnx.ModelProto) -> None:
    decision = json.loads((decided / "decision.json").read_text(encoding="utf-8"))
    written, artifact = load_onnx(decided)
    assert decision["confirmed"]
    assert decision["drop_upper_bound"] <= 0.5
    assert ": confirmed: drop at most 0.5 with 95 % confidence (upper bound 0." in decision["outcome"]
    products = {node.name for node in weighted_nodes(graph)} | set(attention_nodes(graph))
    inputs = {node.name: node.input for node in written.graph.node}
    quantised = {name for name in products if inputs[name][0].endswith("_dq")}
    assert quantised == set(decision["quantised"])
    assert artifact.card.metrics["quantised"] == decision["quantised"]
    assert artifact.card.metrics["confirmed"]
    for name, why in decision["layers"].items():
        assert why.startswith("quantised" if name in quantised else "not quantised"), name
    assert {"nothing quantised"} < set(decision["latency_ms"])
    assert decision["latency_by"] == "openvino, batch 1"


def test_trials_have_unique_names_and_skip_attention(decided: Path, graph: onnx.ModelProto) -> None:
    decision = json.loads((decided / "decision.json").read_text(encoding="utf-8"))
    names = [trial["name"] for trial in decision["trials"]]
    assert len(set(names)) == len(names)
    attention = set(attention_nodes(graph))
    assert any(trial["quantised"] and not attention & set(trial["quantised"]) for trial in decision["trials"])


def test_validation_products_are_searched_or_confirmed(decided: Path, pairs_catalog: Catalog) -> None:
    decision = json.loads((decided / "decision.json").read_text(encoding="utf-8"))
    validation = pairs_catalog.select(split="validation")
    products = set(validation.products[validation.roles == "query"].tolist())
    searched, confirmed = set(decision["search_products"]), set(decision["confirmation_products"])
    assert decision["split"] == "validation"
    assert searched | confirmed == products
    assert not searched & confirmed
    assert {step["products"] for step in decision["sequence"]} == {len(confirmed)}
    sizes = [len(step["quantised"]) for step in decision["sequence"]]
    assert sizes == sorted(sizes)
    for step in decision["sequence"]:
        assert step["confirmed"] is (step["p_value"] <= 0.05)
        assert step["confirmed"] or step["upper_bound"] > 0.5


def test_small_budget_is_not_confirmable(
    fp32: Path, ranges: Path, pairs_catalog: Catalog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert pairs_catalog.artifact is not None
    config = Int8Config(
        str(fp32),
        str(ranges),
        str(tmp_path / "int8"),
        max_recall_drop=0.01,
        catalog=str(pairs_catalog.artifact.path),
        timing_backend="openvino",
        seconds=0.02,
    )
    decision = json.loads((export_int8(config) / "decision.json").read_text(encoding="utf-8"))
    assert not decision["confirmed"]
    assert decision["drop_upper_bound"] is None
    # 11 products with one query each: (1 - p)^11 = 0.05.
    assert decision["smallest_confirmable_drop"] == pytest.approx(1 - 0.05 ** (1 / 11))
    assert "not confirmable with 95 % confidence with these 11 products" in decision["outcome"]
    assert "the smallest drop they can confirm is 0.2384" in decision["outcome"]
    # The numbers are those of the safest set, which is not the written one.
    assert decision["outcome"].startswith(f"{decision['sequence'][0]['name']}: drop at most 0.01 not confirmable")
    assert decision["outcome"] in caplog.messages
    assert f"{len(decision['quantised'])} layers quantised: the written graph is not confirmed." in caplog.text


def test_too_few_validation_products_are_an_error(fp32: Path, ranges: Path, catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.artifact is not None
    path, output = str(catalog.artifact.path), tmp_path / "int8"
    config = Int8Config(
        str(fp32), str(ranges), str(output), max_recall_drop=0.1, catalog=path, timing_backend="openvino"
    )
    with pytest.raises(UserError, match="queries of 4 products, and a search and a confirmation need 15"):
        export_int8(config)
    assert not output.exists()


@pytest.mark.parametrize("confidence", [0.0, 0.4, 1.0, 1.5, float("nan")])
def test_confidence_outside_its_range_is_an_error(confidence: float) -> None:
    with pytest.raises(UserError, match=r"confidence: expected 0\.5 or more and less than 1"):
        Int8Config("a", "b", "c", max_recall_drop=0.1, catalog="d", confidence=confidence)


def test_clearly_faster_smaller_set_is_chosen() -> None:
    largest, faster, slower = frozenset("abc"), frozenset("ab"), frozenset("ac")
    timed = [slower, faster, largest]
    names = _name_sets([frozenset(), largest, faster, slower])
    assert len(set(names.values())) == 4
    times = {names[largest]: 2.0, names[faster]: 1.99, names[slower]: 2.5, "nothing quantised": 1.0}
    assert _pick_fastest(timed, names, times) == largest  # half a percent is noise
    assert _explain_faster(largest, largest, names, times) == {}
    times[names[faster]] = 1.5
    assert _pick_fastest(timed, names, times) == faster
    reasons = _explain_faster(largest, faster, names, times)
    assert set(reasons) == {"c"}
    assert reasons["c"].startswith("not quantised: the budget allows it")
    assert "1.50 ms, against 2.00 ms" in reasons["c"]


def test_gpu_candidates_are_timed_as_engines(
    fp32: Path, graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builds are real; only the loading onto the GPU is replaced."""
    pixels = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    activations = measure_activations(graph, [pixels])
    thresholds = {name: tensor.histogram.largest for name, tensor in activations.items()}
    graphs = {"float": graph, "int8": quantise(graph, thresholds, quantised_nodes(graph))}
    events: list[str] = []
    cards = []

    @contextmanager
    def open_recorded(path: Path) -> Iterator[Forward]:
        artifact = load_artifact(path, "engine")
        cards.append(artifact.card)
        built = load_onnx(artifact.path.with_name(artifact.path.name.replace("engine", "graph")))[0]
        events.append("open")
        yield lambda batch: run_graph(built, batch)
        events.append("close")

    monkeypatch.setattr(candidates_module, "this_gpu", lambda: "sm89")
    with CandidateRunner(load_artifact(fp32, "onnx"), "tensorrt-rtx", 4, open_engine=open_recorded).load(
        graphs
    ) as forwards:
        assert events == ["open", "open"]
        expected = run_graph(graph, pixels)
        for name, forward in forwards.items():
            np.testing.assert_allclose(forward(pixels), expected, atol=0.05, err_msg=name)
    assert events == ["open", "open", "close", "close"]
    assert [card.metrics["profile"] for card in cards] == [[4, 4, 4]] * 2
    assert [card.metrics["targets"] for card in cards] == [["sm89"]] * 2
    assert "QUANTIZE" not in cards[0].metrics["layers"]
    assert cards[1].metrics["layers"]["QUANTIZE"] == len(quantised_nodes(graph))


def test_auto_timing_backend_follows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "NVIDIA Test", "memory_mib": 1, "compute_capability": "8.9"}
    monkeypatch.setattr(candidates_module, "read_gpus", lambda: ([], None))
    assert resolve_timing_backend("auto") == "openvino"
    assert resolve_timing_backend("tensorrt") == "tensorrt"
    monkeypatch.setattr(candidates_module, "read_gpus", lambda: ([gpu], "580"))
    assert resolve_timing_backend("auto") in ("tensorrt", "tensorrt-rtx")
    assert resolve_timing_backend("openvino") == "openvino"


def test_timing_engines_without_a_gpu_is_an_error(
    fp32: Path, ranges: Path, pairs_catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pairs_catalog.artifact is not None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "int8"
    config = Int8Config(
        str(fp32),
        str(ranges),
        str(output),
        max_recall_drop=1.0,
        catalog=str(pairs_catalog.artifact.path),
        timing_backend="tensorrt-rtx",
    )
    with pytest.raises(UserError, match="device: CUDA cannot use GPU 0"):
        export_int8(config)
    assert not output.exists()
