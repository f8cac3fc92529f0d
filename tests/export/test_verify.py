from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.serving.clients import COMBINED, WRONG
from experiments.serving.verify_table import ClientModel, name_mistakes, right_clients, serve_page
from export.config import OnnxConfig
from export.diagnosis import PipelineVectors, diagnose
from export.to_onnx import export_onnx
from export.verify import verify
from export.verify_config import VerifyConfig
from vpr.artifacts.store import load_artifact
from vpr.cli import main
from vpr.common.errors import CheckFailed, UserError
from vpr.data.catalog import Catalog


@pytest.fixture(scope="module")
def graph(student_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(OnnxConfig(str(student_artifact), str(tmp_path_factory.mktemp("verify") / "fp32"), images=1))


@pytest.fixture(scope="module")
def model(graph: Path) -> ClientModel:
    return ClientModel(load_artifact(graph))


@pytest.fixture
def save(tmp_path: Path) -> Callable[[np.ndarray], str]:
    """Save a client's vectors and return the path."""

    def write(vectors: np.ndarray) -> str:
        np.save(tmp_path / "client.npy", vectors)
        return str(tmp_path / "client.npy")

    return write


def catalog_of(catalog: Catalog) -> Path:
    assert catalog.artifact is not None
    return catalog.artifact.path


def test_mistakes_are_named_without_false_alarms(model: ClientModel, catalog: Catalog) -> None:
    right = right_clients(model, catalog_of(catalog))
    rows = name_mistakes(model, right)
    failed = {row["client"]: row["named"] for row in rows if row["right"] != "yes"}
    assert not set(failed) & set(right), failed
    assert len(WRONG) >= 16
    assert len(set(failed) & set(WRONG)) <= len(WRONG) // 8, failed
    assert not set(failed) & set(COMBINED), failed


def test_command_names_the_departing_step(
    graph: Path, model: ClientModel, save: Callable[[np.ndarray], str], capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = save(model.embed(WRONG["reads with OpenCV (BGR)"][0]))
    with pytest.raises(SystemExit) as caught:
        main(["export", "verify", "--artifact", str(graph), "--vectors", vectors])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "departs from" in printed.err
    assert "in colour (BGR instead of RGB, as by cv2.imread()), lowest cosine 0." in printed.err
    assert "1-jpeg-420.jpg" in printed.out


def test_agreeing_client_passes(
    graph: Path, model: ClientModel, save: Callable[[np.ndarray], str], capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = save(3 * model.golden.embeddings.astype(np.float64))
    main(["export", "verify", "--artifact", str(graph), "--vectors", vectors, "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["is_normalised"] is False
    assert result["cosines"] == pytest.approx(dict.fromkeys(model.golden.images, 1.0))
    assert "not of length 1" in printed.err


def test_order_of_the_rows_is_named(graph: Path, model: ClientModel, save: Callable[[np.ndarray], str]) -> None:
    with pytest.raises(CheckFailed, match=r"departs from .* in order \(the rows are not in the order"):
        verify(VerifyConfig(str(graph), save(model.golden.embeddings[::-1])))


def test_unknown_difference_is_not_explained(
    graph: Path, model: ClientModel, save: Callable[[np.ndarray], str]
) -> None:
    noise = np.random.default_rng(0).normal(size=model.golden.embeddings.shape)
    with pytest.raises(CheckFailed, match="no known pipeline explains it"):
        verify(VerifyConfig(str(graph), save(noise)))


def test_small_noise_agrees(model: ClientModel) -> None:
    noise = np.random.default_rng(0).normal(size=model.golden.embeddings.shape) * 3e-3
    noisy = model.golden.embeddings + noise.astype(np.float32)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    assert diagnose(model.golden, noisy, PipelineVectors(model.golden, model.preprocess, model.run)).agrees


def test_without_a_model_the_step_is_not_searched(model: ClientModel) -> None:
    wrong = model.embed(WRONG["passes 0…255"][0])
    diagnosis = diagnose(model.golden, wrong, None)
    assert not diagnosis.agrees
    assert not diagnosis.pipeline.departures


def test_page_agrees_and_another_model_is_rejected(graph: Path, student_artifact: Path, catalog: Catalog) -> None:
    with serve_page(graph, catalog_of(catalog)) as url:
        assert min(verify(VerifyConfig(str(graph), endpoint=url)).cosines.values()) > 0.9999
    with (
        serve_page(student_artifact, catalog_of(catalog)) as url,
        pytest.raises(UserError, match=r"serves student \(torch\), not .*fp32\. Start it with --models"),
    ):
        verify(VerifyConfig(str(graph), endpoint=url))


@contextmanager
def answering(answer: Callable[[str, dict[str, str], bytes], Any]) -> Iterator[str]:
    """Serve a function of path, headers and body; an answer of bytes is sent as it is, others as JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            result = answer(self.path, dict(self.headers), body)
            content = result if isinstance(result, bytes) else json.dumps(result).encode()
            self.send_response(200 if result is not None else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("datatype", ["BYTES", "FP32"])
def test_kserve_endpoint_gets_files_or_inputs(graph: Path, model: ClientModel, datatype: str) -> None:
    files = list(model.golden.images.values())

    def answer(path: str, headers: dict[str, str], body: bytes) -> Any:
        if path == "/v2/models/shop":
            return {
                "inputs": [{"name": "image", "datatype": datatype, "shape": [-1, 1]}],
                "outputs": [{"name": "embedding", "datatype": "FP32", "shape": [-1, 32]}],
            }
        assert path == "/v2/models/shop/infer"
        length = int(headers["Inference-Header-Content-Length"])
        head, content = json.loads(body[:length]), body[length:]
        (tensor,) = head["inputs"]
        assert (tensor["name"], tensor["datatype"]) == ("image", datatype)
        assert tensor["parameters"]["binary_data_size"] == len(content)
        assert head["outputs"] == [{"name": "embedding", "parameters": {"binary_data": False}}]
        if datatype == "BYTES":
            assert tensor["shape"] == [1, 1]
            assert int.from_bytes(content[:4], "little") == len(content) - 4
            vector = model.golden.embeddings[files.index(content[4:])]
        else:
            inputs = np.frombuffer(content, "<f4").reshape(tensor["shape"])
            vector = model.run(inputs)[0]
        return {"outputs": [{"name": "embedding", "shape": [1, 32], "datatype": "FP32", "data": vector.tolist()}]}

    with answering(answer) as url:
        agreement = verify(VerifyConfig(str(graph), endpoint=f"{url}/v2/models/shop"))
    assert min(agreement.cosines.values()) > 0.9999


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"endpoint: http://.* answered 404 to /embed \(null\)\. Check the address"),
        (b"<html>", "answered with no embedding"),
        ([1], "answered with no embedding"),
        ({"models": []}, "answered with no embedding"),
        ({"models": [{"sha256": "x", "name": "other", "embedding": [1]}]}, "serves other, not"),
        (
            {"models": [{"sha256": "SHA", "name": "a", "embedding": [1, 2]}]},
            r"expected vectors of 32 numbers .* got \(2,\)",
        ),
        ({"models": [{"sha256": "SHA", "name": "a", "embedding": ["a"]}]}, "vectors that are no numbers"),
        ({"models": [{"sha256": "SHA", "name": "a", "embedding": [0] * 32}]}, "a vector is zero or not finite"),
        ({"models": [{"sha256": "SHA", "name": "a", "embedding": [np.nan] * 32}]}, "a vector is zero or not finite"),
        ({"models": [{"sha256": "SHA", "name": "a", "embedding": [None] * 32}]}, "a vector is zero or not finite"),
    ],
)
def test_wrong_answers_are_one_line(graph: Path, answer: Any, message: str) -> None:
    text = json.dumps(answer) if not isinstance(answer, bytes) else ""
    answer = json.loads(text.replace("SHA", load_artifact(graph).sha256)) if text else answer
    with answering(lambda path, headers, body: answer) as url, pytest.raises(UserError, match=message):
        verify(VerifyConfig(str(graph), endpoint=url))


def test_model_of_half_precision_inputs_is_one_line(graph: Path) -> None:
    spec = {"inputs": [{"name": "pixels", "datatype": "FP16"}], "outputs": [{"name": "embedding"}]}
    message = r"/v2/models/shop takes FP16, expected image files \(BYTES\) or FP32 inputs"
    with answering(lambda path, headers, body: spec) as url, pytest.raises(UserError, match=message):
        verify(VerifyConfig(str(graph), endpoint=f"{url}/v2/models/shop"))


def test_slow_answer_ends_at_the_deadline(graph: Path) -> None:
    """A byte before each timeout of the socket would otherwise keep the client waiting."""
    stopped = threading.Event()

    class Dripping(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            with suppress(OSError):
                while not stopped.wait(0.1):
                    self.wfile.write(b" ")

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=r"does not answer \(timed out\)"):
            verify(VerifyConfig(str(graph), endpoint=url, seconds=0.5))
        stopped.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "vectors, endpoint: neither is set"),
        (["--vectors", "a.npy", "--endpoint", "http://x"], "vectors, endpoint: both are set"),
        (["--endpoint", "https://x"], "endpoint: expected an address such as http://127.0.0.1:8000, got 'https://x'"),
        (["--endpoint", "http://127.0.0.1:1", "--seconds", "5"], "endpoint: http://127.0.0.1:1 does not answer ("),
        (["--endpoint", "http://127.0.0.1:notaport"], "endpoint: expected an address such as"),
        (["--endpoint", "http://[foo"], "endpoint: expected an address such as"),
        (["--endpoint", "http://:8000"], "endpoint: expected an address such as"),
        (["--endpoint", "http://127.0.0.1:1", "--seconds", "0"], "seconds: expected more than 0"),
        (["--vectors", "missing.npy"], "vectors: missing.npy is no .npy file of numbers (not a plain file"),
        (["--vectors", "SHAPE"], "vectors: expected (8, 32) for the 8 images in"),
        (["--vectors", "TEXT"], "is no .npy file of numbers ("),
        (["--vectors", "OBJECTS"], "is no .npy file of numbers ("),
        (["--vectors", "NAN"], "a vector is zero or not finite"),
    ],
)
def test_bad_input_is_one_line(
    graph: Path, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "shape.npy", np.ones((8, 31)))
    np.save(tmp_path / "nan.npy", np.full((8, 32), np.nan))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("0.1, 0.2")
    names = {name.upper(): str(tmp_path / f"{name}.npy") for name in ("shape", "nan", "objects", "text")}
    with pytest.raises(SystemExit) as caught:
        main(["export", "verify", "--artifact", str(graph), *[names.get(flag, flag) for flag in flags]])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
