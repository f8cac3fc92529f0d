"""Synthetic validation splits and layers whose true drop of recall@1 is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from calibration.confirmation import confirm_sequence, order_candidates, split_products
from calibration.sensitivity import Layers, LayerSetScore, search_quantised_layers
from vpr.retrieval.drop_test import DropTest, change_correlation, drop_test

Hits = NDArray[np.bool_]
Products = NDArray[np.str_]

_MEAN_MARGIN = -0.5  # about 31 % recall@1
_HIT_CORRELATION = 0.4  # of margins, which gives hits an intraclass correlation of about .25
_CHANGE_CORRELATION = 0.3  # of perturbations


@dataclass(frozen=True)
class Network:
    """Layers whose quantisation moves the margin of every query: by a loss, and by noise of a scale."""

    losses: NDArray[np.float64]  # (layers,) mean loss of margin
    scales: NDArray[np.float64]  # (layers,) standard deviation of the change of margin

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return [f"layer{index:02}" for index in range(len(self.losses))]

    def true_drop(self, quantised: Layers) -> float:
        """Return the drop of recall@1 over all queries that there could be: margins are normal, so it is exact."""
        chosen = np.isin(self.names, sorted(quantised))
        scale = np.sqrt(1 + (self.scales[chosen] ** 2).sum())
        return float(ndtr(_MEAN_MARGIN) - ndtr((_MEAN_MARGIN - self.losses[chosen].sum()) / scale))


@dataclass(frozen=True)
class Result:
    """Result of one search and confirmation."""

    confirmed: bool
    true_drop: float  # of the chosen set
    upper_bound: float  # of the chosen set
    search_drop: float  # drop of the searched set on the products that it was searched on
    true_search_drop: float  # true drop of the searched set


def harmful_network(rng: np.random.Generator, layers: int = 24) -> Network:
    """Draw layers of very different harm; all together lose 2 to 6 points of recall@1."""
    shares = rng.dirichlet(np.full(layers, 0.5))
    return Network(rng.uniform(0.06, 0.18) * shares, 0.25 * np.sqrt(shares))


def safe_network(rng: np.random.Generator, layers: int = 24) -> Network:
    """Draw layers of which most change next to nothing, so that a clearly safe graph exists."""
    harmful = harmful_network(rng, layers)
    safe = np.arange(layers) < 3 * layers // 4
    return Network(np.where(safe, 0.0, harmful.losses), np.where(safe, 0.001, harmful.scales))


def draw_hits(
    network: Network, products: int, queries: int, rng: np.random.Generator
) -> tuple[Products, NDArray[np.float64], NDArray[np.float64]]:
    """Draw the queries' products, their margins (queries,), and what each layer adds to them (layers, queries)."""
    codes = np.repeat(np.arange(products), queries)

    def correlated(correlation: float, *shape: int) -> NDArray[np.float64]:
        shared = rng.standard_normal((*shape, products))[..., codes]
        own = rng.standard_normal((*shape, len(codes)))
        return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own

    margins = _MEAN_MARGIN + correlated(_HIT_CORRELATION)
    noise = correlated(_CHANGE_CORRELATION, len(network.losses))
    names = np.array([f"product{code:05}" for code in range(products)])[codes]
    return names, margins, network.scales[:, None] * noise - network.losses[:, None]


def run_search(
    network: Network, products: int, queries: int, max_drop: float, confidence: float, rng: np.random.Generator
) -> Result:
    """Search and confirm layers with the code of ``vpr export int8`` on ``queries`` queries of each product."""
    names, margins, changes = draw_hits(network, products, queries, rng)
    search_products, confirmation_products = split_products(names, int(rng.integers(1 << 31)))
    layers = np.array(network.names)

    def hits(quantised: Layers, rows: Hits) -> Hits:
        return margins[rows] + changes[np.isin(layers, sorted(quantised))][:, rows].sum(axis=0) > 0

    searched, confirmed = np.isin(names, search_products), np.isin(names, confirmation_products)

    def score(quantised: Layers) -> LayerSetScore:
        harm = network.scales[np.isin(layers, sorted(quantised))]
        after = hits(quantised, searched)
        correlation = change_correlation(hits(frozenset(), searched), after, names[searched])
        return LayerSetScore(after, 1 - float((harm**2).sum()), correlation)

    def test(quantised: Layers) -> DropTest:
        return drop_test(
            hits(frozenset(), confirmed), hits(quantised, confirmed), names[confirmed], decision.correlation
        )

    decision = search_quantised_layers(network.names, score, max_drop)
    sequence = confirm_sequence(order_candidates(decision), test, max_drop, confidence)
    passed = [step for step in sequence if step.confirmed]
    chosen = passed[-1] if passed else sequence[0]
    return Result(
        bool(passed),
        network.true_drop(chosen.candidate),
        chosen.upper_bound,
        decision.chosen.drop,
        network.true_drop(decision.chosen.quantised),
    )


def draw_noise(products: int, queries: int, rng: np.random.Generator) -> tuple[Hits, Hits, Products, float]:
    """Draw hits before and after a quantisation that moves all margins a little, and the true drop."""
    network = Network(np.array([0.02]), np.array([0.15]))
    names, margins, changes = draw_hits(network, products, queries, rng)
    return margins > 0, margins + changes[0] > 0, names, network.true_drop(frozenset(network.names))


def draw_rare_loss(
    products: int, queries: int, rng: np.random.Generator, share: float = 0.02, recall: float = 0.9
) -> tuple[Hits, Hits, Products, float]:
    """Draw hits where a share of the products loses all of them, and no other query changes."""
    before, names = correlated_hits(products, queries, 0.25, recall, rng)
    is_lost = rng.random(products) < share
    return before, before & ~np.repeat(is_lost, queries), names, share * recall


def draw_unequal_sizes(
    products: int, queries: int, rng: np.random.Generator, recall: float = 0.8
) -> tuple[Hits, Hits, Products, float]:
    """Draw products of log-normal size, of which the largest tenth loses a fifth of its hits, query by query."""
    scale = 0.8
    sizes = np.maximum(1, np.rint(queries * np.exp(scale * rng.standard_normal(products)))).astype(np.int64)
    large = queries * np.exp(scale * 1.2816)  # the 90 % quantile
    codes = np.repeat(np.arange(products), sizes)
    precision = 3.0  # intraclass correlation .25
    recalls = rng.beta(recall * precision, (1 - recall) * precision, products)
    before = rng.random(len(codes)) < recalls[codes]
    after = before & ~((sizes[codes] > large) & (rng.random(len(codes)) < 0.2))
    # Share of the queries in the largest tenth: the normal distribution of log-size, shifted by its variance.
    in_large = 1 - ndtr(1.2816 - scale)
    return before, after, codes.astype(np.str_), float(0.2 * recall * in_large)


def correlated_hits(
    products: int, queries: int, correlation: float, share: float, rng: np.random.Generator
) -> tuple[Hits, Products]:
    """Draw hits whose intraclass correlation is exact: the products' recalls have a beta distribution."""
    precision = (1 - correlation) / correlation
    recalls = rng.beta(share * precision, (1 - share) * precision, products)
    codes = np.repeat(np.arange(products), queries)
    return rng.random(len(codes)) < recalls[codes], codes.astype(np.str_)
