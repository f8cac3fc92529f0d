"""Base of the parts of ``report.json`` and of the tables that a report draws."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Interval = tuple[float, float]


class Part(BaseModel):
    """A part of a report. Unknown keys are kept: a later version may measure more."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: the keys that were set."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class SeenCounts(Part):
    """Scored products and images that a model, or a model it comes from, has seen, by use."""

    products: int = Field(ge=0, description="number of scored products")
    images: int = Field(ge=0, description="number of scored images of different content")
    seen_products: dict[str, int] = Field(description="number seen in training, distillation, calibration, selection")
    seen_images: dict[str, int] = Field(description="images of the same content seen, by use")
    unknown: list[str] = Field(description="models it comes from that have no record; more may have been seen")
    learned: str = Field(description="mark of what was learned or calibrated on; empty if nothing was")
    selected: str = Field(description="mark of what the epoch, weights or layers were chosen on; empty if nothing was")
