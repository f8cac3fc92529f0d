"""Running time of a process, without the time in which it was suspended."""

from __future__ import annotations

import threading
import time

_TICK = 0.5  # seconds between two readings of the clock
_MAX_TICK = 5.0  # seconds; a longer gap between two readings is a suspension


class RunningClock:
    """Seconds that this process ran, busy or not: a thread reads the clock, and longer gaps are suspensions."""

    def __init__(self) -> None:
        # Counted seconds and the time of that reading; a single tuple keeps them consistent.
        self._state = (0.0, time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_clock, daemon=True)

    def __enter__(self) -> RunningClock:
        self._state = (0.0, time.monotonic())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Seconds until now."""
        counted, before = self._state
        return counted + min(time.monotonic() - before, _MAX_TICK)

    def _read_clock(self) -> None:
        while not self._stop.wait(_TICK):
            self._state = (self.seconds, time.monotonic())
