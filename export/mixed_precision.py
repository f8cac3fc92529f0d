"""Search for the fastest quantised graph within a recall budget, confirmed on products that the search has not seen."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibration.confirmation import Confirmation, confirm_sequence, order_candidates, split_products
from calibration.sensitivity import Decision, Layers, LayerSetScore, Trial, search_quantised_layers
from export.candidates import CandidateRunner
from export.parity import parity
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog
from vpr.inference.onnx_graph import GraphSession
from vpr.inference.timing import measure, summarise
from vpr.retrieval.drop_test import DropTest, change_correlation, drop_test, state_result
from vpr.retrieval.embeddings import l2_normalize
from vpr.retrieval.metrics import RetrievalScores, evaluate
from vpr.retrieval.self_search import find_self_search

log = get_logger(__name__)

_BASE = "nothing quantised"
_BATCH = 16
_SEED = 0
# Number of confirmed sets that are timed, largest sets first.
_MAX_TIMED = 4
# An alternative must take less than this share of the chosen set's time; a smaller gain is noise.
_FASTER = 0.98

Quantise = Callable[[list[str]], onnx.ModelProto]


@dataclass(frozen=True)
class Budget:
    """Recall budget, and how candidates are timed."""

    drop: float  # largest drop of recall@1
    confidence: float  # confidence that a confirmed graph keeps to it
    seconds: float  # seconds of timing per candidate
    candidates: CandidateRunner  # loader of the candidates


class Queries:
    """Queries of some products of the validation split against all of its gallery.

    Where the queries and the gallery are the same images, each query searches the others.
    """

    def __init__(self, validation: Catalog, pixels: NDArray[np.float32], products: NDArray[np.str_]) -> None:
        """Select the queries of ``products``; ``pixels`` are the inputs of all images of the split, in its order."""
        own = find_self_search(validation)
        queries = np.flatnonzero(validation.roles == "query") if own is None else own.queries
        gallery = np.flatnonzero(validation.roles == "gallery") if own is None else own.gallery
        is_chosen = np.isin(validation.products[queries], products)
        self._pixels, self._rows = pixels, np.union1d(queries[is_chosen], gallery)
        self._queries = np.searchsorted(self._rows, queries[is_chosen])
        self._gallery = np.searchsorted(self._rows, gallery)
        self._own = None if own is None else own.own[is_chosen]
        self._products = validation.products[self._rows]
        self.products: list[str] = products.tolist()

    @property
    def query_products(self) -> NDArray[np.str_]:
        """(queries,) ids of the queries' products."""
        return self._products[self._queries]

    def embed(self, graph: onnx.ModelProto) -> NDArray[np.float32]:
        """Embed queries and gallery: (n, dim) float32, L2-normalised."""
        session, rows = GraphSession(graph), self._rows
        blocks = (self._pixels[rows[start : start + _BATCH]] for start in range(0, len(rows), _BATCH))
        return l2_normalize(np.concatenate([session.embed(block) for block in blocks]))

    def score(self, vectors: NDArray[np.float32]) -> RetrievalScores:
        """Score the embeddings of :meth:`embed`."""
        products, gallery = self._products[self._gallery], vectors[self._gallery]
        return evaluate(vectors[self._queries], self.query_products, gallery, products, own=self._own)


def searching_products(validation: Catalog) -> NDArray[np.str_]:
    """Return the (queries,) products of the images that search, as :class:`Queries` selects them."""
    own = find_self_search(validation)
    rows = np.flatnonzero(validation.roles == "query") if own is None else own.queries
    return validation.products[rows]


def search_mixed_precision(
    graph: onnx.ModelProto,
    quantise: Quantise,
    layers: list[str],
    reduced_sets: Sequence[Collection[str]],
    validation: Catalog,
    pixels: NDArray[np.float32],
    budget: Budget,
) -> dict[str, Any]:
    """Search the layers to quantise on some products, confirm the drop on others, and choose by time.

    Args:
        graph: FP32 graph.
        quantise: Function from names of layers to the FP32 graph with these layers quantised.
        layers: Names of the layers that may be quantised.
        reduced_sets: Kinds of layers. The found set is also tried reduced to each, as eight bits may slow the others.
        validation: Images with roles ``query`` and ``gallery`` that no score is reported on.
        pixels: The same images as inputs, (n, 3, size, size) float32.
        budget: Recall budget.

    Returns:
        The content of ``decision.json``, as ``docs/export.md`` lists it. If no candidate is confirmed, the set that
        the search found is ``quantised``, and ``confirmed`` is False.
    """
    search_products, confirmation_products = split_products(searching_products(validation), _SEED)
    decision = _search(graph, quantise, layers, reduced_sets, Queries(validation, pixels, search_products), budget.drop)
    queries = Queries(validation, pixels, confirmation_products)
    sequence = _confirm(graph, quantise, order_candidates(decision, reduced_sets), queries, decision, budget)
    names = _name_sets([trial.quantised for trial in decision.trials] + [step.candidate for step in sequence])
    confirmed = [step.candidate for step in sequence if step.confirmed]
    timed = confirmed[-_MAX_TIMED:] or [decision.chosen.quantised]
    graphs = {names[quantised]: quantise(sorted(quantised)) for quantised in timed}
    times = _time_candidates({_BASE: graph, **graphs}, pixels, budget)
    chosen = _pick_fastest(timed, names, times)
    if times[names[chosen]] >= times[_BASE]:
        log.warning("quantisation does not make this graph faster on this machine")
    reasons = decision.reasons | _explain_unconfirmed(decision, timed[-1])
    return {
        "max_recall_drop": budget.drop,
        "confidence": budget.confidence,
        **_record_outcome(sequence, chosen, names, budget),
        "quantised": [name for name in layers if name in chosen],
        "layers": reasons | _explain_faster(timed[-1], chosen, names, times),
        "latency_ms": times,
        "latency_by": f"{budget.candidates.backend}, batch {budget.candidates.batch}",
        "split": "validation",
        "search_products": search_products.tolist(),
        "confirmation_products": queries.products,
        "sequence": [{"name": names[step.candidate], **_record_confirmation(step)} for step in sequence],
        "single_layer_trials": [_record(trial) for trial in decision.single_layer_trials],
        "trials": [{"name": names[trial.quantised], **_record(trial)} for trial in decision.trials],
    }


def _search(
    graph: onnx.ModelProto,
    quantise: Quantise,
    layers: list[str],
    reduced_sets: Sequence[Collection[str]],
    queries: Queries,
    max_drop: float,
) -> Decision:
    """Search the layers to quantise on the queries of the search's products."""
    log.info(f"search of layers on {len(queries.products)} products")
    float_vectors = queries.embed(graph)
    float_hits = queries.score(float_vectors).hits

    def score(quantised: Layers) -> LayerSetScore:
        vectors = queries.embed(quantise(sorted(quantised))) if quantised else float_vectors
        hits, cosine = queries.score(vectors).hits, parity(float_vectors, vectors)["cosine_mean"]
        result = LayerSetScore(hits, cosine, change_correlation(float_hits, hits, queries.query_products))
        log.info(f"  recall@1 {result.hits.mean():.4f}  cosine {result.cosine:.6f}  {_set_name(quantised)}")
        return result

    decision = search_quantised_layers(layers, score, max_drop, reduced_sets)
    if not decision.within_budget:
        log.warning(f"no set of layers stays within a drop of {max_drop:g} in the search; took the smallest drop")
    return decision


def _confirm(
    graph: onnx.ModelProto,
    quantise: Quantise,
    candidates: Sequence[Layers],
    queries: Queries,
    decision: Decision,
    budget: Budget,
) -> list[Confirmation[Layers]]:
    """Test the candidates in order on the queries of the confirmation's products."""
    log.info(f"confirmation on {len(queries.products)} other products")
    float_hits = queries.score(queries.embed(graph)).hits

    def test(quantised: Layers) -> DropTest:
        hits = queries.score(queries.embed(quantise(sorted(quantised)))).hits
        result = drop_test(float_hits, hits, queries.query_products, decision.correlation)
        log.info(f"  drop {result.drop:+.4f}, p {result.p_value(budget.drop):.4f}  {_set_name(quantised)}")
        return result

    return confirm_sequence(candidates, test, budget.drop, budget.confidence)


def _record_outcome(
    sequence: Sequence[Confirmation[Layers]], chosen: Layers, names: dict[Layers, str], budget: Budget
) -> dict[str, Any]:
    """Log and return the result of the chosen set; without a confirmed set, the safest one shows what is missing."""
    tested = next((step for step in sequence if step.candidate == chosen and step.confirmed), sequence[0])
    result = state_result(tested.test, budget.drop, budget.confidence, tested.upper_bound)
    outcome = f"{names[tested.candidate]}: {result}"
    (log.info if tested.confirmed else log.warning)(outcome)
    if not tested.confirmed:
        note = "the written graph is not confirmed. A third of the validation products steers the search"
        log.warning(f"{names[chosen]}: {note}")
    return {
        "confirmed": tested.confirmed,
        "outcome": outcome,
        "drop_upper_bound": tested.upper_bound if tested.confirmed else None,
        "smallest_confirmable_drop": tested.test.smallest_confirmable(budget.confidence),
    }


def _time_candidates(
    graphs: dict[str, onnx.ModelProto], images: NDArray[np.float32], budget: Budget
) -> dict[str, float]:
    """Return the p50 of graphs in ms, timed in turns on a batch of repeated images."""
    batch = budget.candidates.batch
    pixels = images[np.arange(batch) % len(images)]
    with budget.candidates.load(graphs) as forwards:
        calls = {name: partial(forward, pixels) for name, forward in forwards.items()}
        return {name: summarise(times)["p50"] for name, times in measure(calls, budget.seconds).items()}


def _pick_fastest(timed: list[Layers], names: dict[Layers, str], times: dict[str, float]) -> Layers:
    """Return the largest of the timed sets, or a smaller one that is clearly faster."""
    largest, best = timed[-1], min(timed, key=lambda quantised: times[names[quantised]])
    return best if times[names[best]] < _FASTER * times[names[largest]] else largest


def _explain_unconfirmed(decision: Decision, largest: Layers) -> dict[str, str]:
    """Return the reasons of the layers that the search found but that the confirmation left out."""
    reason = "not quantised: the search would quantise it, but with it the drop is not confirmed"
    return dict.fromkeys(decision.chosen.quantised - largest, reason)


def _explain_faster(
    largest: Layers, fastest: Layers, names: dict[Layers, str], times: dict[str, float]
) -> dict[str, str]:
    """Return the reasons of the layers in which the fastest set differs from the largest set."""
    gain = f"{times[names[fastest]]:.2f} ms, against {times[names[largest]]:.2f} ms of the largest set"
    removed, added = largest - fastest, fastest - largest
    reasons = dict.fromkeys(removed, f"not quantised: the budget allows it, but the graph is faster without it: {gain}")
    return reasons | dict.fromkeys(added, f"quantised: in the fastest set within the budget: {gain}")


def _set_name(quantised: Layers) -> str:
    if len(quantised) == 1:
        return f"only {next(iter(quantised))}"
    return f"{len(quantised)} layers quantised" if quantised else _BASE


def _name_sets(sets: Sequence[Layers]) -> dict[Layers, str]:
    """Return a unique name for each set of layers; sets of one size are numbered."""
    names: dict[Layers, str] = {}
    for quantised in dict.fromkeys(sets):
        name, number = _set_name(quantised), 1
        while name in names.values():
            number += 1
            name = f"{_set_name(quantised)} ({number})"
        names[quantised] = name
    return names


def _record(trial: Trial) -> dict[str, Any]:
    scores = {"recall_at_1": trial.recall, "drop": trial.drop, "cosine": trial.cosine}
    return {"quantised": sorted(trial.quantised), **scores}


def _record_confirmation(step: Confirmation[Layers]) -> dict[str, Any]:
    test = step.test
    counts = {
        key: getattr(test, key) for key in ("products", "queries", "broken", "corrected", "changed_products", "drop")
    }
    result = {"p_value": step.p_value, "upper_bound": step.upper_bound, "confirmed": step.confirmed}
    return {"quantised": sorted(step.candidate), **counts, "correlation": test.correlation, **result}
