"""The whole command line as one tree of nouns and verbs."""

from __future__ import annotations

import argparse
from typing import NoReturn

from grafos._cli import (
    audit,
    authority,
    cluster,
    config,
    demo,
    doctor,
    fence,
    lease,
    node,
    quota,
    token,
)
from grafos._cli.nouns import Tree, add_folders


class _Parser(argparse.ArgumentParser):
    """Says what would fit in one line, then where to read more."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def build() -> argparse.ArgumentParser:
    parser = _Parser(
        "grafos",
        description="Memory and blocks of many machines, leased.",
        allow_abbrev=False,
    )
    add_folders(parser)
    parser.set_defaults(run=lambda given: _usage(parser))
    tree = Tree(parser)
    for noun in (
        cluster,
        doctor,
        demo,
        node,
        lease,
        fence,
        audit,
        token,
        quota,
        authority,
        config,
    ):
        noun.register(tree)
    return parser


def _usage(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2
