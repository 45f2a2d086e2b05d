"""`grafos config`, `version`, `completion`: about the command itself."""

from __future__ import annotations

import argparse
import json
import sys

from grafos._cli import completion, output, settings
from grafos._cli.exits import OK
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing


def register(tree: Tree) -> None:
    noun = tree.noun("config", "settings and where they come from")
    view = noun.verb("view", "every setting that is in force", _view)
    view.add_argument("--show-origin", action="store_true", help="flag, variable, file or default")
    output.add_flags(view, watch=False)
    version = tree.verb("version", "which grafos this is", _version)
    version.add_argument("-o", "--output", choices=("table", "json"), default="table")
    script = tree.verb("completion", "a script that completes commands with Tab", _completion)
    script.add_argument("shell", choices=completion.SHELLS)


def _view(given: argparse.Namespace) -> int:
    rows = []
    for name in settings.SETTINGS:
        found = settings.found(given, name)
        rows.append({"name": name, "value": found.text, "origin": found.origin})
    columns = [
        Column("SETTING", lambda row: row["name"]),
        Column("VALUE", lambda row: row["value"]),
    ]
    if given.show_origin or given.output == "wide":
        columns.append(Column("ORIGIN", lambda row: row["origin"]))
    return output.show(given, lambda: rows, Listing(columns, name=lambda row: str(row["name"])))


def _version(given: argparse.Namespace) -> int:
    from importlib import metadata

    try:
        found = metadata.version("grafos")
    except metadata.PackageNotFoundError:
        found = "unknown"
    python = sys.version.split()[0]
    if given.output == "json":
        print(json.dumps({"grafos": found, "python": python}))
    else:
        print(f"grafos {found} (Python {python})")
    return OK


def _completion(given: argparse.Namespace) -> int:
    from grafos._cli.parser import build

    print(completion.script(build(), given.shell), end="")
    return OK
