from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vpr.artifacts.store import write_artifact
from vpr.cli import COMMANDS, main


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command; it must exit with 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vpr: error: ")
    assert "Traceback" not in error
    return error


def _images(texture_folder: Path, copy: Path) -> Path:
    shutil.copytree(texture_folder, copy)
    return copy


def test_truncated_jpeg(capsys: pytest.CaptureFixture[str], texture_folder: Path, tmp_path: Path) -> None:
    root = _images(texture_folder, tmp_path / "photos")
    victim = sorted(root.rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    error = _fails(capsys, "catalog", "--reader", "folder", "--root", str(root), "--output", str(tmp_path / "c"))
    assert str(victim) in error
    assert "truncated" in error
    assert "--skip-unreadable" in error
    assert not (tmp_path / "c").exists()


def test_text_named_jpg(capsys: pytest.CaptureFixture[str], texture_folder: Path, tmp_path: Path) -> None:
    root = _images(texture_folder, tmp_path / "photos")
    victim = sorted(root.rglob("*.jpg"))[0]
    victim.write_text("<html>not found</html>")
    error = _fails(capsys, "catalog", "--reader", "folder", "--root", str(root), "--output", str(tmp_path / "c"))
    assert f"{victim}: not an image" in error


def test_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ["--reader", "folder", "--root", str(tmp_path / "empty"), "--output", str(tmp_path / "c")]
    assert str(tmp_path / "empty") in _fails(capsys, "catalog", *arguments)


def test_csv_with_a_missing_column(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "images.csv"
    table.write_text("image,prodct\na.jpg,1\n")
    error = _fails(capsys, "catalog", "--reader", "csv", "--root", str(table), "--output", str(tmp_path / "c"))
    assert str(table) in error
    assert "product" in error


def test_unknown_key_in_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 3\n")
    error = _fails(capsys, "teacher", "train", "--config", str(recipe), "--catalog", "c", "--output", "o")
    assert "learning_rate" in error
    assert "vpr teacher train --help" in error


def test_wrong_type_in_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: many\n")
    arguments = ["--config", str(recipe), "--teacher", "t", "--catalog", "c", "--output", "o"]
    assert "epochs" in _fails(capsys, "student", "distill", *arguments)


def test_yaml_that_would_run_code_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path}/owned']\n")
    _fails(capsys, "teacher", "train", "--config", str(recipe), "--catalog", "c", "--output", "o")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nseed: [*a, *a]\n", "a recipe with anchors (&): write out what they stand for"),
        ("seed: " + "1:" * 40_000, "more than 65536 letters of YAML"),
        ("seed: 0x" + "f" * 5000, "a number of more than 64 bits"),
        ("seed: " + "[" * 5000, "nesting"),
        ("config: {a: 1}\n", "a recipe has no key 'config'"),
        ("config: another.yaml\n", "a recipe has no key 'config'"),
        ("seed: 1\nvalidation:\n", "validation: is empty: give a value, or leave the line out"),
        ("seed: 1\nroot: null\n", "root: is empty"),
        ("seed: !own x\n", "could not determine a constructor for the tag"),
    ],
)
def test_a_recipe_that_is_short_to_write_and_endless_to_read_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert message in _fails(capsys, "catalog", "--config", str(recipe), "--reader", "sample", "--output", "o")


@pytest.mark.parametrize(
    ("text", "message"),
    [("rerank:\n", "rerank"), ("rerank: {dba: }\n", "rerank.dba: is empty"), ("k: \n", "k: is empty")],
)
def test_nothing_behind_a_key_is_told_by_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"queries: q\ngallery: g\n{text}")
    assert f"vpr: error: {message}" in _fails(capsys, "search", "--config", str(recipe))


@pytest.mark.parametrize(
    "words",
    [
        ("bench recall", "--catalog", "c", "--models", "[a]", "--output", "o", "--seed", "-1"),
        ("bench report", "--catalog", "c", "--models", "[a]", "--output", "o", "--seed", "-1"),
        ("bench report", "--catalog", "c", "--models", "[a]", "--output", "o", "--threads", "100000"),
        ("bench report", "--catalog", "c", "--models", "[a]", "--output", "o", "--threads", "-1"),
        ("bench latency", "--models", "[a]", "--output", "o", "--threads", "100000"),
        ("bench compare", "a", "b", "--seed", "-1"),
        ("bench scale", "--embeddings", "e", "--output", "o", "--seed", "-1"),
        ("calibrate", "--onnx", "a", "--catalog", "c", "--output", "o", "--seed", "-1"),
        ("student embed", "--model", "a", "--catalog", "c", "--output", "o", "--threads", "100000"),
    ],
)
def test_numbers_that_no_library_takes_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert f"{words[-2].lstrip('-')}: expected 0 " in _fails(capsys, *words[0].split(), *words[1:])


def test_a_recipe_may_hold_the_sign_of_an_anchor_in_its_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("root: 'chairs & tables'\n")
    error = _fails(capsys, "catalog", "--config", str(recipe), "--reader", "folder", "--output", str(tmp_path / "o"))
    assert "chairs & tables: no such folder" in error


def test_edited_weights(capsys: pytest.CaptureFixture[str], student_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(student_artifact, tmp_path / "student")
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    error = _fails(capsys, "export", "onnx", "--student", str(copy), "--output", str(tmp_path / "onnx"))
    assert f"{weights}: changed since it was written" in error


def test_card_of_a_newer_schema(capsys: pytest.CaptureFixture[str], student_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(student_artifact, tmp_path / "student")
    card = copy / "card.json"
    card.write_text(card.read_text().replace('"schema": 1', '"schema": 99').replace('"schema":1', '"schema":99'))
    error = _fails(capsys, "export", "onnx", "--student", str(copy), "--output", str(tmp_path / "onnx"))
    assert f"{card}: card schema 99, this version reads up to 1: upgrade" in error


@pytest.mark.parametrize("arguments", [["fly"], ["teacher", "fly"], ["export", "onnx"], ["search", "--queries", "x"]])
def test_what_was_typed_wrong_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    _fails(capsys, *arguments)


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    overview = capsys.readouterr().out
    assert all(f"vpr {name}" in overview for name in COMMANDS)
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([*name.split(), "--help"])
        assert caught.value.code == 0
        assert "--config" in capsys.readouterr().out


def test_the_help_of_a_verb_names_the_longer_one(capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (("search", True), ("search serve", False), ("calibrate", False)):
        with pytest.raises(SystemExit):
            main([*words.split(), "--help"])
        shown = capsys.readouterr().out
        assert f"usage: vpr {words} [" in shown
        assert ("vpr search serve: a local page" in shown) is named


def test_help_does_not_import_torch() -> None:
    code = "import sys; from vpr.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("kind", ["student", "onnx"])
def test_files_written_wrong_are_named_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    name, config = ("model.safetensors", {"model": {}}) if kind == "student" else ("model.onnx", {"precision": "fp32"})
    with write_artifact(tmp_path / kind, kind, config) as draft:
        (draft.path / name).write_bytes(b"\xff" * 100)
    verb = ["export", "onnx", "--student"] if kind == "student" else ["export", "engine", "--onnx"]
    error = _fails(capsys, *verb, str(tmp_path / kind), "--output", str(tmp_path / "out"))
    assert f"{tmp_path / kind}: is no usable {kind}" in error
    assert not (tmp_path / "out").exists()
