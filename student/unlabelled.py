"""Images without labels for distillation, which learns from the teacher's embeddings of them."""

import tempfile
from pathlib import Path
from typing import Any

from vpr.artifacts.card import Parent
from vpr.artifacts.paths import CARD_NAME
from vpr.common.distributed import rank_and_world
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import CatalogConfig
from vpr.data.duplicates import concatenate, duplicates_of

log = get_logger(__name__)


def add_unlabelled(
    training: Catalog, scored: list[Catalog], folders: tuple[str, ...], output: str, dry_run: bool = False
) -> tuple[Catalog, dict[str, Any], list[Parent]]:
    """Append unlabelled images to the training images; return them, the entry and the parents for the card.

    Duplicates and near-duplicates of the ``scored`` images are left out. ``folders`` hold images, or are catalogues of
    the reader ``images``. Their catalogues are ``<output>-unlabelled-<number>``, in a dry run temporary.
    """
    if not folders:
        return training, {}, []
    with tempfile.TemporaryDirectory() as temporary:
        prefix = Path(temporary) / "student" if dry_run else Path(output)
        catalogs = [_open_catalog(folder, f"{prefix}-unlabelled-{number}") for number, folder in enumerate(folders)]
    images = concatenate(catalogs)
    same, near = duplicates_of(images, concatenate(scored))
    kept, left_out = images.where(~(same | near)), int(same.sum() + near.sum())
    reasons = f"{int(same.sum())} with the same bytes, {int(near.sum())} near-duplicates by their hash"
    log.info(f"unlabelled: {len(kept)} images, {left_out} that repeat validation or test images left out ({reasons})")
    parents = [parent for catalog in catalogs for parent in catalog.as_parents("unlabelled")]
    summary = {"unlabelled": {"images": len(kept), "left_out": left_out, "sha256": kept.sha256}}
    return concatenate([training, kept]), summary, parents


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
