"""``findings.html``: one page with the findings and their images, which needs no network."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpr.data.catalog import Catalog
from vpr.imaging.decode import ImageRejected, decode
from vpr.retrieval.catalog_check import KINDS, CheckResult, Finding
from vpr.retrieval.label_scores import LabelledVectors

_TEMPLATES = Path(__file__).parent / "templates"
_THUMBNAIL = 112  # pixels of the longer side
_COMPANIONS = 2  # other images of the product, next to an image
_TITLES = {
    "wrong-label": ("Wrong labels", "The image is more similar to the other product than to its product."),
    "outlier": ("Outliers", "The image does not look like the other images of its product."),
    "duplicate": ("Duplicates", "Two products have nearly the same image."),
    "merge": ("Products to merge", "The images of the two products are mixed like those of one product."),
    "confusable": ("Confusable products", "Many images of the two products are nearest to the other product."),
}


def draw_page(result: CheckResult, decisions: list[str], part: Catalog, images: LabelledVectors, shown: int) -> str:
    """Return the page with the first ``shown`` findings of each kind. Names are escaped; no script may run."""
    from jinja2 import Environment, FileSystemLoader

    templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    thumbnails: dict[int, str] = {}
    sections = []
    for kind in KINDS:
        pairs = [pair for pair in zip(result.findings, decisions, strict=True) if pair[0].kind == kind]
        title, text = _TITLES[kind]
        entries = [_entry(finding, decision, part, images, thumbnails) for finding, decision in pairs[:shown]]
        sections.append({"kind": kind, "title": title, "text": text, "count": len(pairs), "entries": entries})
    return templates.get_template("findings.html").render(
        sections=sections,
        images=len(part),
        products=len(images.counts),
        outlier_below=result.outlier_below,
        duplicate_from=result.duplicate_from,
        size=_THUMBNAIL,
    )


def _entry(
    finding: Finding, decision: str, part: Catalog, images: LabelledVectors, thumbnails: dict[int, str]
) -> dict[str, Any]:
    """Return what the page shows of a finding: two groups of images, each with its product."""
    groups = [_group(part, [finding.row, *_companions(images, finding.row)], thumbnails)]
    if finding.other >= 0:
        groups.append(_group(part, [finding.other, *_companions(images, finding.other)], thumbnails))
    return {"groups": groups, "score": finding.score, "decision": decision}


def _group(part: Catalog, rows: list[int], thumbnails: dict[int, str]) -> dict[str, Any]:
    for row in rows:
        if row not in thumbnails:
            thumbnails[row] = _thumbnail(part, row)
    return {
        "image": part.table["image"][rows[0]].as_py(),
        "product": str(part.products[rows[0]]),
        "split": part.table["split"][rows[0]].as_py(),
        "thumbnails": [thumbnails[row] for row in rows],
    }


def _companions(images: LabelledVectors, row: int) -> Iterator[int]:
    """Yield the images of the product that are nearest to its centroid, without the image itself."""
    product = int(images.labels[row])
    members = images.groups[product]
    typical = members[(-(images.vectors[members] @ images.sums[product])).argsort(kind="stable")]
    yield from typical[typical != row][:_COMPANIONS].tolist()


def _thumbnail(part: Catalog, row: int) -> str:
    """Return a data URI; empty if the file cannot be read any more."""
    try:
        image = decode(part.path(row), part.box(row), _THUMBNAIL)
    except (ImageRejected, OSError):
        return ""
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
