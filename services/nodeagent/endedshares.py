"""The shares that holders have ended, kept by control: fronts come and go, and what was struck out
must stay so for as long as its lease lives.

Rules. For the owner's thread. Nothing here is durable: an agent that dies ends all of its leases,
and their shares with them. How many there may be is for the front to say, which asks its book.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from services.nodeagent.ipc import Message

PER_MESSAGE: Final = 256


class EndedShares:
    def __init__(self) -> None:
        self._by_lease: dict[tuple[str, int], dict[tuple[str, str], None]] = {}

    def add(self, lease_id: str, epoch: int, share_id: str, by: str) -> None:
        self._by_lease.setdefault((lease_id, epoch), {})[share_id, by] = None

    def forget(self, lease_id: str, epoch: int) -> None:
        """The lease is over."""
        self._by_lease.pop((lease_id, epoch), None)

    def messages(self) -> Iterator[Message]:
        """For a fresh front, in messages of a bounded size."""
        for (lease_id, epoch), pairs in self._by_lease.items():
            ended = [list(pair) for pair in pairs]
            for at in range(0, len(ended), PER_MESSAGE):
                part = ended[at : at + PER_MESSAGE]
                yield {"op": "shares_ended", "lease": lease_id, "epoch": epoch, "ended": part}
