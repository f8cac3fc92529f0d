"""Bit-equality with commit a7424ef: the same weights give the same embeddings, ranges, graphs and engines.

The reference is made once with the old commit, in a separate worktree::

    git worktree add ../before a7424ef && cd ../before && make demo && cd runs/demo
    vpr teacher embed --model teacher --catalog catalog --split test --output teacher-embeddings
    vpr student embed --model student --catalog catalog --split test --output student-embeddings
    vpr export int8 --onnx fp32 --ranges ranges --output int8-all
    vpr export engine --onnx int8-all --output engine-int8-all

Then ``python -m experiments.layout.equivalence ../before/runs/demo`` makes each artifact again from the reference's
weights and compares the files byte by byte. The INT8 graph of the demo is left out: its budget search compares
latencies, which differ from run to run.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from calibration.calibrate import calibrate
from calibration.config import CalibrateConfig
from experiments.figures import Row, markdown
from export.config import EngineConfig, Int8Config, OnnxConfig
from export.int8 import export_int8
from export.tensorrt.build import build_engine
from export.to_onnx import export_onnx
from student.embed import embed_catalog as embed_with_student
from teacher.embed import embed_catalog as embed_with_teacher
from vpr.artifacts.card import SCHEMA
from vpr.artifacts.store import load_artifact
from vpr.data.build_catalog import build_catalog
from vpr.data.config import CatalogConfig
from vpr.retrieval.config import EmbedConfig

_OLD_NAMES = {"images.parquet": "pictures.parquet"}


def compare_with_reference(reference: Path, folder: Path) -> list[Row]:
    """Make every artifact again in ``folder`` and return one row per file: artifact, file, and what is equal.

    Args:
        reference: Artifacts made at a7424ef, see the module's docstring.
        folder: Empty folder for the new artifacts.
    """
    for name in ("teacher", "student"):
        copy_with_new_card(reference / name, folder / name)

    def at(name: str) -> str:
        return str(folder / name)

    build_catalog(CatalogConfig("sample", at("catalog")))
    embed_with_teacher(EmbedConfig(at("teacher"), at("catalog"), at("teacher-embeddings"), split="test"))
    embed_with_student(EmbedConfig(at("student"), at("catalog"), at("student-embeddings"), split="test"))
    export_onnx(OnnxConfig(at("student"), at("fp32"), catalog=at("catalog")))
    export_onnx(OnnxConfig(at("student"), at("fp16"), "fp16", catalog=at("catalog")))
    calibrate(CalibrateConfig(at("fp32"), at("catalog"), at("ranges")))
    export_int8(Int8Config(at("fp32"), at("ranges"), at("int8-cpu"), base="fp32"))
    export_int8(Int8Config(at("fp32"), at("ranges"), at("int8-all")))
    build_engine(EngineConfig(at("fp16"), at("engine-fp16")))
    build_engine(EngineConfig(at("int8-all"), at("engine-int8-all")))
    rows = []
    for path in sorted(folder.iterdir()):
        rows += [
            {
                "artifact": path.name,
                "file": name,
                "equal": _compare(reference / path.name / _OLD_NAMES.get(name, name), path / name),
            }
            for name in sorted(load_artifact(path).card.files)
        ]
    return rows


def _compare(old: Path, new: Path) -> str:
    if not old.is_file():
        return "NO"
    if old.read_bytes() == new.read_bytes():
        return "bytes"
    # Key names of JSON files changed on purpose: the values must not.
    if old.suffix == ".json" and _leaves(json.loads(old.read_bytes())) == _leaves(json.loads(new.read_bytes())):
        return "values"
    return "NO"


def _leaves(value: Any) -> list[str]:
    """Return the sorted values of a JSON document without its key names."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sorted(leaf for item in value for leaf in _leaves(item))
    return [json.dumps(value)]


def copy_with_new_card(source: Path, target: Path) -> None:
    """Copy an artifact of a7424ef and raise the schema of its card; the keys that loading needs kept their names."""
    shutil.copytree(source, target)
    card = target / "card.json"
    values = json.loads(card.read_text(encoding="utf-8"))
    card.write_text(json.dumps({**values, "schema": SCHEMA}), encoding="utf-8")


def main() -> None:
    """Print the table; exit with 1 if a file differs."""
    with tempfile.TemporaryDirectory() as folder:
        rows = compare_with_reference(Path(sys.argv[1]), Path(folder))
    print(markdown(rows))
    sys.exit(any(row["equal"] == "NO" for row in rows))


if __name__ == "__main__":
    main()
