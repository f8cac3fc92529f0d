"""Image files below a folder: found by suffix or content, and kept inside the folder with links followed."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from vpr.common.errors import UserError
from vpr.imaging.formats import HEIC_UNREADABLE, can_read_heic, is_heic, is_image_content

_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
_HEIC_SUFFIXES = frozenset({".heic", ".heif"})
UNKNOWN_SUFFIX, FOLDER_LINK = "unknown suffix", "a link to a folder, which is not followed"
HIDDEN = "its name or folder starts with a dot"
_HEAD = 32  # bytes that show the format of a file


class PathGuard:
    """Check that file names stay inside a folder, with links followed; each folder is resolved once.

    Links may also lead into the folders ``allowed``.
    """

    def __init__(self, root: Path, allowed: Sequence[Path] = ()) -> None:
        self.root = root
        self._resolved = (root.resolve(), *(folder.resolve() for folder in allowed))
        self._folders: dict[str, bool] = {}

    def check(self, name: str, table: Path | None = None, line: int = 0) -> str:
        """Return a name inside the root; else raise :class:`UserError`, with ``table`` and ``line`` if given."""
        if not self.is_inside(name):
            where = f"{table}: line {line}: " if table else ""
            if "\n" in name or "\0" in name:
                raise UserError(f"{where}{ascii(name)}: it has a line break or a zero byte. Rename the file or folder.")
            fix = "Give a folder that contains all images with --image-root" if table else "Copy the file into it"
            fix = fix if table else f"{fix}, or name the folder that links lead into with --follow-links"
            raise UserError(f"{where}'{name}' leads out of '{self.root}'. {fix}.")
        return name

    def is_inside(self, name: str) -> bool:
        """Return whether a name is inside the root."""
        folder, _, file = name.rpartition("/")
        if name.startswith("/") or "\0" in name or "\n" in name:
            return False
        if file in ("", ".", "..") or os.path.islink(f"{self.root}/{name}"):
            return self._is_inside(name)
        return self._is_folder_inside(folder)

    def relative(self, name: str) -> str:
        """Return a name from a table relative to the root, with slashes: it may be absolute or have backslashes."""
        if "\\" in name and not os.path.lexists(f"{self.root}/{name}"):
            name = name.replace("\\", "/")
        if name.startswith("/"):
            for root in (self.root.absolute(), self._resolved[0]):
                if PurePosixPath(name).is_relative_to(root):
                    return PurePosixPath(name).relative_to(root).as_posix()
        return name

    def _is_folder_inside(self, folder: str) -> bool:
        """Return whether a folder is inside. One that is no link is where its parent is, and is not resolved."""
        if folder not in self._folders:
            parent, _, name = folder.rpartition("/")
            is_plain = ".." not in folder and name not in ("", ".") and not os.path.islink(f"{self.root}/{folder}")
            self._folders[folder] = self._is_folder_inside(parent) if is_plain else self._is_inside(folder)
        return self._folders[folder]

    def _is_inside(self, name: str) -> bool:
        try:
            path = (self.root / name).resolve()
        except (OSError, RuntimeError):  # circular links, or a name that is too long for the file system
            return False
        return any(path.is_relative_to(folder) for folder in self._resolved)


def image_files(root: Path, allowed: Sequence[Path] = ()) -> Iterator[str]:
    """Yield the images at any depth of a folder, relative to it, sorted by the parts of their paths."""
    for name in list_files(root, allowed):
        if is_image(root, name):
            check_utf8(root, name)
            yield name


def is_image(root: Path, name: str) -> bool:
    """Return whether a file has the suffix of an image, or no suffix and the content of one, and is not hidden."""
    if is_hidden(name):
        return False
    suffix = os.path.splitext(name)[1].lower()
    return suffix in image_suffixes() if suffix else is_image_content(_head(root, name))


def is_hidden(name: str) -> bool:
    """Return whether a name has a part that starts with a dot, as the copies of Jupyter and the forks of macOS have."""
    return any(part.startswith(".") for part in name.split("/"))


def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the images that can be read here, in lower case."""
    return _SUFFIXES | _HEIC_SUFFIXES if can_read_heic() else _SUFFIXES


def skipped_files(root: Path, output: Path, allowed: Sequence[Path] = ()) -> list[tuple[str, str]]:
    """List files and links that the readers of folders skip, with the reason; files of ``output`` are left out."""
    output = output.resolve()
    prefix = f"{output.relative_to(root.resolve()).as_posix()}/" if output.is_relative_to(root.resolve()) else None
    files, links = _walk(root, allowed)
    skipped = [(name, _reason(root, name)) for name in files if not is_image(root, name)]
    skipped += [(name, FOLDER_LINK) for name in links]
    return [(name, reason) for name, reason in skipped if not (prefix and name.startswith(prefix))]


def check_utf8(root: Path, name: str) -> None:
    """Raise :class:`UserError` for a file name that is not UTF-8."""
    if not name.isprintable() and any("\ud800" <= character <= "\udfff" for character in name):
        raise UserError(f"{root}/{ascii(name)}: its name is not UTF-8. Rename it.")


def list_files(root: Path, allowed: Sequence[Path] = ()) -> list[str]:
    """List all files of a folder at any depth, sorted by the parts of their paths."""
    return _walk(root, allowed)[0]


def _reason(root: Path, name: str) -> str:
    if is_hidden(name):
        return HIDDEN
    suffix = os.path.splitext(name)[1].lower()
    return (
        HEIC_UNREADABLE if suffix in _HEIC_SUFFIXES or (not suffix and is_heic(_head(root, name))) else UNKNOWN_SUFFIX
    )


def _head(root: Path, name: str) -> bytes:
    """Return the first bytes of a file; none of one that is not a regular file."""
    path = root / name
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as stream:
            return stream.read(_HEAD)
    except OSError:
        return b""


def _walk(root: Path, allowed: Sequence[Path]) -> tuple[list[str], list[str]]:
    """List all files, and all links to folders that are not followed.

    A link is followed if it leads into one of ``allowed``, to a folder that is not read yet.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Check --root.")
    targets = [folder.resolve() for folder in allowed]
    read = [root.resolve()]
    files: list[tuple[str, ...]] = []
    links: list[tuple[str, ...]] = []
    pending: list[tuple[str, tuple[str, ...]]] = [(str(root), ())]
    while pending:
        top, prefix = pending.pop()
        for folder, subfolders, names in os.walk(top, onerror=_raise):
            parts = (*prefix, *PurePosixPath(folder).relative_to(top).parts)
            files += [(*parts, name) for name in names]
            for name in sorted(name for name in subfolders if os.path.islink(f"{folder}/{name}")):
                target = Path(os.path.realpath(f"{folder}/{name}"))
                is_new = not any(target.is_relative_to(other) or other.is_relative_to(target) for other in read)
                if is_new and any(target.is_relative_to(other) for other in targets):
                    read.append(target)
                    pending.append((f"{folder}/{name}", (*parts, name)))
                else:
                    links.append((*parts, name))
    return ["/".join(parts) for parts in sorted(files)], ["/".join(parts) for parts in sorted(links)]


def _raise(error: OSError) -> None:
    raise error  # the files of an unreadable folder must not be missing silently
