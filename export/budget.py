"""The fastest quantised graph within a budget of recall, with the evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.sensitivity import Decision, Layers, Score, Trial, decide
from export.cpu import openvino_forward
from export.parity import parity
from vpr.catalog import Catalog
from vpr.console import say
from vpr.embeddings import score_split, unit
from vpr.graphs import INPUT, OUTPUT, GraphSession
from vpr.timing import measure, summarise

_BASE = "nothing quantised"
# Sets of layers within the budget that are timed, those of most layers; and how much faster than the largest a
# smaller one must be to be taken: less is noise.
_TIMED = 3
_FASTER = 0.98

Quantise = Callable[[list[str]], onnx.ModelProto]


@dataclass(frozen=True)
class Budget:
    """What may be lost, and how speed is measured.

    Attributes:
        drop: of recall@1.
        batch: pictures per call.
        seconds: of timing each candidate.
        threads: 0 leaves their number to the engine.
    """

    drop: float
    batch: int
    seconds: float
    threads: int


def keep_recall(
    graph: onnx.ModelProto,
    quantise: Quantise,
    layers: list[str],
    validation: Catalog,
    batches: list[NDArray[np.float32]],
    budget: Budget,
) -> dict[str, Any]:
    """Search the layers to quantise on recall, and time what is found side by side with the float graph.

    Args:
        graph: FP32.
        quantise: names of layers to the FP32 graph with those quantised.
        layers: that may be.
        validation: pictures with roles ``query`` and ``gallery`` that no score is reported on.
        batches: those pictures as inputs.
        budget: what may be lost.

    Returns:
        the record that becomes ``decision.json``: ``quantised`` layers, ``met``, the ``drop`` with its interval,
        ``latency_ms`` of the candidates, a reason for each layer, and every trial.
    """
    floats = _embed(graph, batches)

    def evaluate(quantised: Layers) -> Score:
        vectors = _embed(quantise(sorted(quantised)), batches) if quantised else floats
        score = Score(score_split(validation, vectors).hits, parity(floats, vectors)["cosine_mean"])
        say(f"  {_name(quantised)}: recall@1 {score.hits.mean():.4f}, cosine {score.cosine:.6f}")
        return score

    found = decide(layers, evaluate, budget.drop)
    chosen, times = _fastest(graph, quantise, found, batches, budget)
    low, high = chosen.interval
    say(f"  {_name(chosen.quantised)}: recall@1 drops by {chosen.drop:.4f} [{low:.4f}, {high:.4f}] of {budget.drop:g}")
    if not found.met:
        say(f"  no set of layers stays within a drop of {budget.drop:g}: this one is the nearest")
    if times[_name(chosen.quantised)] >= times[_BASE]:
        say("  on this machine it is no faster than the graph without it")
    return {
        "max_recall_drop": budget.drop,
        "met": found.met,
        "split": "validation",
        "queries": int((validation.roles == "query").sum()),
        "recall_at_1": chosen.recall,
        "drop": chosen.drop,
        "drop_interval": [low, high],
        "latency_ms": times,
        "latency_by": f"openvino, batch {budget.batch}",
        "quantised": [name for name in layers if name in chosen.quantised],
        "layers": found.reasons,
        "alone": [_record(trial) for trial in found.alone],
        "trials": [_record(trial) for trial in found.trials],
    }


def _fastest(
    graph: onnx.ModelProto,
    quantise: Quantise,
    found: Decision,
    batches: list[NDArray[np.float32]],
    budget: Budget,
) -> tuple[Trial, dict[str, float]]:
    """What was found, or a smaller set within the budget that is plainly faster; p50 milliseconds by name."""
    within = [one for one in found.trials if one.quantised and one.drop <= budget.drop]
    most = sorted(within, key=lambda one: -len(one.quantised))[:_TIMED]
    candidates = {_name(one.quantised): one for one in (*most, found.chosen)}
    graphs = {_BASE: graph, **{name: quantise(sorted(one.quantised)) for name, one in candidates.items()}}
    copies = -(-budget.batch // len(batches[0]))
    pixels = np.concatenate([batches[0]] * copies)[: budget.batch]
    calls = {name: partial(openvino_forward(one, budget.threads), pixels) for name, one in graphs.items()}
    times = {name: summarise(seen)["p50"] for name, seen in measure(calls, budget.seconds).items()}
    best = min(candidates, key=lambda name: times[name])
    if times[best] < _FASTER * times[_name(found.chosen.quantised)]:
        return candidates[best], times
    return found.chosen, times


def _embed(graph: onnx.ModelProto, batches: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    runner = GraphSession(graph)
    return unit(np.concatenate([runner.run([OUTPUT], {INPUT: batch})[0] for batch in batches]))


def _name(quantised: Layers) -> str:
    """A set of layers in few words; sets of one size are told apart by what they leave out in the record."""
    if len(quantised) == 1:
        return f"only {next(iter(quantised))}"
    return f"{len(quantised)} layers quantised" if quantised else _BASE


def _record(trial: Trial) -> dict[str, Any]:
    return {
        "quantised": sorted(trial.quantised),
        "recall_at_1": trial.recall,
        "drop": trial.drop,
        "drop_interval": list(trial.interval),
        "cosine": trial.cosine,
    }
