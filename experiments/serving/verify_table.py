"""Clients that ``vpr export verify`` has to accept, and clients with a mistake that it has to name."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import export
from app.search_page.images import GalleryImages
from app.search_page.lookup import load_searchers
from app.search_page.server import make_app
from app.search_page.upload_limits import ADDRESS, make_server
from experiments.figures import Figure, Row
from experiments.serving.clients import COMBINED, TEN_LINES, TENSORS, WRONG, Client
from experiments.serving.triton_model import PythonModel
from export.backends.registry import default_threads, models_of
from export.diagnosis import PipelineVectors, diagnose
from export.endpoint import embed_by_endpoint
from export.golden import load_golden, model_inputs
from export.triton import Scheduling, preprocess_config, to_text
from vpr.artifacts.store import Artifact, load_artifact
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.embeddings import l2_normalize

Vectors = NDArray[np.float32]


class ClientModel:
    """A graph that clients without this toolkit run with ONNX Runtime."""

    def __init__(self, artifact: Artifact) -> None:
        assert artifact.card.preprocess is not None
        self.artifact, self.golden = artifact, load_golden(artifact)
        self.preprocess: Preprocess = artifact.card.preprocess
        self._session = ort.InferenceSession(artifact.file("model.onnx"), providers=["CPUExecutionProvider"])

    def run(self, inputs: Vectors) -> Vectors:
        """Embed (n, 3, size, size) float32 as (n, dim) float32, L2-normalised."""
        (vectors,) = self._session.run(None, {self._session.get_inputs()[0].name: inputs})
        return l2_normalize(vectors)

    def embed(self, client: Client) -> Vectors:
        """Return a client's embeddings of the golden images."""
        return self.run(np.stack([client.input(data, self.preprocess) for data in self.golden.images.values()]))


def right_clients(model: ClientModel, catalog: Path) -> dict[str, Vectors]:
    """Return the embeddings of the golden images by the clients that agree, by name."""
    inputs = model_inputs(model.golden.images, model.preprocess)
    opened = {
        loaded.backend: loaded.open(default_threads())
        for loaded in models_of(model.artifact, ("onnxruntime-cpu", "openvino"))
    }
    with serve_page(model.artifact.path, catalog) as url:
        answers = embed_by_endpoint(url, list(model.golden.images.values()), inputs, model.artifact, 60)
    return {
        "OpenVINO": l2_normalize(opened["openvino"](inputs)),
        "ONNX Runtime": l2_normalize(opened["onnxruntime-cpu"](inputs)),
        "Triton's Python model": model.run(_run_python_model(model)),
        "page of `vpr search serve`": np.array(answers, dtype=np.float32),
        "ten lines of Pillow and numpy": model.embed(TEN_LINES),
        "torchvision on tensors, antialiased": model.embed(TENSORS),
    }


def name_mistakes(model: ClientModel, right: Mapping[str, Vectors]) -> list[Row]:
    """Return a row for each client: what it does, what has to be named, what is named, and the lowest cosine."""
    clients: list[tuple[str, Vectors, dict[str, str]]] = [(name, vectors, {}) for name, vectors in right.items()]
    wrong = [(name, model.embed(client), expected) for name, (client, expected) in {**WRONG, **COMBINED}.items()]
    known = PipelineVectors(model.golden, model.preprocess, model.run)
    rows: list[Row] = []
    for name, vectors, expected in [*clients, *wrong]:
        diagnosis = diagnose(model.golden, vectors, known)
        named = diagnosis.pipeline.departures
        rows.append(
            {
                "client": name,
                "departs in": _text(expected),
                "named": "agrees" if diagnosis.agrees else _text(named) or "no known pipeline",
                "as near": ", ".join(diagnosis.alternatives),
                "lowest cosine": f"{min(diagnosis.cosines.values()):.4f}",
                "right": "yes" if named == expected and diagnosis.agrees != bool(expected) else "NO",
            }
        )
    return rows


def measure_verify(artifact: Path, catalog: Path, command: str) -> tuple[list[Figure], list[Row]]:
    """Return the figures and the table of all clients of a graph."""
    model = ClientModel(load_artifact(artifact, "onnx"))
    right = right_clients(model, catalog)
    rows = name_mistakes(model, right)
    passed = {row["client"] for row in rows if row["right"] == "yes"}
    figures = [
        Figure(title, len(passed & set(names)), f"of {len(names)}", goal, ">=", command)
        for title, names, goal in (
            ("clients with one mistake that `vpr export verify` names", WRONG, round(len(WRONG) * 14 / 16)),
            ("clients with several mistakes that `vpr export verify` names", COMBINED, None),
            ("clients that agree and are accepted", right, len(right)),
        )
    ]
    return figures, rows


@contextmanager
def serve_page(model: Path, catalog: Path) -> Iterator[str]:
    """Serve the search page of a model in a thread; yield its address."""
    searchers, gallery = load_searchers((str(model),), str(catalog), "", ())
    with socket.create_server((ADDRESS, 0)) as listener:
        server = make_server(make_app(searchers, GalleryImages([gallery]), 1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://{ADDRESS}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def _run_python_model(model: ClientModel) -> Vectors:
    """Return the inputs of the golden images by the preprocessing model of a Triton repository."""
    scheduling = Scheduling(max_batch=8, preferred=(), queue_delay_us=0, instances=1, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "1").mkdir()
        fields = preprocess_config("preprocess", model.artifact, model.preprocess, scheduling)
        (folder / "config.pbtxt").write_text(to_text(fields), encoding="utf-8")
        shutil.copyfile(Path(export.__file__).parent / "triton_preprocess.py", folder / "1" / "model.py")
        return PythonModel(folder).infer(list(model.golden.images.values()))


def _text(changes: Mapping[str, str]) -> str:
    return ", ".join(f"{step}.{value}" for step, value in changes.items())
