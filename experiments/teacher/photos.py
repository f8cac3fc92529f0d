"""Teachers on photographs of products that no training has seen: losses, two teachers fused, a cleaned catalogue.

All start from ImageNet weights. Every training has the same epochs, and its last epoch is scored. LoRA is left out,
since EfficientNet has no linear layers to adapt.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.figures import Figure, Row, command_of
from experiments.intervals import gain_text, mean_text
from experiments.teacher.ablation import build_grocery
from experiments.teacher.imagenet_weights import SIZES, embed_untrained, imagenet_tower
from experiments.teacher.wrong_labels import SHARE, inject
from teacher.config import FuseConfig, HeadConfig, PairConfig, ProxyConfig, StageConfig, TrainConfig
from teacher.fuse import fuse
from teacher.model import load_teacher
from teacher.train import train
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import LoaderConfig
from vpr.data.decisions import write_cleaned_catalog
from vpr.imaging.config import ViewConfig
from vpr.retrieval.catalog_check import Thresholds, check_labels
from vpr.retrieval.check_command import suggest_decisions
from vpr.retrieval.embeddings import embed, score_split, torch_forward
from vpr.retrieval.intervals import mean_interval
from vpr.retrieval.label_scores import LabelledVectors
from vpr.retrieval.metrics import RetrievalScores
from vpr.training.config import RunConfig

log = get_logger(__name__)

SEEDS = (0, 1, 2)
EPOCHS, BATCH = 6, 64
SIDES = {0: 224, 2: 260}  # pixels of EfficientNet-Lite0 and -Lite2
_HEAD = HeadConfig(scale=16.0, margin=0.1, margin_end=0.3)  # as in the ablation, for 41 products
MARGIN = "ArcFace"
FUSED = (("concatenated", 0), ("reduced to 256 dimensions", 256))
_GAIN = "gain on the better [95 %]"
_COMMAND = command_of("teacher", "photos")
# Settings of the losses are the defaults of the toolkit; none was tuned here.
LOSSES: dict[str, dict[str, Any]] = {
    MARGIN: {},
    "SoftTriple": {"margin_weight": 0.0, "proxy": ProxyConfig("soft-triple")},
    "Proxy-Anchor": {"margin_weight": 0.0, "proxy": ProxyConfig("proxy-anchor")},
    "contrastive": {"margin_weight": 0.0, "pair": PairConfig("contrastive"), "images_per_product": 4},
    "contrastive, memory of 512": {
        "margin_weight": 0.0,
        "pair": PairConfig("contrastive", positives="hard", memory=512),
        "images_per_product": 4,
    },
    "Multi-Similarity": {"margin_weight": 0.0, "pair": PairConfig("multi-similarity"), "images_per_product": 4},
    "ArcFace + Multi-Similarity": {"pair": PairConfig("multi-similarity"), "images_per_product": 4},
}


@dataclass(frozen=True)
class Photos:
    """Photographs of products with the folder of the trained teachers; ``test`` is the split that is scored."""

    folder: Path
    catalog: Path
    test: Catalog

    def train(
        self,
        name: str,
        seed: int,
        size: int = 0,
        catalog: Path | None = None,
        images_per_product: int = 0,
        **changes: Any,
    ) -> Path:
        """Fine-tune EfficientNet-Lite0 or -Lite2; a finished teacher is reused."""
        config = TrainConfig(
            str(catalog or self.catalog),
            str(self.folder / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}"),
            recipe="photos",
            tower=replace(imagenet_tower(size, self.folder / "weights"), image_size=SIDES[size]),
            head=_HEAD,
            stages=(StageConfig("last", EPOCHS, 2e-3, 1e-3, last_blocks=3, weight_decay=0.05),),
            views=ViewConfig(),
            loader=LoaderConfig(BATCH, keep_in_memory=True, images_per_product=images_per_product),
            run=RunConfig(validate_every=EPOCHS),
            seed=seed,
        )
        path = train(replace(config, **changes))
        assert path is not None
        return path

    def score(self, teacher: Path) -> RetrievalScores:
        """Score a teacher on the unseen products."""
        model, artifact = load_teacher(teacher)
        assert artifact.card.preprocess is not None
        return score_split(self.test, embed(self.test, artifact.card.preprocess, torch_forward(model)))

    def untrained(self, size: int, images: Catalog) -> NDArray[np.float32]:
        """Return embeddings of the ImageNet weights."""
        return embed_untrained(imagenet_tower(size, self.folder / "weights"), images)


def open_photos(data: Path, folder: Path) -> Photos:
    """Build the catalogue of the photographs, split by product."""
    catalog = build_grocery(data, folder)
    return Photos(folder, catalog, load_catalog(catalog).select(split="test"))


def photo_figures(photos: Photos) -> tuple[list[Figure], dict[str, list[Row]]]:
    """Train and score all teachers; return the figures and the tables."""
    scores = {_untrained(size): [score_split(photos.test, photos.untrained(size, photos.test))] for size in SIZES}
    teachers = {name: [photos.train(name, seed, **changes) for seed in SEEDS] for name, changes in LOSSES.items()}
    scores |= {name: [photos.score(path) for path in paths] for name, paths in teachers.items()}
    fused_figures, fused_rows = _fuse(photos, teachers[MARGIN], scores[MARGIN])
    cleaned_figures, cleaned_rows = _clean(photos, scores[MARGIN])
    products = len(set(photos.test.products))
    best = _figure(f"teacher on photographs, {products} unseen products: recall@1", scores[MARGIN])
    tables = {
        "photos-losses": [_row(name, values) for name, values in scores.items()],
        "photos-fused": fused_rows,
        "photos-cleaned": cleaned_rows,
    }
    return [best, *fused_figures, *cleaned_figures], tables


def _fuse(photos: Photos, small: list[Path], small_scores: list[RetrievalScores]) -> tuple[list[Figure], list[Row]]:
    """Fuse the teachers of each seed, with and without reduction, and compare with the better of the two.

    The scores decide which teacher is the better one. That favours the teacher, so the gain is not too high.
    """
    large = [photos.train("Lite2", seed, size=2) for seed in SEEDS]
    single = {"Lite0": small_scores, "Lite2": [photos.score(path) for path in large]}
    better = max(single, key=lambda name: _mean(single[name], "hits").mean())
    rows, figures = [_row(name, scores) | {_GAIN: ""} for name, scores in single.items()], []
    for title, dim in FUSED:
        paths = []
        for seed, pair in zip(SEEDS, zip(small, large, strict=True), strict=True):
            output = str(photos.folder / f"fused-{dim}-seed{seed}")
            paths.append(fuse(FuseConfig(tuple(map(str, pair)), str(photos.catalog), output, dim, seed=seed)))
        scores = [photos.score(path) for path in paths]
        gain = _mean(scores, "hits") - _mean(single[better], "hits")
        row = _row(f"both, whitened and {title}", scores)
        rows.append(row | {_GAIN: gain_text(gain, scores[0].products, hits=_mean(single[better], "hits"))})
        name = f"fused teachers on photographs, {title}: recall@1 against the better of them"
        interval = mean_interval(gain, scores[0].products, lowest=-1)
        figures.append(Figure(name, float(gain.mean()), "", 0.0, ">=", _COMMAND, interval, SEEDS))
    return figures, rows


def _clean(photos: Photos, correct: list[RetrievalScores]) -> tuple[list[Figure], list[Row]]:
    """Train on 5 % wrong labels and on what ``vpr catalog check`` makes of them; compare with the correct labels."""
    seeded = [(_move_labels(photos, seed), seed) for seed in SEEDS]
    checked = [_apply(photos, path, seed) for path, seed in seeded]
    reviewed = [_apply(photos, path, seed, is_reviewed=True) for path, seed in seeded]
    catalogs = {
        f"{SHARE:.0%} wrong": ("wrong labels", [path for path, _ in seeded]),
        "all suggestions applied": ("checked labels", checked),
        "right suggestions applied": ("reviewed labels", reviewed),
    }
    scores = {"correct": correct}
    rows = [_row("correct", correct) | _count_labels(photos, [photos.catalog])]
    for title, (name, paths) in catalogs.items():
        teachers = [photos.train(name, seed, catalog=path) for seed, path in zip(SEEDS, paths, strict=True)]
        scores[title] = [photos.score(teacher) for teacher in teachers]
        rows.append(_row(title, scores[title]) | _count_labels(photos, paths))
    return _regained(scores), rows


def _regained(scores: dict[str, list[RetrievalScores]]) -> list[Figure]:
    """Return what wrong labels cost, and what each cleaned catalogue regains of it."""
    (_, correct), (title, wrong), *cleaned = scores.items()
    figures = []
    for measure, key in (("recall@1", "hits"), ("mAP", "precisions")):
        lost = float((_mean(correct, key) - _mean(wrong, key)).mean())
        name = f"{title} labels on photographs"
        figures.append(Figure(f"{name}: {measure} that they cost", lost, "", None, "<=", _COMMAND, None, SEEDS))
        for change, after in cleaned:
            gain = float((_mean(after, key) - _mean(wrong, key)).mean())
            name_of_gain = f"{name}, {change}: {measure} regained"
            figures.append(Figure(name_of_gain, gain, "", None, ">=", _COMMAND, None, SEEDS))
    return figures


def _move_labels(photos: Photos, seed: int) -> Path:
    """Write the catalogue with a share of its training images in other training products."""
    catalog = load_catalog(photos.catalog)
    training = catalog.select(split="train")
    names, labels = np.unique(training.products, return_inverse=True)
    moved, is_wrong = inject(labels, seed)
    images = training.table["image"].to_pylist()
    rows = [(images[row], f"move {names[moved[row]]}") for row in np.flatnonzero(is_wrong)]
    return _decide(photos, catalog, rows, f"wrong-{seed}")


def _apply(photos: Photos, path: Path, seed: int, is_reviewed: bool = False) -> Path:
    """Write the catalogue with the suggestions of the check, from embeddings of the ImageNet weights.

    ``is_reviewed`` applies only suggestions that the true labels confirm, as a person would who makes no mistake.
    """
    catalog, truth = load_catalog(path), _true_products(photos)
    training = catalog.select(split="train")
    labels = np.unique(training.products, return_inverse=True)[1]
    findings = check_labels(LabelledVectors(photos.untrained(0, training), labels), Thresholds()).findings
    rows = set()
    for finding, decision in zip(findings, suggest_decisions(findings, training), strict=True):
        image, product = training.table["image"][finding.row].as_py(), training.products[finding.row]
        is_right = truth[image] != product and decision in ("drop", f"move {truth[image]}")
        if decision != "keep" and (is_right or not is_reviewed):
            rows.add((image, decision))
    return _decide(photos, catalog, sorted(rows), f"{'reviewed' if is_reviewed else 'checked'}-{seed}")


def _decide(photos: Photos, catalog: Catalog, rows: list[tuple[str, str]], name: str) -> Path:
    table = photos.folder / f"{name}.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("image", "decision"), *rows])
    return write_cleaned_catalog(catalog, table, str(photos.folder / name))


def _count_labels(photos: Photos, paths: list[Path]) -> Row:
    """Return the training images and those in a wrong product, averaged over catalogues."""
    splits = [load_catalog(path).select(split="train") for path in paths]
    wrong = np.mean([_count_wrong(photos, split) for split in splits])
    return {"training images": f"{np.mean([len(split) for split in splits]):.0f}", "wrong labels": f"{wrong:.0f}"}


def _count_wrong(photos: Photos, images: Catalog) -> int:
    truth = _true_products(photos)
    return sum(truth[row["image"]] != row["product"] for row in images.table.to_pylist())


def _true_products(photos: Photos) -> dict[str, str]:
    return {row["image"]: row["product"] for row in load_catalog(photos.catalog).table.to_pylist()}


def _untrained(size: int) -> str:
    return f"Lite{size}, not fine-tuned"


def _mean(seeds: list[RetrievalScores], key: str) -> NDArray[np.float64]:
    """Return a score of each query, averaged over seeds."""
    return np.mean([getattr(scores, key) for scores in seeds], axis=0)


def _figure(name: str, seeds: list[RetrievalScores]) -> Figure:
    hits = _mean(seeds, "hits")
    interval = mean_interval(hits, seeds[0].products)
    return Figure(name, float(hits.mean()), "", None, ">=", _COMMAND, interval, SEEDS)


def _row(name: str, seeds: list[RetrievalScores]) -> Row:
    return {
        "teacher": name,
        "recall@1 [95 %]": mean_text(_mean(seeds, "hits"), seeds[0].products),
        "mAP [95 %]": mean_text(_mean(seeds, "precisions"), seeds[0].products),
        "recall@1 of each seed": ", ".join(f"{scores.recall_at_1:.3f}" for scores in seeds),
    }
