"""A model in a process of its own: how long the first embedding takes, and the memory of that model alone.

``python -m benchmarks.latency.cold_start ARTIFACT BACKEND THREADS`` is the child; it prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from export.backends.registry import Model, models_of
from vpr.common.errors import UserError
from vpr.common.hardware import gpu_memory_used, read_gpus

_ROOT = Path(__file__).parents[2]
_STATUS = Path("/proc/self/status")


def measure_cold_starts(model: Model, threads: int, times: int) -> dict[str, Any]:
    """Start a model so many times in processes of their own; None for everything where that is 0.

    Files are in the system's cache, since the model was read before: that of a cold disk comes on top.

    Returns:
        medians of ``cold_start_ms`` (from the start of Python to the first embedding), ``load_ms`` (artifact to a
        model that is ready, with the imports of its runtime) and ``first_call_ms`` (one image); the largest
        ``peak_memory_bytes`` (resident, from start to that embedding) and ``gpu_memory_bytes`` (what the GPUs hold
        more than before; another process that allocates meanwhile is counted in).
    """
    seen = [start_once(model, threads) for _ in range(times)]
    taken = {key: _of(statistics.median, seen, key) for key in ("cold_start_ms", "load_ms", "first_call_ms")}
    return {**taken, **{key: _of(max, seen, key) for key in ("peak_memory_bytes", "gpu_memory_bytes")}}


def start_once(model: Model, threads: int) -> dict[str, float | None]:
    """One start; the keys of :func:`measure_cold_starts`.

    Raises:
        UserError: the child fails.
    """
    has_gpu = bool(read_gpus()[0])
    before = gpu_memory_used() if has_gpu else None
    path = str(model.artifact.path.resolve())
    command = [sys.executable, "-m", "benchmarks.latency.cold_start", path, model.backend, str(threads)]
    begun = time.perf_counter()
    # The child waits for its input to end, so that its memory on the GPU can be seen.
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        assert child.stdout is not None
        line = child.stdout.readline()
        cold = 1000 * (time.perf_counter() - begun)
        after = gpu_memory_used() if has_gpu else None
        child.communicate()
        errors.seek(0)
        last = last_words(errors.read())
    if child.returncode or not line.strip():
        raise UserError(f"{model.name}: fails in a process of its own ({last}): free some memory, or give --starts 0")
    held = None if before is None or after is None else float(max(0, after - before))
    return {"cold_start_ms": cold, **json.loads(line), "gpu_memory_bytes": held}


def last_words(errors: str) -> str:
    """Why a process failed, of all that it printed: what is said on the way is indented, as most of a traceback is."""
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith(" ")]
    return lines[-1] if lines else "no reason given"


def peak_memory(status: str) -> int | None:
    """Bytes of ``VmHWM`` in the text of ``/proc/self/status``.

    Not ``getrusage``: its maximum is inherited from the process that started this one.
    """
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None


def main(path: str, backend: str, threads: str) -> None:
    """Load and run one model once, print what it took, and wait for the end of the input."""
    begun = time.perf_counter()
    (model,) = models_of(path, [backend])
    forward = model.open(int(threads))
    loaded = time.perf_counter()
    forward(model.random_input(1))
    done = time.perf_counter()
    memory = peak_memory(_STATUS.read_text(encoding="ascii")) if _STATUS.is_file() else None
    taken = {"load_ms": 1000 * (loaded - begun), "first_call_ms": 1000 * (done - loaded)}
    print(json.dumps({**taken, "peak_memory_bytes": memory}), flush=True)
    sys.stdin.read()


def _of(choose: Any, seen: list[dict[str, float | None]], key: str) -> float | None:
    values = [one[key] for one in seen if one[key] is not None]
    return choose(values) if values else None


if __name__ == "__main__":
    from vpr.cli import silence_libraries

    silence_libraries()
    main(*sys.argv[1:])
