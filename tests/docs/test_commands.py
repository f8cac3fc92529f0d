"""Every code block of README and docs runs, or states why it does not; every ``vpr`` command in them parses.

The info string decides: ``bash test`` runs here, ``bash slow`` in ``make test-all``, ``bash no-run REASON`` never.
A ``text`` block after a block that runs is its output; ``...`` in it matches anything.
"""

from __future__ import annotations

import ast
import csv
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.latency.measure import time_models
from experiments.figures import ROOT
from vpr.cli import COMMANDS, main, read_config
from vpr.data.readers import read_csv

# In reading order: a page may use what the blocks before it have written.
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/index.md", "docs/install.md", "docs/concepts.md")
PAGES += (
    "docs/data.md",
    "docs/teacher.md",
    "docs/student.md",
    "docs/export.md",
    "docs/gpu.md",
    "docs/serving.md",
    "docs/gallery.md",
)
PAGES += ("docs/benchmarking.md", "docs/artifacts.md", "docs/architecture.md", "docs/results.md")
PAGES += ("docs/test-suite.md", "docs/reliability.md", "docs/security.md", "docs/licences.md")
# Appended to the commands of tested blocks: the documented defaults measure for seconds or train for many epochs.
SMALLER = {
    "teacher train": ("--stages", '{"train": "all", "epochs": 1}', "--loader.batch-size", "32"),
    "student distill": ("--epochs", "1", "--loader.batch-size", "32"),
    "calibrate": ("--count", "32"),
    "export int8": ("--seconds", "0.01"),
    "bench report": ("--seconds", "0.01", "--batches", "1", "--threads", "1"),
    "bench storage": ("--seconds", "0.01", "--sizes", "500"),
}
_GENERAL = {"-h", "--help", "--help-all", "--version", "-q", "-v", "--json"}
_FENCE = re.compile(r"^```(\w*) *(.*)\n((?:.*\n)*?)```\n", re.MULTILINE)
_TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, ``test``, ``slow`` or ``no-run``, the reason, its lines and its output."""

    page: str
    line: int
    language: str
    mode: str
    reason: str
    text: str
    output: str = ""

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _read_blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks: list[Block] = []
    end = -1
    for match in _FENCE.finditer(text):
        language, info, body = match.groups()
        if language == "text" and blocks and match.start() == end + 1:  # after a single empty line
            blocks[-1] = Block(**{**vars(blocks[-1]), "output": body})
            continue
        mode, _, reason = info.partition(" ")
        end = match.end()
        if language in ("bash", "python"):
            blocks.append(Block(page, text.count("\n", 0, match.start()) + 1, language, mode, reason, body))
    return blocks


BLOCKS = [block for page in PAGES for block in _read_blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
RUN = [
    pytest.param(block, id=str(block), marks=pytest.mark.slow if block.mode == "slow" else ())
    for block in BLOCKS
    if block.mode in ("test", "slow")
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shop/images.csv``: 80 products of 3 small JPEGs each, every product with its own texture."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    rows = [("image", "product", "category")]
    for product in range(80):
        coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        texture = Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)
        (folder / f"shop/images/{product:02d}").mkdir(parents=True)
        for view, (left, top) in enumerate(rng.integers(0, 48, (3, 2)).tolist()):
            name = f"images/{product:02d}/{view}.jpg"
            texture.crop((left, top, left + 48, top + 48)).save(folder / "shop" / name)
            rows.append((name, f"product-{product:02d}", "textures"))
    with (folder / "shop/images.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


def test_every_page_is_listed() -> None:
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")} == set(PAGES[3:])


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_says_whether_it_runs(block: Block) -> None:
    assert block.mode in ("test", "slow", "no-run")
    assert block.mode != "no-run" or block.reason, "no-run needs a reason"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_parse(block: Block) -> None:
    for words in block.commands:
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= _TARGETS
        elif (arguments := _vpr_arguments(words)) and arguments[0] not in _GENERAL:
            name = _command_name(arguments)
            assert name in COMMANDS, arguments
            rest = [word for word in arguments[len(name.split()) :] if word not in _GENERAL]
            if block.mode != "test" and rest:
                read_config(COMMANDS[name].load_config(), name, rest)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_imports_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)


def test_csv_example_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (tmp_path / "images.csv").write_text(page.partition("```csv\n")[2].partition("```")[0], encoding="utf-8")
    rows = list(read_csv(tmp_path / "images.csv"))
    assert [row["product"] for row in rows] == ["chair-17", "chair-17", "lamp-3"]
    assert [row["box"] for row in rows] == [None, {"x": 120, "y": 80, "w": 300, "h": 420}, None]


@pytest.mark.parametrize("block", RUN)
def test_block_runs(
    block: Block, workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    if block.mode == "test":  # a cold start takes 4 s, the ranges of `entropy` take 10 s
        monkeypatch.setattr("calibration.calibrate.METHODS", ("mse",))
        monkeypatch.setattr("benchmarks.report.build.time_models", partial(time_models, starts=0))
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    else:
        for words in block.commands:
            _run(words, block.mode == "test")
    printed = "\n".join(capfd.readouterr())
    for line in filter(None, map(str.strip, block.output.splitlines())):
        assert re.search(re.escape(line).replace(r"\.\.\.", ".*"), printed), f"{line!r} not in:\n{printed}"


def _run(words: list[str], small: bool) -> None:
    arguments = _vpr_arguments(words) if words[0] == "vpr" else []
    if not arguments:
        subprocess.run([sys.executable, *words[1:]] if words[0] == "python" else words, check=True)
        return
    extra = SMALLER.get(_command_name(arguments), ()) if small and not _GENERAL & set(arguments) else ()
    try:
        main([*arguments, *extra])
    except SystemExit as stopped:
        if stopped.code:
            pytest.fail(f"exit code {stopped.code}: {shlex.join(words)}")


def _vpr_arguments(words: list[str]) -> list[str]:
    """Return what follows ``vpr`` or ``-m vpr``; empty for another command."""
    if words[0].endswith("vpr"):
        return words[1:]
    at = words.index("-m") if "-m" in words else len(words)
    return words[at + 2 :] if words[at + 1 : at + 2] == ["vpr"] else []


def _command_name(arguments: list[str]) -> str:
    two = " ".join(arguments[:2])
    return two if two in COMMANDS else arguments[0]
