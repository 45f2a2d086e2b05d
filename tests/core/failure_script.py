"""The whole table of failure codes, as a golden script: a change of it shows in review."""

from collections.abc import Callable

from grafos_core import failure


def _answer(text: str) -> str:
    names = text.split()
    rows = [
        f"{code:18} {each.kind.__name__:16} {each.status:20} {each.message}"
        for code, each in failure.CODES.items()
        if names == ["all"] or code in names
    ]
    return "\n".join(rows)


def interpreter() -> Callable[[str], str]:
    return _answer
