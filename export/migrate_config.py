"""Configuration of ``vpr gallery migrate``. Imports no heavy library, so help and errors in arguments are instant."""

from dataclasses import dataclass

from export.config import check_backend
from vpr.common.errors import UserError, check_numbers
from vpr.common.hardware import MAX_THREADS


@dataclass(frozen=True)
class MigrateConfig:
    """Migration of a gallery to a new model.

    The first step writes one version with the adapter's vectors: queries of the new model are answered from then on.
    Then the new model embeds the images, one version for each part. Rerun the command to resume.

    Attributes:
        gallery: Gallery.
        plan: Plan of ``vpr gallery plan-migration``, from the gallery's model to the new one.
        model: New model; with ``catalogs``.
        catalogs: Catalogues of the gallery's images, to embed them; without one, only the first step is done.
        rows: Images to embed in this run; 0 embeds all.
        rows_per_version: Images per version. A killed run repeats at most so many.
        skip_missing: Leave images that no catalogue has, or without a file, with the adapter's vectors.
        batch_size: Images per batch of the model.
        threads: Background decoding threads; 0 decodes in the calling thread.
        backend: Backend that runs the model, see ``vpr embed --help-all``.
    """

    gallery: str
    plan: str
    model: str = ""
    catalogs: tuple[str, ...] = ()
    rows: int = 0
    rows_per_version: int = 4096
    skip_missing: bool = False
    batch_size: int = 64
    threads: int = 2
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_numbers(self, rows=(0, None), rows_per_version=(1, 1 << 24), batch_size=(1, 1 << 16))
        check_numbers(self, threads=(0, MAX_THREADS))
        check_backend(self.backend)
        if bool(self.model) != bool(self.catalogs):
            missing = "model" if self.catalogs else "catalogs"
            raise UserError(f"{missing}: missing. Set --model and --catalogs, or neither for the first step only.")
