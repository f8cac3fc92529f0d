"""Worker process of atheris: ``python -m tests.reliability.fuzz.guided_worker TARGET FOLDER SECONDS ...``.

Further arguments go to libFuzzer: folders of inputs, the first of which grows, and options. FOLDER holds
``counts.json``, to which each run adds, and each new fault with its traceback in a ``.txt`` file. Fuzzing continues
after a fault. The process may crash or hang; :mod:`tests.reliability.fuzz.guided` watches it.
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

if TYPE_CHECKING:  # main() imports and instruments it
    from tests.reliability.fuzz.targets import Target

_INSTRUMENTED = ["vpr", "calibration", "export", "teacher", "tests.reliability.fuzz.targets"]
_SHARE_BY_FIELD = 0.5  # share of the mutations by field, for files with fields
_WRITE_SECONDS = 1.0  # interval between writes of the counts


class CountedTarget:
    """Target that counts the outcomes of its inputs, and stores inputs with a new fault.

    Args:
        target: Target to fuzz.
        folder: Folder of ``counts.json`` and the faults.
        seconds: Processor time over all runs, after which the process ends.
    """

    def __init__(self, target: Target, folder: Path, seconds: float) -> None:
        self._target, self._folder, self._seconds = target, folder, seconds
        self._known_faults = {path.stem for path in folder.glob("fault-*.txt")}
        before = folder / "counts.json"
        self._counts = Counter(json.loads(before.read_text(encoding="utf-8")) if before.is_file() else {})
        self._spent_before = self._counts["seconds"] - time.process_time()
        self._temporary = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self._next_write = 0.0

    def run(self, data: bytes) -> None:
        """Run one input; raises nothing."""
        from vpr.common.errors import UserError

        try:
            self._target.run(self._temporary, data)
            self._counts["accepted"] += 1
        except UserError:
            self._counts["rejected"] += 1
        except (Exception, SystemExit) as error:
            self._store(data, error)
        if time.monotonic() >= self._next_write:
            self._write()

    def _store(self, data: bytes, error: BaseException) -> None:
        """Store the input of a fault; faults are distinguished by exception class and by the project's frames."""
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        names = [f"{Path(frame.filename).name}:{frame.name}" for frame in frames if "/lib/python" not in frame.filename]
        name = f"fault-{hashlib.sha256(f'{type(error).__name__} {names}'.encode()).hexdigest()[:12]}"
        if name in self._known_faults:
            return
        self._known_faults.add(name)
        (self._folder / name).write_bytes(data)
        (self._folder / f"{name}.txt").write_text("".join(traceback.format_exception(error))[-8000:], errors="replace")

    def _write(self) -> None:
        spent = self._spent_before + time.process_time()
        counts = {"accepted": 0, "rejected": 0, **self._counts, "seconds": round(spent, 1)}
        partial = self._folder / "counts.partial"
        partial.write_text(json.dumps(counts), encoding="utf-8")
        os.replace(partial, self._folder / "counts.json")
        if spent >= self._seconds:
            os._exit(0)  # libFuzzer's limit counts clock time, also that of other processes
        self._next_write = time.monotonic() + _WRITE_SECONDS


def main(name: str, folder: Path, seconds: float, options: list[str]) -> None:
    """Fuzz until the time is over; this does not return."""
    import numpy as np

    from tests.reliability.fuzz.mutated_files import (
        mutate_file,  # not instrumented: its coverage does not count
    )

    with atheris.instrument_imports(include=_INSTRUMENTED):
        target: Target = importlib.import_module("tests.reliability.fuzz.targets").TARGETS[name]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        if target.suffix and rng.random() < _SHARE_BY_FIELD:
            try:
                return mutate_file(f"input.{target.suffix}", data, rng)[1][:max_size]
            except Exception:  # mutate_file expects a well-formed file; earlier mutations may have broken it
                pass
        return atheris.Mutate(data, max_size)

    counted = CountedTarget(target, folder, seconds)
    mutator = {"custom_mutator": mutate} if target.suffix else {}
    atheris.Setup([sys.argv[0], f"-max_len={target.max_size}", *options], counted.run, **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
