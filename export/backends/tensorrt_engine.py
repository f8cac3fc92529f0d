"""TensorRT engines run by the runtime of their own builder, with PyCUDA or cuda-bindings."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.backends.base import BackendUnavailable, RunFailed, explain_no_gpu
from export.tensorrt.bindings import Builder, import_tensorrt
from export.tensorrt.cuda_driver import missing_driver
from export.tensorrt.inspector import describe_precision
from vpr.artifacts.store import Artifact
from vpr.common.errors import UserError
from vpr.retrieval.embeddings import Forward


@dataclass(frozen=True)
class EngineBackend:
    """Engines on a GPU, with CUDA graphs; TensorRT-RTX compiles the kernels of a batch size before it runs them."""

    name: Builder  # builder of the engine, ``tensorrt`` or ``tensorrt-rtx``; also the name in ``report.json``
    kinds: tuple[str, ...] = ("engine",)

    def missing(self) -> str | None:
        """See :class:`export.backends.base.Backend`."""
        try:
            import_tensorrt(self.name)
        except UserError as error:
            return str(error)
        return explain_no_gpu() or missing_driver()

    def version(self) -> str:
        """See :class:`export.backends.base.Backend`."""
        return str(import_tensorrt(self.name).__version__)

    def precision(self, artifact: Artifact) -> str:
        """See :class:`export.backends.base.Backend`."""
        precision = artifact.card.metrics.get("precision")
        if not isinstance(precision, str):
            raise UserError(f"{artifact.path}: the card states no precision. Rebuild with `vpr export engine`.")
        return describe_precision(precision, artifact.card.metrics.get("inspector"))

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`export.backends.base.Backend`.

        The engine is closed, and its compiled kernels are kept, when the function is dropped or the process ends.
        """
        from export.tensorrt.kernel_cache import AUTO
        from export.tensorrt.runner import start_engine

        try:
            engine = start_engine(artifact, eager=True, kernel_cache=AUTO)
        except UserError as error:
            raise BackendUnavailable(str(error)) from None

        def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            try:
                return engine(batch)
            except UserError as error:
                raise RunFailed(str(error)) from None

        return forward
