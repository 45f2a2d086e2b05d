"""A reader who types in every example of a page, in order, and compares what he sees.

    ```python     runs; all blocks of one page share their names. `print(x)  # 42` must print 42
    ```console    every line must be `$ grafos …`: it is run, and its exit status is 0, or what
                  `# exit 3` at the end of the line says; lines below it must be seen in its output
    <!-- not run: reason -->          before a block: it is left out, and counted
    <!-- fabric: node-n1=bind.device:EIO -->    the page's fabric has this fault

Rules. `…` in what is shown stands for anything, and a run of spaces for any other. `$name` in a
command is the text that the page's Python calls `name`. A page has one fabric, which its commands
and its Python meet as the one of this machine.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMAND_S_MAX = 60
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_FABRIC = re.compile(r"<!-- fabric: (\S+)=(\S+) -->")
_PRINTS = re.compile(r"^\s*print\(.*\)  # (.+)$")
_EXIT = re.compile(r"\s+# exit (\d+)$")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    line: int
    """Of its first line of text, from 1."""
    not_run: str
    """The reason; empty: it is run."""


@dataclass(frozen=True, slots=True)
class Page:
    """One document: its examples, and what its fabric must be like."""

    path: Path
    blocks: tuple[Block, ...]
    faults: dict[str, str]

    @property
    def runs(self) -> list[Block]:
        return [each for each in self.blocks if not each.not_run]


def read_page(path: Path) -> Page:
    """The Python and console blocks of a page, in order."""
    text = path.read_text("utf-8")
    faults = dict(_FABRIC.findall(text))
    return Page(path, tuple(_blocks(text.splitlines())), faults)


def _blocks(lines: list[str]) -> list[Block]:
    found: list[Block] = []
    inside, start, before = "", 0, ""
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            if not inside and line.strip():
                before = line.strip()
            continue
        if inside:
            if inside in ("python", "console"):
                reason = _NOT_RUN.fullmatch(before)
                body = "\n".join(lines[start : number - 1]) + "\n"
                found.append(Block(inside, body, start + 1, reason[1] if reason else ""))
            inside, before = "", ""
        else:
            inside, start = line.removeprefix("```").strip() or "text", number
    assert not inside, f"a block that begins in line {start} does not end"
    return found


@dataclass(slots=True)
class Reader:
    """Types in the examples of one page."""

    page: Page
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def follow(self) -> None:
        for block in self.page.runs:
            try:
                self._run(block)
            except BaseException as error:
                error.add_note(f"in {self.page.path.name}, the block at line {block.line}")
                raise

    def _run(self, block: Block) -> None:
        if block.language == "python":
            self._run_python(block)
        else:
            self._run_console(block)

    def _run_python(self, block: Block) -> None:
        source = "\n" * (block.line - 1) + block.text  # tracebacks then name the page's own lines
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, str(self.page.path), "exec"), self.names)
        shown = [found[1] for line in block.text.splitlines() if (found := _PRINTS.match(line))]
        assert_seen(shown, printed.getvalue())

    def _run_console(self, block: Block) -> None:
        command, shown = "", list[str]()
        for line in [*block.text.splitlines(), "$"]:
            if not line.startswith("$"):
                shown.append(line)
                continue
            if command:
                self._run_command(command, shown)
            command, shown = line.removeprefix("$").strip(), []

    def _run_command(self, command: str, shown: list[str]) -> None:
        expected = _EXIT.search(command)
        texts = {name: value for name, value in self.names.items() if isinstance(value, str)}
        words = [_filled(word, texts) for word in shlex.split(_EXIT.sub("", command))]
        assert words[0] == "grafos", f"only `grafos …` is run, not {command!r}"
        done = subprocess.run(
            [sys.executable, "-m", "grafos._cli", *words[1:]],
            capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False,
        )  # fmt: skip
        output = done.stdout + done.stderr
        status = int(expected[1]) if expected else 0
        assert done.returncode == status, f"{command}: {done.returncode}, {output}"
        for line in shown:
            assert any(_fits(line, each) for each in output.splitlines()), (
                f"{command}: no line like {line!r} in\n{output}"
            )


def _filled(word: str, texts: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda found: texts[found[1]], word)


def assert_seen(shown: list[str], printed: str) -> None:
    """Every shown line was printed, in this order; others may stand between them."""
    lines = iter(printed.splitlines())
    for line in shown:
        assert any(_fits(line, each) for each in lines), f"{line!r} is not in\n{printed}"


def _fits(shown: str, line: str) -> bool:
    parts = (re.escape(" ".join(part.split())) for part in shown.split("…"))
    pattern = r"\s*.*\s*".join(parts)
    return re.fullmatch(pattern, " ".join(line.split())) is not None


def environment_of(state: Path, run: Path, config: Path) -> dict[str, str]:
    """What makes a fabric the one of this machine, for Python and for commands."""
    return {
        "GRAFOS_STATE_DIR": str(state), "GRAFOS_RUN_DIR": str(run),
        "XDG_CONFIG_HOME": str(config), "NO_COLOR": "1", "COLUMNS": "100",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip
