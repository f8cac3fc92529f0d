"""Kernels that TensorRT-RTX compiles while it runs: one cache for all contexts of an engine, kept in a file.

Commands keep the kernels in a folder of the user. Python code chooses a file.
"""

import errno
import hashlib
import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from export.tensorrt.cuda_driver import DriverError, Gpu
from vpr.artifacts.replace import lock_path
from vpr.artifacts.run_folder import atomic_write
from vpr.artifacts.store import Artifact
from vpr.common.locks import file_lock
from vpr.common.log import get_logger

log = get_logger(__name__)

AUTO = "auto"  # a file in the folder of the user
FOLDER_VARIABLE = "VPR_KERNEL_CACHE"  # environment variable of that folder, or NO_FOLDER
NO_FOLDER = "none"

_MAX_BYTES = 1 << 30  # of a file, and of all files in the folder of the user
_PATTERN = "kernels-*.cache"


class KernelCache:
    """TensorRT-RTX's runtime cache; threads may share it.

    ``path`` is read at the first context and written by :meth:`save`. TensorRT-RTX rejects the content of another GPU
    or version, and the cache then starts empty. Kernels are code for the GPU: name only files that you wrote.

    ``is_named`` is False for a file in the folder of the user. It is used only if no other user can write there. A file
    that cannot be written is a warning, because the engine has done its work.
    """

    def __init__(self, path: Path | None = None, is_named: bool = True) -> None:
        self._path, self._is_named = path, is_named
        self._stored = b""  # digest of the file's content
        self._cache: Any = None
        self._lock = threading.Lock()

    def attach(self, settings: Any) -> None:
        """Add the cache to the ``IRuntimeConfig`` of a new context."""
        with self._lock:
            if self._cache is None:
                self._cache = settings.create_runtime_cache()
                content = self._read()
                self._stored = _digest(content)
                if content and not self._cache.deserialize(content):
                    log.warning(f"{self._path}: kernels of another GPU or version, compiled again")
            if not settings.set_runtime_cache(self._cache):
                raise DriverError("cannot use a runtime cache")

    def save(self) -> None:
        """Write the kernels to the file, if there is one and they have changed."""
        with self._lock:
            if self._path is None or self._cache is None:
                return
            content = bytes(self._cache.serialize())
            if _digest(content) == self._stored:
                return
            try:
                self._write(self._path, content)
            except OSError as error:
                if self._is_named:
                    raise
                fix = f"Set {FOLDER_VARIABLE} to a folder of yours, or to {NO_FOLDER}."
                log.warning(f"{self._path.parent}: the compiled kernels were not kept ({error.strerror}). {fix}")

    def release(self) -> None:
        """Drop the cache, which must not outlive the engine."""
        with self._lock:
            self._cache = None

    def _read(self) -> bytes:
        if self._path is None:
            return b""
        try:
            if not self._path.is_file() or self._path.stat().st_size > _MAX_BYTES:
                return b""
            if not self._is_named:
                _check_private(self._path.parent)
            content = self._path.read_bytes()
        except OSError:
            if self._is_named:
                raise
            return b""
        if not self._is_named:
            with suppress(OSError):
                os.utime(self._path)  # the files that were not used for longest are removed first
        return content

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(mode=0o777 if self._is_named else 0o700, parents=True, exist_ok=True)
        if not self._is_named:
            _check_private(path.parent)
        with file_lock(lock_path(path)), atomic_write(path) as stream:
            if not self._is_named:
                os.fchmod(stream.fileno(), 0o600)
            stream.write(content)
        if not self._is_named:
            _remove_least_recent(path.parent)


def find_kernel_cache(file: Path | str, artifact: Artifact, version: str, gpu: Gpu) -> KernelCache:
    """Return the cache of an engine on a GPU, by a version of TensorRT-RTX.

    ``file`` is its file, ``auto`` for one in the folder of the user, or empty for none.
    """
    if file != AUTO:
        return KernelCache(Path(file) if file else None)
    folder = _folder_of_user()
    if folder is None:
        return KernelCache()
    plan = artifact.card.files["engine.plan"].sha256
    words = f"kernels {gpu.architecture} {gpu.name} tensorrt rtx {version} {plan}"
    name = "-".join(re.findall(r"[a-z0-9]+", words.lower()))
    return KernelCache(folder / f"{name}.cache", is_named=False)


def _folder_of_user() -> Path | None:
    """Return the folder of all kernels; None if the user wants none or has no home folder."""
    chosen = os.environ.get(FOLDER_VARIABLE, "")
    if chosen:
        return None if chosen == NO_FOLDER else Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG Base Directory Specification: such a path is ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "visual-product-recognition" / "kernels"


def _check_private(folder: Path) -> None:
    """Raise :class:`PermissionError` if another user can write into a folder."""
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(errno.EACCES, "other users can write there", str(folder))


def _remove_least_recent(folder: Path) -> None:
    """Remove the files that were not used for longest, so that the others fit into the limit."""
    files = []
    for path in folder.glob(_PATTERN):
        with suppress(FileNotFoundError):  # another process has removed it
            files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > _MAX_BYTES:
            path.unlink(missing_ok=True)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
