"""Recall of a gallery on its way to a new model: retrained with another seed, and a larger one.

The demo's test products are scored; its training products fit the adapters, its validation products choose.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from experiments.figures import Figure, Row
from experiments.intervals import interval_text
from export.config import EmbedConfig
from export.embed import embed_catalog
from vpr.artifacts.store import load_artifact
from vpr.gallery.change import create_gallery
from vpr.gallery.config import CreateConfig, PlanConfig
from vpr.gallery.plan import FILE, plan_migration

_GOAL = 0.9  # of the new model's own recall, before an image is embedded again
_SHOWN = (0.0, 0.1, 0.2, 0.5, 0.8, 1.0)


def plan_between(old: Path, new: Path, catalog: Path, folder: Path) -> dict[str, Any]:
    """Embed a catalogue by two models, store the old model's gallery and plan its migration; return the plan's JSON.

    Embeddings and plan are reused if they are of these models; the gallery is written again.
    """
    before, after = (
        str(embed_catalog(EmbedConfig(str(model), str(catalog), str(folder / f"{role}-vectors"))))
        for role, model in (("old", old), ("new", new))
    )
    gallery = folder / "gallery"
    shutil.rmtree(gallery, ignore_errors=True)
    create_gallery(CreateConfig(before, str(gallery)))
    plan = plan_migration(PlanConfig(str(gallery), before, after, str(folder / "plan")))
    values: dict[str, Any] = json.loads(load_artifact(plan, "migration").file(FILE).read_text(encoding="utf-8"))
    return values


def migration_figure(name: str, plan: dict[str, Any], command: str) -> Figure:
    """Return the share of the new model's recall that the adapter alone keeps."""
    start = plan["curve"][0]
    title = f"migration, {name}: recall@1 with no image embedded again over the new model's own"
    return Figure(title, round(start["ratio"], 4), "", _GOAL, ">=", command, _pair(start["ratio_interval"]))


def migration_rows(name: str, plan: dict[str, Any]) -> list[Row]:
    """Return the curve: recall by the share of images that the new model has embedded."""
    adapter = next(row for row in plan["adapters"] if row["is_chosen"])
    kind = adapter["method"] if adapter["ridge"] is None else f"{adapter['method']}, ridge {adapter['ridge']:g}"
    old = plan["old_recall"]
    ends = f"{old['recall']:.3f}{interval_text(_pair(old['interval']))}"
    rows: list[Row] = []
    for step in plan["curve"]:
        if not any(abs(step["share"] - share) < 1e-9 for share in _SHOWN):
            continue
        rows.append(
            {
                "migration": name,
                "adapter, order": f"{kind}, {plan['order']}",
                "embedded again": f"{step['share']:.0%}",
                "recall@1 [95 %]": f"{step['recall']:.3f}{interval_text(_pair(step['interval']))}",
                "over the new model's own [95 %]": f"{step['ratio']:.3f}{interval_text(_pair(step['ratio_interval']))}",
                "old model alone": ends,
            }
        )
    return rows


def _pair(interval: list[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])
