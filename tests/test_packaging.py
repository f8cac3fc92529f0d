"""Contents of the package, and agreement of the requirements, their lock and the list of licences."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_namespace_packages

from experiments.figures import ROOT

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
PRODUCT = {"vpr", "teacher", "student", "calibration", "export", "benchmarks", "app"}


def read_requirements(name: str) -> list[Requirement]:
    """Return the requirements of a file, and of the files that it includes."""
    lines = [line.partition(" #")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    included = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    own = [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]
    return [*own, *(requirement for file in included for requirement in read_requirements(file))]


DIRECT = [*read_requirements("requirements.txt"), *read_requirements("requirements-dev.txt")]


def locked_versions() -> dict[str, set[str]]:
    """Return the versions of each locked package; newer Pythons may have another one than older ones."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", LOCK, re.MULTILINE):
        versions.setdefault(name, set()).add(version)
    return versions


def installed_dependencies() -> set[str]:
    """Return the names of the requirements and of all their dependencies on this machine."""
    seen: set[str] = set()
    queue = list(DIRECT)
    while queue:
        requirement = queue.pop()
        for extra in requirement.extras or {""}:
            key = f"{canonicalize_name(requirement.name)}[{extra}]"
            if key not in seen:
                seen.add(key)
                inner = [Requirement(line) for line in metadata.requires(requirement.name) or ()]
                queue += [need for need in inner if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {key.partition("[")[0] for key in seen}


def test_package_has_the_product_only() -> None:
    """The wheel and the editable install take their packages and dependencies from this configuration."""
    packages = find_namespace_packages(str(ROOT), **SETUPTOOLS["packages"]["find"])
    assert {name.partition(".")[0] for name in packages} == PRODUCT
    modules = {path.parent.relative_to(ROOT) for package in PRODUCT for path in (ROOT / package).rglob("*.py")}
    assert {".".join(folder.parts) for folder in modules} <= set(packages)
    assert SETUPTOOLS["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}


def test_package_data_exists() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package.replace(".", "/")).glob(pattern)), (package, pattern)


def test_lock_has_required_versions() -> None:
    versions = locked_versions()
    for requirement in DIRECT:
        assert versions[canonicalize_name(requirement.name)] == {str(requirement.specifier).removeprefix("==")}


def test_lock_has_all_dependencies() -> None:
    assert installed_dependencies() - set(locked_versions()) == set()


def test_lock_has_hashes_and_no_addresses() -> None:
    lines = "\n".join(line for line in LOCK.splitlines() if line[:1] != "#")
    entries = re.split(r"\n(?=[a-z])", f"\n{lines}")[1:]
    assert len(entries) > 100
    assert [entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}", entry)] == []
    assert re.findall(r"://|--index|--extra|--find|--trusted| @ ", LOCK) == []


@pytest.fixture
def licences() -> dict[str, str]:
    text = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) +\| (.+?) +\|$", text, re.MULTILINE)
    return {canonicalize_name(name): licence for name, licence in rows if name != "Name"}


def test_every_locked_package_has_a_licence(licences: dict[str, str]) -> None:
    assert set(licences) == {canonicalize_name(name) for name in locked_versions()} - {"cuda-toolkit"}
    assert [name for name, licence in licences.items() if licence.strip() in ("", "UNKNOWN")] == []
