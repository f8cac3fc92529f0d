"""Command-line flags and recipes, read into a configuration dataclass."""

import dataclasses
import difflib
import json
import re
from argparse import SUPPRESS, Action
from collections import deque
from collections.abc import Iterable, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from vpr.cli.commands import COMMANDS, Command
from vpr.common.errors import UserError
from vpr.common.recipes import find_recipe, install_safe_yaml_loader

RECIPE_FLAG = "--recipe"
# jsonargparse's messages, as `key: problem`.
_EXPECTED = r"expected \1, got '\2'"
_REWRITES = (
    (r'Parser key "([\w.]+)":', r"\1:"),
    (r"Problem with given class_path '[\w.]+': ", ""),
    (r"Expected a <class 'tuple'>\. Got value: (\[.*\])", r"'\1' cannot be read. Check for a missing comma or bracket"),
    (r"Expected a <class 'tuple'>\. Got value: (.*)", r"expected a list, got '\1'. Write [\1]"),
    (r"<class '(\w+)'>", r"\1"),
    (r"typing\.Literal\[(.*?)\]", r"one of \1"),
    (r"Expected an? (.+?)\. Got value: (.*)", _EXPECTED),
    (
        r"Does not validate against any of the Union subtypes Subtypes: \[(.+?), NoneType\].*Given value: (.*)",
        _EXPECTED,
    ),
    (r"Not a valid subclass of (\w+)\. Got value: (.*?) Subclass types.*", r"expected the keys of \1, got '\2'"),
    (r"Unexpected config: (.*)", r"--recipe: expected keys with values, got '\1'"),
    (r"the following arguments are required: (.*)", r"\1: no value given"),
)
_UNKNOWN_KEY = re.compile(r"(?:Group '([\w.]+)' does not accept o|O)ption '([^']+)'(?: is not accepted)?")


class CommandParser(ArgumentParser):
    """Parser whose flags are in kebab case and know their type."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; jsonargparse calls this for every key and copies its source into argument groups."""
        action = super().add_argument(*(name.replace("_", "-") for name in args), **kwargs)
        action.hint = getattr(action, "_typehint", kwargs.get("type"))
        return action


def build_parser(config_class: type[Any]) -> CommandParser:
    """Return the parser of a configuration."""
    parser = CommandParser(add_help=False, print_config=None, exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class)
    for section in dataclasses.fields(config_class):
        default, section_class = cast(Any, section.default), cast(Any, type(section.default))
        if hasattr(section_class, "__dataclass_fields__") and default == section_class():
            # The instance holds what __post_init__ derives. A recipe with another preset must not inherit its sizes.
            keys = [key for key in dataclasses.fields(default) if getattr(default, key.name) != key.default]
            parser.set_defaults({f"{section.name}.{key.name}": key.default for key in keys})
    return parser


def flags_of(parser: CommandParser) -> dict[str, Action]:
    """Return the flags of single keys, in the order of the configuration."""
    keys = (action for action in parser._actions if action.default != SUPPRESS and action.dest != "config")
    return {action.option_strings[0]: action for action in keys}


def read_config(config_class: type[Any], name: str, arguments: Sequence[str]) -> Any:
    """Build a configuration from flags over a recipe over defaults, checked by type.

    ``name`` is a command, whose stage has the packaged recipes, or how a script is started. ``arguments`` are flags,
    such as ``--recipe sample --run.ema 0.999 --dry-run``.

    Raises:
        UserError: If a key is unknown, has no value, or a value of another type.
    """
    install_safe_yaml_loader()
    parser = build_parser(config_class)
    prog = f"vpr {name}" if name in COMMANDS else name
    try:
        parsed = parser.parse_args(_expand(arguments, parser, prog, COMMANDS.get(name)))
        _check_values(parsed, parser.get_defaults())
        values = vars(parser.instantiate(parsed))
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{_explain(error, parser)} See '{prog} --help'.") from None
    return config_class(**{key: value for key, value in values.items() if key != "config"})


def _expand(arguments: Sequence[str], parser: CommandParser, prog: str, command: Command | None) -> list[str]:
    """Rewrite flags to the ``--key=value`` that jsonargparse reads: recipes first, booleans, lists in brackets."""
    flags, words, positional = flags_of(parser), deque(arguments), deque(command.positional if command else ())
    aliases = {f"--{name}": f"--{key}" for name, key in (command.aliases if command else {}).items()}
    recipes, others = [], []
    while words:
        word = words.popleft()
        if not word.startswith("--"):
            if not positional:
                raise UserError(f"{word}: unexpected argument. Put a flag before it. See '{prog} --help'.")
            word = f"--{positional.popleft()}={word}"
        flag, equals, value = word.partition("=")
        flag = aliases.get(flag, flag)
        positive = flag.replace("--no-", "--", 1)
        key = flags.get(flag, flags.get(positive))
        hint = getattr(key, "hint", None)
        if hint is bool:
            if equals:
                raise UserError(f"{flag}: takes no value, got '{value}'. Give {positive} or --no-{positive[2:]}.")
            others.append(f"{positive}={'true' if flag in flags else 'false'}")
            continue
        if flag not in flags and flag != RECIPE_FLAG:
            if command and flag in command.hints:
                raise UserError(f"{flag}: unknown option. {command.hints[flag]}")
            hint = suggest(flag, [*flags, RECIPE_FLAG])
            raise UserError(f"{flag}: unknown option.{hint} See '{prog} --help-all'.")
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--") and (not values or element_type(hint)):
            values.append(words.popleft())
        if flag == RECIPE_FLAG and values:
            recipes.append(f"--config={find_recipe(values[0], command.stage if command else '')}")
        elif element := element_type(hint):
            is_text = element is str or get_origin(element) is Literal
            others.append(f"{flag}=[{', '.join(_quote(text) if is_text else text for text in values)}]")
        elif values:
            others.append(f"{flag}={values[0]}")
        else:
            raise UserError(f"{flag}: no value given. See '{prog} --help'.")
    return recipes + others


def _quote(text: str) -> str:
    """Return a text in the quotes of YAML, which does not join JSON's two escapes of one character (yaml/yaml#73)."""
    return re.sub(r"[^ -~]", lambda match: f"\\U{ord(match[0]):08x}", json.dumps(text, ensure_ascii=False))


def element_type(hint: Any) -> Any:
    """Return the type of a list's elements; None for other types."""
    hint = without_none(hint)
    return get_args(hint)[0] if get_origin(hint) is tuple else None


def without_none(hint: Any) -> Any:
    """Return the type of an optional value."""
    if get_origin(hint) in (Union, UnionType):
        return next(member for member in get_args(hint) if member is not NoneType)
    return hint


def suggest(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known name, or nothing."""
    known = list(known)
    tail = word.lstrip("-")
    candidates = [name for name in known if name.endswith(f".{tail}") or name.startswith(f"{word}.")]
    candidates = candidates or difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {candidates[0]}?" if candidates else ""


def _check_values(parsed: Namespace, defaults: Namespace) -> None:
    """Raise an error for a recipe's `key:` without a value, which jsonargparse accepts for every type."""
    for key, default in defaults.items():
        section = key.rpartition(".")[0]
        if section and not isinstance(parsed.get(section), Namespace):
            raise UserError(f"{section}: expected keys with values, got '{parsed.get(section)}'.")
        if default is not None and parsed.get(key) is None:
            raise UserError(f"{key}: no value given. Give one, or leave the line out.")


def _explain(error: Exception, parser: CommandParser) -> str:
    """Return jsonargparse's message in one line, with a suggestion for an unknown key of a recipe."""
    text = " ".join(str(error).split()).rstrip(".")
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    if unknown := _UNKNOWN_KEY.search(text):
        key = ".".join(filter(None, unknown.groups()))
        hint = suggest(key, (action.dest for action in flags_of(parser).values()))
        return f"{text[: unknown.start()]}{key}: unknown key.{hint}"
    return f"{text}."
