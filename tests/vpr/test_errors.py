from __future__ import annotations

from vpr.errors import UserError


def test_what_a_file_names_cannot_steer_the_terminal() -> None:
    line = str(UserError("card.json: key 'a\x1b[31m\r\n\u202eb\ud800': not known: make it again"))
    assert line == "card.json: key 'a\ufffd[31m \ufffdb\ufffd': not known: make it again"
    assert line.isprintable()


def test_a_line_keeps_its_beginning_and_its_remedy() -> None:
    line = str(UserError(f"card.json: key '{'n' * 100_000}': not known: make it again"))
    assert len(line) < 2100
    assert line.startswith("card.json: key 'nnn")
    assert line.endswith("nnn': not known: make it again")
