"""Errors that the command line prints as one line."""

import difflib
import errno
import os
import re
import traceback
from collections.abc import Collection, Iterable
from multiprocessing import connection

OUT_OF_MEMORY = "there is too little memory"
_MAX_CHARACTERS = 2000
_RERUN = "then rerun the same command: finished work is kept."
# RuntimeErrors of torch.utils.data: from its SIGCHLD handler, or from a queue that stays empty.
_LOST_WORKER = re.compile(
    r"(?:DataLoader worker \(pid[^ ]* [\d, ]+\)|Pin memory thread) (is killed by signal: [\w ]+|exited unexpectedly)"
)
_OUT_OF_MEMORY_TYPES = ("MemoryError", "OutOfMemoryError")  # the second is PyTorch's, for GPUs
# RuntimeErrors of PyTorch: of its allocator on the CPU, and of CUDA and its libraries, which allocate for themselves.
_TORCH_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|CUDA error: out of memory|cudaErrorMemoryAllocation"
    r"|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED"
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Problem that the user can fix. The command line prints it as one line and exits with 2.

    The message names the file or key, the problem and the fix: ``key or file: what is wrong. How to fix it.``
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if len(line) > _MAX_CHARACTERS:
            line = f"{line[: _MAX_CHARACTERS // 2]} ... {line[-_MAX_CHARACTERS // 2 :]}"
        super().__init__(printable(line))


class CheckFailed(Exception):
    """Check that the user requested and that failed. The command line prints it and exits with 1."""


class BudgetExceeded(CheckFailed):
    """Measurement that exceeds the user's budget."""


def check_numbers(config: object, section: str = "", **bounds: tuple[float, float | None]) -> None:
    """Check that numbers of a configuration are within their (smallest, largest) bounds; None for no upper bound.

    ``section`` is the prefix of the fields in a recipe, such as ``loader.``.

    Raises:
        UserError: A number is out of bounds or NaN.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not (low <= value and (high is None or value <= high)):
            expected = f"{low} or more" if high is None else f"{low} to {high}"
            raise UserError(f"{section}{name}: expected {expected}, got {value}.")


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return the known names that are most alike, quoted and separated by commas."""
    matches = difflib.get_close_matches(name, dict.fromkeys(known), count, cutoff=0.0)
    return ", ".join(f"'{match}'" for match in matches)


def check_prefixes(key: str, prefixes: Iterable[str], names: Collection[str]) -> None:
    """Check that each prefix is the beginning of a name.

    Raises:
        UserError: A prefix matches no name; the message has the nearest names.
    """
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"{key}: no layer begins with '{prefix}'. The nearest are {nearest_names(prefix, names)}.")


def printable(text: str) -> str:
    """Replace unprintable characters, so that names read from files cannot control the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def explain_system_error(error: BaseException | None) -> str | None:
    """Return a message for out-of-memory, full-disk and lost-worker errors, however wrapped; else None."""
    while error is not None:
        # safetensors raises an error class that quotes the system error.
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
        if number in _DISK_FULL:
            return f"the disk has no room ({os.strerror(number)}). Free some space, {_RERUN}"
        if lost := _lost_worker(error):
            reason = "it had too little memory, or too little shared memory (in a container: --shm-size)"
            return f"an image-loading worker was lost ({lost}): {reason}. Use fewer workers, {_RERUN}"
        if is_out_of_memory(error):
            summary = ". ".join(str(error).split(". ")[:2])
            details = f" ({summary})" if summary else ""
            return f"{OUT_OF_MEMORY}{details}. Lower the batch size or free some memory, {_RERUN}"
        error = error.__cause__ or error.__context__
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a CPU or GPU has too little memory, also one of CUDA's libraries."""
    return type(error).__name__ in _OUT_OF_MEMORY_TYPES or _TORCH_OUT_OF_MEMORY.search(str(error)) is not None


def _lost_worker(error: BaseException) -> str | None:
    """Return how a DataLoader worker ended, or None for other errors."""
    if match := _LOST_WORKER.match(str(error)):
        return match[1]
    # A worker that ends between announcing a batch and sending it only breaks the connection.
    if isinstance(error, ConnectionError | EOFError):
        *_, innermost = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)] or [""]
        if os.path.dirname(innermost) == os.path.dirname(connection.__file__):
            return "its connection ended"
    return None
