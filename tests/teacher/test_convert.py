from __future__ import annotations

import argparse
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from teacher.convert import convert, find_state
from teacher.tower_config import ConvertConfig
from vpr.common.errors import UserError

TENSORS = {"conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "norm.running_mean": torch.ones(2)}
HEAD = {"head.weight": torch.zeros(5, 2), "head.bias": torch.zeros(5)}


def convert_file(folder: Path, content: Any, name: str = "in.pt", **options: Any) -> dict[str, torch.Tensor]:
    """Save a checkpoint, convert it, and return what was written."""
    torch.save(content, folder / name)
    output = convert(ConvertConfig(str(folder / name), str(folder / "out.safetensors"), **options))
    return load_file(output)


def assert_tensors(written: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", ["in.pt", "in.pth", "in.bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"model_state": state},
        lambda state: {"model": HEAD, "ema": {"decay": 0.9, "module": state}},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"_orig_mod.model.{name}": value for name, value in state.items()},
        # A part that was compiled (pytorch-image-models#1566).
        lambda state: {name.replace(".", "._orig_mod.", 1): value for name, value in state.items()},
    ],
)
def test_weights_are_taken_out_of_usual_wrappers(tmp_path: Path, name: str, wrap: Any) -> None:
    assert_tensors(convert_file(tmp_path, wrap(TENSORS), name), TENSORS)


def test_dropped_entries_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vpr")
    logging.getLogger("vpr").addHandler(caplog.handler)
    state = {**TENSORS, **HEAD, "version": 3}
    written = convert_file(tmp_path, {"state_dict": state, "optimizer": {"lr": 0.1}, "epoch": 7})
    assert_tensors(written, TENSORS)
    messages = " | ".join(caplog.messages)
    for part in (
        "dropped entries: optimizer, epoch",
        "dropped head: head.weight, head.bias",
        "dropped no tensors: ver",
    ):
        assert part in messages
    assert "2 tensors" in messages


def test_head_is_kept_on_request(tmp_path: Path) -> None:
    assert_tensors(convert_file(tmp_path, {**TENSORS, **HEAD}, keep_head=True), {**TENSORS, **HEAD})


def test_key_selects_the_entry(tmp_path: Path) -> None:
    content = {"student": {"x": torch.zeros(1)}, "teacher": {"backbone": TENSORS, "epoch": 1}}
    assert_tensors(convert_file(tmp_path, content, key="teacher.backbone"), TENSORS)
    with pytest.raises(UserError, match=r"no entry 'nothing' with weights\. Choose from: 'student', 'teacher'"):
        find_state(content, "nothing")


def test_shared_and_transposed_tensors_are_written(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    written = convert_file(tmp_path, {"a": weight, "b": weight, "c": weight.T, "d": weight[1:]})
    assert_tensors(written, {"a": weight, "b": weight, "c": weight.T, "d": weight[1:]})


class Payload:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for content in ({"x": torch.zeros(1), "y": Payload(marker)}, Payload(marker)):
        with pytest.raises(UserError, match=r"in\.pt needs .*could run code\. Save its state_dict alone"):
            convert_file(tmp_path, content)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UserError, match=r"plain\.pt"):
        convert(ConvertConfig(str(tmp_path / "plain.pt"), str(tmp_path / "out.safetensors")))
    assert not marker.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_object_that_needs_code_is_named(tmp_path: Path) -> None:
    """The message of PyTorch has the word GLOBAL ahead of the name."""
    with pytest.raises(UserError, match=r"in\.pt needs numpy\.\S*scalar, and loading it could run code"):
        convert_file(tmp_path, {"state_dict": TENSORS, "best": np.float64(0.5)})


def test_bad_checkpoints_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(TENSORS, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-200])
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    torch.save([TENSORS], tmp_path / "list.pt")
    torch.save(HEAD, tmp_path / "head.pt")
    torch.save({"x": torch.zeros(1).expand(1 << 40)}, tmp_path / "huge.pt")
    torch.save({"x": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 20))
    expected = {
        "absent.pt": "does not exist",
        "junk.pt": "checkpoint",
        "empty.pt": "cannot be read",
        "cut.pt": "cannot be read",
        "none.pt": "has no tensors of a model",
        "list.pt": "expected a dictionary of tensors, got list",
        "head.pt": "has no tensors but a head",
        "huge.pt": "tensor 'x' is larger than its data in the file",
        "sparse.pt": "tensor 'x' is sparse",
        "bomb.pt": "is a compressed archive",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            convert(ConvertConfig(str(tmp_path / name), str(tmp_path / "out.safetensors")))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_bad_outputs_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output: expected a name that ends in \.safetensors"):
        ConvertConfig("in.pt", str(tmp_path / "out.bin"))
    with pytest.raises(UserError, match="expected a file in an existing folder"):
        ConvertConfig("in.pt", str(tmp_path / "absent" / "out.safetensors"))
    with pytest.raises(UserError, match="is the checkpoint and would be replaced"):
        ConvertConfig(str(tmp_path / "x.safetensors"), str(tmp_path / "x.safetensors"))
