"""Base of the parts of ``report.json`` and of the tables that a report draws."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]


class Part(BaseModel):
    """A part of a report. Unknown keys are kept: a later version may measure more."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: the keys that were set."""
        return self.model_dump(by_alias=True, exclude_unset=True)
