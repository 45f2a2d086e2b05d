"""Golden scripts: a conversation with a piece of code, written down, and replayed as a test.

A script is a text file of cases. A case is its command lines, a line `----`, what the code
answered, and an empty line:

    # Comments stay where they are.
    grant node=a bytes=10 now=0
    ----
    Granted(lease=1, epoch=1)

An answer that itself holds empty lines stands between two double rules (`----` twice).
`REWRITE=1 pytest …` writes down what the code answers now; the diff is then read by a person.

Rules: what reads and answers a script is pure, so that the core's scripts can also be replayed
where there is no operating system (tests/core/test_pure.py). For that, put the code that
interprets commands into `tests/core/<name>_script.py`, with a function `interpreter()` that
returns a fresh one, and its scripts into `tests/core/testdata/<name>/`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

RULE = "----"

Interpret = Callable[[str], str]
"""Takes the command lines of one case, without comments; gives the answer."""


@dataclass(frozen=True, slots=True)
class Case:
    """One exchange of a script."""

    line_index: int
    """Where its first line stands in the file, from 1."""
    asked: tuple[str, ...]
    """Command lines, comments among them."""
    answer: str

    def commands(self) -> str:
        """The lines that are commands: without comments and empty lines."""
        return "\n".join(line for line in self.asked if line and not line.startswith("#"))


class Malformed(ValueError):
    """A script that is no sequence of cases."""


def parse(text: str) -> tuple[list[Case], str]:
    """The cases of a script, and what stands after the last one (comments only)."""
    lines = text.splitlines()
    cases: list[Case] = []
    at = 0
    while at < len(lines):
        try:
            rule = lines.index(RULE, at)
        except ValueError:
            break
        answer, after = _answer(lines, rule + 1)
        first = next((i for i in range(at, rule) if lines[i]), rule)
        cases.append(Case(at + 1 + (first - at), tuple(lines[first:rule]), answer))
        at = after
    rest = lines[at:]
    for line in rest:
        if line and not line.startswith("#"):
            raise Malformed(f"no {RULE} after: {line}")
    return cases, "\n".join(rest)


def _answer(lines: list[str], start: int) -> tuple[str, int]:
    """The answer that begins at a line, and the index of the line after it."""
    if start < len(lines) and lines[start] == RULE:
        for end in range(start + 1, len(lines) - 1):
            if lines[end] == lines[end + 1] == RULE:
                return "\n".join(lines[start + 1 : end]), end + 2
        raise Malformed(f"line {start}: a double {RULE} is never closed")
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return "\n".join(lines[start:end]), end + 1


def _render(asked: tuple[str, ...], answer: str) -> Iterator[str]:
    yield from asked
    yield RULE
    if "" in answer.split("\n") and answer:
        yield RULE
        yield answer
        yield RULE
        yield RULE
    elif answer:
        yield answer
    yield ""


def replay(text: str, interpret: Interpret) -> str:
    """The script as it would be with the answers that the code gives now."""
    cases, rest = parse(text)
    lines: list[str] = []
    for case in cases:
        lines.extend(_render(case.asked, interpret(case.commands()).rstrip()))
    if rest.strip():
        lines.append(rest.strip("\n"))
    return "\n".join(lines).rstrip("\n") + "\n"


def difference(text: str, interpret: Interpret) -> str:
    """The first case whose answer changed, told so that it can be read; empty when none did."""
    for case in parse(text)[0]:
        answer = interpret(case.commands()).rstrip()
        if answer != case.answer:
            return (
                f"line {case.line_index}:\n{case.commands()}\n"
                f"--- written down\n{case.answer}\n--- answered now\n{answer}"
            )
    return ""


def run_golden(path: "Path", interpret: Interpret) -> None:
    """Replay one script; fail on the first answer that changed, or rewrite under REWRITE=1."""
    # Imported late: this module is also used where there is no operating system.
    import os

    text = path.read_text(encoding="utf-8")
    if os.environ.get("REWRITE") == "1":
        path.write_text(replay(text, interpret), encoding="utf-8")
        return
    assert parse(text)[0], f"{path.name} holds no case"
    changed = difference(text, interpret)
    assert not changed, f"{path.name}, {changed}\nIf this is meant: REWRITE=1, and read the diff."


def scripts(folder: "Path", name: str) -> "list[Path]":
    """The scripts of one subject, in order: `folder`/testdata/`name`/*.txt."""
    found = sorted((folder / "testdata" / name).glob("*.txt"))
    assert found, f"no script below {folder.name}/testdata/{name}"
    return found
