"""One model timed by pyperf instead of by us, each worker a process of its own: what our milliseconds are held against.

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
    """Median milliseconds of a call with one image.

    Args:
        model: what is timed.
        threads: of it.
        processes: that pyperf starts, one after another.
        values: calls timed in each.
    """
    import pyperf

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pyperf.json"
        words = [str(model.artifact.path.resolve()), model.backend, str(threads)]
        # One call a value: pyperf would else give means of several, whose median is no p50 of calls.
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
    """Run as pyperf's manager or, started by it, as a worker."""
    import pyperf

    def pass_on(command: list[str], arguments: argparse.Namespace) -> None:
        command.extend((arguments.path, arguments.backend, arguments.threads))

    runner: Any = pyperf.Runner(add_cmdline_args=pass_on, program_args=("-m", "experiments.latency.pyperf_check"))
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
