"""``vpr catalog relocate``: point a catalogue to the images at their new place, without making it again."""

from pathlib import Path

from vpr.artifacts.stage import Stage
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.data.catalog import Catalog, load_catalog
from vpr.data.config import RelocateConfig
from vpr.data.location import SAMPLE, differing_images, write_location

log = get_logger(__name__)


def relocate_catalog(config: RelocateConfig) -> Path:
    """Record where the images of a catalogue are now; nothing that was made from the catalogue is out of date.

    Raises:
        UserError: The root is no folder, or sampled images are missing there or have other contents.
    """
    catalog, root = load_catalog(config.catalog), Path(config.root)
    if root.is_file():  # a CSV table, next to its images
        root = root.parent
    if not root.is_dir():
        raise UserError(f"root: {config.root} is no folder. Give the folder of the images with --root.")
    assert catalog.artifact is not None
    if catalog.artifact.card.config.get("reader") == "sample":
        raise UserError(f"{config.catalog}: the images of the sample are in the catalogue. Move the catalogue itself.")
    if differing := differing_images(catalog.table, root):
        sample = min(SAMPLE, len(catalog))
        problem = f"{len(differing)} of {sample} sampled images are missing or differ, first '{differing[0]}'"
        raise UserError(f"root: {problem}. Give the folder of the same images, or run `vpr catalog` for changed ones.")
    write_location(catalog.artifact.path, root)
    log.info(f"{config.catalog}: {len(catalog)} images in {root.resolve()}")
    return catalog.artifact.path


def find_relocated(stage: Stage, root: Path) -> Catalog | None:
    """Return the up-to-date catalogue of a stage with its images in ``root``, or None if it must be made.

    If the images were in another folder, sampled images are compared, and the new place is recorded.
    """
    artifact = stage.find()
    if artifact is None:
        return None
    catalog = load_catalog(artifact.path)
    if catalog.root.resolve() == root.resolve():
        return catalog
    if differing_images(catalog.table, root):
        return None
    write_location(artifact.path, root)
    return load_catalog(artifact.path)
