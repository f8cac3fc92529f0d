from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import edit_card
from vpr.artifacts import store
from vpr.artifacts.card import CorruptArtifact, Parent
from vpr.artifacts.paths import CARD_NAME
from vpr.artifacts.stage import Stage
from vpr.artifacts.store import load_artifact, reraise_as_artifact_error
from vpr.artifacts.writer import check_output, find_up_to_date, write_artifact
from vpr.common.errors import UserError


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    path = tmp_path / "thing"
    with write_artifact(path, "ranges", {"method": "mse", "bins": 2048}) as writer:
        (writer.path / "ranges.json").write_text("{}")
        writer.metrics["tensors"] = 0
    return path


def test_round_trip(artifact: Path) -> None:
    loaded = load_artifact(artifact, "ranges")
    assert loaded.card.config == {"method": "mse", "bins": 2048}
    assert loaded.file("ranges.json").read_text() == "{}"
    assert [p.name for p in artifact.parent.iterdir()] == ["thing"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=5), st.dictionaries(st.text(), JSON, max_size=3))
def test_any_json_round_trips(config: dict[str, Any], metrics: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thing"
        with write_artifact(path, "ranges", config) as writer:
            writer.metrics = metrics
        card = load_artifact(path).card
        assert (card.config, card.metrics) == (config, metrics)
        assert json.loads((path / CARD_NAME).read_bytes())["config"] == config
        assert find_up_to_date(path, "ranges", config, []) is not None
        assert find_up_to_date(path, "ranges", {**config, "one": "more"}, []) is None


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_changed_byte_is_detected(content: bytes, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thing"
        with write_artifact(path, "ranges", {}) as writer:
            (writer.path / "file").write_bytes(content)
        at = data.draw(st.integers(0, len(content) - 1))
        changed = bytearray(content)
        changed[at] ^= data.draw(st.integers(1, 255))
        (path / "file").write_bytes(changed)
        with pytest.raises(CorruptArtifact, match="changed since it was written"):
            load_artifact(path)


def test_deeply_nested_card_is_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / CARD_NAME).write_text("[" * 100_000)
    check_output(tmp_path, "ranges")
    with pytest.raises(UserError, match="not a card"):
        load_artifact(tmp_path)


def test_failed_write_changes_nothing(artifact: Path) -> None:
    before = (artifact / "card.json").read_bytes()

    def fail_half_way() -> None:
        with write_artifact(artifact, "ranges", {}) as writer:
            (writer.path / "half").write_text("x")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fail_half_way()
    assert (artifact / "card.json").read_bytes() == before
    assert [p.name for p in artifact.parent.iterdir()] == ["thing"]


def test_kill_between_renames_is_repaired(artifact: Path) -> None:
    artifact.rename(artifact.parent / ".thing.previous")
    assert load_artifact(artifact).card.name == "thing"


def test_foreign_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not an artifact"), write_artifact(tmp_path / "mine", "ranges", {}):
        pass
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_up_to_date_artifact_is_found(artifact: Path) -> None:
    assert find_up_to_date(artifact, "ranges", {"bins": 2048, "method": "mse"}, [])
    assert find_up_to_date(artifact, "ranges", {"bins": 1024, "method": "mse"}, []) is None
    assert find_up_to_date(artifact.parent / "absent", "ranges", {}, []) is None


def test_corrupt_artifact_is_made_again(artifact: Path) -> None:
    config = {"method": "mse", "bins": 2048}
    (artifact / "ranges.json").write_text("[]")
    assert find_up_to_date(artifact, "ranges", config, []) is None
    with write_artifact(artifact, "ranges", config) as writer:
        (writer.path / "ranges.json").write_text("{}")
    assert find_up_to_date(artifact, "ranges", config, [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "ranges.json").write_text("[]"), "checksum differs"),
        (lambda p: (p / "ranges.json").unlink(), "ranges.json: missing"),
        (lambda p: edit_card(p, schema=3), "expected card schema up to 2, got 3. Upgrade"),
        (lambda p: edit_card(p, schema="x"), "card schema up to 2, got 'x'"),
        (lambda p: edit_card(p, surprise=1), "key 'surprise'"),
        (lambda p: edit_card(p, kind="spell"), "key 'kind'"),
        (lambda p: (p / "card.json").write_text("{"), "not a card"),
        (lambda p: (p / "card.json").write_text("[" * 100_000), "not a card"),
        (lambda p: (p / "card.json").write_text("[1]"), "not a card"),
        (lambda p: (p / "card.json").write_text(" " * ((4 << 20) + 1)), "larger than 4194304 bytes, so not a card"),
        (lambda p: (p / "card.json").unlink(), "no artifact here"),
        (lambda p: edit_card(p, files={"../x": {"size": 1, "sha256": "0"}}), "leads out of the artifact"),
        (lambda p: edit_card(p, files={"n" * 300: {"size": 1, "sha256": "0"}}), "missing"),
        (lambda p: edit_card(p, files={"a\0b": {"size": 1, "sha256": "0"}}), "missing"),
        (lambda p: edit_card(p, files={"/etc/passwd": {"size": 1, "sha256": "0"}}), "leads out of the artifact"),
    ],
)
def test_corruption_message(artifact: Path, damage: object, message: str) -> None:
    damage(artifact)
    with pytest.raises(UserError, match=message) as caught:
        load_artifact(artifact)
    assert "\n" not in str(caught.value)
    assert str(artifact) in str(caught.value)


def test_symbolic_link_inside_is_rejected(artifact: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.json"
    (artifact / "ranges.json").rename(target)
    (artifact / "ranges.json").symlink_to(target)
    with pytest.raises(UserError, match="symbolic link"):
        load_artifact(artifact)


@pytest.mark.parametrize("target", ["card.json", "/dev/zero", "elsewhere.json"])
def test_linked_card_is_rejected(artifact: Path, target: str) -> None:
    (artifact / "card.json").rename(artifact / "elsewhere.json")
    (artifact / "card.json").symlink_to(target)
    with pytest.raises(UserError, match=r"card\.json: not a plain file"):
        load_artifact(artifact)


def test_pipe_as_card_does_not_block(artifact: Path) -> None:
    (artifact / "card.json").unlink()
    os.mkfifo(artifact / "card.json")
    with pytest.raises(UserError, match=r"card\.json: not a plain file"):
        load_artifact(artifact)


def test_wrong_kind_is_rejected(artifact: Path) -> None:
    with pytest.raises(UserError, match="expected an artifact of kind teacher or student, got ranges"):
        load_artifact(artifact, ("teacher", "student"))


def test_output_of_another_kind_is_kept(artifact: Path) -> None:
    with (
        pytest.raises(UserError, match="holds an artifact of kind ranges, expected onnx"),
        write_artifact(artifact, "onnx", {}),
    ):
        pass
    assert load_artifact(artifact, "ranges")


@pytest.mark.parametrize(
    "damage",
    [
        lambda card: card.write_text("{"),
        lambda card: card.write_text('{"schema": 1}'),
        lambda card: (card.rename(card.parent / "elsewhere.json"), card.symlink_to("elsewhere.json")),
    ],
)
def test_artifact_with_corrupt_card_is_made_again(artifact: Path, damage: Any) -> None:
    config = {"method": "mse", "bins": 2048}
    damage(artifact / "card.json")
    assert find_up_to_date(artifact, "ranges", config, []) is None
    with write_artifact(artifact, "ranges", config) as writer:
        (writer.path / "ranges.json").write_text("{}")
    assert find_up_to_date(artifact, "ranges", config, [])


def test_newer_card_is_not_replaced(artifact: Path) -> None:
    edit_card(artifact, schema=3)
    with pytest.raises(UserError, match="Upgrade"):
        find_up_to_date(artifact, "ranges", {}, [])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_is_not_an_artifact_error(artifact: Path, error: Exception) -> None:
    with pytest.raises(type(error)), reraise_as_artifact_error(load_artifact(artifact)):
        raise error
    with pytest.raises(UserError, match="not a usable ranges"), reraise_as_artifact_error(load_artifact(artifact)):
        raise ValueError("a shape")


def test_output_equal_to_input_is_rejected(artifact: Path) -> None:
    """Of the same kind, as the FP32 graph that an INT8 one is made from."""
    parent = load_artifact(artifact).as_parent("ranges")
    with pytest.raises(UserError, match="the output is also the input 'ranges'"):
        find_up_to_date(artifact, "ranges", {"other": 1}, [parent])


def test_output_is_checked_before_the_work(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds an artifact of kind ranges, expected onnx"):
        find_up_to_date(artifact, "onnx", {}, [])
    with pytest.raises(UserError, match=r"holds a ranges of another command \(without latency\.json\)"):
        find_up_to_date(artifact, "ranges", {}, [], "latency.json")
    assert find_up_to_date(artifact, "ranges", {}, [], "ranges.json") is None
    for name, target in {"link": artifact, "dangling": tmp_path / "nowhere"}.items():
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UserError, match=f"{name}: the output must be a directory, not a symbolic link"):
            find_up_to_date(tmp_path / name, "ranges", {}, [])


def test_metric_without_names_is_rejected(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "made", "onnx", {}) as writer:
        writer.metrics = {"kept": ["a", "b"], "wide": 3.5, "mixed": ["a", 1]}
    artifact = load_artifact(tmp_path / "made")
    assert artifact.names("kept") == ("a", "b")
    assert artifact.names("absent") == ()
    for metric in ("wide", "mixed"):
        with pytest.raises(UserError, match=rf"'metrics\.{metric}' is not a list of names"):
            artifact.names(metric)


def test_file_is_hashed_once_per_process(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_RACY_NS", 0)
    hashed = []
    original = store.file_sha256
    monkeypatch.setattr(store, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    for _ in range(3):
        load_artifact(artifact)
    assert hashed == ["ranges.json"]
    (artifact / "ranges.json").write_text("[]")
    with pytest.raises(CorruptArtifact, match="checksum differs"):
        load_artifact(artifact)


def test_recently_changed_file_is_hashed_again(artifact: Path) -> None:
    """A second change within one step of the file system's clock leaves the time stamp as it was."""
    load_artifact(artifact)
    state = (artifact / "ranges.json").stat()
    (artifact / "ranges.json").write_text("[]")
    os.utime(artifact / "ranges.json", ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CorruptArtifact, match="checksum differs"):
        load_artifact(artifact)


def test_older_schema_is_made_again(artifact: Path) -> None:
    edit_card(artifact, schema=1)
    with pytest.raises(CorruptArtifact, match="expected card schema 2, got 1"):
        load_artifact(artifact)
    assert find_up_to_date(artifact, "ranges", {"method": "mse", "bins": 2048}, []) is None


def test_keys_that_replace_an_artifact_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parents = [Parent(role="catalog", name="c", sha256="0" * 64)]
    old = {"tower": {"name": "a", "size": 1}, "stages": [1], "seed": 0}
    with Stage(str(tmp_path / "a"), "teacher", old, parents).write():
        pass
    for config, inputs, changes in (
        ({**old, "tower": {"name": "b", "size": 1}, "stages": [2]}, parents, "tower.name, stages"),
        (old, [parents[0].model_copy(update={"sha256": "1" * 64})], "its inputs"),
    ):
        assert Stage(str(tmp_path / "a"), "teacher", config, inputs).find() is None
        assert f"a is replaced: {changes} changed" in capsys.readouterr().err
    assert Stage(str(tmp_path / "a"), "teacher", old, parents).find() is not None
    assert "replaced" not in capsys.readouterr().err
