"""TensorRT engines run by PyCUDA and the runtime of the engine's own builder."""

from dataclasses import dataclass

from export.backends.base import INSTALL_GPU, BackendUnavailable, explain_no_gpu, import_or_explain
from export.tensorrt.bindings import Builder, import_tensorrt
from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import Forward


@dataclass(frozen=True)
class EngineBackend:
    """Engines on a GPU, with CUDA graphs."""

    name: Builder  # builder of the engine, ``tensorrt`` or ``tensorrt-rtx``; also the name in ``report.json``
    kinds: tuple[str, ...] = ("engine",)

    def missing(self) -> str | None:
        """See :class:`export.backends.base.Backend`."""
        try:
            import_tensorrt(self.name)
        except UserError as error:
            return str(error)
        return explain_no_gpu() or import_or_explain("pycuda.driver", INSTALL_GPU)[1]

    def version(self) -> str:
        """See :class:`export.backends.base.Backend`."""
        return str(import_tensorrt(self.name).__version__)

    def precision(self, artifact: Artifact) -> str:
        """See :class:`export.backends.base.Backend`."""
        precision = artifact.card.metrics.get("precision")
        if not isinstance(precision, str):
            raise UserError(f"{artifact.path}: the card states no precision. Rebuild with `vpr export engine`.")
        return precision

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`export.backends.base.Backend`."""
        from export.tensorrt.runner import start_engine

        try:
            return start_engine(artifact)
        except UserError as error:
            raise BackendUnavailable(str(error)) from None
