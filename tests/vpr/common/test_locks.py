from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vpr.common.errors import UserError
from vpr.common.locks import file_lock

HOLDER = """
import os, sys, time
from pathlib import Path
from vpr.common.locks import file_lock
with file_lock(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""
WAITER = """
import sys
from pathlib import Path
from vpr.common.locks import file_lock
with file_lock(Path(sys.argv[1])):
    print(1)
"""


def test_lock_is_exclusive_and_ends_with_a_kill(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        forked = int(holder.stdout.readline())
        with pytest.raises(UserError, match="^in use: wait$"), file_lock(lock, "in use: wait"):
            pass
        holder.kill()
        holder.wait()
        with file_lock(lock, "in use: wait"):  # the forked child is still running
            assert lock.exists()
        assert not lock.exists()
        os.kill(forked, signal.SIGKILL)


def test_lock_file_removed_during_the_wait_is_ignored(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with file_lock(lock):
        waiter = subprocess.Popen([sys.executable, "-c", WAITER, str(lock)], stdout=subprocess.PIPE, text=True)
        while len(list(Path(f"/proc/{waiter.pid}/fd").glob("*"))) < 4:  # until it has opened the file
            assert waiter.poll() is None
        lock.unlink()
    assert waiter.communicate(timeout=60)[0] == "1\n"
    assert not lock.exists()
