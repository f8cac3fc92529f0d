"""The process in which atheris fuzzes: ``python -m tests.reliability.fuzz.guided_worker TARGET FOLDER SECONDS ...``.

What follows is libFuzzer's: folders of inputs, of which the first grows, and options (``-merge=1`` keeps of the others
what covers more). FOLDER holds ``told.json``, to which each run adds, and a file for each new fault with its traceback
beside it; after a fault it goes on. It may crash or hang; :mod:`tests.reliability.fuzz.guided` watches it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

if TYPE_CHECKING:  # instrumented when it is imported below
    from tests.reliability.fuzz.targets import Target

_OURS = ["vpr", "calibration", "export", "teacher", "tests.reliability.fuzz.targets"]
_BY_FIELD = 0.5  # share of the mutations by field, of files that have fields
_TELL_EVERY = 1.0  # seconds


class Watched:
    """A target that counts what becomes of its inputs, and keeps those that make a new fault.

    Args:
        target: that is fuzzed.
        folder: for ``told.json`` and the faults.
        seconds: of processor time, all runs together, after which the process ends.
    """

    def __init__(self, target: Target, folder: Path, seconds: float) -> None:
        self._target, self._folder, self._seconds = target, folder, seconds
        self._seen = {path.stem for path in folder.glob("fault-*.txt")}
        before = folder / "told.json"
        self._told = Counter(json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {})
        self._spent_before = self._told["seconds"] - time.process_time()
        self._place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self._due = 0.0

    def run(self, data: bytes) -> None:
        """One input; never raises."""
        from vpr.common.errors import UserError

        try:
            self._target.run(self._place, data)
            self._told["accepted"] += 1
        except UserError:
            self._told["refused"] += 1
        except (Exception, SystemExit) as error:
            self._keep(data, error)
        if time.monotonic() >= self._due:
            self._tell()

    def _keep(self, data: bytes, error: BaseException) -> None:
        """Faults are told apart by their kind and by where in our code they come from."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        ours = [f"{Path(frame.filename).name}:{frame.name}" for frame in frames if "/lib/python" not in frame.filename]
        name = f"fault-{hashlib.sha256(f'{type(error).__name__} {ours}'.encode()).hexdigest()[:12]}"
        if name in self._seen:
            return
        self._seen.add(name)
        (self._folder / name).write_bytes(data)
        (self._folder / f"{name}.txt").write_text("".join(traceback.format_exception(error))[-8000:], errors="replace")

    def _tell(self) -> None:
        spent = self._spent_before + time.process_time()
        told = {"accepted": 0, "refused": 0, **self._told, "seconds": round(spent, 1)}
        partial = self._folder / "told.partial"
        partial.write_text(json.dumps(told), encoding="utf-8")
        os.replace(partial, self._folder / "told.json")
        if spent >= self._seconds:
            os._exit(0)  # libFuzzer's own limit is by the clock, on which other work counts too
        self._due = time.monotonic() + _TELL_EVERY


def main(name: str, folder: Path, seconds: float, options: list[str]) -> None:
    """Fuzz until the time is over; does not return."""
    import numpy as np

    from tests.reliability.fuzz.mutated_files import (
        mutate_file,  # not instrumented: what it does is no coverage of ours
    )

    with atheris.instrument_imports(include=_OURS):
        target: Target = importlib.import_module("tests.reliability.fuzz.targets").TARGETS[name]

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        if target.form and rng.random() < _BY_FIELD:
            try:
                return mutate_file(f"input.{target.form}", data, rng)[1][:longest]
            except Exception:  # it is written for well-formed files, and this is not one any more
                pass
        return atheris.Mutate(data, longest)

    watched = Watched(target, folder, seconds)
    mutator = {"custom_mutator": mutate} if target.form else {}
    atheris.Setup([sys.argv[0], f"-max_len={target.longest}", *options], watched.run, **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
