"""Configuration of ``vpr export verify``. Imports no heavy library, so help and errors in arguments are instant."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from vpr.common.errors import UserError


@dataclass(frozen=True)
class VerifyConfig:
    """Options of ``vpr export verify``.

    Attributes:
        artifact: Artifact of ``vpr export onnx``, ``int8``, ``engine`` or ``serving``. Its folder ``golden`` holds the
            images to embed.
        vectors: Client's embeddings of the images in the artifact's folder ``golden``: a ``.npy`` file of (images, dim)
            numbers in the order of the file names.
        endpoint: Address to get the embeddings from instead. ``http://127.0.0.1:8000`` is a page of
            ``vpr search serve``, ``http://HOST:8000/v2/models/NAME`` a model of Triton or another KServe server.
        seconds: Longest wait for an answer of the endpoint.
    """

    artifact: str
    vectors: str = ""
    endpoint: str = ""
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if bool(self.vectors) == bool(self.endpoint):
            problem = "both are set" if self.vectors else "neither is set"
            raise UserError(
                f"vectors, endpoint: {problem}. Pass the client's --vectors FILE.npy or its --endpoint URL."
            )
        if self.endpoint and not _is_address(self.endpoint):
            raise UserError(f"endpoint: expected an address such as http://127.0.0.1:8000, got '{self.endpoint}'.")
        if not 0 < self.seconds <= 600:
            raise UserError(f"seconds: expected more than 0 and at most 600, got {self.seconds}.")


def _is_address(url: str) -> bool:
    """Whether an HTTP address has a host and a valid port."""
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
