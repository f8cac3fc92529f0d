from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from app.search_page.upload_limits import ADDRESS
from tests.reliability.load import load
from tests.reliability.load import uploads as load_uploads
from tests.reliability.load.clients import Expected, Outcome, Upload, Way, judge, run_clients
from tests.reliability.load.load import LoadConfig, put_under_load, summarise
from vpr.data.catalog import Catalog

OTHERS = frozenset({(1, 2), (3, 4)})


def page(rows: tuple[int, ...], scores: tuple[float, ...]) -> str:
    """Return a page as the template writes it."""
    hits = enumerate(zip(rows, scores, strict=True), start=1)
    return "\n".join(f'<img src="/image/{row}" alt="">\n<b>{n}. {score:.3f}</b>' for n, (row, score) in hits)


def image(rows: tuple[int, ...], way: Way = "at once", body: bytes = b"x" * 64) -> Upload:
    return Upload("good", body, Expected(200, rows, (0.9, 0.8)), way)


@pytest.mark.parametrize(
    ("status", "text", "verdict"),
    [
        (200, page((1, 2), (0.9, 0.8)), "right"),
        (200, page((3, 4), (0.9, 0.8)), "mixed up"),
        (200, page((2, 1), (0.9, 0.8)), "wrong"),
        (200, page((1, 2), (0.9, 0.7)), "wrong"),
        (200, "", "wrong"),
        (503, page((1, 2), (0.9, 0.8)), "lost"),
        (0, "", "lost"),
    ],
)
def test_answer_is_compared_with_expected(status: int, text: str, verdict: str) -> None:
    assert judge(image((1, 2)), status, text, OTHERS)[0] == verdict


def test_rejection_is_judged_by_reason() -> None:
    upload = Upload("no image", b"<svg>", Expected(422, text="not an image"))
    assert judge(upload, 422, "not an image: choose another", OTHERS)[0] == "right"
    assert judge(upload, 422, "truncated", OTHERS)[0] == "wrong"
    assert judge(upload, 200, page((1, 2), (0.9, 0.8)), OTHERS)[0] == "lost"


def serve_constant(plans: list[list[Upload]], answer: str) -> tuple[list[Outcome], list[bytes]]:
    """Return the outcomes of a server with a constant answer, or none, and the requests that it got."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = bytearray()
        try:
            while not data.endswith(b"end"):
                piece = await reader.read(1 << 16)
                if not piece:
                    break
                data += piece
            if answer:
                writer.write(f"HTTP/1.1 200 OK\r\n\r\n{answer}".encode())
                await writer.drain()
        except ConnectionResetError:
            data += b"(reset)"
        requests.append(bytes(data))
        writer.close()

    async def both() -> list[Outcome]:
        server = await asyncio.start_server(serve, ADDRESS, 0)
        outcomes = await run_clients(server.sockets[0].getsockname()[1], plans)
        await asyncio.sleep(0.2)
        server.close()
        return outcomes

    return asyncio.run(both()), requests


def test_mixed_up_and_lost_answers_are_detected() -> None:
    plans = [[image((1, 2), body=b"end")] * 3, [image((3, 4), body=b"end")] * 2]
    outcomes, _ = serve_constant(plans, page((1, 2), (0.9, 0.8)))
    assert [outcome.verdict for outcome in outcomes] == ["right"] * 3 + ["mixed up"] * 2
    outcomes, _ = serve_constant(plans, "")
    assert [outcome.verdict for outcome in outcomes] == ["lost"] * 5


def test_uploads_are_sent_as_specified() -> None:
    body = bytes(range(97, 123)) * 10 + b"end"
    _, (slow,) = serve_constant([[image((1, 2), "slowly", body)]], page((1, 2), (0.9, 0.8)))
    head, _, sent = slow.partition(b"\r\n\r\n")
    assert sent == body
    assert b"Content-Length: 263" in head
    leaver = Upload("breaks off", b"y" * 1000, Expected(0), "then breaks off")
    (outcome,), (broken,) = serve_constant([[leaver]], "never read")
    assert outcome.verdict == "right"
    assert broken.endswith(b"y(reset)")
    assert b"Content-Length: 1000" in broken
    assert broken.count(b"y") <= 500


@pytest.mark.reliability
def test_page_answers_all_under_load(
    student_artifact: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = [kind for kind in load_uploads.SHARES if kind not in ("stalls", "good, 12 megapixels")]
    for module in (load, load_uploads):
        monkeypatch.setattr(module, "SHARES", {kind: 1 / len(quick) for kind in quick})
    assert catalog.artifact is not None
    config = LoadConfig(
        (str(student_artifact),), str(catalog.artifact.path), str(tmp_path / "kept"), clients=12, uploads=5
    )
    result = put_under_load(config)
    assert [outcome for outcome in result.outcomes if outcome.verdict != "right"] == []
    sent = Counter(outcome.kind for outcome in result.outcomes)
    assert (sent.total(), set(sent)) == (2 * 12 * 5, set(quick))
    figures, table = summarise(config, result, "command")
    assert [figure.name for figure in figures if figure.met is False] == ["load: clients at once"]
    assert [row["sent"] for row in table] == [sent[kind] for kind in quick]
