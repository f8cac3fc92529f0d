"""The architecture as the code has it: which module imports which, and an image of it.

``python -m experiments.imports`` draws ``docs/results/architecture.svg`` (``make architecture``).
"""

from __future__ import annotations

import ast
from pathlib import Path

from experiments.figures import RESULTS, ROOT
from vpr.common.log import get_logger

log = get_logger(__name__)

# From what imports nothing of ours to what may import all.
PACKAGES = ("vpr", "teacher", "student", "calibration", "export", "benchmarks")
IMAGE = RESULTS / "architecture.svg"
# Of each package: what it does, and the left, right and vertical middle of its box.
_BOXES = {
    "vpr": ("catalogue, artifacts, training, embeddings, search, the command", 0.0, 10.0, 0.4),
    "teacher": ("CLIP tower,\nmargin heads, soups", 0.0, 1.9, 2.2),
    "student": ("small ViT, losses,\ndistillation", 2.7, 4.6, 2.2),
    "calibration": ("images, ranges,\nsensitivity", 5.4, 7.3, 2.2),
    "export": ("ONNX, Q/DQ,\nengines, Triton", 8.1, 10.0, 2.2),
    "benchmarks": ("recall, latency, the report, the figures", 0.0, 10.0, 4.0),
}
_HEIGHT = 0.7


def imports_of(module: Path, root: Path = ROOT) -> set[str]:
    """The modules of ours that a file imports, anywhere in it, by dotted name.

    ``from a import b`` counts as ``a.b`` where that is a module, else as ``a``.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if root.joinpath(*name.split(".")).with_suffix(".py").is_file()}
            found |= modules or {node.module}
    return {name for name in found if name.partition(".")[0] in PACKAGES}


def read_imports(root: Path = ROOT) -> dict[str, set[str]]:
    """By dotted name of each module of ours, the modules of ours that it imports."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): imports_of(path, root)
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


def arrows(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """From which package into which other one imports lead, sorted."""
    pairs = {
        (module.partition(".")[0], other.partition(".")[0]) for module, others in imports.items() for other in others
    }
    return sorted(pair for pair in pairs if pair[0] != pair[1])


def draw(found: list[tuple[str, str]], path: Path = IMAGE) -> None:
    """Packages as boxes, and an arrow from each to those it imports, as SVG whose description lists the arrows."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Drawing
    from matplotlib.patches import FancyBboxPatch

    drawing = Drawing(figsize=(9, 4), layout="constrained")
    axes = drawing.subplots()
    axes.set(xlim=(-0.3, 11.4), ylim=(-0.2, 4.6))
    axes.axis("off")
    for name, (purpose, left, right, middle) in _BOXES.items():
        corner, width = (left, middle - _HEIGHT / 2), right - left
        axes.add_patch(FancyBboxPatch(corner, width, _HEIGHT, boxstyle="round,pad=0.08", fc="#e8f0fa", ec="#1f5fa8"))
        axes.text((left + right) / 2, middle + 0.04, name, ha="center", va="bottom", weight="bold", fontsize=9)
        axes.text((left + right) / 2, middle - 0.02, purpose, ha="center", va="top", fontsize=7)
    for importer, imported in found:
        points, bend = _route(importer, imported)
        style = {"arrowstyle": "-|>", "color": "#555555", "connectionstyle": bend}
        axes.annotate("", points[1], points[0], arrowprops=style)
    with mpl.rc_context({"svg.hashsalt": "vpr", "svg.fonttype": "none"}):
        drawing.savefig(path, format="svg", metadata={"Date": None, "Description": listed(found)})


def listed(found: list[tuple[str, str]]) -> str:
    """Arrows as a line of text."""
    return ", ".join(f"{importer} imports {imported}" for importer, imported in found)


def _route(importer: str, imported: str) -> tuple[tuple[tuple[float, float], tuple[float, float]], str]:
    """Both ends of an arrow, and how it bends."""
    (_, left, right, above), (_, other_left, other_right, below) = _BOXES[importer], _BOXES[imported]
    edge = _HEIGHT / 2 + 0.1
    if above == below:
        skips = left - other_right > 1
        ends = ((left + right) / 2, above + edge), ((other_left + other_right) / 2, below + edge)
        return (ends, "arc3,rad=0.25") if skips else (((left - 0.1, above), (other_right + 0.1, below)), "arc3")
    if right - left == other_right - other_left:  # past the stages
        return ((right + 0.1, above), (right + 0.1, below)), "bar,fraction=-0.15"
    x = (left + right) / 2 if right - left < other_right - other_left else (other_left + other_right) / 2
    return ((x, above - edge), (x, below + edge)), "arc3"


if __name__ == "__main__":
    draw(arrows(read_imports()))
    log.info(f"{IMAGE.relative_to(ROOT)}: drawn")
