"""Candidate graphs, loaded for timing next to each other: as TensorRT engines on a GPU, by OpenVINO on a CPU."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import onnx

from export.backends.openvino_runtime import openvino_forward
from export.config import TARGETS, EngineConfig, TimingBackend
from export.fp16 import to_fp16
from export.tensorrt.bindings import Builder, choose_builder, this_gpu
from export.tensorrt.build import build_engine
from export.tensorrt.runner import open_engine
from export.to_onnx import fill_graph_card
from vpr.artifacts.store import Artifact
from vpr.artifacts.writer import write_artifact
from vpr.common.hardware import read_gpus
from vpr.inference.onnx_file import save_graph
from vpr.retrieval.embeddings import Forward

Graphs = Mapping[str, onnx.ModelProto]
OpenEngine = Callable[[Path], AbstractContextManager[Forward]]


@dataclass(frozen=True)
class CandidateRunner:
    """Loads candidate graphs on one backend."""

    model: Artifact  # FP32 ``onnx`` artifact that the candidates come from
    backend: Literal["openvino"] | Builder  # backend from :func:`resolve_timing_backend`
    batch: int  # images per call; engines are built for this batch only
    threads: int = 0  # CPU threads of OpenVINO; 0 lets OpenVINO choose
    fp32_nodes: tuple[str, ...] = ()  # nodes whose values FP16 cannot represent
    # function that loads an engine onto the GPU; TensorRT-RTX would otherwise time fallback kernels
    open_engine: OpenEngine = partial(open_engine, eager=True)

    @contextmanager
    def load(self, graphs: Graphs) -> Iterator[dict[str, Forward]]:
        """Load FP32 graphs, with or without Q/DQ, as functions of images; engines are built over FP16."""
        if self.backend == "openvino":
            yield {name: openvino_forward(graph, self.threads) for name, graph in graphs.items()}
            return
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            forwards = {}
            for index, (name, graph) in enumerate(graphs.items()):
                engine = self._build(graph, self.backend, Path(folder), index)
                forwards[name] = stack.enter_context(self.open_engine(engine))
            yield forwards

    def _build(self, graph: onnx.ModelProto, builder: Builder, folder: Path, index: int) -> Path:
        """Build one engine; those of one folder share TensorRT's kernel timings."""
        half = to_fp16(graph, self.fp32_nodes)
        graph_path, engine_path = folder / f"graph-{index}", folder / f"engine-{index}"
        with write_artifact(graph_path, "onnx", {"precision": "candidate"}) as draft:
            save_graph(half, draft.path)
            fill_graph_card(draft, self.model, half)
        gpu, batch = this_gpu(), self.batch
        target = gpu if gpu in TARGETS else EngineConfig.target
        return build_engine(EngineConfig(str(graph_path), str(engine_path), builder, target, batch, batch, batch))


def resolve_timing_backend(backend: TimingBackend) -> Literal["openvino"] | Builder:
    """Resolve ``auto`` to the installed engine builder if there is an NVIDIA GPU, else to OpenVINO."""
    if backend == "auto":
        return choose_builder("auto") if read_gpus()[0] else "openvino"
    return backend
