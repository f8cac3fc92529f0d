"""Galleries and searches for which the bound of a confirmed threshold holds."""

from vpr.common.log import get_logger
from vpr.retrieval.threshold_command import StoredThreshold

log = get_logger(__name__)

MAX_GROWTH = 2  # the absent products of the bound, half of those with queries by default, are in the gallery again


def check_gallery_size(threshold: StoredThreshold, products: int) -> None:
    """Warn if a gallery has many more products than the one of the bound: more of them look like an absent one."""
    confirmed = threshold.gallery_products
    if products > MAX_GROWTH * confirmed:
        log.warning(
            f"threshold: confirmed in a gallery of {confirmed} products, this one has {products}, so more false "
            "accepts are likely. Run `vpr gallery threshold` with this gallery."
        )


def check_filter(threshold: StoredThreshold) -> None:
    """Warn if the bound does not hold for a search with a filter.

    A filter lowers similarity and margin or keeps them. A probability that falls with one of them may then rise.
    """
    probability = threshold.probability
    if threshold.score == "probability" and min(probability.similarity, probability.margin) < 0:
        log.warning(
            "threshold: its probability falls with the similarity or the margin, so a filter may cause more false "
            "accepts. Run `vpr gallery threshold` with --score similarity."
        )
