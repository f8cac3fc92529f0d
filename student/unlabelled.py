"""Images without labels for distillation, which learns from the teacher's embeddings of them.

Images of scored products are left out. The teacher's embeddings find them: those of an image that is closer to a scored
image than images of other products are.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student.config import DistillConfig
from student.teacher_model import TeacherModel
from vpr.artifacts.card import Parent
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.run_folder import atomic_save_npy, atomic_write, run_lock, wait_until
from vpr.common.distributed import compute_device, is_first, rank_and_world
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.duplicates import concatenate
from vpr.data.loaders import decoding_workers
from vpr.retrieval.embeddings import embed, torch_forward

log = get_logger(__name__)

Vectors = NDArray[np.float32]
MAX_WRONG = 0.01  # share of images of other products that the measured threshold leaves out
_BLOCK = 1 << 24  # cosines at a time: 64 MiB
_MIN_IMAGES = 10  # validation images that a threshold is measured on


@dataclass(frozen=True)
class Threshold:
    """Cosine from which an image counts as one of a scored product, measured on the validation images.

    Attributes:
        cosine: The threshold.
        found: Share of the validation images that reach it with another image of their product; None if none has one.
        wrong: Share of the validation images that reach it with a scored image of another product.
        images: Number of validation images.
    """

    cosine: float
    found: float | None
    wrong: float
    images: int


def open_unlabelled(
    folders: tuple[str, ...], output: str, dry_run: bool = False
) -> tuple[Catalog | None, list[Parent]]:
    """Return the unlabelled images of some folders, and the parents for the card; None without folders.

    ``folders`` hold images, or are catalogues of the reader ``images``. Catalogues of the folders are written to
    ``<output>-unlabelled-<number>``, in a dry run to a temporary folder.
    """
    if not folders:
        return None, []
    with tempfile.TemporaryDirectory() as temporary:
        prefix = Path(temporary) / "student" if dry_run else Path(output)
        catalogs = [_open_catalog(folder, f"{prefix}-unlabelled-{number}") for number, folder in enumerate(folders)]
    parents = [parent for catalog in catalogs for parent in catalog.as_parents("unlabelled")]
    return concatenate(catalogs), parents


def leave_out_scored(
    images: Catalog, scored: list[Catalog], teacher: TeacherModel, config: DistillConfig, folder: Path | None
) -> tuple[Catalog, dict[str, Any]]:
    """Return the unlabelled images that show no scored product, and their entry for the card.

    Images with the bytes of a scored one are left out, and images whose embedding has a cosine of
    ``unlabelled_cosine`` or more with that of a scored one. Of several processes the first embeds the images.

    Args:
        images: Unlabelled images.
        scored: Validation split, then other scored splits.
        teacher: Model that embeds the images.
        config: Distillation.
        folder: Run folder, where the cosines are kept for a killed run. None compares bytes alone, for a dry run.

    Raises:
        UserError: A threshold is to be measured, and the validation split is too small.
    """
    joined = concatenate(scored)
    is_same = np.isin(np.array(images.table["sha256"].to_pylist()), joined.table["sha256"].to_pylist())
    is_close, threshold = np.zeros_like(is_same), None
    if folder is not None:
        cosines, threshold = _measure(images, joined, len(scored[0]), teacher, config, folder)
        is_close = (cosines >= threshold.cosine) & ~is_same
    kept = images.where(~(is_same | is_close))
    counts = {"images": len(kept), "left_out": len(images) - len(kept), "sha256": kept.sha256}
    reasons = f"{int(is_same.sum())} with the bytes of a scored image"
    if threshold is None:
        log.info(f"unlabelled: {len(kept)} of {len(images)} images; {reasons} left out, others not searched")
        return kept, {"unlabelled": counts}
    reasons += f", {int(is_close.sum())} with a cosine of {threshold.cosine:.3f} or more to one"
    log.info(f"unlabelled: {len(kept)} of {len(images)} images, {counts['left_out']} left out: {reasons}")
    found = "none of them has another image" if threshold.found is None else f"it finds {threshold.found:.0%}"
    wrong = f"and takes {threshold.wrong:.1%} for another product's"
    log.info(f"  of {threshold.images} validation images, {found} by another image of their product, {wrong}")
    same, close = int(is_same.sum()), int(is_close.sum())
    return kept, {"unlabelled": {**counts, "same_bytes": same, "close": close, "threshold": asdict(threshold)}}


def measure_threshold(vectors: Vectors, products: NDArray[np.str_], count: int, cosine: float = 0.0) -> Threshold:
    """Measure the cosine that separates images of a scored product from images of other products.

    It is the smallest one that at most :data:`MAX_WRONG` of the first ``count`` images reach with an image of another
    product: these images stand for unlabelled ones, of products that no training has seen.

    Args:
        vectors: (n, dim) float32 embeddings of scored images, L2-normalised.
        products: (n,) ids of their products.
        count: Number of validation images, which come first.
        cosine: Threshold whose shares are measured instead; 0 measures one.

    Raises:
        UserError: There are too few validation images, or only one product.
    """
    codes = np.unique(products, return_inverse=True)[1]
    own, other = np.full(count, -np.inf, np.float32), np.full(count, -np.inf, np.float32)
    step = max(1, _BLOCK // max(1, len(vectors)))
    for start in range(0, count, step):
        rows = np.arange(start, min(start + step, count))
        cosines = vectors[rows] @ vectors.T
        is_own = codes[rows, None] == codes[None]
        other[rows] = np.where(is_own, -np.inf, cosines).max(axis=1)
        is_own[np.arange(len(rows)), rows] = False
        own[rows] = np.where(is_own, cosines, -np.inf).max(axis=1)
    if not cosine:
        if count < _MIN_IMAGES or not np.isfinite(other).all():
            problem = f"it is measured on {_MIN_IMAGES} or more validation images of two products, got {count}"
            raise UserError(f"unlabelled_cosine: {problem}. Set it, for example to 0.9.")
        limit = np.quantile(other, 1 - MAX_WRONG, method="higher").astype(np.float32)
        cosine = float(np.nextafter(limit, np.float32(2)))
    has_own = np.isfinite(own)
    found = float((own[has_own] >= cosine).mean()) if has_own.any() else None
    return Threshold(cosine, found, float((other >= cosine).mean()), count)


def largest_cosines(vectors: Vectors, scored: Vectors) -> Vectors:
    """Return the (n,) largest cosine of each of (n, dim) unit vectors with one of (m, dim) unit vectors."""
    step = max(1, _BLOCK // max(1, len(scored)))
    blocks = [(vectors[start : start + step] @ scored.T).max(axis=1) for start in range(0, len(vectors), step)]
    return np.concatenate([np.empty(0, np.float32), *blocks])


def _measure(
    images: Catalog, scored: Catalog, count: int, teacher: TeacherModel, config: DistillConfig, folder: Path
) -> tuple[Vectors, Threshold]:
    """Return the largest cosine of each image with a scored one, and the threshold; a killed run has left them."""
    cosines, measured = folder / "unlabelled.npy", folder / "unlabelled.json"
    with run_lock(folder):
        if is_first() and not (cosines.is_file() and measured.is_file()):
            log.info(f"unlabelled: embedding {len(images)} images and {len(scored)} scored ones")
            forward = torch_forward(teacher.network.to(compute_device()))
            options = (teacher.preprocess, forward, config.loader.batch_size, decoding_workers(config.loader.workers))
            vectors = embed(scored, *options)
            threshold = measure_threshold(vectors, scored.products, count, config.unlabelled_cosine)
            found = largest_cosines(embed(images, *options), vectors) if len(images) else np.empty(0, np.float32)
            atomic_save_npy(cosines, found)
            with atomic_write(measured, "w") as stream:
                json.dump(asdict(threshold), stream)
        wait_until(measured.is_file)
    return np.load(cosines, allow_pickle=False), Threshold(**json.loads(measured.read_text(encoding="utf-8")))


def _open_catalog(folder: str, output: str) -> Catalog:
    """Load a catalogue, or build it from a folder of images."""
    if not (Path(folder) / CARD_NAME).is_file():
        if rank_and_world()[1] > 1:
            fix = f"Run `vpr catalog --reader images --root {folder} --output {output}` and pass {output}."
            raise UserError(f"unlabelled: {folder} has no catalogue, which several processes need first. {fix}")
        try:
            build_catalog(CatalogConfig("images", output, folder, skip_unreadable=True))
        except UserError as error:
            reason = str(error).rstrip(".")
            raise UserError(f"unlabelled: no catalogue of {folder} ({reason}). Use a folder of images.") from None
        folder = output
    catalog = load_catalog(folder)
    if catalog.artifact is None or catalog.artifact.card.config.get("reader") != "images":
        raise UserError(f"unlabelled: {folder} is a catalogue of products. Build one with `--reader images`.")
    return catalog
