"""`grafos demo`: a fabric of its own, real data and real failures, explained as it goes."""

from __future__ import annotations

import argparse

from grafos._cli.nouns import Tree


def register(tree: Tree) -> None:
    tree.verb("demo", "see leases granted, used, lost and proved back, in a minute", _demo)


def _demo(given: argparse.Namespace) -> int:
    from grafos._demo import main

    return main()
