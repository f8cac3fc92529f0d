"""Distillation by lightly-train, in lightly-train's environment: this file imports nothing of the project.

``python experiments/external/lightly_distill.py SETTINGS.json`` trains a student on image files by a teacher in
TorchScript, embeds images, and prints the seconds of the training and lightly-train's version as JSON.
``make other-toolkits`` installs it. lightly-train accepts any teacher that gives features and pools them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_HEADS = ("student_projection_head_global", "student_projection_head")


class Wrapper(nn.Module):
    """Network behind lightly-train's interface of custom models: (batch, width, rows, columns) and their mean."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.width = network, width

    def get_model(self) -> nn.Module:
        """Return the network, which lightly-train exports."""
        return self.network

    def feature_dim(self) -> int:
        """Return the number of channels."""
        return self.width

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of each position."""
        return {"features": self.network(x)}

    def forward_pool(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of the features."""
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}


class Grid(nn.Module):
    """The student as timm's ViT: (batch, 3, size, size) to (batch, dim, rows, columns)."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        import timm
        from lightly_export import timm_arguments

        arguments = timm_arguments(shape)
        stem = arguments.pop("embed_layer")  # a local class, which lightly-train's checkpoints cannot hold
        self.vit: Any = timm.create_model("vit_tiny_patch16_224", **arguments)
        embed: Any = self.vit.patch_embed
        embed.proj = stem(shape["image_size"], shape["patch_size"], 3, shape["dim"]).proj
        self.side = shape["image_size"] // shape["patch_size"]

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens as a grid."""
        tokens: Tensor = self.vit.forward_features(x)
        return tokens.transpose(1, 2).unflatten(2, (self.side, self.side))


def train(settings: dict[str, Any], student: Any, teacher: Any) -> tuple[float, nn.Module]:
    """Distil the student by the method of the settings, and return the seconds and the module that was trained.

    lightly-train returns nothing, and its checkpoint is a pickle, which is not read. Lightning is given the module.
    """
    import lightly_train
    import pytorch_lightning

    trainers: Any = pytorch_lightning.Trainer
    modules: list[nn.Module] = []
    fit = trainers.fit

    def keep_module(trainer: Any, model: nn.Module, *arguments: Any, **named: Any) -> None:
        modules.append(model)
        fit(trainer, model, *arguments, **named)

    trainers.fit = keep_module
    start = time.perf_counter()
    lightly_train.pretrain(
        out=settings["folder"],
        overwrite=True,
        data=settings["images"],
        model=student,
        method=settings["method"],
        method_args={"teacher": teacher},
        epochs=settings["epochs"],
        batch_size=settings["batch"],
        num_workers=0,
        devices=1,
        accelerator="cpu",
        precision=settings["precision"],
        seed=settings["seed"],
        optim="adamw",
        optim_args={"lr": settings["lr"]},
        transform_args={
            "image_size": (settings["shape"]["image_size"],) * 2,
            "normalize": {"mean": settings["mean"], "std": settings["std"]},
            **settings["transform"],
        },
    )
    seconds = time.perf_counter() - start
    trainers.fit = fit
    if not modules:
        raise SystemExit("lightly-train: it did not train by pytorch_lightning. Use lightly-train 0.18.0.")
    return seconds, modules[-1]


def projection_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the layer from the student's features to the teacher's embeddings."""
    weights = module.state_dict()
    for name in _HEADS:
        if f"{name}.weight" in weights:
            return weights[f"{name}.weight"].cpu(), weights[f"{name}.bias"].cpu()
    raise SystemExit(f"lightly-train: its module has none of {', '.join(_HEADS)}. Use lightly-train 0.18.0.")


def embed(network: Any, pixels: NDArray[np.float32]) -> Tensor:
    """Return the (n, dim) pooled features of (n, 3, size, size) pixels."""
    network.eval()
    with torch.no_grad():
        return torch.cat(
            [network(torch.from_numpy(pixels[i : i + 64])).mean((2, 3)) for i in range(0, len(pixels), 64)]
        )


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Train, write the embeddings of ``pixels`` as ``features.npy`` and ``projected.npy``, and return the result."""
    os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "HF_HUB_OFFLINE": "1"}  # nothing is sent or fetched
    import lightly_train

    torch.manual_seed(settings["seed"])
    network = Grid(settings["shape"])
    teacher = torch.jit.load(settings["teacher"])
    student = Wrapper(network, settings["shape"]["dim"])
    seconds, module = train(settings, student, Wrapper(teacher, settings["teacher_dim"]))
    folder = Path(settings["folder"])
    weight, bias = projection_of(module)
    features = embed(network, np.load(settings["pixels"], allow_pickle=False))
    for name, vectors in (("features", features), ("projected", features @ weight.float().T + bias.float())):
        unit = torch.nn.functional.normalize(vectors.float(), dim=1)
        np.save(folder / f"{name}.npy", unit.numpy(), allow_pickle=False)
    return {"seconds": seconds, "version": str(lightly_train.__version__)}


if __name__ == "__main__":
    result = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(result))
