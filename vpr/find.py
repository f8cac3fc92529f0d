"""``vpr search``: nearest gallery pictures of queries, both embedded before."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vpr.console import say
from vpr.embeddings import Embeddings, load_embeddings
from vpr.errors import UserError
from vpr.search import search


@dataclass(frozen=True)
class FindConfig:
    """What to look for, where.

    Attributes:
        queries: embeddings artifact whose ``query`` pictures are looked up (all of it, if it has none).
        gallery: embeddings artifact of the same model whose ``gallery`` pictures are searched.
        output: CSV file of the results; empty prints the first queries only.
        k: results per query.
    """

    queries: str
    gallery: str
    output: str = ""
    k: int = 5


def find(config: FindConfig) -> Path | None:
    """Search, print the first queries, and write all results as CSV (query, rank, image, product, score)."""
    queries, gallery = load_embeddings(config.queries), load_embeddings(config.gallery)
    first, second = queries.artifact.card.parents[0], gallery.artifact.card.parents[0]
    if first.sha256 != second.sha256:
        raise UserError(
            f"{config.queries}: embedded with '{first.name}', the gallery with '{second.name}': use one model"
        )
    asked, shown = _rows(queries, "query"), _rows(gallery, "gallery")
    scores, found = search(queries.vectors[asked], gallery.vectors[shown], config.k)
    table = Table("query", *[f"top {rank + 1}" for rank in range(config.k)])
    for row in range(min(8, len(asked))):
        names = [escape(f"{gallery.products[shown[i]]} {s:.2f}") for i, s in zip(found[row], scores[row], strict=True)]
        table.add_row(escape(str(queries.products[asked[row]])), *names)
    Console().print(table)
    if not config.output:
        return None
    partial = Path(f"{Path(config.output)}.partial")
    with partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["query", "rank", "image", "product", "score"])
        for row, query in enumerate(asked):
            for rank in range(config.k):
                hit = shown[found[row, rank]]
                values = [queries.images[query], rank + 1, gallery.images[hit], gallery.products[hit]]
                writer.writerow([*values, f"{scores[row, rank]:.6f}"])
    os.replace(partial, config.output)
    say(f"{config.output}: {len(asked)} queries, {config.k} results each")
    return Path(config.output)


def _rows(embeddings: Embeddings, role: str) -> list[int]:
    rows = [row for row, value in enumerate(embeddings.roles) if value == role]
    return rows or list(range(len(embeddings.roles)))
