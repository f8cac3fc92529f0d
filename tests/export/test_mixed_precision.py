"""``vpr export int8 --max-recall-drop``: the decision, its record, and what times it."""

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
from calibration.sensitivity import Decision, Trial
from export import candidates as candidates_module
from export.candidates import CandidateRunner, resolve_timing_backend
from export.config import Int8Config
from export.int8 import export_int8
from export.mixed_precision import _fastest, _names, _slower
from export.qdq import quantise, quantised_nodes
from export.to_onnx import load_onnx, run_graph
from vpr.artifacts.store import load_artifact
from vpr.common.errors import UserError
from vpr.data.catalog import Catalog
from vpr.retrieval.embeddings import Forward


@pytest.fixture(scope="module")
def decided(fp32: Path, ranges: Path, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert catalog.artifact is not None
    return export_int8(
        Int8Config(
            str(fp32),
            str(ranges),
            str(tmp_path_factory.mktemp("budget") / "int8"),
            max_recall_drop=0.05,
            catalog=str(catalog.artifact.path),
            timing_backend="openvino",
            seconds=0.05,
        )
    )


def test_the_graph_is_what_the_decision_says(decided: Path, graph: onnx.ModelProto) -> None:
    decision = json.loads((decided / "decision.json").read_text(encoding="utf-8"))
    written, artifact = load_onnx(decided)
    assert decision["met"]
    assert decision["drop"] <= 0.05
    assert decision["certain"] is (decision["drop_interval"][1] <= 0.05)
    products = {node.name for node in weighted_nodes(graph)} | set(attention_nodes(graph))
    inputs = {node.name: node.input for node in written.graph.node}
    in_eight_bits = {name for name in products if inputs[name][0].endswith("_dq")}
    assert in_eight_bits == set(decision["quantised"])
    assert artifact.card.metrics["quantised"] == decision["quantised"]
    for name, why in decision["layers"].items():
        assert why.startswith("quantised" if name in in_eight_bits else "kept"), name
    assert {"nothing quantised"} < set(decision["latency_ms"])
    assert decision["latency_by"] == "openvino, batch 1"


def test_every_trial_is_named_once_and_what_is_found_is_tried_without_attention(
    decided: Path, graph: onnx.ModelProto
) -> None:
    decision = json.loads((decided / "decision.json").read_text(encoding="utf-8"))
    names = [trial["name"] for trial in decision["trials"]]
    assert len(set(names)) == len(names)
    attention = set(attention_nodes(graph))
    assert any(trial["quantised"] and not attention & set(trial["quantised"]) for trial in decision["trials"])


def test_validation_alone_decides(decided: Path, catalog: Catalog) -> None:
    decision = json.loads((decided / "decision.json").read_text(encoding="utf-8"))
    queries = catalog.select(split="validation").roles == "query"
    assert decision["queries"] == int(queries.sum())
    assert decision["split"] == "validation"


def _trial(layers: str, drop: float = 0.0) -> Trial:
    return Trial(frozenset(layers), 0.5, drop, (drop, drop), 0.99)


def test_a_smaller_set_that_is_plainly_faster_is_taken_and_says_why() -> None:
    whole, less, same = _trial("abc"), _trial("ab"), _trial("ac")
    found = Decision(whole, True, [], [_trial(""), whole, less, same], dict.fromkeys("abc", "quantised: all"))
    names = _names(found)
    assert len(set(names.values())) == 4
    times = {names[whole]: 2.0, names[less]: 1.99, names[same]: 2.5, "nothing quantised": 1.0}
    assert _fastest(found, names, times) is whole  # half a percent is noise
    assert _slower(found, whole, names, times) == {}
    times[names[less]] = 1.5
    assert _fastest(found, names, times) is less
    reasons = _slower(found, less, names, times)
    assert set(reasons) == {"c"}
    assert reasons["c"].startswith("kept: the budget bears it")
    assert "1.50 ms, against 2.00 ms" in reasons["c"]


def test_on_a_gpu_candidates_are_timed_as_the_engines_they_become(
    fp32: Path, graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real builds; only the loading onto the GPU is replaced."""
    pixels = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    thresholds = {name: seen.histogram.largest for name, seen in measure_activations(graph, [pixels]).items()}
    graphs = {"floats": graph, "eight": quantise(graph, thresholds, quantised_nodes(graph))}
    events: list[str] = []
    cards = []

    @contextmanager
    def opened(path: Path) -> Iterator[Forward]:
        artifact = load_artifact(path, "engine")
        cards.append(artifact.card)
        built = load_onnx(artifact.path.parent / "graph")[0]
        events.append("open")
        yield lambda batch: run_graph(built, batch)
        events.append("close")

    monkeypatch.setattr(candidates_module, "this_gpu", lambda: "sm89")
    with CandidateRunner(load_artifact(fp32, "onnx"), "tensorrt-rtx", 4, open_engine=opened).opened(graphs) as forwards:
        assert events == ["open", "open"]
        expected = run_graph(graph, pixels)
        for name, forward in forwards.items():
            np.testing.assert_allclose(forward(pixels), expected, atol=0.05, err_msg=name)
    assert events == ["open", "open", "close", "close"]
    assert [card.metrics["profile"] for card in cards] == [[4, 4, 4]] * 2
    assert [card.metrics["targets"] for card in cards] == [["sm89"]] * 2
    assert "QUANTIZE" not in cards[0].metrics["layers"]
    assert cards[1].metrics["layers"]["QUANTIZE"] == len(quantised_nodes(graph))


def test_without_a_gpu_openvino_times_unless_an_engine_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "NVIDIA Test", "memory_mib": 1, "compute_capability": "8.9"}
    monkeypatch.setattr(candidates_module, "read_gpus", lambda: ([], None))
    assert resolve_timing_backend("auto") == "openvino"
    assert resolve_timing_backend("tensorrt") == "tensorrt"
    monkeypatch.setattr(candidates_module, "read_gpus", lambda: ([gpu], "580"))
    assert resolve_timing_backend("auto") in ("tensorrt", "tensorrt-rtx")
    assert resolve_timing_backend("openvino") == "openvino"


def test_an_engine_without_a_gpu_is_refused_in_one_line(
    fp32: Path, ranges: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert catalog.artifact is not None
    monkeypatch.setitem(__import__("sys").modules, "pycuda", None)
    output = tmp_path / "int8"
    config = Int8Config(
        str(fp32),
        str(ranges),
        str(output),
        max_recall_drop=1.0,
        catalog=str(catalog.artifact.path),
        timing_backend="tensorrt-rtx",
    )
    with pytest.raises(UserError, match="pycuda: cannot be loaded"):
        export_int8(config)
    assert not output.exists()
