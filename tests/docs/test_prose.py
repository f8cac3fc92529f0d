"""Words that no text of the project uses (private vocabulary of earlier versions)."""

from __future__ import annotations

import re
import tokenize

import pytest

from experiments.figures import ROOT

BANNED = re.compile(
    r"\b(told|tells|asked|roads?|lies?|stands|behind|whole|mend(ed)?|refus(ed|es|al)|of ours|of its own|all the same"
    r"|at hand|of no consequence|as far as|anew|pictures?|photos?)\b",
    re.IGNORECASE,
)
# Generated tables, code blocks and inline code keep the words of their source.
_SKIPPED = re.compile(r"<!-- table.*?<!-- /table -->|^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
DOCUMENTS += tuple(sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem != "licences"))
# From Python 3.12 on, the text of an f-string is a token of another type.
_TEXTS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
PACKAGES = ("vpr", "teacher", "student", "calibration", "export", "benchmarks", "app")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_has_no_banned_word(document: str) -> None:
    text = _SKIPPED.sub("", (ROOT / document).read_text(encoding="utf-8"))
    assert [match.group() for match in BANNED.finditer(text)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_package_texts_have_no_banned_word(package: str) -> None:
    words = []
    for path in (ROOT / package).rglob("*.py"):
        with tokenize.open(path) as stream:
            for token in tokenize.generate_tokens(stream.readline):
                if token.type in _TEXTS:
                    name = f"{path.relative_to(ROOT)}:{token.start[0]}"
                    words += [f"{name}: {match.group()}" for match in BANNED.finditer(token.string)]
    assert words == []


@pytest.mark.parametrize(("document", "lines"), [("README.md", 150), ("CHANGELOG.md", 60)])
def test_document_is_short(document: str, lines: int) -> None:
    assert len((ROOT / document).read_text(encoding="utf-8").splitlines()) <= lines


def test_changelog_lines_are_short() -> None:
    assert max(map(len, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines())) <= 100
