"""Configuration of catalogues and loaders. Imports no heavy library, so help and argument errors are instant."""

from dataclasses import dataclass
from typing import Literal

from vpr.common.errors import UserError, check_numbers


def check_shares(validation: float, test: float, seed: int) -> None:
    """Raise :class:`UserError` if the shares leave no products to train on, or the seed is negative."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UserError(f"validation, test: expected shares of together less than 1, got {validation} and {test}.")
    if seed < 0:
        raise UserError(f"seed: expected 0 or more, got {seed}.")


@dataclass(frozen=True)
class CatalogConfig:
    """Images to read, and their split by product.

    A CSV needs the columns ``image`` (path relative to the CSV) and ``product``. It may have ``category``, ``role``,
    ``split`` and ``box_x``, ``box_y``, ``box_w``, ``box_h`` (crop in pixels of the upright image).
    Roles: ``train`` (default), ``gallery`` for the images to search in, ``query`` for the images to search with.
    Splits: ``train`` (default), ``validation`` to select checkpoints, ``test`` for the final scores.

    Attributes:
        reader: Format of the data. ``sample`` is embedded and needs no root.
        output: Folder of the catalogue to write.
        root: Folder of the data set, or the CSV file.
        validation: Share of products held out to select checkpoints. Without it and ``test``, the reader's splits stay.
        test: Share of products held out for the final scores.
        seed: Seed of the split.
        skip_unreadable: Skip unreadable images instead of failing, and list them in ``set_aside.csv``. The folder,
            images and webdataset readers always list files without an image suffix there, and links to folders.
    """

    reader: Literal["sample", "products10k", "aicrowd", "csv", "folder", "images", "webdataset"]
    output: str
    root: str = ""
    validation: float = 0.0
    test: float = 0.0
    seed: int = 0
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        check_shares(self.validation, self.test, self.seed)


@dataclass(frozen=True)
class LoaderConfig:
    """Batches of the training loop.

    Attributes:
        batch_size: Number of images per step and process.
        workers: Number of decoding processes. 0 decodes in the training process. With ``keep_in_memory`` none start.
            They use the forkserver start method: scripts need ``if __name__ == "__main__":``.
        keep_in_memory: Decode every image once and keep its pixels, for data sets that fit in memory. A training image
            takes three bytes for each pixel of the side that its views need.
        max_per_product: Largest number of images of a product in an epoch, a new sample each epoch. 0 takes all.
        min_per_product: Smallest number of images of a product in an epoch, by repetition. 0 repeats none.
        images_per_product: Number of images of a product in a batch (M per class), by repetition if it has fewer. 0
            draws images independently.
        by_category: Fill each batch with products of one category, while the category has enough.
    """

    batch_size: int = 128
    workers: int = 0
    keep_in_memory: bool = False
    max_per_product: int = 0
    min_per_product: int = 0
    images_per_product: int = 0
    by_category: bool = False

    def __post_init__(self) -> None:
        products = {"max_per_product": (0, 1 << 20), "min_per_product": (0, 10_000)}
        products |= {"images_per_product": (0, 10_000)}
        check_numbers(self, "loader.", batch_size=(1, None), workers=(0, 512), **products)
        if 0 < self.max_per_product < self.min_per_product:
            expected = f"expected at most loader.max_per_product {self.max_per_product}"
            raise UserError(f"loader.min_per_product: {expected}, got {self.min_per_product}.")
        if self.images_per_product and self.batch_size % self.images_per_product:
            expected = f"expected a multiple of loader.images_per_product {self.images_per_product}"
            raise UserError(f"loader.batch_size: {expected}, got {self.batch_size}.")
