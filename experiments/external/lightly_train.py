"""lightly-train's export of a student, run in its own environment: this file imports nothing of the project.

``python experiments/external/lightly_train.py SHAPE.json WEIGHTS.safetensors FOLDER`` writes ``fp32.onnx`` and ``fp16.onnx``,
all the precisions that it has, and prints its version; ``make other-toolkits`` makes the environment. lightly-train
exports embedding models to PyTorch files only; to ONNX it exports classifiers. So the student's weights are put into
its classifier, a timm ViT of the same layers whose class scores are the embedding; ``export_onnx`` is called; the graph
is cut at the scores.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

# The ends of our graphs, so that one harness runs all.
INPUT, OUTPUT = "pixels", "embedding"
PRECISIONS = ("fp32", "fp16")
# What a block of the student is called in timm.
_BLOCK = {
    "0.norm": "norm1",
    "0.to_qkv": "attn.qkv",
    "0.to_out.0": "attn.proj",
    "1.net.0": "norm2",
    "1.net.1": "mlp.fc1",
    "1.net.4": "mlp.fc2",
}


def timm_arguments(shape: dict[str, Any]) -> dict[str, Any]:
    """What makes timm's ``vit_tiny_patch16_224`` the student of a shape, without its last projection."""
    from timm.layers import PatchEmbed
    from torch import nn

    class Stem(PatchEmbed):  # type: ignore[misc]
        """The student's convolutional stem as timm's patch embedding."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            halvings = shape["patch_size"].bit_length() - 1
            widths = [3] + [max(shape["dim"] >> (halvings - 1 - i), 24) for i in range(halvings)]
            layers: list[nn.Module] = []
            for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
                layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], shape["dim"], 1))  # type: ignore[assignment]

    return {
        "img_size": shape["image_size"],
        "patch_size": shape["patch_size"],
        "embed_dim": shape["dim"],
        "depth": shape["depth"],
        "num_heads": shape["heads"],
        "mlp_ratio": shape["mlp_dim"] / shape["dim"],
        "qkv_bias": False,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "num_classes": 0,
        "norm_layer": nn.LayerNorm,
        "embed_layer": Stem,
    }


def timm_weights(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A student's weights under timm's names, and those of its last projection."""
    named = {name.removeprefix("vit."): value for name, value in weights.items()}
    projection = {kind: named.pop(f"mlp_head.{kind}") for kind in ("weight", "bias")}
    named.pop("cls_token")  # the student pools over all tokens: it has none
    body = {"pos_embed": named.pop("pos_embedding")[None]}
    last = 1 + max(int(name.split(".")[2]) for name in named if name.startswith("to_patch_embedding.layers."))
    for name, value in named.items():
        new = name.replace("to_patch_embedding.layers.", "patch_embed.proj.")
        new = new.replace("to_patch_embedding.project.", f"patch_embed.proj.{last + 1}.")  # a ReLU lies between
        new = new.replace("transformer.layers.", "blocks.").removeprefix("transformer.")
        for ours, theirs in _BLOCK.items():
            new = re.sub(rf"^(blocks\.\d+)\.{re.escape(ours)}\.", rf"\1.{theirs}.", new)
        body[new] = value
    return body, projection


def end_at_scores(graph: onnx.ModelProto, width: int) -> onnx.ModelProto:
    """A classifier's graph up to the scores that its softmax reads, (batch, width), between float32 ends of our names.

    The casts of half precision are what a client would do before and after.
    """
    import onnx
    from onnx import TensorProto, helper

    opened = graph.graph.input[0]
    scores = [node for node in graph.graph.node if node.op_type == "Softmax"][-1].input[0]  # the others are attention's
    kind = opened.type.tensor_type.elem_type
    shape = [dim.dim_value or "batch" for dim in opened.type.tensor_type.shape.dim]
    cut = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(graph)).extract_model([opened.name], [scores])
    del cut.graph.input[:], cut.graph.output[:]
    cut.graph.node.insert(0, helper.make_node("Cast", [INPUT], [opened.name], to=kind))
    cut.graph.node.append(helper.make_node("Cast", [scores], [OUTPUT], to=TensorProto.FLOAT))
    cut.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape))
    cut.graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", width]))
    return cut


def export(shape: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> str:
    """Write the graphs; lightly-train's version."""
    os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "HF_HUB_OFFLINE": "1"}  # nothing is sent or fetched
    import lightly_train
    import onnx
    from lightly_train._task_models.image_classification.task_model import ImageClassification

    model = ImageClassification(
        model="timm/vit_tiny_patch16_224",
        classes={number: str(number) for number in range(shape["embedding_dim"])},
        classification_task="multiclass",
        image_size=(shape["image_size"], shape["image_size"]),
        image_normalize=None,
        backbone_freeze=False,
        backbone_args=timm_arguments(shape),
        load_weights=False,
    )
    body, projection = timm_weights(weights)
    model.backbone.get_model().load_state_dict(body)
    model.class_head.load_state_dict(projection)
    for precision in PRECISIONS:
        file = folder / f"{precision}.onnx"
        model.export_onnx(out=str(file), precision=precision)
        onnx.save(end_at_scores(onnx.load(file), shape["embedding_dim"]), file)
    return str(lightly_train.__version__)


if __name__ == "__main__":
    from safetensors.torch import load_file

    shape_file, weights_file, output_folder = sys.argv[1:]
    print(export(json.loads(Path(shape_file).read_text()), load_file(weights_file), Path(output_folder)))
