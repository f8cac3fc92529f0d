"""Reference latencies by pyperf, with a process for each worker.

``python -m experiments.latency.pyperf_check ARTIFACT BACKEND THREADS -o FILE`` is a pyperf script.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from export.backends.registry import Model, models_of

_ROOT = Path(__file__).parents[2]
_WARMUPS = 10


def pyperf_median(model: Model, threads: int, processes: int, values: int) -> float:
    """Return the median milliseconds of a call with one image.

    Args:
        model: Model to time.
        threads: Threads of the model.
        processes: Number of processes that pyperf starts, one after another.
        values: Number of timed calls in each process.
    """
    import pyperf

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pyperf.json"
        words = [str(model.artifact.path.resolve()), model.backend, str(threads)]
        # One call for each value: pyperf would otherwise average several calls, and the median of means is no p50.
        options = ["--loops", "1", "--values", str(values), "--processes", str(processes), "--warmups", str(_WARMUPS)]
        command = [
            sys.executable,
            "-m",
            "experiments.latency.pyperf_check",
            *words,
            *options,
            "--quiet",
            "-o",
            str(output),
        ]
        subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
        return 1000 * statistics.median(pyperf.Benchmark.load(str(output)).get_values())


def main() -> None:
    """Run as pyperf's manager, or as one of its workers."""
    import pyperf

    def add_arguments(command: list[str], arguments: argparse.Namespace) -> None:
        command.extend((arguments.path, arguments.backend, arguments.threads))

    runner: Any = pyperf.Runner(add_cmdline_args=add_arguments, program_args=("-m", "experiments.latency.pyperf_check"))
    for name in ("path", "backend", "threads"):
        runner.argparser.add_argument(name)
    arguments = runner.parse_args()
    if not arguments.worker:  # the manager times nothing
        runner.bench_func("embed", int)
        return
    (model,) = models_of(arguments.path, [arguments.backend])
    runner.bench_func("embed", model.open(int(arguments.threads)), model.random_input(1))


if __name__ == "__main__":
    main()
