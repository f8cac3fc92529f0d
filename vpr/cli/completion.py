"""``vpr completion``: a script that completes commands and flags in a shell."""

from dataclasses import dataclass
from typing import Literal

from vpr.cli.commands import COMMANDS, DEVICE_COMMANDS
from vpr.cli.parser import RECIPE_FLAG, build_parser, flags_of

_BASH = """_vpr() {{
  local words= line="${{COMP_WORDS[*]:0:COMP_CWORD}} "
  case "$line" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _vpr vpr"""
_SCRIPTS = {
    "bash": _BASH,
    "zsh": "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" + _BASH,
    "fish": """function _vpr
  switch (string join ' ' (commandline -opc))' '
{cases}
  end
end
complete -c vpr -a '(_vpr)'""",
}
_CASES = {"bash": '  "{line}"*) words="{words}" ;;', "fish": "  case '{line}*'\n    string split ' ' '{words}'"}


@dataclass(frozen=True)
class CompletionConfig:
    """Shell to complete in.

    Attributes:
        shell: Shell; load the script with `source <(vpr completion bash)`, or with `vpr completion fish | source`.
    """

    shell: Literal["bash", "zsh", "fish"]


def print_completion(config: CompletionConfig) -> None:
    """Print the completion script of a shell."""
    choices: dict[str, dict[str, None]] = {}
    for name, command in COMMANDS.items():
        words = name.split()
        for count, word in enumerate(words):  # `vpr`: its groups; a group: its commands
            choices.setdefault(" ".join(["vpr", *words[:count]]), {})[word] = None
        parser = build_parser(command.load_config())
        device = ["--device"] if name in DEVICE_COMMANDS else []
        flags = [RECIPE_FLAG, *flags_of(parser), *device, "--help", "--help-all"]
        choices.setdefault(f"vpr {name}", {}).update(dict.fromkeys(flags))
    case = _CASES.get(config.shell, _CASES["bash"])
    lines = sorted(choices, key=len, reverse=True)  # the first match wins
    cases = "\n".join(case.format(line=f"{line} ", words=" ".join(choices[line])) for line in lines)
    print(_SCRIPTS[config.shell].format(cases=cases))
