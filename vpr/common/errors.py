"""The one error that a person sees as a line of text."""

from __future__ import annotations

import errno
import os
import re
import traceback
from multiprocessing import connection

_LONGEST = 2000
_AGAIN = ", then give the same command again: what is done is kept"
# torch.utils.data's RuntimeError, from its handler of SIGCHLD or from the queue that stays empty.
_LOST = re.compile(
    r"(?:DataLoader worker \(pid[^ ]* [\d, ]+\)|Pin memory thread) (is killed by signal: [\w ]+|exited unexpectedly)"
)
_TOO_LITTLE = "it had too little memory, or too little shared memory (of a container: --shm-size)"
OUT_OF_MEMORY = "there is too little memory"
_NO_MEMORY = ("MemoryError", "OutOfMemoryError")  # the second is PyTorch's, of a GPU
_NO_MEMORY_OF_TORCH = "DefaultCPUAllocator: can't allocate memory"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the caller can put right. The command line prints it as one line and exits with 2.

    The message names the file or key at fault and the remedy: ``what is wrong: what to do``.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        super().__init__(printable(line))


def check_numbers(config: object, section: str = "", **bounds: tuple[float, float | None]) -> None:
    """Refuse a number of a configuration that lies outside its bounds, by name.

    Args:
        config: a dataclass.
        section: what its fields are called by in a recipe, such as ``loader.``.
        bounds: least and most of each field; None is without end.
    """
    for name, (least, most) in bounds.items():
        value = getattr(config, name)
        if not (least <= value and (most is None or value <= most)):
            expected = f"{least} or more" if most is None else f"{least} to {most}"
            raise UserError(f"{section}{name}: expected {expected}, got {value}.")


class BudgetExceeded(Exception):
    """What was measured breaks a budget that the caller named. The command line prints it and exits with 1."""


def printable(text: str) -> str:
    """Text whose names come from files: none may steer the terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def explain_system_error(error: BaseException | None) -> str | None:
    """The line for what the machine lacks, whatever a library has made of it; None for other errors."""
    while error is not None:
        # safetensors raises an error of its own, which cites the system's.
        cited = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(cited[1]) if cited else None
        if number in _FULL:
            return f"the disk has no room ({os.strerror(number)}): make room{_AGAIN}"
        if lost := _lost_worker(error):
            return f"a process that reads images was lost ({lost}): {_TOO_LITTLE}: give fewer workers{_AGAIN}"
        if type(error).__name__ in _NO_MEMORY or _NO_MEMORY_OF_TORCH in str(error):
            said = ". ".join(str(error).split(". ")[:2])
            where = f" ({said})" if said else ""
            return f"{OUT_OF_MEMORY}{where}: lower the batch size, or free some{_AGAIN}"
        error = error.__cause__ or error.__context__
    return None


def _lost_worker(error: BaseException) -> str | None:
    """What is known of a DataLoader's process that is gone."""
    if found := _LOST.match(str(error)):
        return found[1]
    # One that ends between its word that a batch is there and the batch itself is told by the connection alone.
    if isinstance(error, ConnectionError | EOFError):
        *_, innermost = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)] or [""]
        if os.path.dirname(innermost) == os.path.dirname(connection.__file__):
            return "its connection ended"
    return None
