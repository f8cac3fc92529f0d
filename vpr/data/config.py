"""Configuration of catalogues and loaders. Imports no heavy library, so help and errors in arguments are quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vpr.common.errors import UserError, check_numbers


def check_shares(validation: float, test: float, seed: int) -> None:
    """Refuse shares of products that leave none to train on, and a seed below 0."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UserError(f"validation {validation} and test {test}: shares of products, together less than 1")
    if seed < 0:
        raise UserError(f"seed: {seed}: give 0 or more")


@dataclass(frozen=True)
class CatalogConfig:
    """Where images come from and how products are split.

    Attributes:
        reader: form of the data; ``sample`` is embedded and needs no root.
        output: where the catalogue is written.
        root: folder of the data set, or the CSV file.
        validation: share of products held out to choose checkpoints; with ``test`` 0 too, the reader's splits stay.
        test: share of products held out to be scored.
        seed: of the split.
        skip_unreadable: set unreadable images aside in ``set_aside.csv`` instead of refusing. The folder,
            images and webdataset readers always list there what is no image by name, and links to folders.
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
    """How images reach the training loop.

    Attributes:
        batch_size: images per step and process.
        workers: processes that decode; 0 decodes in the training process. None are started where pixels are kept. They
            come from Python's fork server: a script that trains has its own work under ``if __name__ == "__main__":``.
        keep_in_memory: decode every image once and keep its pixels, for sets that fit.
        max_per_product: most images of a product in an epoch, others in each; 0 takes all.
        min_per_product: products with fewer images have them repeated up to this many in an epoch; 0 repeats none.
    """

    batch_size: int = 128
    workers: int = 0
    keep_in_memory: bool = False
    max_per_product: int = 0
    min_per_product: int = 0

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "loader.",
            batch_size=(1, None),
            workers=(0, 512),
            max_per_product=(0, 1 << 20),
            min_per_product=(0, 10_000),
        )
        if 0 < self.max_per_product < self.min_per_product:
            raise UserError(
                f"loader.min_per_product: {self.min_per_product} is more than loader.max_per_product {self.max_per_product}: lower it"
            )
