"""Round of a soak: a small distillation, embedding by student and graphs, and a search."""

from __future__ import annotations

import csv
import hashlib
import shutil
from pathlib import Path

import numpy as np

from export.backends.registry import models_of
from export.config import OnnxConfig
from export.to_onnx import export_onnx
from student.config import DistillConfig, StudentConfig, TargetsConfig
from student.distill import distill
from student.embed import embed_catalog
from teacher.config import StageConfig, TowerConfig, TrainConfig
from teacher.train import train
from vpr.data.build_catalog import build_catalog
from vpr.data.catalog import load_catalog
from vpr.data.config import CatalogConfig, LoaderConfig
from vpr.retrieval.config import EmbedConfig, SearchConfig
from vpr.retrieval.embeddings import embed
from vpr.retrieval.search import search
from vpr.retrieval.search_command import search_gallery

_BACKENDS = ("onnxruntime-cpu", "openvino")
_PRODUCTS = 12  # of each split
_BATCH = 32
_TOP = 5


def make_inputs(folder: Path) -> None:
    """Write a part of the sample, a teacher trained for one epoch, a student and its graph."""
    sample, catalog = folder / "sample", folder / "catalog"
    build_catalog(CatalogConfig("sample", str(sample)))
    _write_part(sample)
    build_catalog(CatalogConfig("csv", str(catalog), str(sample / "part.csv")))
    stages = (StageConfig("all", 1, lr_head=2e-3, lr_tower=2e-3),)
    loader = LoaderConfig(_BATCH)
    train(
        TrainConfig(str(catalog), str(folder / "teacher"), "", TowerConfig("sample", ""), stages=stages, loader=loader)
    )
    _distil(folder, folder / "student")
    export_onnx(OnnxConfig(str(folder / "student"), str(folder / "fp32")))


def run_round(inputs: Path, folder: Path) -> str:
    """Distil a student for an epoch, embed with it and with its graphs, search; return a digest of the results."""
    catalog, student = str(inputs / "catalog"), str(folder / "student")
    _distil(inputs, folder / "student")
    embeddings = str(embed_catalog(EmbedConfig(student, catalog, str(folder / "embeddings"), split="test")))
    table = search_gallery(SearchConfig(embeddings, embeddings, str(folder / "neighbours.csv"), k=_TOP))
    assert table is not None
    results = [table.read_bytes()]
    part = load_catalog(catalog).select(split="test")
    for model in models_of(inputs / "fp32", _BACKENDS):
        vectors = embed(part, model.preprocess, model.open(1), _BATCH)
        rows = search(vectors[part.roles == "query"], vectors[part.roles == "gallery"], _TOP)[1]
        results.append(rows.tobytes())
    shutil.rmtree(folder)
    return hashlib.sha256(b"".join(results)).hexdigest()[:12]


def _write_part(sample: Path) -> None:
    """Write a CSV table of all images of the first products of each split."""
    catalog = load_catalog(sample)
    with (sample / "part.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["image", "product", "role", "split"], extrasaction="ignore")
        writer.writeheader()
        for split in ("train", "validation", "test"):
            part = catalog.select(split=split)
            products = set(np.unique(part.products)[:_PRODUCTS].tolist())
            writer.writerows(row for row in part.table.to_pylist() if row["product"] in products)


def _distil(inputs: Path, output: Path) -> None:
    model, targets = StudentConfig("sample", stem="conv"), TargetsConfig(views=1)
    teacher, catalog = str(inputs / "teacher"), str(inputs / "catalog")
    loader = LoaderConfig(_BATCH, keep_in_memory=True)
    distill(DistillConfig((teacher,), catalog, str(output), model=model, targets=targets, epochs=1, loader=loader))
