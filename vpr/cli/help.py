"""Help: the overview of commands, and the keys of one command, short or complete."""

import dataclasses
import inspect
import re
import shutil
import textwrap
from argparse import Action
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from vpr.cli.commands import COMMANDS, DEVICE_COMMANDS, Command
from vpr.cli.parser import build_parser, element_type, flags_of, without_none

_INDENT = 28
_METAVARS = {str: "TEXT", int: "INT", float: "FLOAT"}
_RECIPE = ("--recipe NAME|FILE", "Packaged recipe (see `vpr recipes list`) or YAML file; flags override its keys.")
_VERBOSITY = ("-q, -v", "Print warnings only, or details too.")
_DEVICE = (
    "--device INDEX|UUID|cpu",
    "GPU to use, by its index in CUDA's order; cpu uses none. [default: the first GPU]",
)
_JSON = ("--json", "Print the result as JSON to stdout and all else to stderr.")


def overview(group: str = "") -> str:
    """Return the commands, or those of a group."""
    names = [name for name in COMMANDS if not group or name.split()[0] == group]
    usage = f"usage: vpr {group or 'COMMAND'} {'COMMAND ' if group else ''}[--recipe NAME] [--key value ...]"
    more = "vpr COMMAND --help shows the common keys of a command, --help-all all keys; vpr --version the version."
    return "\n".join([usage, "", *(f"  vpr {name:16} {COMMANDS[name].help}" for name in names), "", more])


def command_help(name: str, is_complete: bool = False) -> str:
    """Return the help of a command; see :func:`config_help`."""
    command = COMMANDS[name]
    return config_help(f"vpr {name}", command.load_config(), command, is_complete)


def config_help(prog: str, config_class: type[Any], command: Command, is_complete: bool) -> str:
    """Return the help of a configuration; ``prog`` is the start of the command line.

    If ``is_complete``, every key has its full description; else only the required and the common keys are shown.
    """
    flags = flags_of(build_parser(config_class))
    required = [action for action in flags.values() if action.required]
    others = [action for action in flags.values() if not action.required and action.dest != "recipe"]
    usage = " ".join(action.dest.upper() if command.positional else _head(action) for action in required)
    lines = [" ".join(f"usage: {prog} {usage} [--key value ...]".split()), "", f"{command.help}."]
    if longer := [f"vpr {other}" for other in COMMANDS if f"vpr {other}".startswith(f"{prog} ")]:
        lines.append(f"See also: {', '.join(longer)}.")
    if details := (inspect.getdoc(config_class) or "").partition("\n\nAttributes:")[0].partition("\n\n")[2]:
        lines += ["", *textwrap.wrap(" ".join(details.replace("``", "`").split()), 80)]
    lines += _section("required", [_entry(action, is_complete) for action in required])
    if not is_complete:
        common = [action for action in others if action.dest in command.common]
        lines += _section("common", [_RECIPE, *(_entry(action, False) for action in common)])
        lines += ["", f"`{prog} --help-all` shows all {len(required) + len(others)} keys."]
        return "\n".join(lines)
    for section in dict.fromkeys(action.dest.rpartition(".")[0] for action in others):
        members = [action for action in others if action.dest.rpartition(".")[0] == section]
        lines += _section(section or "optional", [_entry(action, True) for action in members])
    general = [_RECIPE, *([_DEVICE] if prog.removeprefix("vpr ") in DEVICE_COMMANDS else []), _VERBOSITY, _JSON]
    return "\n".join(lines + _section("all commands", general))


def _section(title: str, entries: Iterable[tuple[str, str]]) -> list[str]:
    """Return a title and entries in two columns; nothing without entries."""
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    lines: list[str] = []
    for head, text in entries:
        wrapped = textwrap.wrap(text, width - _INDENT) or [""]
        if len(head) > _INDENT - 4:
            lines.append(f"  {head}")
            head = ""
        lines += [f"  {head:{_INDENT - 2}}{wrapped[0]}", *(" " * _INDENT + line for line in wrapped[1:])]
    return ["", f"{title}:", *lines] if lines else []


def _entry(action: Action, is_complete: bool) -> tuple[str, str]:
    """Return a key's flag and its description with the default, cut to the first sentence in the short help."""
    text = " ".join((action.help or "").replace("``", "`").split())
    if not is_complete:
        text = re.split(r"(?<=\.)\s(?=[A-Z`])", text)[0]
    if not action.required and (is_complete or action.default not in ("", None, False, 0, ())):
        text += f" [default: {_default_text(action.default)}]"
    return _head(action), text


def _default_text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return " ".join(map(_default_text, value)) or "none"
    if dataclasses.is_dataclass(value):
        changed = (field.name for field in dataclasses.fields(value) if getattr(value, field.name) != field.default)
        return f"{{{', '.join(f'{name}: {getattr(value, name)}' for name in changed)}}}"
    return "none" if value in ("", None) else str(value)


def _head(action: Action) -> str:
    """Return a key's flag with its type."""
    flag, hint = action.option_strings[0], without_none(getattr(action, "hint", str))
    if hint is bool:
        return f"{flag}, --no-{flag[2:]}"
    element = element_type(hint)
    return f"{flag} {_metavar(element)} ..." if element else f"{flag} {_metavar(hint)}"


def _metavar(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return _METAVARS.get(hint, "YAML")
