"""Worker that runs commands at the limits of their options: ``python -m tests.reliability.limits.worker FOLDER``.

:mod:`tests.reliability.limits.sweep` sends it the numbers of the cases (:mod:`tests.reliability.case_process`).
"""

from __future__ import annotations

import shutil
import sys
import traceback
from contextlib import chdir
from pathlib import Path
from typing import Any

from tests.reliability.case_process import limit_memory, open_results, serve_cases
from tests.reliability.commands import paths_in
from tests.reliability.limits.options import LimitCase, cases
from vpr import cli


def run_case(folder: Path, case: LimitCase) -> dict[str, Any]:
    """Run a case in an empty folder, as the command line does.

    Args:
        folder: Folder of the inputs, with the output of each command.
        case: Case to run.

    Returns:
        ``outcome`` (``accepted``, ``rejected`` or ``exception``) and ``line``, which describes an exception.
    """
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    words = case.command.words(paths_in(folder), str(work / case.command.output) if case.command.output else "")
    try:
        with chdir(work):
            cli.main([*words, *case.flag])
    except SystemExit as end:
        return {"outcome": "rejected" if end.code in (1, 2) else "exception", "line": f"exit code {end.code}"}
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [
            f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "site-packages" not in frame.filename
        ]
        return {"outcome": "exception", "line": f"{type(error).__name__}: {str(error)[:300]} at {' '.join(lines[-3:])}"}
    return {"outcome": "accepted", "line": ""}


def main(folder: Path) -> None:
    """Run the cases of the input until it ends."""
    results = open_results()
    cli.silence_libraries()
    import torch  # noqa: F401 (its size does not count for the limit)

    limit_memory()
    serve_cases(lambda number: run_case(folder, cases()[number]), results)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
