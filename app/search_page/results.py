"""Values that the template of the results shows: texts, links and the agreement of two lists."""

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from app.search_page.lookup import Hit, SearchResult

_MAX_SHOWN = 200  # characters of a value
_WEB_ADDRESS = re.compile(r"https?://[^\s\\\x00-\x20\x7f]+", re.IGNORECASE)


def make_columns(results: Sequence[SearchResult]) -> list[dict[str, Any]]:
    """Return the values of each model's or gallery's column."""
    columns = []
    for index, result in enumerate(results):
        others = [[hit.key for hit in other.hits] for number, other in enumerate(results) if number != index]
        answer = {"is_match": result.is_match, "probability": result.probability}
        hits = [_show(hit, others) for hit in result.hits]
        columns.append({"name": result.name, "milliseconds": result.milliseconds, **answer, "hits": hits})
    return columns


def describe_agreement(results: Sequence[SearchResult]) -> str:
    """Return a sentence on the agreement of two lists; empty for one list, or if one has no image."""
    lists = [[hit.key for hit in result.hits] for result in results]
    if len(lists) == 1 or not all(lists):
        return ""
    first, second = lists
    same = "Same first image" if first[0] == second[0] else "Different first images"
    return f"{same}; {len(set(first) & set(second))} of {max(map(len, lists))} are in both lists."


def web_address(value: object) -> str | None:
    """Return a value if it is an http or https address with a host, which a link may open; else None."""
    if not isinstance(value, str) or not _WEB_ADDRESS.fullmatch(value):
        return None
    try:
        return value if urlsplit(value).hostname else None
    except ValueError:  # such as an unclosed bracket of an IPv6 address
        return None


def _show(hit: Hit, others: Sequence[Sequence[object]]) -> dict[str, Any]:
    url = web_address(hit.metadata.get("url"))
    title = hit.metadata.get("title")
    shown = {"title"} if title else set()
    details = {
        name: _text(value)
        for name, value in hit.metadata.items()
        if value is not None and name not in shown and (name != "url" or url is None)
    }
    return {
        "row": hit.row,
        "score": hit.score,
        "product": hit.product,
        "category": hit.category,
        "title": _text(title) if title else "",
        "url": url,
        "details": details,
        # Its rank in the other list, empty if it is not there; None without another list.
        "elsewhere": [other.index(hit.key) + 1 for other in others if hit.key in other] if others else None,
    }


def _text(value: str | float | None) -> str:
    text = f"{value:.15g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} …"
