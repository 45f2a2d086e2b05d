"""Refuse whoever acts on an old view: a number that only rises, checked where it matters.

    guard = FenceGuard(FenceEpoch.zero())
    message = Fenced(42, FenceEpoch.zero())
    guard.check(message.epoch())   # in force
    guard.advance()
    guard.check(message.epoch())   # raises: a newer epoch is in force

The fabric does this itself for everything leased. This is for what you build beside it: a file, a
database, a queue that must not hear from yesterday's leader. `Fenced` here is a value with its
epoch; the failure of that name is `grafos.Fenced`, and `StaleEpochError` is one.
"""

from __future__ import annotations

from grafos_core.fence import FencedMessage as Fenced
from grafos_core.fence import FenceEpoch, FenceGuard, StaleEpochError

__all__ = ["FenceEpoch", "FenceGuard", "Fenced", "StaleEpochError"]
