"""Results on standard output: a table for people, JSON and names for programs.

Rules. `-o json` prints one JSON value and nothing else; `-o name` one name per line; `-o wide` is
the table with more columns. With `--watch` the same is printed again whenever it changes: a screen
that is redrawn where there is a terminal, one JSON value per line otherwise. Colour is for
terminals only, and never where NO_COLOR is set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from grafos import _clock

Row = Mapping[str, Any]
WHEN: Final = ("_at_ms", "end_ms")
"""So are instants called, in milliseconds of Unix time."""
WATCH_MS: Final = 1_000
FORMATS: Final = ("table", "wide", "json", "name")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    cell: Callable[[Row], Any]
    wide: bool = False
    """Only with `-o wide`."""


@dataclass(frozen=True, slots=True)
class Listing:
    """How one sort of thing is shown."""

    columns: Sequence[Column]
    name: Callable[[Row], str]
    empty: str = "nothing"
    """What people read where there are none."""


def add_flags(parser: argparse.ArgumentParser, *, watch: bool = True) -> None:
    parser.add_argument("-o", "--output", choices=FORMATS, default="table", help="how to show it")
    parser.add_argument("--no-headers", action="store_true", help="tables without their first line")
    if watch:
        parser.add_argument("--watch", action="store_true", help="go on showing it until Ctrl-C")


def show(given: argparse.Namespace, fetch: Callable[[], Any], listing: Listing) -> int:
    """Print what `fetch` gives: rows, or an object with rows under `items`."""
    shown = None
    while True:
        text = rendered(fetch(), listing, given.output, headers=not given.no_headers)
        if text != shown:
            _print(text, again=shown is not None)
            shown = text
        if not getattr(given, "watch", False):
            return 0
        _clock.sleep_ms(WATCH_MS)


def rendered(what: Any, listing: Listing, output: str, *, headers: bool) -> str:
    """What is printed, with its last line end."""
    rows: Sequence[Row] = what if isinstance(what, list) else what["items"]
    if output == "json":
        whole = what if isinstance(what, list) else what.get("whole", what["items"])
        return json.dumps(whole, sort_keys=True) + "\n"
    if output == "name":
        return "".join(f"{listing.name(row)}\n" for row in rows)
    columns = [each for each in listing.columns if output == "wide" or not each.wide]
    if not rows:
        print(listing.empty, file=sys.stderr)
        return ""
    lines = [[str(column.cell(row)) for column in columns] for row in rows]
    if headers:
        lines.insert(0, [column.title for column in columns])
    return table(lines, bold_first=headers)


def table(lines: Sequence[Sequence[str]], *, bold_first: bool = False) -> str:
    """Columns under each other, two spaces apart."""
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    texts = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    if bold_first and colour():
        texts[0] = f"\x1b[1m{texts[0]}\x1b[0m"
    return "\n".join(texts) + "\n"


def facts(pairs: Sequence[tuple[str, Any]]) -> str:
    """One thing, described line by line."""
    width = max(len(name) for name, _ in pairs) + 1
    return "".join(f"{name + ':':{width}} {_said(name, value)}\n" for name, value in pairs)


def _said(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(each) for each in value)
    if name.endswith(WHEN) and isinstance(value, int):
        return f"{value} ({datetime.fromtimestamp(value // 1000, UTC):%Y-%m-%d %H:%M:%S} UTC)"
    return str(value)


def colour() -> bool:
    return "NO_COLOR" not in os.environ and sys.stdout.isatty()


def progress(text: str) -> None:
    """For whoever waits; never part of a result."""
    print(text, file=sys.stderr, flush=True)


def duration(ms: int) -> str:
    """For people: `350ms`, `12s`, `5m03s`, `2h04m`, `3d02h`."""
    seconds = ms // 1000
    if ms < 1000:
        return f"{ms}ms"
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    return f"{seconds // 86_400}d{seconds % 86_400 // 3600:02}h"


def _print(text: str, *, again: bool) -> None:
    if again and sys.stdout.isatty():
        sys.stdout.write("\x1b[H\x1b[2J")
    sys.stdout.write(text)
    sys.stdout.flush()
