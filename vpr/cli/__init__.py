"""The ``vpr`` command: each command is a function of one configuration dataclass, found by name.

The stages are imported when their command runs, so help and errors in arguments import no heavy library, and this
package depends on no stage.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpr import __version__
from vpr.artifacts.paths import CARD_NAME
from vpr.cli.commands import COMMANDS, DEVICE_COMMANDS
from vpr.common.allocator import keep_freed_memory
from vpr.common.distributed import destroy_process_group, is_first
from vpr.common.errors import CheckFailed, UserError, explain_system_error, printable
from vpr.common.gpus import select_device
from vpr.common.log import configure_logging
from vpr.common.telemetry import disable_telemetry

__all__ = ["COMMANDS", "main", "read_config", "run", "silence_libraries"]

_VERBOSITY = {"-q": -1, "-v": 1}
_JSON = "--json"
_DEVICE = "--device"
_BROKEN_PIPE = 141  # as a shell reports SIGPIPE
_HELP = {"-h", "--help", "--help-all"}
_RESUMABLE = {("teacher", "train"), ("student", "distill")}
_OTHER_NAMES = {  # of commands, as other tools call them
    "export tensorrt": "export engine",
    "serve": "search serve",
    "train": "teacher train",
    "distill": "student distill",
    "quantize": "export int8",
    "quantise": "export int8",
    "predict": "search",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and print its result.

    Exit codes: 1 if a check fails, such as a budget that is exceeded, 2 and one line for an error that the caller can
    fix, 130 for Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    silence_libraries()
    configure_logging(sum(_VERBOSITY.get(word, 0) for word in words))
    as_json = _JSON in words
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = run([word for word in words if word != _JSON and word not in _VERBOSITY])
        destroy_process_group()
        if is_first():
            _print_result(result, as_json)
    except UserError as error:
        _fail(str(error))
    except CheckFailed as error:
        print(f"vpr: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if message := explain_system_error(error):
            _fail(message)
        if not isinstance(error, OSError):
            raise
        if isinstance(error, BrokenPipeError):  # such as `vpr recipes list | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(_BROKEN_PIPE)
        if error.filename is None:
            _fail(f"{' '.join(str(error).split())}: check the network, the disk and the paths")
        _fail(f"{error.filename}: {error.strerror}: check that the path exists and is writable")
    except KeyboardInterrupt:
        if is_first() and tuple(words[:2]) in _RESUMABLE:
            print("vpr: training was interrupted (Ctrl-C). Run the command again to resume it.", file=sys.stderr)
        sys.exit(130)


def run(arguments: Sequence[str]) -> Any:
    """Run a command and return the result of its function; None for help.

    Raises:
        UserError: If the command, a key or a value is wrong, or the command finds another error of the caller.
    """
    words = list(arguments)
    if words == ["--version"]:
        print(f"vpr {__version__}")
        return None
    name, rest = _find_command(words)
    if name not in COMMANDS or _HELP & set(rest):
        from vpr.cli.help import command_help, overview

        print(command_help(name, "--help-all" in rest) if name in COMMANDS else overview(name))
        return None
    command = COMMANDS[name]
    if name in DEVICE_COMMANDS:
        rest = _select_device(rest)
    config = read_config(command.load_config(), name, rest)
    if command.infers:
        keep_freed_memory()
    return command.load_function()(config)


def _select_device(words: list[str]) -> list[str]:
    """Apply ``--device``, before a library starts CUDA, and return the other words."""
    others: list[str] = []
    iterator = iter(words)
    for word in iterator:
        flag, equals, value = word.partition("=")
        if flag != _DEVICE:
            others.append(word)
            continue
        device = value if equals else next(iterator, "")
        if not device or device.startswith("--"):
            raise UserError("device: no value given. Set --device to the index of a GPU, its UUID, or cpu.")
        select_device(device)
    return others


def read_config(config_class: type[Any], name: str, arguments: Sequence[str]) -> Any:
    """Build the configuration of a command; see :func:`vpr.cli.parser.read_config`."""
    from vpr.cli.parser import read_config

    return read_config(config_class, name, arguments)


def _find_command(words: list[str]) -> tuple[str, list[str]]:
    """Split arguments into the name of a command, or of a group if its help is requested, and the other words."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS:
            return name, words[count:]
    names = [word for word in words if word not in _HELP]
    group = [name for name in COMMANDS if names and name.split()[0] == names[0]]
    if not names or (group and len(names) == 1):
        return " ".join(names), []
    from vpr.cli.parser import suggest

    name = " ".join(names[:2])
    overview = f"vpr {names[0]} --help" if group else "vpr --help"
    known = _OTHER_NAMES.get(name) or _OTHER_NAMES.get(names[0])
    hint = f" Did you mean {known}?" if known else suggest(name, COMMANDS)
    raise UserError(f"vpr {name}: unknown command.{hint} See '{overview}'.")


def _print_result(result: Any, as_json: bool) -> None:
    """Print the path of an artifact, or any result as JSON: an artifact as its card."""
    if as_json:
        if isinstance(result, Path) and (result / CARD_NAME).is_file():
            card = json.loads((result / CARD_NAME).read_text(encoding="utf-8"))
            result = {"path": str(result), **card}
        print(json.dumps(result, indent=1, default=_to_json))
    elif isinstance(result, Path):
        print(result)


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def _fail(message: str) -> None:
    print(f"vpr: error: {message}", file=sys.stderr)
    sys.exit(2)


def silence_libraries() -> None:
    """Silence notices of libraries, which hide the few lines that matter; their errors still show."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "open_clip", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    disable_telemetry()
