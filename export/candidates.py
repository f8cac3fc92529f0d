"""Candidate graphs made ready to be timed side by side: on the CPU by OpenVINO, on a GPU as the engines they become."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from export.backends.openvino_session import openvino_forward
from export.config import TARGETS, EngineConfig, TimingBackend
from export.fp16 import to_fp16
from export.tensorrt.bindings import Backend, choose_backend, this_gpu
from export.tensorrt.build import build_engine
from export.tensorrt.runner import open_engine
from export.to_onnx import fill_graph_card
from vpr.artifacts.store import Artifact, write_artifact
from vpr.common.hardware import read_gpus
from vpr.retrieval.embeddings import Forward

Graphs = Mapping[str, onnx.ModelProto]
OpenEngine = Callable[[Path], AbstractContextManager[Forward]]


@dataclass(frozen=True)
class CandidateRunner:
    """How candidates are run.

    Attributes:
        model: the FP32 ``onnx`` artifact that they come from.
        by: what runs them, as :func:`resolve_timing_backend` gives it.
        batch: images per call, which engines are built for.
        threads: of OpenVINO; 0 leaves their number to it.
        wide: nodes that FP16 cannot hold.
        open_engine: loads an engine onto the GPU.
    """

    model: Artifact
    by: Literal["openvino"] | Backend
    batch: int
    threads: int = 0
    wide: tuple[str, ...] = ()
    open_engine: OpenEngine = open_engine

    @contextmanager
    def opened(self, graphs: Graphs) -> Iterator[dict[str, Forward]]:
        """Graphs, FP32 with or without Q/DQ, as functions of images; engines are built over FP16.

        Raises:
            UserError: what :func:`export.tensorrt.build.build_engine` or :func:`export.tensorrt.runner.open_engine` finds wrong.
        """
        if self.by == "openvino":
            yield {name: openvino_forward(graph, self.threads) for name, graph in graphs.items()}
            return
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            found = {}
            for number, (name, graph) in enumerate(graphs.items()):
                engine = self._build(graph, self.by, Path(folder) / str(number))
                found[name] = stack.enter_context(self.open_engine(engine))
            yield found

    def _build(self, graph: onnx.ModelProto, backend: Backend, folder: Path) -> Path:
        half = to_fp16(graph, self.wide)
        with write_artifact(folder / "graph", "onnx", {"precision": "candidate"}) as draft:
            onnx.save(half, draft.path / "model.onnx")
            fill_graph_card(draft, self.model, half)
        gpu = this_gpu()
        return build_engine(
            EngineConfig(
                str(folder / "graph"),
                str(folder / "engine"),
                backend,
                target=gpu if gpu in TARGETS else EngineConfig.target,
                min_batch=self.batch,
                opt_batch=self.batch,
                max_batch=self.batch,
            )
        )


def resolve_timing_backend(by: TimingBackend) -> Literal["openvino"] | Backend:
    """``auto`` is an engine where there is an NVIDIA GPU, by the builder that is installed, else OpenVINO."""
    if by == "auto":
        return choose_backend("auto") if read_gpus()[0] else "openvino"
    return by
