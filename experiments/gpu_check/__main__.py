"""Check a GPU within nine minutes: drivers, training steps, latencies and engines, the most valuable ones first.

Each part runs in its own process, within its share of the time, and records its results in ``docs/results/gpu.json`` as
soon as it has them. A part that fails, hangs or lacks a package does not stop the others. ``--rehearse`` runs the parts
that a CPU can run, at a small size. ``--wheels`` lists the packages for a machine without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command import check_minimums, run_command
from experiments.figures import RESULTS, Figure, Row, markdown, record
from experiments.gpu_check.wheels import wheel_rows
from vpr.common.log import get_logger

log = get_logger(__name__)

_MODULE = "experiments.gpu_check"


@dataclass(frozen=True)
class GpuCheckConfig:
    """Check of a GPU.

    Attributes:
        parts: Parts to run, all if empty.
        seconds: Time of all parts together.
        rehearse: Run on the CPU, at a small size.
        output: Folder of ``gpu.json``; empty is docs/results for a GPU, and records nothing without one.
        wheels: List the packages to bring to a machine that has PyTorch but no network, and stop.
    """

    parts: tuple[str, ...] = ()
    seconds: int = 540
    rehearse: bool = False
    output: str = ""
    wheels: bool = False

    def __post_init__(self) -> None:
        check_minimums(self, {"seconds": 10})


def check_gpu(config: GpuCheckConfig) -> bool:
    """Run the parts, record and print their outcomes, and return whether one failed."""
    if config.wheels:
        print(markdown(wheel_rows()))
        return False
    import torch

    from experiments.gpu_check.run_parts import run_parts

    # The recorded figures and their environment are those of a GPU.
    is_kept = config.output or (torch.cuda.is_available() and not config.rehearse)
    folder = Path(config.output or RESULTS) if is_kept else None

    def keep(figures: list[Figure], tables: dict[str, list[Row]]) -> None:
        if folder is not None:
            record("gpu", figures, tables, folder)

    outcomes = run_parts(config.parts, config.seconds, config.rehearse, keep)
    print(markdown(outcomes))
    if folder is not None:
        log.info(f"results: {folder / 'gpu.json'}")
    return any(str(row["outcome"]).startswith("failed") for row in outcomes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the GPU of this machine."""
    run_command(_MODULE, __doc__, GpuCheckConfig, check_gpu, arguments)


if __name__ == "__main__":
    main()
