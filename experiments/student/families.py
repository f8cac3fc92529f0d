"""Networks of vit-pytorch for small data, at about equal multiply-adds: which export, and how fast they are on a CPU.

The toolkit's students are the first three. The others are measured as vit-pytorch has them, with random weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vit_pytorch.cct import CCT
from vit_pytorch.cvt import CvT
from vit_pytorch.levit import LeViT
from vit_pytorch.max_vit import MaxViT
from vit_pytorch.mobile_vit import MobileViT
from vit_pytorch.nest import NesT

from experiments.figures import Figure, Row
from export.to_onnx import OUTPUT, run_graph, trace
from student.config import StudentConfig
from student.model import Student
from vpr.common.log import get_logger
from vpr.inference.model_size import count_multiply_adds, count_parameters
from vpr.inference.timing import measure, summarise

log = get_logger(__name__)

_SIDE, _DIM = 128, 256
_OWN = StudentConfig(image_size=_SIDE, patch_size=16, embedding_dim=_DIM)
_BATCHES = (1, 3)
_MAX_DIFFERENCE = 1e-4
_MOBILE_CHANNELS = [16, 24, 40, 40, 64, 64, 80, 80, 96, 96, 384]
# The names are vit-pytorch's. Widths and depths are chosen for 140 to 175 million multiply-adds.
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "ViT with convolutional stem": lambda: Student(StudentConfig(**{**vars(_OWN), "stem": "conv"})),
    "ViT, 7 blocks": lambda: Student(StudentConfig(**{**vars(_OWN), "depth": 7})),
    "ViT for small data sets": lambda: Student(StudentConfig(**{**vars(_OWN), "family": "small-data", "mlp_dim": 320})),
    "CCT": lambda: CCT(
        img_size=_SIDE, embedding_dim=192, n_conv_layers=2, kernel_size=3, stride=2, padding=1, pooling_kernel_size=3,
        pooling_stride=2, pooling_padding=1, num_layers=6, num_heads=3, mlp_ratio=2, num_classes=_DIM,
    ),
    "MobileViT": lambda: MobileViT((_SIDE, _SIDE), [96, 120, 144], _MOBILE_CHANNELS, _DIM, expansion=2),
    "LeViT": lambda: LeViT(
        image_size=_SIDE, num_classes=_DIM, stages=3, dim=(128, 192, 256), depth=4, heads=(4, 6, 8), mlp_mult=2
    ),
    "CvT": lambda: CvT(
        num_classes=_DIM, s1_emb_dim=32, s1_mlp_mult=2, s2_emb_dim=80, s2_heads=1, s2_depth=1, s2_mlp_mult=3,
        s3_emb_dim=160, s3_heads=3, s3_depth=4, s3_mlp_mult=3,
    ),
    "NesT": lambda: NesT(
        image_size=_SIDE, patch_size=8, dim=88, heads=2, num_hierarchies=3, block_repeats=(1, 1, 2), num_classes=_DIM
    ),
    "MaxViT": lambda: MaxViT(
        num_classes=_DIM, dim=24, dim_conv_stem=24, depth=(1, 2, 3), window_size=8, dim_head=24
    ),
}  # fmt: skip


class _Unit(nn.Module):
    """A network whose output has length 1, as embeddings have."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, dim) of length 1."""
        return nn.functional.normalize(self.network(x), dim=1)


def compare_families(command: str, seconds: float = 5.0) -> tuple[list[Figure], list[Row]]:
    """Export every network, compare the graph with PyTorch, and time those that export, on one thread.

    Args:
        command: Command that repeats the measurement.
        seconds: Duration of the timing of each graph.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    rows, calls = {}, {}
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        network = build().eval()
        rows[name] = {
            "network": name,
            "parameters": f"{count_parameters(network) / 1e6:.2f} M",
            "multiply-adds": f"{count_multiply_adds(network, _SIDE) / 1e6:.0f} M",
        }
        log.info(f"  {name}")
        rows[name]["graph"], graph = _export(_Unit(network))
        if graph is not None:
            calls[name] = partial(graph, [np.random.default_rng(0).random((1, 3, _SIDE, _SIDE), dtype=np.float32)])
    times = measure(calls, seconds)
    for name in rows:
        rows[name]["ms, OpenVINO"] = f"{summarise(times[name])['p50']:.2f}" if name in times else ""
    name = "networks of vit-pytorch that export with PyTorch's embeddings"
    return [Figure(name, float(len(calls)), "", None, ">=", command)], list(rows.values())


def _export(network: nn.Module) -> tuple[str, Any]:
    """Return what the graph is worth in words, and its function in OpenVINO; None where it cannot be used."""
    try:
        graph = trace(network, _SIDE, opset=23)
        for batch in _BATCHES:
            pixels = torch.randn(batch, 3, _SIDE, _SIDE)
            with torch.no_grad():
                expected = network(pixels).numpy()
            difference = float(np.abs(run_graph(graph, pixels.numpy()) - expected).max())
            if not difference <= _MAX_DIFFERENCE:
                return f"differs by {difference:.1e} at batch {batch}", None
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80]}", None
    return "equal", _openvino(graph.SerializeToString())


def _openvino(graph: bytes) -> Any:
    import openvino

    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(graph), "CPU", config)
    return lambda inputs: compiled(inputs)[OUTPUT]
