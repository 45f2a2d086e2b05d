"""How a noun adds its verbs to the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int]


class Tree:
    """The command `grafos`, to which nouns and verbs are added."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(title="commands", metavar="<command>")

    def verb(self, name: str, help: str, run: Run) -> argparse.ArgumentParser:
        """A command of one word, such as `up`."""
        return _add(self._subparsers, name, help, run)

    def noun(self, name: str, help: str) -> Tree:
        """A command of two words, such as `lease list`; without the second it shows its verbs."""
        parser = self._subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        parser.set_defaults(run=lambda given: _usage(parser))
        return Tree(parser)


def _add(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str, run: Run
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=run)
    add_folders(parser)
    return parser


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Which fabric is meant; said before the noun or after the verb."""
    for name, what in (("state-dir", "the fabric's state"), ("run-dir", "the fabric's sockets")):
        parser.add_argument(
            f"--{name}", metavar="DIR", default=argparse.SUPPRESS, help=f"folder of {what}"
        )


def _usage(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2
