"""Scripts that let a shell complete `grafos` commands with Tab, made from the parser itself.

Rules. The script holds every command and flag there is and asks nobody at completion time, so it
costs nothing and needs no fabric; it is made anew when the commands change.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final

SHELLS: Final = ("bash", "zsh", "fish")

_BASH: Final = """\
_grafos() {{
    local word path=grafos
    COMPREPLY=()
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in -*) ;; *) path="$path $word" ;; esac
    done
    local words=
    case "$path" in
{cases}    esac
    COMPREPLY=( $(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}") )
}}
complete -o default -F _grafos grafos
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell reads, as in `source <(grafos completion bash)`."""
    paths = dict(_paths(parser, "grafos"))
    if shell == "fish":
        return "".join(_fish(paths))
    cases = "".join(
        f'        "{path}"*) words="{" ".join(words)}" ;;\n'
        for path, words in sorted(paths.items(), key=lambda pair: -len(pair[0]))
    )
    text = _BASH.format(cases=cases)
    return "autoload -U +X bashcompinit && bashcompinit\n" + text if shell == "zsh" else text


def _paths(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str]]]:
    """Each command with the words that may follow it."""
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words += action.choices
            for name, below in action.choices.items():
                yield from _paths(below, f"{path} {name}")
        else:
            words += [flag for flag in action.option_strings if flag.startswith("--")]
    yield path, words


def _fish(paths: dict[str, list[str]]) -> Iterator[str]:
    yield "complete -c grafos -f\n"
    for path, words in paths.items():
        seen = path.split()[1:]
        test = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in seen)
        condition = test or "__fish_use_subcommand"
        for word in words:
            what = f"-l {word[2:]}" if word.startswith("--") else f"-a {word}"
            yield f"complete -c grafos -n '{condition}' {what}\n"
