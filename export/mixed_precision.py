"""Search for the fastest quantised graph within a recall budget, with a record of the evidence."""

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
# Number of sets within the budget that are timed next to the chosen one, largest sets first.
_MAX_ALTERNATIVES = 3
# An alternative must take less than this share of the chosen set's time; a smaller gain is noise.
_FASTER = 0.98

Quantise = Callable[[list[str]], onnx.ModelProto]


@dataclass(frozen=True)
class Budget:
    """Recall budget, and how candidates are timed."""

    drop: float  # largest drop of recall@1
    seconds: float  # seconds of timing per candidate
    candidates: CandidateRunner  # loader of the candidates


def search_mixed_precision(
    graph: onnx.ModelProto,
    quantise: Quantise,
    layers: list[str],
    reduced_sets: Sequence[Collection[str]],
    validation: Catalog,
    batches: list[NDArray[np.float32]],
    budget: Budget,
) -> dict[str, Any]:
    """Choose the layers to quantise by recall, then by the time next to the float graph.

    Args:
        graph: FP32 graph.
        quantise: Function from names of layers to the FP32 graph with these layers quantised.
        layers: Names of the layers that may be quantised.
        reduced_sets: Kinds of layers. The chosen set is also timed reduced to each, as eight bits may slow the others.
        validation: Images with roles ``query`` and ``gallery`` that no score is reported on.
        batches: The same images as inputs.
        budget: Recall budget.

    Returns:
        The content of ``decision.json``: ``quantised`` layers; ``within_budget`` by the ``drop`` and ``certain`` by
        the upper end of its interval; ``latency_ms`` of the candidates; a reason for each layer; and every trial.
    """
    float_vectors = _embed(graph, batches)

    def evaluate(quantised: Layers) -> LayerSetScore:
        vectors = _embed(quantise(sorted(quantised)), batches) if quantised else float_vectors
        score = LayerSetScore(score_split(validation, vectors).hits, parity(float_vectors, vectors)["cosine_mean"])
        log.info(f"  recall@1 {score.hits.mean():.4f}  cosine {score.cosine:.6f}  {_set_name(quantised)}")
        return score

    decision = search_quantised_layers(layers, evaluate, budget.drop, reduced_sets)
    names = _name_trials(decision)
    candidates = _select_candidates(decision, budget.drop)
    graphs = {_BASE: graph, **{names[trial]: quantise(sorted(trial.quantised)) for trial in candidates}}
    times = _time_candidates(graphs, batches[0], budget)
    fastest = _pick_fastest(decision, names, times)
    queries = int((validation.roles == "query").sum())
    _log_choice(names[fastest], fastest, decision.within_budget, queries, budget.drop)
    if times[names[fastest]] >= times[_BASE]:
        log.warning("quantisation does not make this graph faster on this machine")
    return {
        "max_recall_drop": budget.drop,
        "within_budget": decision.within_budget,
        "certain": fastest.interval[1] <= budget.drop,
        "split": "validation",
        "queries": queries,
        "recall_at_1": fastest.recall,
        "drop": fastest.drop,
        "drop_interval": list(fastest.interval),
        "latency_ms": times,
        "latency_by": f"{budget.candidates.backend}, batch {budget.candidates.batch}",
        "quantised": [name for name in layers if name in fastest.quantised],
        "layers": decision.reasons | _explain_faster(decision, fastest, names, times),
        "single_layer_trials": [_record(trial) for trial in decision.single_layer_trials],
        "trials": [{"name": names[trial], **_record(trial)} for trial in decision.trials],
    }


def _log_choice(name: str, trial: Trial, within_budget: bool, queries: int, budget: float) -> None:
    low, high = trial.interval
    log.info(f"  {name}: drop of recall@1 {trial.drop:.4f} [{low:.4f}, {high:.4f}], budget {budget:g}")
    if not within_budget:
        log.warning(f"no set of layers stays within a drop of {budget:g}; took the set with the smallest drop")
    elif high > budget:
        log.warning(f"95 % interval on {queries} queries ends at {high:.4f}, beyond the budget. Use more queries.")


def _select_candidates(decision: Decision, budget: float) -> list[Trial]:
    """Return the trials to time: the chosen one, and the largest others within the budget."""
    chosen = decision.chosen
    others = [trial for trial in decision.trials if trial.quantised and trial.drop <= budget and trial != chosen]
    return [chosen, *sorted(others, key=lambda trial: -len(trial.quantised))[:_MAX_ALTERNATIVES]]


def _time_candidates(
    graphs: dict[str, onnx.ModelProto], images: NDArray[np.float32], budget: Budget
) -> dict[str, float]:
    """Return the p50 of graphs in ms, timed in turns on a batch of repeated images."""
    batch = budget.candidates.batch
    pixels = np.concatenate([images] * -(-batch // len(images)))[:batch]
    with budget.candidates.load(graphs) as forwards:
        calls = {name: partial(forward, pixels) for name, forward in forwards.items()}
        return {name: summarise(times)["p50"] for name, times in measure(calls, budget.seconds).items()}


def _pick_fastest(decision: Decision, names: dict[Trial, str], times: dict[str, float]) -> Trial:
    """Return the chosen trial, or another timed trial that is clearly faster."""
    timed = [trial for trial in decision.trials if names[trial] in times and trial.quantised]
    best = min(timed, key=lambda trial: times[names[trial]])
    return best if times[names[best]] < _FASTER * times[names[decision.chosen]] else decision.chosen


def _explain_faster(
    decision: Decision, fastest: Trial, names: dict[Trial, str], times: dict[str, float]
) -> dict[str, str]:
    """Return the reasons of the layers in which the fastest set differs from the largest set."""
    largest = decision.chosen
    gain = f"{times[names[fastest]]:.2f} ms, against {times[names[largest]]:.2f} ms of the largest set"
    removed, added = largest.quantised - fastest.quantised, fastest.quantised - largest.quantised
    reasons = dict.fromkeys(removed, f"not quantised: the budget allows it, but the graph is faster without it: {gain}")
    return reasons | dict.fromkeys(added, f"quantised: in the fastest set within the budget: {gain}")


def _embed(graph: onnx.ModelProto, batches: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    session = GraphSession(graph)
    return l2_normalize(np.concatenate([session.embed(batch) for batch in batches]))


def _set_name(quantised: Layers) -> str:
    if len(quantised) == 1:
        return f"only {next(iter(quantised))}"
    return f"{len(quantised)} layers quantised" if quantised else _BASE


def _name_trials(decision: Decision) -> dict[Trial, str]:
    """Return a unique name for each trial; sets of one size are numbered."""
    names: dict[Trial, str] = {}
    for trial in decision.trials:
        name, number = _set_name(trial.quantised), 1
        while name in names.values():
            number += 1
            name = f"{_set_name(trial.quantised)} ({number})"
        names[trial] = name
    return names


def _record(trial: Trial) -> dict[str, Any]:
    scores = {"recall_at_1": trial.recall, "drop": trial.drop, "drop_interval": list(trial.interval)}
    return {"quantised": sorted(trial.quantised), **scores, "cosine": trial.cosine}
