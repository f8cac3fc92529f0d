from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.offline.offline import (
    DOWNLOAD,
    ROAD,
    VerbResult,
    has_network_of_its_own,
    prepare,
    run_each,
    run_together,
    verb_of,
)
from vpr.cli import COMMANDS

PAGE = tuple(one for one in ROAD if one.startswith("search serve"))
DEMO = tuple(one for one in ROAD if one.startswith("demo"))
OTHERS = tuple(one for one in ROAD if one not in PAGE + DEMO)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VerbResult]:
    folder = tmp_path_factory.mktemp("offline")
    prepare(folder)
    return folder, run_together(OTHERS, folder)


def test_every_verb_is_on_the_road() -> None:
    assert {verb_of(command) for command in ROAD} == set(COMMANDS)
    assert [len(PAGE), len(DEMO)] == [1, 1]


@pytest.mark.slow
def test_verbs_reach_no_other_machine(walked: tuple[Path, VerbResult]) -> None:
    """All but the page, which is below, and the demo, which runs the others (make figures runs it too)."""
    told = walked[1]
    assert (told.code, told.attempts) == (0, ()), told.line


@pytest.mark.slow
def test_the_page_reaches_no_other_machine(walked: tuple[Path, VerbResult]) -> None:
    (told,) = run_each(PAGE, walked[0])
    assert (told.code, told.attempts, told.line) == (0, (), "ended")


@pytest.mark.slow
def test_each_verb_alone_reaches_no_other_machine(tmp_path: Path) -> None:
    prepare(tmp_path)
    told = list(run_each(ROAD[: -len(DEMO)], tmp_path))
    assert [one for one in told if not one.passed] == []
    (asked,) = run_each((DOWNLOAD,), tmp_path)
    assert asked.code == 2
    assert [attempt.split()[0] for attempt in asked.attempts][0] == "socket.getaddrinfo"


def _guarded(code: str, log: Path) -> str:
    """What a process with sockets blocked writes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "no_network"), "NO_NETWORK_LOG": str(log)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "attempt"),
    [
        ("import urllib.request as u; u.urlopen('http://vpr.invalid/')", "socket.getaddrinfo vpr.invalid"),
        ("import socket; socket.socket().connect(('192.0.2.1', 80))", "socket.connect 192.0.2.1"),
        ("import socket; socket.gethostbyname('vpr.invalid')", "socket.gethostbyname vpr.invalid"),
        ("import socket; socket.socket(type=2).sendto(b'', ('192.0.2.1', 9))", "socket.sendto 192.0.2.1"),
        ("import socket; socket.socket(10).connect(('2001:db8::1', 80))", "socket.connect 2001:db8::1"),
    ],
)
def test_an_attempt_is_refused_and_written_down(code: str, attempt: str, tmp_path: Path) -> None:
    assert "no network here" in _guarded(code, tmp_path / "log")
    assert attempt in (tmp_path / "log").read_text().splitlines()


def test_an_attempt_of_a_child_that_hides_it_is_written_down(tmp_path: Path) -> None:
    inner = "import socket\ntry:\n    socket.getaddrinfo('vpr.invalid', 80)\nexcept OSError:\n    print('hidden')"
    said = _guarded(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])", tmp_path / "log")
    assert said == "hidden\n"
    assert (tmp_path / "log").read_text() == "socket.getaddrinfo vpr.invalid\n"


def test_this_machine_s_own_addresses_are_open(tmp_path: Path) -> None:
    code = """
import socket, tempfile
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(("localhost", server.getsockname()[1])).close()
with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
    server.bind(f"{folder}/s")
    server.listen()
    socket.socket(socket.AF_UNIX).connect(f"{folder}/s")
print("open")
"""
    assert _guarded(code, tmp_path / "log") == "open\n"
    assert not (tmp_path / "log").exists()


def test_where_a_network_can_be_had_alone_it_has_nothing_but_loopback(tmp_path: Path) -> None:
    from tests.reliability.offline.offline import _ALONE

    if not has_network_of_its_own():
        pytest.skip("this machine lets no user have a network of their own (unshare --net)")
    done = subprocess.run([*_ALONE, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True)
    assert [line.split(":")[0].strip() for line in done.stdout.splitlines()[2:]] == ["lo"]


def test_openvino_says_nothing_of_its_use(tmp_path: Path) -> None:
    """It would tell Google Analytics of each import, from a thread, passing over any error."""
    code = "from vpr.cli import silence_libraries; silence_libraries(); import openvino.tools.ovc.telemetry_utils as t; print(t.tm.__name__)"
    assert _guarded(code, tmp_path / "log") == "openvino.tools.ovc.telemetry_stub\n"
    assert not (tmp_path / "log").exists()
