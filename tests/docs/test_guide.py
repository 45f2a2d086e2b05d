"""The documents do what they say: every example runs, every table is the code's."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import grafos
from grafos._builder import LATER
from grafos._cli import exits, settings
from grafos._cli.parser import build
from grafos_core import failure
from services.runtime import faults, telemetry
from tests.docs.blocks import Block, Page, Reader, assert_seen, environment_of, read_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GUIDE = sorted((DOCS / "guide").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDE, DOCS / "PROTOCOLS.md"]
NOT_RUN_MAX = 5

MS = {"µs": 0.001, "ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "days": 86_400_000}
BYTES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_example_of_a_page_does_what_the_page_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = read_page(path)
    with grafos.local_fabric(faults=page.faults) as fabric:
        for name in [name for name in os.environ if name.startswith("GRAFOS_")]:
            monkeypatch.delenv(name)
        layout = fabric.layout
        for name, value in environment_of(layout.state, layout.run, tmp_path / "config").items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        Reader(page, {"__name__": "__main__", "fabric": fabric}).follow()


def test_each_page_has_examples_and_hardly_any_is_left_out() -> None:
    pages = [read_page(path) for path in PAGES]
    assert all(page.runs for page in pages)
    left_out = [block.not_run for page in pages for block in page.blocks if block.not_run]
    assert len(left_out) <= NOT_RUN_MAX, left_out


# Tables -------------------------------------------------------------------------------------


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Every table: its titles, and its rows without backticks."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            rows.append([cell.replace("`", "").replace("\\|", "|").strip() for cell in cells])
        elif rows:
            yield rows[0], rows[2:]
            rows = []


def plain(text: str) -> str:
    return text.replace("`", "")


def rows_under(*titles: str) -> list[list[str]]:
    """The rows of every table of the documents that has exactly these titles."""
    texts = [path.read_text("utf-8") for path in PAGES]
    return [
        row for text in texts for found, rows in tables(text) if found == list(titles)
        for row in rows
    ]  # fmt: skip


def value_of(where: str) -> Any:
    """What stands in the code at `module:expression`."""
    module, _, expression = where.partition(":")
    return eval(expression, dict(vars(importlib.import_module(module))))


def as_number(text: str, where: str) -> float | str:
    """`60 s` in the unit that the code's name ends in; text where it is no number."""
    found = re.fullmatch(r"([\d,.]+)\s*(\S*)", text)
    if found is None:
        return text
    number, unit = float(found[1].replace(",", "")), found[2]
    if unit in MS:
        seconds = re.search(r"_(s|secs|S)(_|\b)", where) is not None
        return number * MS[unit] / (1_000 if seconds else 1)
    return number * BYTES[unit] if unit in BYTES else number


def test_every_default_that_is_named_is_the_codes_own() -> None:
    rows = rows_under("default", "value", "where")
    assert len(rows) >= 25
    wrong = {}
    for name, value, where in rows:
        there = value_of(where)
        if as_number(value, where) != there:
            wrong[name] = f"the page says {value}, {where} is {there!r}"
    assert not wrong


def test_every_failure_code_is_listed_with_its_failure_status_and_sentence() -> None:
    listed = rows_under("code", "failure", "status", "what outsiders read")
    known = [
        [code, known.kind.__name__, known.status, known.message]
        for code, known in failure.CODES.items()
    ]
    assert sorted(listed) == sorted(known)


def test_every_fault_point_is_listed() -> None:
    assert dict(rows_under("fault point", "what fails there")) == faults.POINTS


def counted_by_nobody() -> set[str]:
    """Metrics whose name stands in the services once: where it is described."""
    services = "".join(path.read_text("utf-8") for path in (ROOT / "services").rglob("*.py"))
    every = (*telemetry.GAUGES, *telemetry.COUNTERS, *telemetry.HISTOGRAMS)
    return {name for name in every if services.count(f'"{name}"') == 1}


def test_every_metric_that_a_service_counts_is_listed_with_its_labels() -> None:
    silent = counted_by_nobody()
    known = {
        f"{name}{ending}": [kind, ", ".join(labels) or "none", text]
        for kind, ending, table in (
            ("gauge", "", telemetry.GAUGES), ("counter", "_total", telemetry.COUNTERS),
            ("histogram", "", telemetry.HISTOGRAMS),
        )
        for name, (text, labels) in table.items()
        if name not in silent
    }  # fmt: skip
    listed = {name: rest for name, *rest in rows_under("metric", "kind", "labels", "what")}
    assert listed == known


def test_a_metric_that_nobody_counts_is_named_as_such() -> None:
    text = (DOCS / "guide" / "operations.md").read_text("utf-8")
    listed = re.search(r"counted by nobody yet: (.*)\.\n", text)
    assert set(re.findall(r"`(\w+)`", listed[1]) if listed else ()) == counted_by_nobody()


def commands(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, str]]:
    """Every command with its one line of help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for about in action._choices_actions:
                below = action.choices[about.dest]
                inner = list(commands(below, f"{path} {about.dest}"))
                yield from inner or [(f"{path} {about.dest}", plain(str(about.help)))]


def test_every_command_is_listed_with_its_help() -> None:
    assert dict(rows_under("command", "what it does")) == dict(commands(build(), "grafos"))


def test_every_setting_is_listed_with_its_variable_and_default() -> None:
    listed = rows_under("setting", "variable", "default value", "meaning")
    known = [
        [each.name, each.variable, each.default or "see below", plain(each.help)]
        for each in settings.SETTINGS.values()
    ]
    assert listed == known


def test_every_exit_status_is_listed() -> None:
    known = {"OK", "FAILED", "USAGE", "NOT_FOUND", "DENIED", "TIMEOUT", "INTERRUPTED"}
    listed = {int(row[0]) for row in rows_under("status", "meaning")}
    assert listed == {getattr(exits, name) for name in known}


def test_every_public_name_is_listed() -> None:
    listed = {name for row in rows_under("name", "what it is") for name in row[0].split(", ")}
    assert set(grafos.__all__) == listed


def test_every_option_of_a_later_version_is_listed() -> None:
    text = (DOCS / "guide" / "reference.md").read_text("utf-8")
    listed = re.search(r"Not there yet: (.+?)\.\n", text, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == LATER


# The reader himself -------------------------------------------------------------------------


def page_of(tmp_path: Path, text: str) -> Page:
    path = tmp_path / "page.md"
    path.write_text(text, "utf-8")
    return read_page(path)


def test_a_page_is_read_block_by_block_with_what_is_left_out(tmp_path: Path) -> None:
    text = (
        "<!-- fabric: node-n1=bind.device:EIO -->\n```python\na = 1\n```\nthen\n\n"
        "<!-- not run: it takes an hour -->\n```console\n$ grafos demo\n```\n```sh\nmake\n```\n"
    )
    page = page_of(tmp_path, text)
    assert page.blocks == (
        Block("python", "a = 1\n", 3, ""),
        Block("console", "$ grafos demo\n", 9, "it takes an hour"),
    )
    assert page.faults == {"node-n1": "bind.device:EIO"}
    assert page.runs == [page.blocks[0]]


@pytest.mark.parametrize(
    "example",
    [
        "```python\nprint(6 * 7)  # 43\n```\n",
        "```python\nassert False\n```\n",
        "```console\n$ grafos version  # exit 3\n```\n",
        "```console\n$ grafos version\ngrafos 99…\n```\n",
        "```console\n$ ls\n```\n",
    ],
    ids=["print", "assert", "status", "output", "foreign"],
)
def test_an_example_that_is_not_as_shown_is_found(tmp_path: Path, example: str) -> None:
    with pytest.raises(AssertionError):
        Reader(page_of(tmp_path, example)).follow()


def test_names_go_from_block_to_block_and_into_commands(tmp_path: Path) -> None:
    text = (
        "```python\nwhat = 'version'\n```\n```console\n$ grafos $what\ngrafos … (Python …)\n```\n"
        "```python\nprint(what, 1)  # version …\n```\n"
    )
    Reader(page_of(tmp_path, text)).follow()


def test_shown_lines_are_sought_in_their_order() -> None:
    assert_seen(["b…", "c"], "a\nbcd\nc\n")
    with pytest.raises(AssertionError):
        assert_seen(["c", "b"], "b\nc\n")


@pytest.mark.parametrize(
    ("text", "where", "number"),
    [
        ("60 s", "a:TTL_MS", 60_000), ("3 s", "a:max_backoff_secs", 3), ("4 KiB", "a:N", 4096),
        ("100,000", "a:KEPT_MAX", 100_000), ("0.75", "a:b", 0.75), ("keep", "a:b", "keep"),
    ],
)  # fmt: skip
def test_a_value_is_read_in_the_unit_of_its_name(
    text: str, where: str, number: float | str
) -> None:
    assert as_number(text, where) == number
