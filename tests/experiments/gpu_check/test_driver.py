from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from experiments.gpu_check import driver as checks
from experiments.gpu_check.latency import Skipped


class FakeDriver:
    """Driver that works on the memory of the host; the work of a stream runs when it is synchronised."""

    def __init__(self) -> None:
        self.memory: dict[int, NDArray[np.float32]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.depth = 0
        self.freed = 0

    @contextmanager
    def current(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def stream(self) -> Any:
        return SimpleNamespace(work=[])

    def pinned(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return np.full(shape, np.nan, np.float32)

    def allocate(self, size: int) -> int:
        self.memory[256] = np.full(size // 4, np.nan, np.float32)
        return 256

    def free(self, memory: Any) -> None:
        self.freed += 1

    def copy_in(self, device: int, host: NDArray[np.float32], stream: Any) -> None:
        stream.work.append(lambda: self.memory[device].__setitem__(slice(None), host))

    def copy_out(self, host: NDArray[np.float32], device: int, stream: Any) -> None:
        stream.work.append(lambda: host.__setitem__(slice(None), self.memory[device]))

    def synchronise(self, stream: Any) -> None:
        while stream.work:
            stream.work.pop(0)()

    def capture(self, stream: Any, enqueue: Callable[[], bool]) -> int:
        assert enqueue()
        self.graphs[1], stream.work = stream.work, []
        return 1

    def launch(self, graph: int, stream: Any) -> None:
        stream.work += self.graphs[graph]

    def discard(self, graph: int) -> None:
        del self.graphs[graph]


class TimedDriver(FakeDriver):
    """Driver with events; a copy takes 2 ms."""

    def event(self) -> list[float]:
        return []

    def record(self, event: list[float], stream: Any) -> None:
        event.append(float(len(stream.work)))

    def wait_on_host(self, event: list[float]) -> None:
        assert event

    def milliseconds(self, start: list[float], end: list[float]) -> float:
        return 2 * (end[0] - start[0])


class EagerCapture(FakeDriver):
    """Driver that runs the work while it captures it."""

    def capture(self, stream: Any, enqueue: Callable[[], bool]) -> int:
        graph = super().capture(stream, enqueue)
        for job in self.graphs[graph]:
            job()
        return graph


class LostReplay(FakeDriver):
    """Driver whose graphs do nothing."""

    def launch(self, graph: int, stream: Any) -> None:
        pass


class LostCopy(FakeDriver):
    """Driver that copies nothing back."""

    def copy_out(self, host: NDArray[np.float32], device: int, stream: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_VALUES", 1000)


def test_working_driver_passes() -> None:
    driver = TimedDriver()
    assert checks.copy_pinned(driver) == checks.copy_in_thread(driver) == checks.replay_captured_copy(driver) == []
    (bandwidth,) = checks.time_by_events(driver)
    assert bandwidth.value == pytest.approx(4000 / 2 / 1e6)
    assert driver.depth == 0
    assert driver.freed == 4 * 3
    assert driver.graphs == {}


def test_missing_events_are_skipped() -> None:
    with pytest.raises(Skipped, match="no events"):
        checks.time_by_events(FakeDriver())


@pytest.mark.parametrize(
    ("driver", "check"),
    [
        (LostCopy(), checks.copy_pinned),
        (LostCopy(), checks.copy_in_thread),
        (EagerCapture(), checks.replay_captured_copy),
        (LostReplay(), checks.replay_captured_copy),
    ],
)
def test_broken_driver_fails(driver: FakeDriver, check: Callable[[Any], Any]) -> None:
    with pytest.raises(AssertionError):
        check(driver)


def test_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks._CLASSES, "pycuda", (("export.tensorrt.no_such_driver",), "PyCudaDriver"))
    with pytest.raises(Skipped, match="the toolkit has no driver by pycuda"):
        checks.open_driver("pycuda")
