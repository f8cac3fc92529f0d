"""``make figures TOPIC=layout``: size, imports, help and speed of the code, into ``docs/results/layout.json``.

Parts: ``code``, ``help``, ``hashing``, ``tests``, ``equivalence``. The last one needs the folder of a reference, see
:mod:`experiments.layout.equivalence`, in ``runs/reference``. Nothing else may run while ``help`` and ``tests`` measure.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import grimp
import networkx as nx

from experiments.figures import ROOT, Figure, Row, command_of, measure, record
from experiments.layout.equivalence import compare_with_reference
from experiments.layout.hashing import count_hashes
from vpr.cli import COMMANDS
from vpr.common.errors import UserError

PRODUCT = ("vpr", "teacher", "student", "calibration", "export", "benchmarks", "app")
_REFERENCE = Path("runs/reference")
_REPEATS = 5


def measure_code() -> None:
    """Record lines of the product, its largest folder, import circles, and lines of the README."""
    command = command_of("layout", "code")
    lines = product_lines()
    total = sum(lines.values())
    packages, folders, files = Counter[str](), Counter[str](), Counter[str]()
    for path, count in lines.items():
        packages[path.parts[0]] += count
        folders[str(path.parent)] += count
        files[str(path.parent)] += 1
    largest_package, largest_folder = packages.most_common(1)[0], folders.most_common(1)[0]
    readme = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    kept = subprocess.run([Path(sys.executable).parent / "lint-imports"], capture_output=True, cwd=ROOT, check=False)
    figures = [
        Figure("product lines of Python", total, "", 17_000, "<=", command),
        Figure("largest folder's share of the product", largest_folder[1] / total, "", 0.25, "<=", command),
        Figure("files in the largest folder", max(files.values()), "", 22, "<=", command),
        Figure("largest package's share of the product", largest_package[1] / total, "", None, "<=", command),
        Figure("import circles between modules", len(import_circles()), "", 0, "<=", command),
        Figure("broken import contracts", float(kept.returncode != 0), "", 0, "<=", command),
        Figure("README lines", readme, "", 150, "<=", command),
    ]
    table: list[Row] = [
        {"folder": folder, "files": files[folder], "lines": count, "share": f"{count / total:.0%}"}
        for folder, count in folders.most_common()
    ]
    record("layout", figures, {"folders": table})


def product_lines() -> dict[Path, int]:
    """Return the lines of every tracked Python file of the product."""
    listed = subprocess.run(["git", "ls-files", *PRODUCT], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    paths = [Path(line) for line in listed.splitlines() if line.endswith(".py")]
    return {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths}


def import_circles() -> list[set[str]]:
    """Return the sets of modules that import each other, directly or not; imports inside functions count too."""
    graph = grimp.build_graph(*PRODUCT)
    imports = nx.DiGraph(
        (module, other) for module in graph.modules for other in graph.find_modules_directly_imported_by(module)
    )
    return [circle for circle in nx.strongly_connected_components(imports) if len(circle) > 1]


def measure_help() -> None:
    """Record CPU seconds and lines of the slowest and longest help."""
    command = command_of("layout", "help")
    seconds, lines = {}, {}
    for name in COMMANDS:
        runs = [_help(name) for _ in range(_REPEATS + 1)][1:]  # the first one warms the file cache
        seconds[name], lines[name] = statistics.median(cpu for cpu, _ in runs), runs[0][1]
    slowest, longest = max(seconds, key=seconds.__getitem__), max(lines, key=lines.__getitem__)
    record(
        "layout",
        [
            Figure("`vpr COMMAND --help`, slowest, median of 5", seconds[slowest], "s of CPU", 0.5, "<=", command),
            Figure("lines of the longest default help", lines[longest], "", 60, "<=", command),
        ],
        {"help": [{"command": name, "s of CPU": f"{seconds[name]:.2f}", "lines": lines[name]} for name in COMMANDS]},
    )


def _help(name: str) -> tuple[float, int]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "vpr", *name.split(), "--help"], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, len(done.stdout.splitlines())


def measure_hashing() -> None:
    """Record how often a file of an input is hashed in one distillation with initial weights and ranges."""
    with tempfile.TemporaryDirectory() as folder:
        counts = count_hashes(Path(folder))
    name = "times a file of an input is hashed in one `vpr student distill`, most"
    figure = Figure(name, max(counts.values()), "", 1, "<=", command_of("layout", "hashing"))
    record("layout", [figure], {"hashing": [{"file": file, "times": count} for file, count in sorted(counts.items())]})


def measure_tests() -> None:
    """Record the seconds of ``make test``."""
    started = time.monotonic()
    done = subprocess.run(["make", "test"], cwd=ROOT, check=False)
    if done.returncode:
        raise UserError("layout: `make test` failed. Repair the tests, then measure again.")
    seconds = time.monotonic() - started
    record("layout", [Figure("`make test`", seconds, "s", 480, "<=", command_of("layout", "tests"))], {})


def measure_equivalence() -> None:
    """Record how many files differ from those that a7424ef makes from the same weights."""
    if not _REFERENCE.is_dir():
        raise UserError(f"{_REFERENCE}: the reference is missing. See experiments/layout/equivalence.py.")
    with tempfile.TemporaryDirectory() as folder:
        rows = compare_with_reference(_REFERENCE, Path(folder))
    different = sum(row["equal"] == "NO" for row in rows)
    name = "files that differ from those of a7424ef, same weights"
    figure = Figure(name, different, f"of {len(rows)}", 0, "<=", command_of("layout", "equivalence"))
    record("layout", [figure], {"equivalence": rows})


PARTS = {
    "code": measure_code,
    "help": measure_help,
    "hashing": measure_hashing,
    "tests": measure_tests,
    "equivalence": measure_equivalence,
}

if __name__ == "__main__":
    measure(PARTS, sys.argv[1:])
