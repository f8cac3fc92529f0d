"""docs/security.md: every claim has a test, and every limit is the one in the code."""

from __future__ import annotations

import re

import pytest

from app.search_page import server as search_page
from app.search_page import upload_limits as http_limits
from app.search_page.upload import MAX_FILTER
from experiments.figures import ROOT
from vpr.artifacts import card as artifact
from vpr.data import webdataset as shards
from vpr.imaging import formats, limits

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(tests/\S+?::test_\w+)`", PAGE))))
def test_each_claim_has_a_test(test: str) -> None:
    path, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("section", ["What is not trusted", "The search page"])
def test_each_row_has_a_test(section: str) -> None:
    rows = [line for line in PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines() if line[:1] == "|"]
    assert len(rows) > 8
    assert [row for row in rows[2:] if "::test_" not in row] == []


def test_limits_equal_the_code() -> None:
    for limit in (
        f"at most {limits.MAX_FILE_BYTES >> 20} MiB as a file",
        f"at most {limits.MAX_PIXELS // 10**6} megapixels ({limits.MAX_PIXELS // 2 // 10**6} if not a JPEG, "
        f"{limits.MAX_PIXELS // 4 // 10**6} for WebP and AVIF; {limits.MAX_JPEG_PIXELS // 10**6} for a JPEG with one "
        "scan, decoded at half its size or less)",
        f"members of at most {limits.MAX_FILE_BYTES >> 20} MiB, labels of at most {shards._MAX_LABEL_BYTES >> 20} MiB",
        f"a card of at most {artifact._MAX_CARD_BYTES >> 20} MiB",
        f"uploads of at most {search_page.MAX_BYTES >> 20} MiB",
        f"an upload may take {search_page.UPLOAD_SECONDS} s",
        f"{http_limits.MAX_CONNECTIONS} connections",
        f"{search_page.MAX_UPLOAD_MEMORY >> 20} MiB of uploads at once",
        f"a connection has {http_limits.HEAD_SECONDS:g} s",
        f"one condition of at most {MAX_FILTER} characters",
        f"listens on {search_page.ADDRESS} only",
    ):
        assert limit in PAGE
    assert f"one of {', '.join(formats.FORMATS)}".replace("WEBP", "WebP") in PAGE
