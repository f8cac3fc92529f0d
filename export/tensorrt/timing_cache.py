"""Kernel timings of one GPU and TensorRT version, kept in a file for later builds."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.config import NO_TIMING_CACHE, EngineConfig
from export.tensorrt.bindings import Builder
from vpr.artifacts.replace import lock_path
from vpr.artifacts.run_folder import atomic_write
from vpr.common.errors import UserError
from vpr.common.gpus import list_gpus
from vpr.common.locks import file_lock
from vpr.common.log import get_logger

log = get_logger(__name__)

_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class TimingCache:
    """A file of kernel timings. The user has named it, or its name says the GPU and the version it is for."""

    path: Path
    is_named: bool

    @classmethod
    def find(cls, config: EngineConfig, backend: Builder, version: str) -> "TimingCache | None":
        """Return the cache of a build, or None; :class:`UserError` if a file is named for TensorRT-RTX.

        The default is a file next to the output. There is none if CUDA does not name the GPU. TensorRT-RTX times no
        kernels, and a timing cache would make it look for a GPU.
        """
        if config.timing_cache == NO_TIMING_CACHE:
            return None
        if backend == "tensorrt-rtx":
            if config.timing_cache:
                raise UserError("timing_cache: TensorRT-RTX times no kernels at build time. Remove --timing-cache.")
            return None
        if config.timing_cache:
            return cls(Path(config.timing_cache), is_named=True)
        gpu = next(iter(list_gpus().gpus), None)
        if gpu is None or not config.output:
            return None
        words = [f"timings {gpu.architecture} {gpu.name} tensorrt", *re.findall(r"\d+", version)]
        name = "-".join(re.findall(r"[a-z0-9]+", " ".join(words).lower()))
        return cls(Path(config.output).parent / f"{name}.cache", is_named=False)

    def load(self, build: Any) -> None:
        """Give the timings to a builder's configuration.

        A named file that TensorRT rejects is a :class:`UserError`. The default file starts empty instead, for example
        after an update of CUDA.
        """
        if self._use(build, self._read()):
            return
        if self.is_named:
            raise UserError(f"{self.path}: not a timing cache of this GPU and TensorRT version. Name another file.")
        log.warning(f"{self.path}: timings of another GPU or version, measured again")
        self._use(build, b"")

    def save(self, build: Any) -> None:
        """Write the timings of a finished build; a reader sees the old file or the new one.

        A default file that cannot be written is a warning: the engine is finished.
        """
        content = bytes(build.get_timing_cache().serialize())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(lock_path(self.path)), atomic_write(self.path) as stream:
                stream.write(content)
        except OSError as error:
            if self.is_named:
                raise
            log.warning(f"{self.path}: the kernel timings were not kept ({error.strerror})")

    def _read(self) -> bytes:
        if not self.path.is_file():
            return b""
        if self.path.stat().st_size <= _MAX_BYTES:
            return self.path.read_bytes()
        if self.is_named:
            raise UserError(f"{self.path}: the file is too large for a timing cache. Name another file.")
        return b""

    @staticmethod
    def _use(build: Any, content: bytes) -> bool:
        cache = build.create_timing_cache(content)
        return cache is not None and bool(build.set_timing_cache(cache, False))
