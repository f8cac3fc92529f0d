from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
import sys
import numpy as np
from vpr.common.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(6):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(25_000_000, np.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _count_faults(setting: str) -> int:
    """Return the page faults of four arrays of 25 MB that are freed in turn."""
    done = subprocess.run([sys.executable, "-c", _FAULTS, setting], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert _count_faults("keep") < 1000
