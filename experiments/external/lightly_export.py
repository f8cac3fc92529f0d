"""Export of a student by lightly-train, in lightly-train's environment: this file imports nothing of the project.

``python experiments/external/lightly_export.py SHAPE.json WEIGHTS.safetensors FOLDER`` writes ``fp32.onnx`` and
``fp16.onnx``, all precisions of lightly-train, and prints its version. ``make other-toolkits`` installs it.

lightly-train exports embedding models to PyTorch files only, and classifiers to ONNX. This program therefore loads the
student's weights into a classifier, a timm ViT with the same layers whose class scores are the embedding. It calls
``export_onnx`` and cuts the graph at the scores.
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

# Input and output of the toolkit's graphs, so that the same harness runs all graphs.
INPUT, OUTPUT = "pixels", "embedding"
PRECISIONS = ("fp32", "fp16")
# timm's names of the layers of a block.
_BLOCK = {
    "0.norm": "norm1",
    "0.to_qkv": "attn.qkv",
    "0.to_out.0": "attn.proj",
    "1.net.0": "norm2",
    "1.net.1": "mlp.fc1",
    "1.net.4": "mlp.fc2",
}


def timm_arguments(shape: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that give timm's ``vit_tiny_patch16_224`` the student's layers, without the projection."""
    from timm.layers import PatchEmbed
    from torch import nn

    class Stem(PatchEmbed):  # type: ignore[misc]
        """Student's convolutional stem as timm's patch embedding."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            halvings = shape["patch_size"].bit_length() - 1
            widths = [3] + [max(shape["dim"] >> (halvings - 1 - i), 24) for i in range(halvings)]
            layers: list[nn.Module] = []
            for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
                layers += [
                    nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(width_out),
                    nn.ReLU(),
                ]
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
    """Return a student's weights under timm's names, and the weights of its last projection."""
    named = {name.removeprefix("vit."): value for name, value in weights.items()}
    projection = {kind: named.pop(f"mlp_head.{kind}") for kind in ("weight", "bias")}
    named.pop("cls_token")  # unused: the student pools over all tokens
    body = {"pos_embed": named.pop("pos_embedding")[None]}
    last = 1 + max(int(name.split(".")[2]) for name in named if name.startswith("to_patch_embedding.layers."))
    for name, value in named.items():
        new = name.replace("to_patch_embedding.layers.", "patch_embed.proj.")
        new = new.replace("to_patch_embedding.project.", f"patch_embed.proj.{last + 1}.")  # after a ReLU
        new = new.replace("transformer.layers.", "blocks.").removeprefix("transformer.")
        for student_name, timm_name in _BLOCK.items():
            new = re.sub(rf"^(blocks\.\d+)\.{re.escape(student_name)}\.", rf"\1.{timm_name}.", new)
        body[new] = value
    return body, projection


def cut_at_scores(graph: onnx.ModelProto, width: int) -> onnx.ModelProto:
    """Cut a classifier's graph at the scores before its softmax, (batch, width), with float32 input and output.

    Casts replace the conversion to and from half precision that a client would do.
    """
    import onnx
    from onnx import TensorProto, helper

    model_input = graph.graph.input[0]
    scores = [node for node in graph.graph.node if node.op_type == "Softmax"][-1].input[
        0
    ]  # all earlier ones belong to attentions
    dtype = model_input.type.tensor_type.elem_type
    shape = [dim.dim_value or "batch" for dim in model_input.type.tensor_type.shape.dim]
    cut = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(graph)).extract_model([model_input.name], [scores])
    del cut.graph.input[:], cut.graph.output[:]
    cut.graph.node.insert(0, helper.make_node("Cast", [INPUT], [model_input.name], to=dtype))
    cut.graph.node.append(helper.make_node("Cast", [scores], [OUTPUT], to=TensorProto.FLOAT))
    cut.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape))
    cut.graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", width]))
    return cut


def export(shape: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> str:
    """Write the graphs and return lightly-train's version."""
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
        onnx.save(cut_at_scores(onnx.load(file), shape["embedding_dim"]), file)
    return str(lightly_train.__version__)


if __name__ == "__main__":
    from safetensors.torch import load_file

    shape_file, weights_file, output_folder = sys.argv[1:]
    print(export(json.loads(Path(shape_file).read_text()), load_file(weights_file), Path(output_folder)))
