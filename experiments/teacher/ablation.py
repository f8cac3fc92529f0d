"""Ablation of the teacher's recipe, on photographs of products that no stage has seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from experiments.figures import Row
from experiments.intervals import mean_text
from experiments.teacher.shuffled_split import build_shuffled_catalog
from teacher.config import HeadConfig, SoupConfig, StageConfig, TowerConfig, TrainConfig
from teacher.model import load_teacher
from teacher.soup import soup
from teacher.train import train
from vpr.cli import read_config
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import SCHEMA, Catalog, load_catalog
from vpr.data.config import LoaderConfig
from vpr.imaging.config import ViewConfig
from vpr.retrieval.config import RerankConfig
from vpr.retrieval.embeddings import embed, torch_forward
from vpr.retrieval.metrics import evaluate_similarities
from vpr.retrieval.rerank import similarities
from vpr.training.config import RunConfig

log = get_logger(__name__)

Vectors = NDArray[np.float32]
Embedded = tuple[Vectors, Vectors]  # embeddings of the scored images, and of the shop images
SEEDS = (0, 1, 2)
HEADS = {
    "ArcFace": HeadConfig(scale=16.0, margin=0.1, margin_end=0.3),
    "CosFace": HeadConfig("cosface", scale=16.0, margin=0.05, margin_end=0.2),
    "sub-centre ArcFace, K = 2": HeadConfig(scale=16.0, margin=0.1, margin_end=0.3, sub_centres=2),
    "adaptive margin": HeadConfig(scale=16.0, margin=0.1, margin_end=0.3, min_margin_ratio=0.2),
}
RERANKINGS = {
    "DBA + query expansion": RerankConfig(dba=5, qe=5),
    "k-reciprocal": RerankConfig(k_reciprocal=True),
}


def grocery_data() -> Path:
    """Return the folder of ``grocery``; raise :class:`UserError` if ``VPR_DATA`` is not set."""
    data = os.environ.get("VPR_DATA")
    if not data:
        raise UserError("VPR_DATA: it is not set. Set it to the folder with 'grocery'.")
    return Path(data)


def sample_teacher(recipe: str, catalog: Path, output: Path | str) -> Path:
    """Return a teacher of furniture renders by a packaged recipe; train it if it does not exist."""
    arguments = ["--recipe", recipe, "--catalog", str(catalog)]
    path = train(read_config(TrainConfig, "teacher train", [*arguments, "--output", str(output)]))
    assert path is not None
    return path


def build_grocery(data: Path, folder: Path) -> Path:
    """Write a catalogue of the Grocery Store Dataset, split by product: 15 % for validation, 35 % for test."""
    root, output = str(data / "grocery" / "train"), str(folder / "catalog")
    return build_shuffled_catalog("folder", root, output, validation=0.15, test=0.35)


def ablate(data: Path, start: Path, folder: Path, epochs: int = 8, seeds: tuple[int, ...] = SEEDS) -> list[Row]:
    """Train every variant with every seed, average, re-rank, and score all on the same queries.

    Args:
        data: Folder of ``grocery``.
        start: Teacher artifact from which every training starts, in place of CLIP's weights.
        folder: Folder of the artifacts; finished ones are reused.
        epochs: Number of epochs of each training; the first trains the head only.
        seeds: Seeds of each variant.
    """
    catalog = load_catalog(build_grocery(data, folder))
    test, shop = catalog.select(split="test"), shop_images(data)
    rows, embedded = [], {"start, not fine-tuned": [_embed(start, test, shop)]}
    for name, head in HEADS.items():
        embedded[name] = [_embed(_train(folder, start, head, seed, epochs, 0.0), test, shop) for seed in seeds]
    ema = [_train(folder, start, HEADS["ArcFace"], seed, epochs, 0.97) for seed in seeds]
    embedded["ArcFace + EMA"] = [_embed(path, test, shop) for path in ema]
    plain = [_train(folder, start, HEADS["ArcFace"], seed, epochs, 0.0) for seed in seeds]
    wise = [_soup(folder, "wise-ft", [path], number) for number, path in enumerate(plain)]
    embedded["ArcFace + WiSE-FT"] = [_embed(path, test, shop) for path in wise]
    members = [_train(folder, start, head, seed, epochs, 0.0) for head in HEADS.values() for seed in seeds]
    for method in ("uniform", "greedy"):
        embedded[f"{method} soup of the {len(members)} heads and seeds"] = [
            _embed(_soup(folder, method, members, 0), test, shop)
        ]
    for name, vectors in embedded.items():
        rows.append(_row(name, vectors, test, shop, RerankConfig()))
    for name, config in RERANKINGS.items():
        rows.append(_row(f"ArcFace + {name}", embedded["ArcFace"], test, shop, config))
    return rows


def _train(
    folder: Path, start: Path, head: HeadConfig, seed: int, epochs: int, ema: float, output: Path | None = None
) -> Path:
    name = "-".join([head.loss, f"k{head.sub_centres}", f"by{head.min_margin_ratio}", f"ema{ema}", f"seed{seed}"])
    config = TrainConfig(
        str(folder / "catalog"),
        str(output or folder / name),
        recipe="grocery",
        tower=TowerConfig("sample", str(start)),
        head=head,
        stages=(
            StageConfig("head", 1, lr_head=2e-3, weight_decay=0.05),
            StageConfig("all", epochs - 1, lr_head=2e-3, lr_tower=1e-3, weight_decay=0.05, warmup=0.15),
        ),
        views=ViewConfig(),
        loader=LoaderConfig(batch_size=64, keep_in_memory=True),
        run=RunConfig(ema=ema),
        seed=seed,
    )
    path = train(config)
    assert path is not None
    return path


def grocery_teacher(folder: Path, start: Path, output: Path, epochs: int = 24) -> Path:
    """Train the ablation's plain ArcFace teacher until more epochs add little."""
    return _train(folder, start, HEADS["ArcFace"], SEEDS[0], epochs, 0.0, output)


def _soup(folder: Path, method: Any, models: list[Path], number: int) -> Path:
    output = str(folder / f"{method}-{number}")
    return soup(SoupConfig(tuple(str(path) for path in models), str(folder / "catalog"), output, method))


def shop_images(data: Path) -> Catalog:
    """Return the clean shop image of each of the 81 products: the hard gallery, unseen in training."""
    paths = sorted((data / "grocery" / "iconic").glob("*.jpg"))
    rows = [{"image": path.name, "product": path.stem, "role": "gallery", "split": "test"} for path in paths]
    return Catalog(pa.Table.from_pylist(rows, schema=SCHEMA), data / "grocery" / "iconic")


def _embed(path: Path, test: Catalog, shop: Catalog) -> Embedded:
    model, artifact = load_teacher(path)
    assert artifact.card.preprocess is not None
    log.info(f"  scoring {path.name}")
    forward = torch_forward(model)
    return embed(test, artifact.card.preprocess, forward), embed(shop, artifact.card.preprocess, forward)


def _row(name: str, seeds: list[Embedded], test: Catalog, shop: Catalog, config: RerankConfig) -> Row:
    """Return scores averaged over seeds, with their intervals by product."""
    query, gallery = test.roles == "query", test.roles == "gallery"
    shelf, single = [], []
    for images, shop_vectors in seeds:
        scores = similarities(images[query], images[gallery], config)
        shelf.append(evaluate_similarities(scores, test.products[query], test.products[gallery]))
        scores = similarities(images, shop_vectors, config)
        single.append(evaluate_similarities(scores, test.products, shop.products))
    return {
        "variant": name,
        "seeds": len(seeds),
        "recall@1 [95 %]": mean_text(np.mean([score.hits for score in shelf], axis=0), shelf[0].products),
        "mAP [95 %]": mean_text(np.mean([score.precisions for score in shelf], axis=0), shelf[0].products),
        "recall@1 of each seed": ", ".join(f"{score.recall_at_1:.3f}" for score in shelf),
        "shop image: recall@1 [95 %]": mean_text(np.mean([score.hits for score in single], axis=0), single[0].products),
    }
