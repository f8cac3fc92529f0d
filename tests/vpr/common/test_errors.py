from __future__ import annotations

import errno
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from vpr.common.errors import UserError, explain_system_error


def test_what_a_file_names_cannot_steer_the_terminal() -> None:
    line = str(UserError("card.json: key 'a\x1b[31m\r\n\u202eb\ud800': not known: make it again"))
    assert line == "card.json: key 'a\ufffd[31m \ufffdb\ufffd': not known: make it again"
    assert line.isprintable()


def test_a_line_keeps_its_beginning_and_its_remedy() -> None:
    line = str(UserError(f"card.json: key '{'n' * 100_000}': not known: make it again"))
    assert len(line) < 2100
    assert line.startswith("card.json: key 'nnn")
    assert line.endswith("nnn': not known: make it again")


def test_a_full_disk_is_seen_behind_a_library_s_own_error() -> None:
    assert explain_system_error(RuntimeError("I/O error: No space left on device (os error 28)"))
    behind = ValueError("cannot write the table")
    behind.__cause__ = OSError(errno.EDQUOT, "of this user")
    assert "Disk quota exceeded" in str(explain_system_error(behind))
    assert explain_system_error(OSError(errno.ENOENT, "no file")) is None


class Fatal:
    """Rows that end the process which reads them."""

    def __init__(self, sign: signal.Signals) -> None:
        self._sign = sign

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> int:
        if row == 2 and get_worker_info():
            os.kill(os.getpid(), self._sign)
        return row


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # torch learns of it by a signal, or looks now and then
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGBUS])
def test_a_lost_worker_is_told_in_a_line(sign: signal.Signals, method: str) -> None:
    """As the system kills one where memory runs out, or where a container's shared memory is too small."""
    with pytest.raises((RuntimeError, ConnectionError, EOFError)) as raised:  # as it happens
        list(DataLoader(Fatal(sign), num_workers=1, multiprocessing_context=method))  # type: ignore[arg-type]
    assert "a process that reads images was lost (" in str(explain_system_error(raised.value))


def test_a_lost_worker_is_told_where_its_batches_go_to_a_gpu() -> None:
    assert "was lost (exited unexpectedly)" in str(
        explain_system_error(RuntimeError("Pin memory thread exited unexpectedly"))
    )
    assert explain_system_error(ConnectionResetError(errno.ECONNRESET, "by a server")) is None
    killed = RuntimeError("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that ...")
    assert "was lost (is killed by signal: Bus error): it had too little" in str(explain_system_error(killed))


def test_too_little_memory_is_told_in_a_line() -> None:
    long = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB): lower the batch" in str(
        explain_system_error(torch.OutOfMemoryError(long))
    )
    with pytest.raises(MemoryError) as raised:
        bytearray(1 << 62)
    assert "memory: lower the batch" in str(explain_system_error(raised.value))
    with pytest.raises(RuntimeError) as raised_by_torch:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "there is too little memory (" in str(explain_system_error(raised_by_torch.value))
    assert explain_system_error(RuntimeError("a fault of ours")) is None
