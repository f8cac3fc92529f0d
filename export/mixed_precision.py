"""The fastest quantised graph within a budget of recall, with the evidence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.sensitivity import Decision, Layers, LayerSetScore, Trial, search_quantised_layers
from export.candidates import CandidateRunner
from export.parity import parity
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.inference.onnx_graph import GraphSession
from vpr.inference.timing import measure, summarise
from vpr.retrieval.embeddings import l2_normalize, score_split

log = get_logger(__name__)

_BASE = "nothing quantised"
# Sets of layers within the budget that are timed beside the one found, those of most layers; and how much faster than
# it another must be to be taken: less is noise.
_TIMED = 3
_FASTER = 0.98

Quantise = Callable[[list[str]], onnx.ModelProto]


@dataclass(frozen=True)
class Budget:
    """What may be lost, and how speed is measured.

    Attributes:
        drop: of recall@1.
        seconds: of timing each candidate.
        candidates: how they are run.
    """

    drop: float
    seconds: float
    candidates: CandidateRunner


def search_mixed_precision(
    graph: onnx.ModelProto,
    quantise: Quantise,
    layers: list[str],
    fewer: Sequence[Collection[str]],
    validation: Catalog,
    batches: list[NDArray[np.float32]],
    budget: Budget,
) -> dict[str, Any]:
    """Search the layers to quantise on recall, and time what is found side by side with the float graph.

    Args:
        graph: FP32.
        quantise: names of layers to the FP32 graph with those quantised.
        layers: that may be.
        fewer: kinds of layers; others in eight bits may cost time, so what is found is timed cut down to each too.
        validation: images with roles ``query`` and ``gallery`` that no score is reported on.
        batches: those images as inputs.
        budget: what may be lost.

    Returns:
        the record that becomes ``decision.json``: ``quantised`` layers, ``met`` by the ``drop`` and ``certain`` by the
        upper end of its interval, ``latency_ms`` of the candidates, a reason for each layer, and every trial.
    """
    floats = _embed(graph, batches)

    def evaluate(quantised: Layers) -> LayerSetScore:
        vectors = _embed(quantise(sorted(quantised)), batches) if quantised else floats
        score = LayerSetScore(score_split(validation, vectors).hits, parity(floats, vectors)["cosine_mean"])
        log.info(f"  {_name(quantised)}: recall@1 {score.hits.mean():.4f}, cosine {score.cosine:.6f}")
        return score

    found = search_quantised_layers(layers, evaluate, budget.drop, fewer)
    names = _names(found)
    timed = {names[one]: one.quantised for one in _candidates(found, budget.drop)}
    times = _time(graph, quantise, timed, batches, budget)
    chosen = _fastest(found, names, times)
    queries = int((validation.roles == "query").sum())
    _say_chosen(names[chosen], chosen, found.within_budget, queries, budget.drop)
    if times[names[chosen]] >= times[_BASE]:
        log.info("  on this machine it is no faster than the graph without it")
    return {
        "max_recall_drop": budget.drop,
        "met": found.within_budget,
        "certain": chosen.interval[1] <= budget.drop,
        "split": "validation",
        "queries": queries,
        "recall_at_1": chosen.recall,
        "drop": chosen.drop,
        "drop_interval": list(chosen.interval),
        "latency_ms": times,
        "latency_by": f"{budget.candidates.by}, batch {budget.candidates.batch}",
        "quantised": [name for name in layers if name in chosen.quantised],
        "layers": found.reasons | _slower(found, chosen, names, times),
        "alone": [_record(trial) for trial in found.single_layer_trials],
        "trials": [{"name": names[trial], **_record(trial)} for trial in found.trials],
    }


def _say_chosen(name: str, chosen: Trial, met: bool, queries: int, budget: float) -> None:
    low, high = chosen.interval
    log.info(f"  {name}: recall@1 drops by {chosen.drop:.4f} [{low:.4f}, {high:.4f}] of {budget:g}")
    if met and high > budget:
        log.info(f"  the interval of {queries} validation queries reaches beyond that: more of them tell it better")
    if not met:
        log.info(f"  no set of layers stays within a drop of {budget:g}: this one is the nearest")


def _candidates(found: Decision, budget: float) -> list[Trial]:
    """What is timed: what was found, and those within the budget that quantise most."""
    within = [one for one in found.trials if one.quantised and one.drop <= budget and one != found.chosen]
    return [found.chosen, *sorted(within, key=lambda one: -len(one.quantised))[:_TIMED]]


def _time(
    graph: onnx.ModelProto,
    quantise: Quantise,
    candidates: dict[str, Layers],
    batches: list[NDArray[np.float32]],
    budget: Budget,
) -> dict[str, float]:
    """p50 milliseconds of the candidates and of the float graph, side by side."""
    graphs = {_BASE: graph, **{name: quantise(sorted(one)) for name, one in candidates.items()}}
    batch = budget.candidates.batch
    pixels = np.concatenate([batches[0]] * -(-batch // len(batches[0])))[:batch]
    with budget.candidates.opened(graphs) as forwards:
        calls = {name: partial(forward, pixels) for name, forward in forwards.items()}
        return {name: summarise(seen)["p50"] for name, seen in measure(calls, budget.seconds).items()}


def _fastest(found: Decision, names: dict[Trial, str], times: dict[str, float]) -> Trial:
    """What was found, or another that was timed and is plainly faster."""
    best = min(
        (one for one in found.trials if names[one] in times and one.quantised), key=lambda one: times[names[one]]
    )
    return best if times[names[best]] < _FASTER * times[names[found.chosen]] else found.chosen


def _slower(found: Decision, chosen: Trial, names: dict[Trial, str], times: dict[str, float]) -> dict[str, str]:
    """Reasons of the layers in which what is fastest departs from the largest set within the budget."""
    what = f"{times[names[chosen]]:.2f} ms, against {times[names[found.chosen]]:.2f} ms of the largest set"
    kept = dict.fromkeys(
        found.chosen.quantised, f"kept: the budget bears it, but what is fastest is without it: {what}"
    )
    taken = dict.fromkeys(chosen.quantised, f"quantised: in the fastest set within the budget: {what}")
    return {name: why for name, why in (kept | taken).items() if (name in kept) != (name in taken)}


def _embed(graph: onnx.ModelProto, batches: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    session = GraphSession(graph)
    return l2_normalize(np.concatenate([session.embed(batch) for batch in batches]))


def _name(quantised: Layers) -> str:
    if len(quantised) == 1:
        return f"only {next(iter(quantised))}"
    return f"{len(quantised)} layers quantised" if quantised else _BASE


def _names(found: Decision) -> dict[Trial, str]:
    """A name of each set that was tried; those of one size are numbered."""
    names: dict[Trial, str] = {}
    for trial in found.trials:
        name, number = _name(trial.quantised), 1
        while name in names.values():
            number += 1
            name = f"{_name(trial.quantised)} ({number})"
        names[trial] = name
    return names


def _record(trial: Trial) -> dict[str, Any]:
    return {
        "quantised": sorted(trial.quantised),
        "recall_at_1": trial.recall,
        "drop": trial.drop,
        "drop_interval": list(trial.interval),
        "cosine": trial.cosine,
    }
