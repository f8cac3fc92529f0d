"""Embeddings of image files from a server: our search page, or a model of Triton by the KServe protocol (version 2).

https://github.com/kserve/open-inference-protocol and Triton's binary tensor data extension.
"""

from __future__ import annotations

import http.client
import json
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError
from vpr.common.log import get_logger
from vpr.imaging.preprocess import ModelInput

log = get_logger(__name__)

_MAX_ANSWER = 16 << 20
_KSERVE = "/v2/models/"
_DATATYPES = {"float32": "FP32", "uint8": "UINT8"}
EMBED_PATH = "/embed"  # of the search page


@dataclass(frozen=True)
class _Server:
    """HTTP server at an address; every failure is a one-line :class:`UserError`."""

    url: str
    seconds: float

    @property
    def path(self) -> str:
        """Path of the address, without a slash at its end."""
        return urlsplit(self.url).path.rstrip("/")

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Any:
        """Return the JSON of an answer."""
        try:
            parts = urlsplit(self.url)
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=self.seconds)
            try:
                connection.request(method, path, body or None, headers or {})
                response = connection.getresponse()
                answer = _read(response, time.monotonic() + self.seconds)
            finally:
                connection.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"endpoint: {self.url} does not answer ({reason}). Start the server first.") from None
        if response.status != 200:
            text = " ".join(answer.decode("utf-8", "replace").split())[:200]
            raise UserError(f"endpoint: {self.url} answered {response.status} to {path} ({text}). Check the address.")
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise self.unexpected() from None

    def unexpected(self) -> UserError:
        """Return the error of an answer without an embedding."""
        return UserError(f"endpoint: {self.url} answered with no embedding. Pass a search page or a model's address.")


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Return the first bytes of an answer; the timeout of the socket alone would allow a byte per timeout forever."""
    answer = b""
    while len(answer) < _MAX_ANSWER and (block := response.read1(_MAX_ANSWER - len(answer))):
        answer += block
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return answer


def embed_by_endpoint(
    url: str, images: Sequence[bytes], inputs: ModelInput, artifact: Artifact, seconds: float
) -> list[Any]:
    """Return the embedding of each image file as JSON values, which the caller checks.

    A KServe model that takes bytes gets the files. One that takes numbers gets the golden ``inputs``, so that only the
    model is checked. The page must serve ``artifact``.

    Raises:
        UserError: The server does not answer, or answers with something else.
    """
    server = _Server(url, seconds)
    if server.path.startswith(_KSERVE):
        return _embed_by_kserve(server, images, inputs)
    accepted = [artifact.sha256]
    if artifact.card.kind in ("engine", "serving"):  # they have the golden vectors of the graph or engine
        accepted += [parent.sha256 for parent in artifact.card.parents if parent.role in ("onnx", "engine")]
    vectors = []
    for image in images:
        answer = server.request("POST", server.path + EMBED_PATH, image)
        models = answer.get("models", ()) if isinstance(answer, dict) else ()
        try:
            served = {model["sha256"]: model["embedding"] for model in models}
            names = ", ".join(str(model["name"]) for model in models)
        except (KeyError, TypeError):
            raise server.unexpected() from None
        if not served:
            raise server.unexpected()
        found = [served[sha256] for sha256 in accepted if sha256 in served]
        if not found:
            raise UserError(f"endpoint: {url} serves {names}, not {artifact.path}. Start it with --models.")
        vectors.append(found[0])
    return vectors


def _embed_by_kserve(server: _Server, images: Sequence[bytes], inputs: ModelInput) -> list[Any]:
    metadata = server.request("GET", server.path)
    try:
        (spec,), output = metadata["inputs"], metadata["outputs"][0]["name"]
        name, datatype = str(spec["name"]), spec["datatype"]
    except (KeyError, TypeError, ValueError, IndexError):
        raise server.unexpected() from None
    if datatype == "BYTES":
        tensors = [(np.array([1, 1]), struct.pack("<I", len(image)) + image) for image in images]
    elif datatype == _DATATYPES[inputs.dtype.name]:
        log.warning(f"{server.url}: the model takes preprocessed images, so only the model is checked")
        rows = inputs.astype(inputs.dtype.newbyteorder("<"))
        tensors = [(np.array([1, *row.shape]), row.tobytes()) for row in rows]
    else:
        expected = f"image files (BYTES) or {_DATATYPES[inputs.dtype.name]} inputs"
        raise UserError(f"endpoint: {server.url} takes {datatype}, expected {expected}.")
    vectors = []
    for shape, content in tensors:
        described = {"name": name, "shape": shape.tolist(), "datatype": datatype}
        described["parameters"] = {"binary_data_size": len(content)}
        outputs = [{"name": output, "parameters": {"binary_data": False}}]
        head = json.dumps({"inputs": [described], "outputs": outputs}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        answer = server.request("POST", f"{server.path}/infer", head + content, headers)
        try:
            vectors.append(answer["outputs"][0]["data"])
        except (KeyError, TypeError, IndexError):
            raise server.unexpected() from None
    return vectors
