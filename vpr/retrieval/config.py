"""Configuration of embedding, search and re-ranking. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from vpr.artifacts.paths import check_file
from vpr.common.distributed import rank_and_world
from vpr.common.errors import UserError, check_numbers
from vpr.common.hardware import MAX_THREADS


@dataclass(frozen=True)
class EmbedConfig:
    """What to embed, with what.

    Attributes:
        model: artifact of the model.
        catalog: catalogue artifact.
        output: where the embeddings are written.
        split: only this split; empty embeds all.
        batch_size: images at a time.
        threads: that decode images ahead in each process; 0 decodes in turn with the model.
        part: images, rounded up to whole batches, that a run which was killed may have to embed again.
        ray: workers of a Ray Data job (``requirements-scale.txt``); 0 embeds in this process, or in those of torchrun.
    """

    model: str
    catalog: str
    output: str
    split: str = ""
    batch_size: int = 64
    threads: int = 0
    part: int = 4096
    ray: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, batch_size=(1, 1 << 16), threads=(0, MAX_THREADS), part=(1, 1 << 24), ray=(0, 4096))
        if self.ray and rank_and_world()[1] > 1:
            raise UserError("ray: its job starts its own workers: start it without torchrun")


@dataclass(frozen=True)
class RerankConfig:
    """Steps after the embedding, in this order; by default there are none.

    Attributes:
        centre: subtract the gallery's mean.
        whiten: keep this many principal directions of the gallery, each scaled to unit variance; 0 does not.
        dba: database augmentation: neighbours that each gallery vector is joined with.
        qe: query expansion: gallery neighbours that each query is joined with.
        alpha: power of the similarity that weighs a neighbour in ``dba`` and ``qe``.
        k_reciprocal: re-rank by the overlap of reciprocal neighbourhoods.
        k1: size of those neighbourhoods.
        k2: neighbours that their descriptions are averaged over; 1 does not.
        weight: share of the original distance in the final one.
    """

    centre: bool = False
    whiten: int = 0
    dba: int = 0
    qe: int = 0
    alpha: float = 3.0
    k_reciprocal: bool = False
    k1: int = 20
    k2: int = 6
    weight: float = 0.3

    def __post_init__(self) -> None:
        check_numbers(self, "rerank.", whiten=(0, None), dba=(0, None), qe=(0, None), k1=(1, None), k2=(1, None))
        if not 0 <= self.weight <= 1:
            raise UserError(f"rerank.weight: {self.weight}: give a share from 0 to 1")
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"rerank.alpha: {self.alpha}: give 0 or more")


@dataclass(frozen=True)
class SearchConfig:
    """What to look for, where.

    Attributes:
        queries: embeddings artifact whose ``query`` images are looked up (all of it, if it has none).
        gallery: embeddings artifact of the same model whose ``gallery`` images are searched.
        output: CSV file of the results; empty prints the first queries only.
        k: results per query.
        rerank: steps between the embeddings and the ranking.
        submission: ``.npy`` file for the AIcrowd Visual Product Recognition challenge: (queries, 1000) int64
            gallery indices, both in the order of their tables.
    """

    queries: str
    gallery: str
    output: str = ""
    k: int = 5
    rerank: RerankConfig = RerankConfig()
    submission: str = ""

    def __post_init__(self) -> None:
        check_numbers(self, k=(1, None))
        check_file("output", self.output)
        check_file("submission", self.submission)
        if self.submission and self.output and Path(self.submission).resolve() == Path(self.output).resolve():
            raise UserError(f"submission: {self.submission}: is the output too: name another file")
