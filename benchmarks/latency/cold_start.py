"""Cold start of a model in a new process: time to the first embedding, and the memory of that model alone.

``python -m benchmarks.latency.cold_start ARTIFACT BACKEND THREADS`` is the child; it prints one line of JSON.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

from export.backends.registry import Model, models_of
from vpr.common.errors import UserError
from vpr.common.gpus import gpu_memory_used

_ROOT = Path(__file__).parents[2]
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class ColdStart:
    """Costs of starting a model. Unmeasured values are None."""

    cold_start_ms: float | None = None  # milliseconds from the start of Python to the first embedding
    load_ms: float | None = None  # milliseconds from the artifact to a ready model, with the imports of its runtime
    first_call_ms: float | None = None  # milliseconds of the first call, on one image
    peak_memory_bytes: int | None = None  # largest resident memory until the first embedding
    # increase of the memory in use on the GPU; includes other processes that allocate meanwhile
    gpu_memory_bytes: float | None = None


def measure_cold_starts(model: Model, threads: int, starts: int) -> ColdStart:
    """Return the median times and the largest memory of several starts, each in a new process.

    Files are in the system's cache, because the model was read before. A cold disk takes longer. TensorRT-RTX compiles
    its kernels in every start, whatever earlier runs have kept.
    """
    measured = [start_once(model, threads) for _ in range(starts)]

    def reduce(function: Any, name: str) -> Any:
        values = [getattr(start, name) for start in measured if getattr(start, name) is not None]
        return function(values) if values else None

    times = {name: reduce(statistics.median, name) for name in ("cold_start_ms", "load_ms", "first_call_ms")}
    return ColdStart(**times, **{name: reduce(max, name) for name in ("peak_memory_bytes", "gpu_memory_bytes")})


def start_once(model: Model, threads: int) -> ColdStart:
    """Measure one start; :class:`UserError` if the child fails."""
    from export.tensorrt.kernel_cache import FOLDER_VARIABLE, NO_FOLDER  # the child shall not pay for the import

    memory_before = gpu_memory_used()
    path = str(model.artifact.path.resolve())
    command = [sys.executable, "-m", "benchmarks.latency.cold_start", path, model.backend, str(threads)]
    environment = {**os.environ, FOLDER_VARIABLE: NO_FOLDER}
    start = time.perf_counter()
    # The child waits for its input to end, so that its memory on the GPU can be read.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdin=PIPE, stdout=PIPE, stderr=errors, text=True
        ) as child,
    ):
        assert child.stdout is not None
        line = child.stdout.readline()
        cold_start_ms = 1000 * (time.perf_counter() - start)
        memory_after = gpu_memory_used()
        child.communicate()
        errors.seek(0)
        reason = last_error_line(errors.read())
    if child.returncode or not line.strip():
        raise UserError(f"{model.name}: its start in a new process failed ({reason}). Free memory or pass --starts 0.")
    gpu_memory = None
    if memory_before is not None and memory_after is not None:
        gpu_memory = float(max(0, memory_after - memory_before))
    return ColdStart(cold_start_ms, gpu_memory_bytes=gpu_memory, **json.loads(line))


def last_error_line(errors: str) -> str:
    """Return the error in a process's output; progress lines and most of a traceback are indented."""
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith(" ")]
    return lines[-1] if lines else "no reason given"


def parse_peak_memory(status: str) -> int | None:
    """Return the bytes of ``VmHWM`` in ``/proc/self/status``; ``getrusage`` would inherit the parent's maximum."""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None


def main(path: str, backend: str, threads: str) -> None:
    """Load and run one model once, print its costs, and wait for the end of the input."""
    start = time.perf_counter()
    (model,) = models_of(path, [backend])
    forward = model.open(int(threads))
    loaded = time.perf_counter()
    forward(model.random_input(1))
    end = time.perf_counter()
    memory = parse_peak_memory(_STATUS.read_text(encoding="ascii")) if _STATUS.is_file() else None
    times = {"load_ms": 1000 * (loaded - start), "first_call_ms": 1000 * (end - loaded)}
    print(json.dumps({**times, "peak_memory_bytes": memory}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    from vpr.cli import silence_libraries

    silence_libraries()
    main(*sys.argv[1:])
