"""Images that nobody has labelled: distillation learns from the teacher's embeddings of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.store import Parent
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
    """Add the images of folders to the training ones, but for those that are scored.

    Args:
        training: labelled images; they come first.
        scored: images that no stage may see; one that is, or nearly is, among them is left out.
        folders: of images, or catalogues of the reader ``images``.
        output: a folder's catalogue is written beside it, as ``<output>-unlabelled-<number>``.
        dry_run: leave nothing there.

    Returns:
        the images, what the card says of them, and the catalogues that they come from.
    """
    if not folders:
        return training, {}, []
    with tempfile.TemporaryDirectory() as passing:
        place = Path(passing) / "student" if dry_run else Path(output)
        found = [_catalog(folder, f"{place}-unlabelled-{number}") for number, folder in enumerate(folders)]
    extra = concatenate(found)
    seen = duplicates_of(extra, concatenate(scored))
    kept = extra.where(~seen)
    log.info(f"unlabelled: {len(kept)} images, and {int(seen.sum())} left out that are (nearly) scored ones")
    parents = [parent for one in found for parent in one.as_parents("unlabelled")]
    summary = {"unlabelled": {"images": len(kept), "left_out": int(seen.sum()), "sha256": kept.sha256}}
    return concatenate([training, kept]), summary, parents


def _catalog(folder: str, output: str) -> Catalog:
    if not (Path(folder) / CARD_NAME).is_file():
        if rank_and_world()[1] > 1:
            raise UserError(
                f"unlabelled: {folder}: several processes need its catalogue first: run 'vpr catalog --reader images "
                f"--root {folder} --output {output}' and name that"
            )
        try:
            build_catalog(CatalogConfig("images", output, folder, skip_unreadable=True))
        except UserError as error:
            reason = str(error).partition(". Check ")[0]
            raise UserError(f"unlabelled: {folder}: {reason}: name a folder of images") from None
        folder = output
    catalog = load_catalog(folder)
    if catalog.artifact is None or catalog.artifact.card.config.get("reader") != "images":
        raise UserError(f"unlabelled: {folder}: is a catalogue of products: build one with --reader images")
    return catalog
