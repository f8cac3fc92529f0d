from __future__ import annotations

import re
from email.message import Message
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments.audit import LOCK
from experiments.figures import ROOT
from experiments.licences import LIST, licence_of, pinned
from vpr.common.errors import UserError


def _direct() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def _installed() -> set[str]:
    """Names of the requirements and of all that they need on this machine."""
    found: set[str] = set()
    left = _direct()
    while left:
        one = left.pop()
        for extra in one.extras or {""}:
            key = f"{canonicalize_name(one.name)}[{extra}]"
            if key not in found:
                found.add(key)
                inner = [Requirement(line) for line in metadata.requires(one.name) or ()]
                left += [each for each in inner if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {key.partition("[")[0] for key in found}


def _listed() -> dict[str, str]:
    rows = re.findall(r"^\| ([a-z0-9.-]+) \| (.+?) \| .+ \|$", LIST.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(rows[1:])


def test_the_lock_has_what_is_required_at_its_version() -> None:
    locked = pinned()
    for one in _direct():
        assert locked[canonicalize_name(one.name)] == {str(one.specifier).removeprefix("==")}


def test_the_lock_has_all_that_is_needed() -> None:
    assert _installed() - set(pinned()) == set()


def test_every_entry_of_the_lock_has_hashes_and_names_no_place() -> None:
    text = LOCK.read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-z])", "\n" + "\n".join(line for line in text.splitlines() if line[:1] != "#"))[1:]
    assert len(entries) > 100
    assert [entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}", entry)] == []
    assert re.findall(r"://|--index|--extra|--find|--trusted| @ ", text) == []


def test_every_package_of_the_lock_has_its_licence_listed() -> None:
    listed = _listed()
    assert set(listed) == set(pinned())
    assert [name for name, licence in listed.items() if not licence.strip() or licence == "UNKNOWN"] == []


def test_the_list_says_what_the_installed_packages_say() -> None:
    """Of those at the very version that is required: what these need may be older or newer here."""
    listed = _listed()
    for one in _direct():
        assert listed[canonicalize_name(one.name)] == licence_of(one.name).name


def test_a_package_that_does_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not-there: is not installed"):
        licence_of("not-there")
    monkeypatch.setattr(metadata, "metadata", lambda _: Message())
    with pytest.raises(UserError, match="numpy: its metadata names no licence"):
        licence_of("numpy")
