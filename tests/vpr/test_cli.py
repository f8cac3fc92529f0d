"""The command line: flags, recipes, help, completion, results and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.config import CompareConfig, LatencyConfig, RecallConfig, ReportConfig
from export.config import Int8Config
from student.config import DistillConfig
from teacher.config import StageConfig, TrainConfig
from vpr.artifacts.writer import write_artifact
from vpr.cli import COMMANDS, main, read_config, run
from vpr.cli.parser import build_parser, flags_of
from vpr.common.errors import BudgetExceeded
from vpr.common.flags import to_flags
from vpr.imaging.preprocess import Preprocess
from vpr.retrieval.config import RerankConfig

TRAIN = ("teacher", "train", "--catalog", "c", "--output", "o")
DISTILL = ("--teacher", "t", "--catalog", "c", "--output", "o")


def _error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit with 2 and one line, and return the line."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("vpr: error: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return error


def _copy(texture_folder: Path, copy: Path) -> Path:
    shutil.copytree(texture_folder, copy)
    return copy


def _distill(*arguments: str) -> DistillConfig:
    config: DistillConfig = read_config(DistillConfig, "student distill", [*DISTILL, *arguments])
    return config


def test_flags_are_kebab_case_and_nested_keys_dotted() -> None:
    config = _distill(
        "--weight-decay", "0.1", "--run.validate-every", "3", "--losses.head.margin-end=0.5", "--seed", "5"
    )
    assert (config.weight_decay, config.run.validate_every, config.seed) == (0.1, 3, 5)
    assert (config.losses.head.margin_end, config.losses.head.scale) == (0.5, 16.0)


def test_section_defaults_survive_a_flag() -> None:
    assert _distill("--run.ema", "0.5").run.validate_every == 2
    config = read_config(
        RecallConfig, "bench recall", ["--catalog", "c", "--models", "m", "--output", "o", "--rerank.qe", "3"]
    )
    assert config.rerank == RerankConfig(centre=True, dba=5, qe=3)


def test_booleans_take_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    config = _distill("--dry-run", "--loader.keep-in-memory", "--no-allow-leak")
    assert (config.dry_run, config.loader.keep_in_memory, config.allow_leak) == (True, True, False)
    assert not _distill("--dry-run", "--no-dry-run").dry_run
    assert not read_config(TrainConfig, "teacher train", [*TRAIN[2:], "--no-tower.squash"]).tower.squash
    assert "--dry-run: takes no value, got 'true'." in _error_of(capsys, *TRAIN, "--dry-run=true")
    assert "true: unexpected argument." in _error_of(capsys, *TRAIN, "--dry-run", "true")


def test_lists_need_no_quotes() -> None:
    words = ["--models", "a", "it's, [b]", "null", "--batches", "1", "8", "--output", "o"]
    config = read_config(LatencyConfig, "bench latency", words)
    assert (config.models, config.batches) == (("a", "it's, [b]", "null"), (1, 8))
    assert _distill("--views.scale", "0.5", "1.5").views.scale == (0.5, 1.5)
    words = ["--onnx", "a", "--ranges", "r", "--output", "o"]
    assert read_config(Int8Config, "export int8", words).exclude_layers is None
    assert read_config(Int8Config, "export int8", [*words, "--exclude-layers"]).exclude_layers == ()
    assert read_config(Int8Config, "export int8", [*words, "--exclude-layers", "x", "y"]).exclude_layers == ("x", "y")


@pytest.mark.parametrize("text", ["\U0001f600 chair", "\x7f\x85\u2028\ufeff", "caf\u00e9", "a\tb\\", "2024-01-01"])
def test_lists_keep_every_character(text: str) -> None:
    config = read_config(LatencyConfig, "bench latency", ["--models", text, "--output", text])
    assert (config.models, config.output) == ((text,), text)


def test_list_of_sections_takes_one_word_each() -> None:
    stages = ("--stages", "{train: head, epochs: 2}", "{train: all, epochs: 3, views: {rotate: 5}}")
    config = read_config(TrainConfig, "teacher train", [*TRAIN[2:], *stages])
    assert config.stages[0] == StageConfig("head", 2)
    assert config.stages[1].views is not None
    assert config.stages[1].views.rotate == 5


def test_optional_values_and_negative_numbers() -> None:
    int8 = ["--onnx", "a", "--ranges", "r", "--output", "-o", "--max-recall-drop", "0.01", "--catalog", "c"]
    config = read_config(Int8Config, "export int8", int8)
    assert (config.max_recall_drop, config.output) == (0.01, "-o")
    compare = read_config(CompareConfig, "bench compare", ["a", "b", "--max-recall-drop", "-0.01"])
    assert compare.max_recall_drop == -0.01
    assert read_config(Int8Config, "export int8", [*int8, "--max-recall-drop", "1e-5"]).max_recall_drop == 1e-5


def test_flags_of_a_configuration_read_back() -> None:
    config = ReportConfig("a b", ("x", "it's"), "o", batches=(2,), rerank=RerankConfig(qe=3), ranges=("r",), seed=2)
    assert read_config(ReportConfig, "bench report", to_flags(ReportConfig, vars(config))) == config
    assert to_flags(DistillConfig, {"dry_run": True, "model": {"dim": 64}}) == ["--model.dim", "64", "--dry-run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fly", "vpr fly: unknown command. See 'vpr --help'."),
        ("teacher tran", "vpr teacher tran: unknown command. Did you mean teacher train? See 'vpr teacher --help'."),
        ("export tensorrt", "vpr export tensorrt: unknown command. Did you mean export engine?"),
        ("serve --port 1", "vpr serve --port: unknown command. Did you mean search serve?"),
        ("quantize", "vpr quantize: unknown command. Did you mean export int8?"),
        ("teacher train --lr 0.1", "--lr: unknown option. A teacher's rates and epochs are in --stages: --stages '{tr"),
        ("teacher train --epochs 3", "--epochs: unknown option. A teacher's rates and epochs are in --stages"),
        ("teacher train --weight_decay 1", "--weight_decay: unknown option."),
        ("teacher train --run.emaa 1", "--run.emaa: unknown option. Did you mean --run.ema? See 'vpr teacher train"),
        ("teacher train --ema 1", "--ema: unknown option. Did you mean --run.ema?"),
        ("teacher train --tower x", "--tower: unknown option. Did you mean --tower.name?"),
        ("teacher train --allow_leak", "--allow_leak: unknown option. Did you mean --allow-leak?"),
        ("teacher train --config x", "--config: unknown option."),
        (
            "teacher train --seed x --catalog c --output o",
            "seed: expected int, got 'x'. See 'vpr teacher train --help'.",
        ),
        ("teacher train --seed 1.5 --catalog c --output o", "seed: expected int, got '1.5'."),
        ("teacher train --head.loss x", "head.loss: expected one of 'arcface', 'cosface', got 'x'."),
        ("teacher train --stages 3", "stages: expected the keys of StageConfig, got '3'."),
        ("teacher train --seed", "--seed: no value given."),
        ("teacher train --catalog c", "output: no value given."),
        ("bench latency --models a --output o --batches 1 x", "batches: expected int, got 'x'."),
        ("bench compare a b --max-recall-drop x", "max_recall_drop: expected float, got 'x'."),
        ("bench compare a b c", "c: unexpected argument."),
        ("bench compare a", "after: no value given."),
        ("export onnx --student s --output o --opset 21", "opset: expected one of 20, 23, got '21'."),
        ("teacher train --recipe", "--recipe: no value given."),
        ("teacher train --recipe absent.yaml", "absent.yaml: no such recipe file."),
        ("teacher train --recipe absent", "teacher/absent: unknown recipe. Choose one of teacher/aicrowd-1st,"),
        ("recipes show sample", "sample: several stages have this recipe. Choose teacher/sample or student/sample."),
        ("completion tcsh", "shell: expected one of 'bash', 'zsh', 'fish', got 'tcsh'."),
    ],
)
def test_wrong_words_are_named(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert f"vpr: error: {message}" in _error_of(capsys, *words.split())


@pytest.mark.parametrize(
    "words",
    [
        ("bench recall", "--catalog", "c", "--models", "a", "--output", "o", "--seed", "-1"),
        ("bench report", "--catalog", "c", "--models", "a", "--output", "o", "--seed", "-1"),
        ("bench report", "--catalog", "c", "--models", "a", "--output", "o", "--threads", "100000"),
        ("bench report", "--catalog", "c", "--models", "a", "--output", "o", "--threads", "-1"),
        ("bench latency", "--models", "a", "--output", "o", "--threads", "100000"),
        ("bench compare", "a", "b", "--seed", "-1"),
        ("bench storage", "--embeddings", "e", "--output", "o", "--seed", "-1"),
        ("calibrate", "--onnx", "a", "--catalog", "c", "--output", "o", "--seed", "-1"),
        ("student embed", "--model", "a", "--catalog", "c", "--output", "o", "--threads", "100000"),
    ],
)
def test_numbers_out_of_range_are_rejected(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    error = _error_of(capsys, *words[0].split(), *words[1:])
    assert f"vpr: error: {words[-2].lstrip('-')}: " in error
    assert words[-1] in error


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text("epochs: 3\nrun: {ema: 0.5, clip: 2}\nunlabelled: [a, b]\ndry_run: true\n")
    for arguments in (["--recipe", str(recipe), "--run.ema", "0.9"], ["--run.ema", "0.9", "--recipe", str(recipe)]):
        config = _distill(*arguments, "--no-dry-run")
        assert (config.epochs, config.run.ema, config.run.clip, config.run.validate_every) == (3, 0.9, 2, 2)
        assert (config.unlabelled, config.dry_run) == (("a", "b"), False)


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = read_config(TrainConfig, "teacher train", [*TRAIN[2:], "--recipe", "sample"])
    assert (config.tower.name, len(config.stages)) == ("sample", 3)
    assert _distill("--recipe", "sample").model.stem == "conv"
    assert _distill("--recipe", "student/sample-full").epochs == 40


def test_recipes_list_show_and_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["recipes", "list"])
    listed = capsys.readouterr().out.splitlines()
    assert {"teacher/sample", "student/sample", "teacher/guie-1st"} <= {line.split()[0] for line in listed}
    main(["recipes", "list", "--json"])
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [line.split()[0] for line in listed]
    main(["recipes", "show", "teacher/sample"])
    shown = capsys.readouterr().out
    main(["recipes", "copy", "teacher/sample"])
    assert capsys.readouterr().out == "sample.yaml\n"
    assert (tmp_path / "sample.yaml").read_text() == shown
    assert "sample.yaml: already exists." in _error_of(capsys, "recipes", "copy", "teacher/sample", ".")
    assert "'absent' does not exist." in _error_of(capsys, "recipes", "copy", "seed", "absent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 3\n", "learning_rate: unknown key."),
        ("epoch: 3\n", "epoch: unknown key. Did you mean epochs? See 'vpr student distill --help'."),
        ("run: {eam: 3}\n", "run.eam: unknown key. Did you mean run.ema?"),
        ("run: 3\n", "run: expected keys with values, got '3'."),
        ("epochs: many\n", "epochs: expected int, got 'many'."),
        ("epochs: 1.5\n", "epochs: expected int, got '1.5'."),
        ("dry_run: x\n", "dry_run: expected bool, got 'x'."),
        ("cache: 3\n", "cache: expected str, got '3'."),
        ("unlabelled: x\n", "unlabelled: expected a list, got 'x'. Write [x]."),
        ("views: {scale: [1]}\n", "views.scale: expected tuple with 2 elements, got '[1]'."),
        ("epochs:\nseed: 1\n", "epochs: no value given. Give one, or leave the line out."),
        ("epochs:\n", "--recipe: expected keys with values, got 'epochs:'."),
        ("losses: {head: {margin: }}\n", "losses.head.margin: no value given."),
        ("[1, 2]\n", ""),
        ("a: [\n", ""),
        ("x" * 1000, ""),
    ],
)
def test_wrong_recipe_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert f"vpr: error: {message}" in _error_of(capsys, "student", "distill", "--recipe", str(recipe), *DISTILL)


def test_yaml_runs_no_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path}/owned']\n")
    _error_of(capsys, *TRAIN, "--recipe", str(recipe))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nseed: [*a, *a]\n", "a recipe with anchors (&). Write out their values"),
        ("seed: " + "1:" * 40_000, "more than 65536 characters of YAML"),
        ("seed: 0x" + "f" * 5000, "a number of more than 64 bits"),
        ("seed: " + "[" * 5000, "nesting"),
        ("config: {a: 1}\n", "a recipe has no key 'config'"),
        ("config: another.yaml\n", "a recipe has no key 'config'"),
        ("seed: 1\nroot: null\n", "root: no value given."),
        ("seed: !own x\n", "could not determine a constructor for the tag"),
    ],
)
def test_hostile_recipe_is_rejected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert message in _error_of(capsys, "catalog", "--recipe", str(recipe), "--reader", "sample", "--output", "o")


def test_recipe_text_may_contain_an_ampersand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("root: 'chairs & tables'\n")
    error = _error_of(capsys, "catalog", "--recipe", str(recipe), "--reader", "folder", "--output", str(tmp_path / "o"))
    assert "chairs & tables" in error


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        overview = capsys.readouterr().out
        assert all(f"vpr {name} " in overview for name in COMMANDS)
    main(["teacher"])
    overview = capsys.readouterr().out
    assert "vpr teacher soup" in overview
    assert "vpr student" not in overview


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_and_help_all_complete(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main([*name.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith(f"usage: vpr {name}")
    assert "common:" in lines
    assert f"vpr {name} --help-all" in lines[-1]
    assert all(len(line) <= 80 for line in lines[1:] if "|" not in line)
    main([*name.split(), "--help-all"])
    complete = capsys.readouterr().out
    flags = flags_of(build_parser(COMMANDS[name].load_config()))
    assert all(f"  {flag}" in complete for flag, action in flags.items() if action.dest != "recipe")
    assert set(COMMANDS[name].common) <= {action.dest for action in flags.values() if not action.required}


def test_help_shows_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["teacher", "train", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--loader.batch-size INT" in text
    assert "[default: 128]" in text
    assert "--head.loss arcface|cosface" in text
    assert "[default: {train: head, epochs: 1} {train: all, epochs: 9}]" in text
    assert "--tower.squash, --no-tower.squash" in text
    assert "SUPPRESS" not in text


def test_help_and_errors_import_no_heavy_library() -> None:
    """In a process for all commands, so that no other test has imported a library."""
    code = """
import sys
from vpr.cli import COMMANDS, main
for name in COMMANDS:
    main([*name.split(), "--help"])
    for flags in ("--no-such-flag", "--help-all"):
        try:
            main([*name.split(), flags])
        except SystemExit as error:
            assert error.code == 2, error.code
heavy = {"torch", "numpy", "onnx", "onnxruntime", "PIL", "pyarrow", "pydantic", "lightning"} & set(sys.modules)
sys.exit(f"{heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_completion_scripts_name_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        main(["completion", shell])
        script = capsys.readouterr().out
        assert all(word in script for word in ("teacher", "distill", "--recipe", "--run.validate-every"))
        if shell == "bash" and shutil.which("bash"):
            words = "COMP_WORDS=(vpr student distill --run.val) COMP_CWORD=3; _vpr; echo ${COMPREPLY[@]}"
            done = subprocess.run(["bash", "-c", f"{script}\n{words}"], capture_output=True, text=True, check=True)
            assert done.stdout == "--run.validate-every\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from vpr import __version__

    main(["--version"])
    assert capsys.readouterr().out == f"vpr {__version__}\n"


def test_artifact_path_is_the_only_output(
    capsys: pytest.CaptureFixture[str], texture_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "catalog"
    arguments = ["catalog", "--reader", "folder", "--root", str(texture_folder), "--output", str(output)]
    main(arguments)
    captured = capsys.readouterr()
    assert captured.out == f"{output}\n"
    assert captured.err
    main([*arguments, "--json", "-q"])
    captured = capsys.readouterr()
    card = json.loads(captured.out)
    assert (card["path"], card["kind"]) == (str(output), "catalog")
    assert captured.err == ""


def test_run_returns_the_result() -> None:
    assert [row["name"] for row in run(["recipes", "list"])][:1] == ["teacher/aicrowd-1st"]


@pytest.mark.parametrize(("error", "code"), [(BudgetExceeded("too slow"), 1), (KeyboardInterrupt(), 130)])
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: Any) -> None:
        raise error

    monkeypatch.setattr("vpr.cli.run", fail)
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == code
    assert capsys.readouterr().err == ("vpr: too slow\n" if code == 1 else "")


def test_truncated_jpeg(capsys: pytest.CaptureFixture[str], texture_folder: Path, tmp_path: Path) -> None:
    root = _copy(texture_folder, tmp_path / "photos")
    victim = sorted(root.rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    error = _error_of(capsys, "catalog", "--reader", "folder", "--root", str(root), "--output", str(tmp_path / "c"))
    assert str(victim) in error
    assert "truncated" in error
    assert "--skip-unreadable" in error
    assert not (tmp_path / "c").exists()


def test_text_named_jpg(capsys: pytest.CaptureFixture[str], texture_folder: Path, tmp_path: Path) -> None:
    root = _copy(texture_folder, tmp_path / "photos")
    victim = sorted(root.rglob("*.jpg"))[0]
    victim.write_text("<html>not found</html>")
    error = _error_of(capsys, "catalog", "--reader", "folder", "--root", str(root), "--output", str(tmp_path / "c"))
    assert f"{victim}: not an image" in error


def test_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ["--reader", "folder", "--root", str(tmp_path / "empty"), "--output", str(tmp_path / "c")]
    assert str(tmp_path / "empty") in _error_of(capsys, "catalog", *arguments)


def test_csv_with_a_missing_column(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "images.csv"
    table.write_text("image,prodct\na.jpg,1\n")
    error = _error_of(capsys, "catalog", "--reader", "csv", "--root", str(table), "--output", str(tmp_path / "c"))
    assert str(table) in error
    assert "product" in error


def test_edited_weights(capsys: pytest.CaptureFixture[str], student_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(student_artifact, tmp_path / "student")
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    error = _error_of(capsys, "export", "onnx", "--student", str(copy), "--output", str(tmp_path / "onnx"))
    assert f"{weights}: changed since it was written" in error


def test_card_of_a_newer_schema(capsys: pytest.CaptureFixture[str], student_artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(student_artifact, tmp_path / "student")
    card = copy / "card.json"
    card.write_text(card.read_text().replace('"schema": 2', '"schema": 99').replace('"schema":2', '"schema":99'))
    error = _error_of(capsys, "export", "onnx", "--student", str(copy), "--output", str(tmp_path / "onnx"))
    assert f"{card}: expected card schema up to 2, got 99. Upgrade" in error


@pytest.mark.parametrize("kind", ["student", "onnx"])
def test_damaged_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    name, config = ("model.safetensors", {"model": {}}) if kind == "student" else ("model.onnx", {"precision": "fp32"})
    with write_artifact(tmp_path / kind, kind, config) as draft:
        (draft.path / name).write_bytes(b"\xff" * 100)
        draft.preprocess = Preprocess(size=32)
    verb = ["export", "onnx", "--student"] if kind == "student" else ["export", "engine", "--onnx"]
    error = _error_of(capsys, *verb, str(tmp_path / kind), "--output", str(tmp_path / "out"))
    assert f"{tmp_path / kind}: not a usable {kind}" in error
    assert not (tmp_path / "out").exists()
