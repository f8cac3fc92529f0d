"""Batches of several images per product: M per class, by category, or next to the most similar products."""

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray


def group_by_product(
    order: NDArray[np.int64],
    labels: NDArray[np.int64],
    targets: NDArray[np.int64],
    size: int,
    draws: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group rows into sets of ``size`` images of one product, spread over the epoch.

    An image is repeated only after all images of its product have been sampled.

    Args:
        order: (n,) random order of the rows.
        labels: (n,) product of each row; each product has a row.
        targets: (products,) number of images of each product in the epoch, multiples of ``size``.
        size: Images in a group.
        draws: (products,) random numbers from 0 to below 1, which shift a product's groups in the epoch.

    Returns:
        (groups, size) rows, and the (groups,) product of each group.
    """
    counts = np.bincount(labels, minlength=len(targets))
    by_product = order[np.argsort(labels[order], kind="stable")]
    products = np.repeat(np.arange(len(targets)), targets)
    position = np.arange(len(products)) - np.repeat(np.cumsum(targets) - targets, targets)
    rows = by_product[(np.cumsum(counts) - counts)[products] + position % counts[products]]
    groups, products = rows.reshape(-1, size), products[::size]
    per_product = (targets // size)[products]
    # A product with k groups has one in each k-th of the epoch, so that a batch rarely holds two of them.
    sequence = np.argsort((position[::size] // size + draws[products]) / per_product, kind="stable")
    return groups[sequence], products[sequence]


def sort_by_category(
    categories: NDArray[np.str_], groups: NDArray[np.int64], generator: torch.Generator
) -> NDArray[np.int64]:
    """Return the (groups,) order that puts the groups of a category next to each other, categories in random order."""
    names, codes = np.unique(categories[groups[:, 0]], return_inverse=True)
    ranks = torch.randperm(len(names), generator=generator).numpy()
    return np.argsort(ranks[codes], kind="stable")


def sort_by_neighbours(products: NDArray[np.int64], neighbours: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the (groups,) order in which each group is followed by one of each of its product's neighbours.

    ``products`` is the (groups,) product of each group, ``neighbours`` the (products, k) most similar products, -1 for
    none. A neighbour without a group left is omitted.
    """
    waiting: dict[int, deque[int]] = {}
    for group, product in enumerate(products.tolist()):
        waiting.setdefault(product, deque()).append(group)
    sequence = []
    for group, product in enumerate(products.tolist()):
        if not waiting[product] or waiting[product][0] != group:
            continue  # placed already, as a neighbour
        for member in (product, *neighbours[product].tolist()):
            if waiting.get(member):
                sequence.append(waiting[member].popleft())
    return np.array(sequence, dtype=np.int64)


def shuffle_batches(groups: NDArray[np.int64], per_batch: int, generator: torch.Generator) -> NDArray[np.int64]:
    """Cut (groups, size) into batches of ``per_batch`` groups, drop an incomplete one, and shuffle the batches."""
    batches = groups[: len(groups) // per_batch * per_batch].reshape(-1, per_batch, groups.shape[1])
    return batches[torch.randperm(len(batches), generator=generator).numpy()].reshape(-1, groups.shape[1])
