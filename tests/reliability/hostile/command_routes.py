"""Routes of hostile input through galleries, thresholds, plans, reports, golden vectors and teachers.

Each is one command line. Its files are in the folder of a case: artifacts of :func:`make_command_originals`, and the
files of ``given``, which a hostile input replaces.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.reliability.cases import CSV, RESULT, Case
from tests.reliability.commands import Command, paths_in
from tests.reliability.fuzz.mutated_files import json_bytes
from vpr import cli

GIVEN = "in"
_NO_OLDER = "none"  # the output is expected to be absent before
_TRAIN = (
    "teacher train --run.precision 32-true --loader.batch-size 8 --loader.workers 0 --catalog {catalog}"
    " --tower.name sample --tower.pretrained '' --tower.image-size 32 --stages '{train: head, epochs: 1}'"
)
_MORE_ORIGINALS = (
    Command(_TRAIN, "teacher"),
    Command(f"{_TRAIN} --views.rotate 5", "other-teacher"),
    Command("teacher fuse --models {teacher} {other-teacher} --catalog {catalog} --embedding-dim 8 --steps 2", "fused"),
    Command("teacher embed --model {teacher} --catalog {catalog}", "teacher-embeddings"),
    Command("export onnx --student {student} --input uint8 --images 8", "uint8"),
    Command("bench skew --model {fp32} --catalog {catalog} --pipelines colour.bgr", "skew"),
    Command(
        "bench storage --embeddings {embeddings} --sizes 100 --formats int8 --indexes flat --seconds 0.02",
        "storage",
    ),
    Command(
        "gallery threshold --embeddings {embeddings} --split '' --max-false-accept 0.9 --confidence 0.5", "threshold"
    ),
    Command("gallery create --embeddings {embeddings} --split train --columns price:number name", "stock"),
    Command("gallery plan-migration --gallery {stock} --old {embeddings} --new {teacher-embeddings}", "plan"),
)
_DECISION = {
    "max_recall_drop": 0.1,
    "confidence": 0.9,
    "confirmed": True,
    "outcome": "confirmed",
    "quantised": [],
    "layers": {},
    "search_products": [],
    "single_layer_trials": [],
    "trials": [],
    "sequence": [],
}


@dataclass(frozen=True)
class CommandCase(Case):
    """A command line as a case.

    Attributes:
        inputs: Artifacts of the originals that it reads, beyond those of every case.
    """

    inputs: tuple[str, ...] = ()


def make_command_originals(folder: Path) -> None:
    """Write the artifacts and given files, next to those of :func:`tests.reliability.cases.make_student`."""
    for command in _MORE_ORIGINALS:
        cli.run(command.words(_paths(folder), str(folder / command.output)))
    shutil.copytree(folder / "fp32", folder / "decided")
    (folder / "decided" / "decision.json").write_text(json.dumps(_DECISION), encoding="utf-8")
    sign_file(folder / "decided", "decision.json")
    _confirm_storage(folder / "storage")
    given = folder / "given"
    given.mkdir()
    shutil.copyfile(folder / "fp32" / "golden" / "embeddings.npy", given / "client.npy")
    shutil.copytree(folder / "embeddings", given / "embeddings")
    for name in ("before.json", "report.json"):
        shutil.copyfile(folder / "report.json", given / name)
    rows = pq.read_table(folder / "embeddings" / "rows.parquet", columns=["product", "split"]).to_pylist()
    product = next(row["product"] for row in rows if row["split"] == "train")
    (given / "metadata.csv").write_text(f"product,price,name\n{product},1.5,chair\n", encoding="utf-8")
    (given / "ids.csv").write_text("product\n", encoding="utf-8")
    (given / "where.txt").write_text("product <> 'x'", encoding="utf-8")
    (given / "products.json").write_text("[]", encoding="utf-8")


def _confirm_storage(artifact: Path) -> None:
    """Add a decision for the largest gallery, which needs more products than a test has."""
    values = json.loads((artifact / "storage.json").read_bytes())
    row = next(row for row in values["rows"] if row["rescoring"] is None)
    decision = {"size": row["size"], "max_recall_drop": 0.1, "confidence": 0.9, "max_ms": None, "chosen": row["name"]}
    decision |= {"outcome": "confirmed", "drop_upper_bound": 0.0, "smallest_confirmable_drop": None, "untested": 0}
    decision |= {"search_products": 15, "confirmation_products": 15, "sequence": []}
    (artifact / "storage.json").write_text(json.dumps({**values, "decisions": [decision]}), encoding="utf-8")
    sign_file(artifact, "storage.json")


def sign_file(artifact: Path, name: str) -> None:
    """Update the card of an artifact to a file that was changed or added."""
    data = (artifact / name).read_bytes()
    card = json.loads((artifact / "card.json").read_bytes())
    card["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (artifact / "card.json").write_text(json.dumps(card), encoding="utf-8")


def edit_json(name: str, change: Callable[[Any], object], folder: Path) -> None:
    """Change the values of a JSON file in the folder of a case, and sign it unless it is a card or no artifact's."""
    path = folder / name
    values = json.loads(path.read_bytes())
    change(values)
    path.write_bytes(json_bytes(values))
    if path.name != "card.json" and (path.parent / "card.json").is_file():
        sign_file(path.parent, path.name)


def lay_out_inputs(originals: Path, folder: Path, route: CommandCase) -> None:
    """Copy the artifacts that a route reads, and the given files."""
    for name in route.inputs:
        shutil.copytree(originals / name, folder / name)
    shutil.copytree(originals / "given", folder / GIVEN, dirs_exist_ok=True)


def find_given(folder: Path, stem: str) -> str:
    """Return the path of the given file with this stem, whatever its suffix; the newest if an input added one."""
    return str(max((folder / GIVEN).glob(f"{stem}.*"), key=lambda path: path.lstat().st_mtime_ns))


def _paths(folder: Path) -> dict[str, str]:
    given = ("client.npy", "before.json", "report.json", "embeddings")
    return {
        **paths_in(folder),
        **{name: str(folder / name) for name in ("uint8", "decided")},
        **{f"given/{name}": str(folder / GIVEN / name) for name in given},
        "result": str(folder / RESULT),
    }


def command_routes(run_vpr: Callable[..., None]) -> dict[str, Case]:
    """Return the routes by name; ``run_vpr`` is :func:`tests.reliability.hostile.routes.run_vpr`."""

    def case(line: str, older: str = "", *inputs: str, check: bool = False, extra: str = "") -> CommandCase:
        def run(folder: Path) -> None:
            output = {"": "", CSV: f"{folder / RESULT}.csv"}.get(older, str(folder / RESULT))
            words = Command(line).words(_paths(folder), "" if "{result}" in line else output)
            run_vpr(*words, *_extra_words(folder, extra), is_check=check)

        return CommandCase(run, older, inputs)

    search = "--queries {embeddings} --k 3"
    return {
        "export verify": case("export verify --artifact {fp32} --vectors {given/client.npy}", check=True),
        "export verify, uint8": case(
            "export verify --artifact {uint8} --vectors {uint8}/golden/embeddings.npy", "", "uint8", check=True
        ),
        "export parity, uint8": case(
            "export parity --student {student} --models {uint8} --catalog {catalog}", _NO_OLDER, "uint8"
        ),
        "export onnx of a teacher": case("export onnx --model {teacher} --images 8", _NO_OLDER, "teacher"),
        "export serving": case(
            "export serving --model {fp32} --gallery {embeddings} --storage {storage} --device cpu",
            *(_NO_OLDER, "storage"),
        ),
        "bench storage": case(
            "bench storage --embeddings {embeddings} --distractors {given/client.npy} --sizes 100 --formats int8"
            " --indexes flat --seconds 0.02",
            *("storage",),
        ),
        "bench compare": case("bench compare {given/before.json} {given/report.json}", "", check=True),
        "bench report": case(
            "bench report --models {decided} --catalog {catalog} --skew {skew} --storage {storage} --batches 1"
            " --seconds 0.02 --sheet-queries 2",
            *(_NO_OLDER, "decided", "skew", "storage"),
        ),
        "search": case("search --queries {given/embeddings} --gallery {given/embeddings} --k 3", CSV),
        "search, threshold": case(
            f"search {search} --gallery {{embeddings}} --threshold {{threshold}}", CSV, "threshold"
        ),
        **_gallery_routes(case, search),
        "teacher fuse": case(
            "teacher fuse --models {teacher} {other-teacher} --catalog {catalog} --embedding-dim 8 --steps 2",
            *(_NO_OLDER, "teacher", "other-teacher"),
        ),
        "teacher soup": case(
            "teacher soup --models {teacher} {other-teacher} --catalog {catalog}", _NO_OLDER, "teacher", "other-teacher"
        ),
        "teacher embed, fused": case("teacher embed --model {fused} --catalog {catalog}", _NO_OLDER, "fused"),
        "doctor": case("doctor --models {teacher}", "", "teacher"),
    }


def _gallery_routes(case: Callable[..., CommandCase], search: str) -> dict[str, Case]:
    """Return the routes of galleries: those that change one have it at their output."""
    stock = f"gallery search --gallery {{stock}} {search}"
    return {
        "gallery search": case(stock, CSV, "stock"),
        "gallery search, threshold": case(f"{stock} --threshold {{threshold}}", CSV, "stock", "threshold"),
        "gallery search, where": case(stock, CSV, "stock", extra="where"),
        "gallery info": case("gallery info --gallery {stock}", "", "stock"),
        "gallery verify": case("gallery verify --gallery {stock}", "", "stock", check=True),
        "gallery export": case("gallery export --gallery {stock}", "embeddings", "stock"),
        "gallery compact": case("gallery compact --gallery {stock}", "", "stock"),
        "gallery create": case(
            "gallery create --embeddings {given/embeddings} --split train --columns price:number name",
            _NO_OLDER,
            extra="metadata",
        ),
        "gallery add": case("gallery add --gallery {result} --embeddings {given/embeddings} --split test", "stock"),
        "gallery update": case("gallery update --gallery {result}", "stock", extra="metadata"),
        "gallery remove": case("gallery remove --gallery {result} --skip-missing", "stock", extra="products"),
        "gallery remove, table": case("gallery remove --gallery {result} --skip-missing", "stock", extra="ids"),
        "gallery threshold": case(
            "gallery threshold --embeddings {given/embeddings} --split '' --max-false-accept 0.9 --confidence 0.5",
            *("threshold",),
        ),
        "gallery plan-migration": case(
            "gallery plan-migration --gallery {stock} --old {given/embeddings} --new {teacher-embeddings}",
            *("plan", "stock", "teacher-embeddings"),
        ),
        "gallery migrate": case("gallery migrate --gallery {result} --plan {plan}", "stock", "plan"),
    }


def _extra_words(folder: Path, extra: str) -> list[str]:
    """Return the words of an option that a given file has: a condition, product ids, or the path of a table."""
    if extra == "where":
        return ["--where", (folder / GIVEN / "where.txt").read_text("utf-8", "surrogateescape")]
    if extra == "products":
        return ["--products", *json.loads((folder / GIVEN / "products.json").read_bytes()), "absent"]
    return [{"metadata": "--metadata", "ids": "--table"}[extra], find_given(folder, extra)] if extra else []
