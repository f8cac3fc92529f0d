"""Configuration of the commands on galleries. Imports no heavy library, so help and errors are instant."""

import re
from dataclasses import dataclass

from vpr.artifacts.paths import check_file
from vpr.common.errors import UserError, check_numbers

_MAX_COLUMNS = 64
_COLUMN = re.compile(r"[a-z][a-z0-9_]{0,62}")
RESERVED = frozenset({"product", "image", "digest", "backfill", "vector", "score", "rank", "query", "probability"})
COLUMN_TYPES = ("text", "number")


def read_columns(words: tuple[str, ...]) -> dict[str, str]:
    """Return the types of metadata columns by name, from words such as ``price:number``.

    Raises:
        UserError: A name or a type is invalid, or a name is given twice.
    """
    columns: dict[str, str] = {}
    if len(words) > _MAX_COLUMNS:
        raise UserError(f"columns: expected at most {_MAX_COLUMNS}, got {len(words)}.")
    for word in words:
        name, _, kind = word.partition(":")
        kind = kind or "text"
        if not _COLUMN.fullmatch(name) or name in RESERVED or name.startswith("_"):
            rule = f"lower-case letters, digits and _, and not one of {', '.join(sorted(RESERVED))}"
            raise UserError(f"columns: '{name}' is not a column name. Use {rule}.")
        if kind not in COLUMN_TYPES:
            raise UserError(f"columns: expected {name}:text or {name}:number, got '{word}'.")
        if name in columns:
            raise UserError(f"columns: '{name}' is given twice. Name it once.")
        columns[name] = kind
    return columns


@dataclass(frozen=True)
class CreateConfig:
    """A new gallery with the gallery images of an embeddings artifact.

    Attributes:
        embeddings: Embeddings artifact. Its model is the model of the gallery from then on.
        output: Folder of the gallery.
        columns: Metadata columns as ``NAME:text`` or ``NAME:number``, such as ``price:number``.
        metadata: Table (CSV, JSON lines or Parquet) with a column ``product``, optionally ``image``, and metadata.
        split: Split of the embeddings to take; empty takes all splits.
        threshold: Artifact of ``vpr gallery threshold`` for "no match"; empty answers all queries.
        address: Address of the vectors, such as ``s3://bucket/folder``; empty stores them in the gallery's folder.
    """

    embeddings: str
    output: str
    columns: tuple[str, ...] = ()
    metadata: str = ""
    split: str = ""
    threshold: str = ""
    address: str = ""

    def __post_init__(self) -> None:
        read_columns(self.columns)
        check_address(self.address)


SCHEMES = ("s3", "gs", "az")


def check_address(address: str) -> None:
    """Check the form of an address.

    Raises:
        UserError: The address does not start with a known scheme.
    """
    scheme, separator, place = address.partition("://")
    if address and (scheme not in SCHEMES or not separator or not place):
        forms = " or ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"address: expected {forms} and a place, got '{address}'.")


@dataclass(frozen=True)
class AddConfig:
    """New images of a gallery.

    Attributes:
        gallery: Gallery.
        embeddings: Embeddings artifact of the gallery's model; its gallery images are added.
        metadata: Table (CSV, JSON lines or Parquet) with a column ``product``, optionally ``image``, and metadata.
        split: Split of the embeddings to take; empty takes all splits.
    """

    gallery: str
    embeddings: str
    metadata: str = ""
    split: str = ""


@dataclass(frozen=True)
class UpdateConfig:
    """Changed images, metadata or threshold of a gallery.

    Attributes:
        gallery: Gallery.
        embeddings: Embeddings artifact of the gallery's model. Its gallery images replace those with the same ids, and
            other images are added.
        metadata: Table with a column ``product``, optionally ``image``, and metadata. Without ``embeddings`` it
            replaces the metadata of these products or images; without it, replaced images lose their metadata.
        split: Split of the embeddings to take; empty takes all splits.
        threshold: Artifact of ``vpr gallery threshold``, which replaces the stored threshold.
        skip_missing: Skip metadata of products or images that the gallery does not have.
    """

    gallery: str
    embeddings: str = ""
    metadata: str = ""
    split: str = ""
    threshold: str = ""
    skip_missing: bool = False


@dataclass(frozen=True)
class RemoveConfig:
    """Products or images to remove from a gallery.

    Attributes:
        gallery: Gallery.
        products: Product ids; all their images are removed.
        images: Image ids, as in the catalogue.
        table: Table (CSV, JSON lines or Parquet) with a column ``product`` or ``image`` that lists more.
        skip_missing: Accept ids that the gallery does not have.
    """

    gallery: str
    products: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    table: str = ""
    skip_missing: bool = False


@dataclass(frozen=True)
class GallerySearchConfig:
    """Search of embedded queries in a gallery.

    Attributes:
        gallery: Gallery.
        queries: Embeddings artifact with the ``query`` images; without that role, all its images are queries.
        output: CSV file for the results; empty prints the first queries only.
        k: Results per query.
        where: Condition on product, image and metadata in SQL, such as ``price < 20 AND title LIKE '%blue%'``.
        probes: Partitions of the index to search for each query; 0 compares each query with all images.
        version: Version to search; 0 searches the newest.
        threshold: Artifact of ``vpr gallery threshold`` in place of the stored threshold.
    """

    gallery: str
    queries: str
    output: str = ""
    k: int = 5
    where: str = ""
    probes: int = 0
    version: int = 0
    threshold: str = ""

    def __post_init__(self) -> None:
        check_numbers(self, k=(1, 10_000), probes=(0, 1 << 16), version=(0, None))
        check_file("output", self.output)


@dataclass(frozen=True)
class VerifyGalleryConfig:
    """Check of a gallery's stored vectors, ids and index.

    Attributes:
        gallery: Gallery.
        embeddings: Embeddings artifacts to compare with: an image in both must have the same product and vector.
    """

    gallery: str
    embeddings: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompactConfig:
    """Rewrite of a gallery's files without removed images and older versions.

    Attributes:
        gallery: Gallery.
        index: Partitions of an IVF index over the vectors, for ``--probes``; 0 keeps an existing index's number, or no
            index.
    """

    gallery: str
    index: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, index=(0, 1 << 16))


@dataclass(frozen=True)
class InfoConfig:
    """Counts, versions and identity of a gallery.

    Attributes:
        gallery: Gallery.
    """

    gallery: str


@dataclass(frozen=True)
class ExportConfig:
    """Embeddings artifact with a gallery's images, for faiss and all commands that read embeddings.

    Attributes:
        gallery: Gallery.
        output: Path of the embeddings artifact to write.
        where: Condition on product, image and metadata in SQL; empty takes all images.
    """

    gallery: str
    output: str
    where: str = ""


@dataclass(frozen=True)
class PlanConfig:
    """Plan of a gallery's migration to a new model. Nothing of the gallery changes.

    Attributes:
        gallery: Gallery.
        old: Embeddings of a catalogue with all splits by the gallery's model.
        new: Embeddings of the same catalogue by the new model.
        output: Path of the plan to write.
        seed: Seed of the random orders, and of the intervals.
    """

    gallery: str
    old: str
    new: str
    output: str
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, seed=(0, (1 << 32) - 1))
