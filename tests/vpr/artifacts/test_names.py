from __future__ import annotations

from vpr.artifacts.card import Parent
from vpr.artifacts.names import tell_apart


def test_artifacts_of_one_name_have_their_checksums() -> None:
    first, second = (Parent(role="model", name="int8", sha256=digit * 64) for digit in "ab")
    assert tell_apart(first, second) == ("'int8' (aaaaaaaaaaaa)", "'int8' (bbbbbbbbbbbb)")
    assert tell_apart(first, second.model_copy(update={"name": "fp32"})) == ("'int8'", "'fp32'")
