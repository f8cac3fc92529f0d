"""``make licences``: docs/licences.md, the licences of the installed packages, from their metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from experiments.audit import LOCK
from experiments.figures import ROOT, markdown
from vpr.common.errors import UserError

LIST = ROOT / "docs" / "licences.md"
_PINNED = re.compile(r"^([a-z0-9._-]+)==(\S+)", re.MULTILINE)
_LONGEST = 80  # letters; more is a text, not a name
_HEAD = """\
# Licences

`make licences` writes this page from the metadata of the packages in `requirements.lock`. The toolkit itself is under
[Apache-2.0](../LICENSE). `vpr/data/sample/ATTRIBUTION.csv` lists the licences of the sample's models.

"""


@dataclass(frozen=True)
class Licence:
    """What a package's metadata says of its licence.

    Attributes:
        package: its name in the lock.
        name: SPDX expression, or the words of the metadata; of several classifiers all.
        said: field of the metadata.
    """

    package: str
    name: str
    said: str


def licence_of(package: str) -> Licence:
    """The licence of an installed package; :class:`UserError` if it is not installed or does not tell."""
    try:
        found = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        raise UserError(f"{package}: is not installed: pip install --require-hashes -r {LOCK.name}") from None
    field = " ".join((found.get_all("License") or [""])[0].split())
    classes = [one.split(" :: ")[-1] for one in found.get_all("Classifier") or () if one.startswith("License ::")]
    if expressions := found.get_all("License-Expression"):
        return Licence(package, expressions[0], "License-Expression")
    if field and len(field) <= _LONGEST and field.upper() != "UNKNOWN":
        return Licence(package, field, "License")
    if classes := [one for one in classes if one != "OSI Approved"]:
        return Licence(package, ", ".join(sorted(classes)), "Classifier")
    if all(path.parts[0].endswith(".dist-info") for path in metadata.files(package) or ()):
        return Licence(package, "none stated: it has no files of its own, and requires others", "RECORD")
    raise UserError(f"{package}: its metadata names no licence: look it up before it is used")


def pinned(lock: Path = LOCK) -> dict[str, set[str]]:
    """The versions that a lock has of each package; newer Pythons may have another than older ones."""
    found: dict[str, set[str]] = {}
    for name, version in _PINNED.findall(lock.read_text(encoding="utf-8")):
        found.setdefault(name, set()).add(version)
    return found


def write(path: Path = LIST) -> int:
    """Write the list; the number of packages."""
    found = [licence_of(name) for name in sorted(pinned())]
    rows = [{"package": one.package, "licence": one.name, "said by": one.said} for one in found]
    path.write_text(_HEAD + markdown(rows) + "\n", encoding="utf-8")
    return len(found)


if __name__ == "__main__":
    print(f"{LIST.name}: {write()} packages")
