"""How long a process ran, without the time in which it was stopped."""

from __future__ import annotations

import threading
import time

_TICK, _LATE = 0.5, 5.0  # seconds between looks at the clock, and the most that lie between two where the process runs


class RunningClock:
    """Seconds that this process ran, busy or not: a thread looks at the clock, and longer gaps are a stop's."""

    def __init__(self) -> None:
        self._state = (
            0.0,
            time.monotonic(),
        )  # seconds counted so far, and when; one tuple, so that both are of one look
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> RunningClock:
        self._state = (0.0, time.monotonic())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Until now."""
        counted, before = self._state
        return counted + min(time.monotonic() - before, _LATE)

    def _look(self) -> None:
        while not self._ended.wait(_TICK):
            self._state = (self.seconds, time.monotonic())
