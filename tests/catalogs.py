"""Catalogue artifacts from tables that a test builds."""

from __future__ import annotations

from pathlib import Path

from vpr.artifacts.writer import write_artifact
from vpr.data.catalog import Catalog, write_catalog_files


def write_catalog(path: Path, catalog: Catalog) -> Path:
    """Write a catalogue artifact; its images stay in their root."""
    with write_artifact(path, "catalog", {"reader": "table", "root": str(catalog.root.resolve())}) as draft:
        write_catalog_files(draft, catalog, [])
    return path
