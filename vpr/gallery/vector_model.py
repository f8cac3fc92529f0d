"""Model of the vectors of one version of a gallery. A migration records it in the schema of the table.

A version, its vectors and its model therefore change together: no reader sees the vectors of one model under the name
of another. Versions from before the first migration have the model of the gallery's card.
"""

from __future__ import annotations

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpr.artifacts.card import Parent
from vpr.common.errors import UserError
from vpr.imaging.preprocess import Preprocess

_KEY = b"model"
_MAX_BYTES = 1 << 16


class VectorModel(BaseModel):
    """Model of the vectors of a version.

    Attributes:
        model: Model; its embedded queries search the version.
        dim: Dimension of the vectors.
        preprocess: Preprocessing of the model.
        previous: Model before the migration; None without one.
        plan: SHA-256 of the card of the migration's plan; empty without one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: Parent
    dim: int = Field(ge=1, le=1 << 16)
    preprocess: Preprocess | None = None
    previous: Parent | None = None
    plan: str = ""

    @property
    def is_migrated(self) -> bool:
        """Whether the version has the column of rows to embed."""
        return self.previous is not None

    def add_to(self, schema: pa.Schema) -> pa.Schema:
        """Return a schema that records this model."""
        return schema.with_metadata({**(schema.metadata or {}), _KEY: self.model_dump_json().encode()})


def read_vector_model(schema: pa.Schema, path: str) -> VectorModel | None:
    """Return the model that a schema records, None if it records none; ``path`` is named in the error.

    Raises:
        UserError: The record is broken.
    """
    raw = (schema.metadata or {}).get(_KEY)
    if raw is None:
        return None
    try:
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        return VectorModel.model_validate_json(raw)
    except (ValidationError, ValueError) as error:
        reason = str(error.errors()[0]["msg"] if isinstance(error, ValidationError) else error)
        raise UserError(
            f"{path}: the record of the vectors' model is broken ({reason}). Restore the gallery."
        ) from None
