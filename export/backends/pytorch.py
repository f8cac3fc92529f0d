"""Teachers and students run by PyTorch, eager or compiled, in several precisions on a GPU."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.backends.base import INSTALL, RunFailed, explain_no_gpu, import_or_explain, is_older_than, single_line
from vpr.artifacts.store import Artifact
from vpr.common.errors import explain_system_error
from vpr.common.gpus import list_gpus
from vpr.retrieval.embeddings import Forward

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
_MAX_VARIANTS = 256  # compiled variants of one network: precisions times batch sizes


@dataclass(frozen=True)
class TorchBackend:
    """Teachers and students by PyTorch."""

    name: str  # name in ``report.json``
    device: str  # ``cpu`` or ``cuda``
    compiled: bool  # use ``torch.compile``; the first call of a batch size then takes up to minutes
    dtype: Precision = "fp32"  # precision of the products; the embeddings are float32
    kinds: tuple[str, ...] = ("teacher", "student")

    def missing(self) -> str | None:
        """See :class:`export.backends.base.Backend`."""
        torch, reason = import_or_explain("torch", INSTALL)
        if torch is None:
            return reason
        if self.device == "cpu":
            return "needs a C++ compiler. Install g++, or name a compiler in CXX." if self._lacks("CXX") else None
        if not torch.cuda.is_available():
            return explain_no_gpu() or _explain_no_cuda(torch)
        if self.dtype in ("tf32", "bf16") and is_older_than("sm80"):
            return f"needs a GPU of compute capability 8.0 or newer for {self.dtype}; this one has none"
        if self._lacks("CC"):
            return "needs a C compiler. Install gcc, or name a compiler in CC."
        if self.compiled and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return "needs Python.h. Install the package python3-dev of this Python version."
        return None

    def version(self) -> str:
        """See :class:`export.backends.base.Backend`."""
        import torch

        return f"{torch.__version__}; {torch.cuda.get_device_name() if self.device == 'cuda' else 'CPU'}"

    def precision(self, artifact: Artifact) -> str:
        """See :class:`export.backends.base.Backend`."""
        return self.dtype

    def open(self, artifact: Artifact, threads: int) -> Forward:
        """See :class:`export.backends.base.Backend`."""
        import torch

        torch.set_num_threads(threads)
        network = self.load(artifact)

        def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            try:
                return network(torch.from_numpy(batch).to(self.device)).cpu().numpy()
            except Exception as error:  # compilers and CUDA raise errors of many classes
                if explain_system_error(error):  # such as too little memory
                    raise
                reason = single_line(error)[:300]
                raise RunFailed(f"{artifact.path}: {self.name} cannot run it ({reason}). See `vpr doctor`.") from None

        return forward

    def load(self, artifact: Artifact) -> Any:
        """Return the network as a function of (n, 3, size, size) float32 tensors on the device, to float32."""
        import torch

        model = load_module(artifact).to(self.device)
        if self.dtype in ("bf16", "fp16"):
            _convert_weights(model, self._half())
        network = compile_by_batch(model, self.device) if self.compiled else model

        def embed(pixels: Any) -> Any:
            with torch.inference_mode(), self._products():
                return network(pixels).float()

        return embed

    @contextmanager
    def _products(self) -> Iterator[None]:
        """Compute products in this backend's precision inside the block."""
        import torch

        if self.dtype in ("bf16", "fp16"):
            # The weights are converted already, so there is nothing to keep.
            with torch.autocast(self.device, self._half(), cache_enabled=False):
                yield
        elif self.device == "cuda":
            with float32_products(self.dtype == "tf32"):
                yield
        else:
            yield

    def _half(self) -> Any:
        import torch

        return torch.bfloat16 if self.dtype == "bf16" else torch.float16

    def _lacks(self, variable: Literal["CC", "CXX"]) -> bool:
        """Return whether the compiler that torch.compile starts is missing; False if nothing is compiled."""
        names = {"CXX": ("g++", "clang++"), "CC": ("gcc", "clang")}[variable]
        found = (shutil.which(name) for name in (os.environ.get(variable), *names) if name)
        return self.compiled and not any(found)


@contextmanager
def float32_products(is_tf32: bool) -> Iterator[None]:
    """Compute float32 products on the GPU's TF32 units, or in full precision, inside the block.

    By default PyTorch uses TF32 for convolutions only, so an FP32 network would be a mixture.
    """
    from torch import backends

    products, convolutions = backends.cuda.matmul, backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = is_tf32
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def compile_by_batch(model: Any, device: str) -> Any:
    """Return a function that compiles a network once per batch size, with CUDA graphs on a GPU.

    One compiled function would switch to dynamic shapes at the second batch size, which is slower and needs no graphs.
    """
    import torch
    from torch._dynamo import config

    # Beyond its limit of variants torch.compile would run the network uncompiled, without a word.
    config.recompile_limit = config.accumulated_recompile_limit = _MAX_VARIANTS
    config.fail_on_recompile_limit_hit = True
    mode = "reduce-overhead" if device == "cuda" else "default"
    variants: dict[int, Any] = {}

    def run(pixels: Any) -> Any:
        if len(pixels) not in variants:
            variants[len(pixels)] = torch.compile(model, mode=mode, dynamic=False)
        torch.compiler.cudagraph_mark_step_begin()
        return variants[len(pixels)](pixels)

    return run


def load_module(artifact: Artifact) -> Any:
    """Load the network of a teacher or student artifact on the CPU, in evaluation mode."""
    if artifact.card.kind == "teacher":
        from teacher.model import load_teacher

        return load_teacher(artifact.path, artifact)[0]
    from student.model import load_student

    return load_student(artifact.path, artifact)[0]


def _convert_weights(model: Any, dtype: Any) -> None:
    """Convert the weights that autocast would convert at every call; norms and buffers stay in float32."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            module.to(dtype)


def _explain_no_cuda(torch: Any) -> str:
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA. Install its CUDA build."
    listing = list_gpus()
    driver = f"driver {listing.driver or 'of unknown version'} supports CUDA {listing.cuda}"
    return f"PyTorch is built for CUDA {torch.version.cuda}, and the {driver}. Update the driver."
