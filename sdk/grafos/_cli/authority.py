"""authority."""

from grafos._cli.nouns import Tree


def register(tree: Tree) -> None:
    pass
