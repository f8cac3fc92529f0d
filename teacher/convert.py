"""``vpr teacher convert``: write the weights of a PyTorch checkpoint as safetensors, without running its pickle."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from teacher.naming import strip_prefixes
from teacher.tower_config import ConvertConfig
from vpr.artifacts.run_folder import atomic_write
from vpr.common.errors import UserError, explain_system_error, printable
from vpr.common.log import get_logger

log = get_logger(__name__)

# Entries of a checkpoint that hold the weights. Averaged weights come first, because published results are theirs.
_WRAPPERS = (
    "ema", "model_ema", "ema_state_dict", "state_dict_ema", "module",
    "state_dict", "model_state_dict", "model_state", "model", "weights",
)  # fmt: skip
_HEAD = re.compile(r"(.*\.)?(head|head_dist|heads|fc|classifier|aux_head)(\.(fc|linear|l|head))?\.(weight|bias)")
_DEPTH = 8  # wrappers in wrappers
_SHOWN = 5  # names in a line


def convert(config: ConvertConfig) -> Path:
    """Write the tensors of a checkpoint's model to a safetensors file, and report what was left out.

    Raises:
        UserError: The checkpoint is missing, damaged, no checkpoint, or holds objects other than tensors and numbers.
    """
    path, output = Path(config.checkpoint), Path(config.output)
    state, entries = find_state(load_checkpoint(path), config.key)
    state = strip_prefixes({str(name): value for name, value in state.items()})
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"checkpoint: {path} has no tensors of a model. Name another file, or the entry with --key.")
    heads = [name for name in tensors if _HEAD.fullmatch(name)] if not config.keep_head else []
    kept = {name: _check_tensor(path, name, value) for name, value in tensors.items() if name not in heads}
    if not kept:
        raise UserError(f"checkpoint: {path} has no tensors but a head. Use --keep-head to write it.")
    data = save(kept)
    with atomic_write(output) as stream:
        stream.write(data)
    dropped = {
        "entries": entries,
        "head": heads,
        "no tensors": [name for name in state if name not in tensors],
    }
    for kind, names in dropped.items():
        if names:
            log.info(f"dropped {kind}: {_list_names(names)}")
    log.info(f"{output}: {len(kept)} tensors, {sum(value.numel() for value in kept.values()) / 1e6:.1f} M values")
    return output


def load_checkpoint(path: Path) -> Any:
    """Load a checkpoint with ``weights_only``; raise :class:`UserError` if it needs any other object.

    ``argparse.Namespace``, in which trainers store their arguments, is accepted as timm does; it runs no code.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"checkpoint: {path} {problem}. Check the path.")
    try:
        _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported global:?) (?!GLOBAL)([\w.]+)", str(error))
        problem = f"needs {found[1]}, and loading it could run code" if found else "is no checkpoint of weights alone"
        fix = "Save its state_dict alone with torch.save"
        raise UserError(f"checkpoint: {path} {problem}. {fix}.") from None
    except UserError:
        raise
    except Exception as error:  # torch raises many types on damaged files
        if explain_system_error(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160].rstrip('.')}"
        raise UserError(f"checkpoint: {path} cannot be read ({reason}). Save its state_dict with torch.save.") from None


def find_state(checkpoint: Any, key: str = "") -> tuple[Mapping[Any, Any], list[str]]:
    """Return the model's state dict inside a checkpoint, and the names of the entries next to it.

    ``key`` is the entry to take, such as ``teacher`` or ``model.ema``; empty takes the first usual name.

    Raises:
        UserError: There is no such entry, or no state dict.
    """
    state, others = checkpoint, []
    for part in key.split(".") if key else []:
        if not isinstance(state, Mapping) or not isinstance(state.get(part), Mapping):
            known = ", ".join(f"'{name}'" for name in _sub_entries(state)) or "none"
            raise UserError(f"key: the checkpoint has no entry '{part}' with weights. Choose from: {known}.")
        others += [str(name) for name in state if name != part]
        state = state[part]
    for _ in range(_DEPTH):
        wrapper = next((name for name in _WRAPPERS if name in _sub_entries(state)), None)
        if wrapper is None:
            break
        others += [str(name) for name in state if name != wrapper]
        state = state[wrapper]
    if not isinstance(state, Mapping):
        raise UserError(
            f"checkpoint: expected a dictionary of tensors, got {type(state).__name__}. Use its state_dict."
        )
    return state, others


def _sub_entries(state: Any) -> list[str]:
    """Return the names of the entries that are dictionaries."""
    if not isinstance(state, Mapping):
        return []
    return [name for name, value in state.items() if isinstance(name, str) and isinstance(value, Mapping) and value]


def _check_archive(path: Path) -> None:
    """Raise :class:`UserError` if a zip file is compressed: torch writes none, and it could unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise UserError(f"checkpoint: {path} is a compressed archive. Save its state_dict with torch.save.")


def _check_tensor(path: Path, name: str, value: Tensor) -> Tensor:
    """Return a contiguous copy that shares no memory; raise :class:`UserError` if the file has not all its values."""
    problem = ""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        problem = "is sparse, quantised or without data"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        problem = "is larger than its data in the file"
    if problem:
        raise UserError(f"checkpoint: {path}: tensor '{printable(name)[:80]}' {problem}. Save its dense weights.")
    return value.detach().clone(memory_format=torch.contiguous_format)


def _list_names(names: list[str]) -> str:
    first = ", ".join(printable(name)[:80] for name in names[:_SHOWN])
    return f"{first} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else first
