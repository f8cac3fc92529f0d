from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.commands import COMMANDS, write_inputs
from tests.reliability.offline.offline import (
    _UNSHARE,
    DOWNLOAD,
    SERVE,
    OfflineResult,
    can_unshare_network,
    run_each,
    run_together,
)
from vpr import cli

PAGE = [command for command in COMMANDS if command.verb == SERVE]
DEMO = [command for command in COMMANDS if command.verb == "demo"]
OTHERS = [command for command in COMMANDS if command not in PAGE + DEMO]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OfflineResult]:
    folder = tmp_path_factory.mktemp("offline")
    write_inputs(folder)
    return folder, run_together(OTHERS, folder)


def test_every_verb_has_a_command() -> None:
    assert {command.verb for command in COMMANDS} == set(cli.COMMANDS)
    assert [len(PAGE), len(DEMO)] == [2, 1]


@pytest.mark.reliability
def test_commands_use_no_network(together: tuple[Path, OfflineResult]) -> None:
    """All but the search page, which has its own test, and the demo, which runs the others (make figures runs it)."""
    result = together[1]
    assert (result.code, result.attempts) == (0, ()), result.line


@pytest.mark.reliability
def test_search_page_uses_no_network(together: tuple[Path, OfflineResult]) -> None:
    for result in run_each(PAGE, together[0]):
        assert (result.code, result.attempts, result.line) == (0, (), "server stopped")


@pytest.mark.reliability
def test_each_command_alone_uses_no_network(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    results = list(run_each([*OTHERS, *PAGE], tmp_path))
    assert [result for result in results if not result.has_passed] == []
    (download,) = run_each((DOWNLOAD,), tmp_path)
    assert download.code == 2
    assert [attempt.split()[0] for attempt in download.attempts][0] == "socket.getaddrinfo"


def _run_blocked(code: str, log: Path) -> str:
    """Return the output of Python code with blocked sockets."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "no_network"), "NO_NETWORK_LOG": str(log)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    return process.stdout + process.stderr


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
def test_attempt_is_blocked_and_logged(code: str, attempt: str, tmp_path: Path) -> None:
    assert "no network here" in _run_blocked(code, tmp_path / "log")
    assert attempt in (tmp_path / "log").read_text().splitlines()


def test_hidden_attempt_of_child_is_logged(tmp_path: Path) -> None:
    child = "import socket\ntry:\n    socket.getaddrinfo('vpr.invalid', 80)\nexcept OSError:\n    print('hidden')"
    output = _run_blocked(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", tmp_path / "log"
    )
    assert output == "hidden\n"
    assert (tmp_path / "log").read_text() == "socket.getaddrinfo vpr.invalid\n"


def test_local_addresses_are_open(tmp_path: Path) -> None:
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
    assert _run_blocked(code, tmp_path / "log") == "open\n"
    assert not (tmp_path / "log").exists()


def test_unshared_network_has_loopback_only(tmp_path: Path) -> None:
    if not can_unshare_network():
        pytest.skip("this machine lets no user have a network namespace (unshare --net)")
    process = subprocess.run([*_UNSHARE, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True)
    assert [line.split(":")[0].strip() for line in process.stdout.splitlines()[2:]] == ["lo"]


def test_openvino_telemetry_is_off(tmp_path: Path) -> None:
    """OpenVINO would report each import from a thread, and hide any error."""
    code = """
from vpr.cli import silence_libraries
silence_libraries()
import openvino.tools.ovc.telemetry_utils as telemetry
print(telemetry.tm.__name__)
"""
    assert _run_blocked(code, tmp_path / "log") == "openvino.tools.ovc.telemetry_stub\n"
    assert not (tmp_path / "log").exists()


_SESSION = """
import onnx
from onnx import TensorProto, helper
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("pixels", "embedding")]
graph = helper.make_graph([helper.make_node("Identity", ["pixels"], ["embedding"])], "graph", values[:1], values[1:])
content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
"""
_OURS = "from vpr.inference.onnx_session import open_session; open_session(content)"
_PLAIN = "import onnxruntime; onnxruntime.InferenceSession(content)"


@pytest.mark.parametrize(("opened", "is_reporting"), [(_OURS, False), (_PLAIN, True)])
def test_onnx_runtime_telemetry_is_off(opened: str, is_reporting: bool, tmp_path: Path) -> None:
    """ONNX Runtime would store an identifier of the machine and upload events, as the plain session shows."""
    if is_reporting and not can_unshare_network():
        pytest.skip("this machine lets no user have a network namespace (unshare --net)")
    silenced = {"ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS", "XDG_CACHE_HOME"}
    environment = {key: value for key, value in os.environ.items() if key not in silenced} | {"HOME": str(tmp_path)}
    command = [*(_UNSHARE if is_reporting else ()), sys.executable, "-c", _SESSION + opened]
    subprocess.run(command, env=environment, check=True)
    assert bool(list(tmp_path.rglob("deviceid"))) == is_reporting
