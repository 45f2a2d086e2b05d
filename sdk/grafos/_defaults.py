"""Which fabric a builder asks that was not told: the one of the innermost `with` block.

Rules. A thread inside a block of its own asks that one; any other thread asks the block entered
last, whoever entered it. This file loads nothing, so that entering a block costs nothing.
"""

from __future__ import annotations

import threading
from typing import Any

_entered: list[tuple[int, Any]] = []
"""(thread, connection or something with a `connection`), in the order of entering."""


def enter(source: Any) -> None:
    _entered.append((threading.get_ident(), source))


def leave(source: Any) -> None:
    """Undo the latest `enter` of this one. Leaving what was never entered is no error."""
    for index in range(len(_entered) - 1, -1, -1):
        if _entered[index][1] is source:
            del _entered[index]
            return


def innermost() -> Any | None:
    """The source in force; None outside of all blocks."""
    own = [source for thread, source in _entered if thread == threading.get_ident()]
    if own:
        return own[-1]
    return _entered[-1][1] if _entered else None


def clear() -> None:
    """In a forked child: its parent's blocks are not its own."""
    _entered.clear()
