"""Configuration of catalogues and loaders. Imports no heavy library, so help and argument errors are instant."""

from dataclasses import dataclass, fields
from typing import Literal

from vpr.common.errors import UserError, check_numbers


def check_shares(validation: float, test: float, seed: int, resplit: bool = False) -> None:
    """Raise :class:`UserError` for shares that leave no products to train on, a negative seed, or an idle resplit."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UserError(f"validation, test: expected shares of together less than 1, got {validation} and {test}.")
    if seed < 0:
        raise UserError(f"seed: expected 0 or more, got {seed}.")
    if resplit and not validation and not test:
        raise UserError("resplit: it divides all products by the shares. Give --validation, --test or both.")


@dataclass(frozen=True)
class ReadOptions:
    """How a reader finds images and boxes; see :class:`CatalogConfig` for the fields."""

    columns: tuple[str, ...] = ()
    image_root: str = ""
    box_form: Literal["auto", "xywh", "xyxy", "cxcywh"] = "auto"
    box_unit: Literal["pixels", "shares"] = "pixels"
    box_frame: Literal["auto", "upright", "stored"] = "auto"
    follow_links: tuple[str, ...] = ()

    def check_reader(self, reader: str) -> None:
        """Raise :class:`UserError` for an option that the reader has no use for."""
        with_boxes = ("csv", "webdataset")
        users = {"columns": ("csv",), "image_root": ("csv",), "box_form": with_boxes, "box_unit": with_boxes}
        users["box_frame"] = (*with_boxes, "aicrowd")
        for name, readers in users.items():
            if getattr(self, name) != getattr(ReadOptions, name) and reader not in readers:
                raise UserError(f"{name}: the {reader} reader has no use for it. Leave it out.")


@dataclass(frozen=True)
class CatalogConfig:
    """Images to read, and their split by product.

    A table (CSV, JSON lines or Parquet) needs the columns ``image`` (path relative to the table) and ``product``. It
    may have ``category``, ``role``, ``split`` and ``box_x``, ``box_y``, ``box_w``, ``box_h`` (crop in pixels).
    Roles: ``gallery`` for the images to search in, ``query`` for the images to search with, ``train`` (default).
    Splits: ``train`` (default), ``validation`` to select checkpoints, ``test`` for the final scores.
    Rows with a role of query or gallery and without a split are test rows.

    Attributes:
        reader: Format of the data. ``csv`` reads every kind of table. ``sample`` is embedded and needs no root.
        output: Folder of the catalogue to write.
        root: Folder of the data set, or the table.
        validation: Share of products held out to select checkpoints. Only products that the data set does not hold out
            itself are divided, by a hash of their ids. A split that the data set has itself stays as it is.
        test: Share of products held out for the final scores, likewise.
        seed: Seed of the hash.
        resplit: Divide all products by the shares, also those that have a split or a role in the data set.
        skip_unreadable: Skip unreadable images instead of failing, and list them in ``set_aside.csv``. The folder,
            images and webdataset readers always list files that are no images there, and links to folders.
        skip_invalid_rows: Skip rows without a product id, or with a broken box, instead of failing, and list them in
            ``set_aside.csv``.
        columns: Names of the table's columns, as NAME=COLUMN, such as ``image=image_path product=product_id``.
        image_root: Folder that the table's image paths are relative to, or below; empty is the folder of the table.
        box_form: Meaning of a box's numbers: ``xywh`` (left, top, width, height), ``xyxy`` (left, top, right, bottom)
            or ``cxcywh`` (centre, width, height). ``auto`` follows the names of the columns.
        box_unit: Unit of a box's numbers: ``pixels``, or ``shares`` of the image's width and height.
        box_frame: Image that boxes are about: ``upright`` by its EXIF orientation, or as ``stored``. ``auto`` is
            ``stored`` for the aicrowd reader, else ``upright``.
        follow_links: Folders that links may lead into. Links to other folders outside of the root are not followed.
    """

    reader: Literal["sample", "products10k", "aicrowd", "csv", "folder", "images", "webdataset"]
    output: str
    root: str = ""
    validation: float = 0.0
    test: float = 0.0
    seed: int = 0
    resplit: bool = False
    skip_unreadable: bool = False
    skip_invalid_rows: bool = False
    columns: tuple[str, ...] = ()
    image_root: str = ""
    box_form: Literal["auto", "xywh", "xyxy", "cxcywh"] = "auto"
    box_unit: Literal["pixels", "shares"] = "pixels"
    box_frame: Literal["auto", "upright", "stored"] = "auto"
    follow_links: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_shares(self.validation, self.test, self.seed, self.resplit)
        self.read_options().check_reader(self.reader)

    @staticmethod
    def later_keys() -> tuple[str, ...]:
        """Return the keys that older cards do not have; at their default they are left out of new cards too."""
        return ("resplit", "skip_invalid_rows", *(field.name for field in fields(ReadOptions)))

    def read_options(self) -> ReadOptions:
        """Return the options of the reader."""
        return ReadOptions(**{field.name: getattr(self, field.name) for field in fields(ReadOptions)})


@dataclass(frozen=True)
class RelocateConfig:
    """New place of a catalogue's images.

    Attributes:
        catalog: Catalogue artifact, which keeps its rows.
        root: Folder of the images now, or a CSV file in it.
    """

    catalog: str
    root: str


@dataclass(frozen=True)
class LoaderConfig:
    """Batches of the training loop.

    Attributes:
        batch_size: Number of images per step and process.
        workers: Number of decoding processes. 0 decodes in the training process. ``auto`` is 0 without a GPU, where the
            training itself needs all processors, and else one for each processor but one, at most 12. With
            ``keep_in_memory`` none start. The results do not depend on it. Decoding processes use the forkserver start
            method: scripts need ``if __name__ == "__main__":``.
        keep_in_memory: Decode every image once and keep its pixels, for data sets that fit in memory. A training image
            takes three bytes for each pixel of the side that its views need.
        max_per_product: Largest number of images of a product in an epoch, a new sample each epoch. 0 takes all.
        min_per_product: Smallest number of images of a product in an epoch, by repetition. 0 repeats none.
        images_per_product: Number of images of a product in a batch (M per class), by repetition if it has fewer. 0
            draws images independently.
        by_category: Fill each batch with products of one category, while the category has enough.
        cache_gb: Disk space in GB for decoded and resized images, next to the output until the training ends: an
            image is decoded in its first epoch only. It takes three bytes for each pixel, and images beyond the space
            are decoded in every epoch. 0 stores none.
    """

    batch_size: int = 128
    workers: int | Literal["auto"] = "auto"
    keep_in_memory: bool = False
    max_per_product: int = 0
    min_per_product: int = 0
    images_per_product: int = 0
    by_category: bool = False
    cache_gb: float = 0.0

    def __post_init__(self) -> None:
        products = {"max_per_product": (0, 1 << 20), "min_per_product": (0, 10_000)}
        products |= {"images_per_product": (0, 10_000)}
        check_numbers(self, "loader.", batch_size=(1, None), cache_gb=(0, 1e6), **products)
        if self.workers != "auto":
            check_numbers(self, "loader.", workers=(0, 512))
        if 0 < self.max_per_product < self.min_per_product:
            expected = f"expected at most loader.max_per_product {self.max_per_product}"
            raise UserError(f"loader.min_per_product: {expected}, got {self.min_per_product}.")
        if self.images_per_product and self.batch_size % self.images_per_product:
            expected = f"expected a multiple of loader.images_per_product {self.images_per_product}"
            raise UserError(f"loader.batch_size: {expected}, got {self.batch_size}.")

    def later_keys(self) -> tuple[str, ...]:
        """Return the keys that older cards do not have."""
        return ("cache_gb",)
