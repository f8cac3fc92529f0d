"""Kernels that TensorRT-RTX compiles while it runs: one cache for all contexts of an engine, kept in a file."""

import threading
from pathlib import Path
from typing import Any

from export.tensorrt.cuda_driver import DriverError
from vpr.artifacts.run_folder import atomic_write
from vpr.common.log import get_logger

log = get_logger(__name__)

_MAX_BYTES = 1 << 30


class KernelCache:
    """TensorRT-RTX's runtime cache; threads may share it.

    ``path`` is read at the first context and written by :meth:`save`. TensorRT-RTX rejects the content of another GPU
    or version, and the cache then starts empty. Kernels are code for the GPU: name only files that you wrote.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._cache: Any = None
        self._lock = threading.Lock()

    def attach(self, settings: Any) -> None:
        """Add the cache to the ``IRuntimeConfig`` of a new context."""
        with self._lock:
            if self._cache is None:
                self._cache = settings.create_runtime_cache()
                content = self._read()
                if content and not self._cache.deserialize(content):
                    log.warning(f"{self._path}: kernels of another GPU or version, compiled again")
            if not settings.set_runtime_cache(self._cache):
                raise DriverError("cannot use a runtime cache")

    def save(self) -> None:
        """Write the kernels to the file, if there is one."""
        with self._lock:
            if self._path is None or self._cache is None:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as stream:
                stream.write(bytes(self._cache.serialize()))

    def release(self) -> None:
        """Drop the cache, which must not outlive the engine."""
        with self._lock:
            self._cache = None

    def _read(self) -> bytes:
        if self._path is None or not self._path.is_file() or self._path.stat().st_size > _MAX_BYTES:
            return b""
        return self._path.read_bytes()
