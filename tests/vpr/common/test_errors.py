from __future__ import annotations

import errno
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from vpr.common.errors import UserError, explain_system_error, is_out_of_memory, nearest_names


def test_control_characters_are_replaced() -> None:
    line = str(UserError("card.json: key 'a\x1b[31m\r\n\u202eb\ud800': not known. Rerun it."))
    assert line == "card.json: key 'a\ufffd[31m \ufffdb\ufffd': not known. Rerun it."
    assert line.isprintable()


def test_long_messages_keep_beginning_and_end() -> None:
    line = str(UserError(f"card.json: key '{'n' * 100_000}': not known. Rerun it."))
    assert len(line) < 2100
    assert line.startswith("card.json: key 'nnn")
    assert line.endswith("nnn': not known. Rerun it.")


def test_full_disk_is_found_in_wrapped_errors() -> None:
    assert explain_system_error(RuntimeError("I/O error: No space left on device (os error 28)"))
    wrapped = ValueError("cannot write the table")
    wrapped.__cause__ = OSError(errno.EDQUOT, "of this user")
    assert "Disk quota exceeded" in str(explain_system_error(wrapped))
    assert explain_system_error(OSError(errno.ENOENT, "no file")) is None


class KillingDataset:
    """Dataset that kills the worker that reads its third row."""

    def __init__(self, signal_number: signal.Signals) -> None:
        self._signal = signal_number

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> int:
        if row == 2 and get_worker_info():
            os.kill(os.getpid(), self._signal)
        return row


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # torch notices by SIGCHLD, or by polling
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGBUS])
def test_killed_worker_is_explained(signal_number: signal.Signals, method: str) -> None:
    """The system sends these signals when memory or shared memory runs out."""
    with pytest.raises((RuntimeError, ConnectionError, EOFError)) as raised:  # depends on the timing
        list(DataLoader(KillingDataset(signal_number), num_workers=1, multiprocessing_context=method))  # type: ignore[arg-type]
    assert "an image-loading worker was lost (" in str(explain_system_error(raised.value))


def test_lost_pin_memory_thread_is_explained() -> None:
    assert "was lost (exited unexpectedly)" in str(
        explain_system_error(RuntimeError("Pin memory thread exited unexpectedly"))
    )
    assert explain_system_error(ConnectionResetError(errno.ECONNRESET, "by a server")) is None
    killed = RuntimeError("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that ...")
    assert "was lost (is killed by signal: Bus error): it had too little" in str(explain_system_error(killed))


def test_out_of_memory_is_explained() -> None:
    long = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB). Lower the batch" in str(
        explain_system_error(torch.OutOfMemoryError(long))
    )
    with pytest.raises(MemoryError) as raised:
        bytearray(1 << 62)
    assert "memory. Lower the batch" in str(explain_system_error(raised.value))
    with pytest.raises(RuntimeError) as torch_raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "there is too little memory (" in str(explain_system_error(torch_raised.value))
    assert explain_system_error(RuntimeError("a bug")) is None


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_libraries_of_cuda_run_out_of_memory_by_other_errors(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert "there is too little memory (" in str(explain_system_error(RuntimeError(message)))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_nearest_names_are_listed_once() -> None:
    assert nearest_names("p5", iter(["p9", "p9", "q", "p9"]), 2) == "'p9', 'q'"
