"""What a node knows of the shares of its leases: which were shown to it, which were ended.

A share needs no node to come into being; the first that a node hears of it is when somebody shows
it. From then on it has an entry here, and every use of it asks that entry, besides the lease's own
gate. A share that its giver ends is struck out with all that were made of it, the last ones first.

    shown ──► open ──► over       its own time ran out, or its lease's: nobody has to do anything
                └────► ended      by the one who gave it, by one before him, or by itself

Rules. An entry is of one chain, byte for byte, on one epoch of a lease; showing the chain again
finds the same one. Its end is fixed on this machine's boot-time clock when it is shown first, and
only comes nearer: for what was shown, a wall clock that is set back lengthens nothing. What was
ended stays ended for as long as its lease lives, also if it was never shown. Who may end what: the
lease's holder any share of it, the holder of a share that one and those that he gave. No lock, no
clock: whoever keeps a book sees to both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.share import Chain, Scope, over

SHOWN_MAX: Final = 256
"""Entries of one lease. Protects the node from holders who share in a loop."""
KEYS_MAX: Final = 64
"""Processes that use one share by their common name."""
ENDED_MAX: Final = 1_024
"""Shares of one lease that were ended; they are kept as long as it lives."""
ENDED_BY_SHARE_MAX: Final = 64
"""Of those, what the holder of one share may add."""
NS_PER_MS: Final = 1_000_000


@dataclass(slots=True, eq=False)
class Entry:
    """A chain that was shown."""

    digest: str
    lease_id: str
    epoch: int
    holder_key: str
    """Of the lease itself: who gave the first share."""
    lineage: tuple[str, ...]
    scope: Scope
    deadline_ns: int
    """Boottime."""
    cause: FabricError | None = None
    """Why it was ended; None: it was not."""
    keys: set[str] = field(default_factory=set)
    """Of those who showed it: several processes may go by one name."""
    in_flight: int = 0
    """Operations under it that move bytes now; whoever keeps the book counts."""

    @property
    def share_id(self) -> str:
        return self.lineage[-1]

    def end(self, now_ns: int) -> FabricError | None:
        """Why it is not to be used any more, as far as it is its own doing."""
        if self.cause is not None:
            return failure.from_fields(type(self.cause).__name__, self.cause.fields())
        return over(self.lease_id, self.epoch) if now_ns >= self.deadline_ns else None


@dataclass(frozen=True, slots=True)
class View:
    """One share in the tree of a lease."""

    share_id: str
    parent_id: str
    """Empty: given by the lease's holder."""
    depth: int
    scope: Scope
    remaining_ms: int
    state: str
    """open, ended, over."""


@dataclass(slots=True)
class _Leaf:
    """All about one lease."""

    epoch: int
    entries: dict[str, Entry] = field(default_factory=dict)
    ended: dict[str, set[str]] = field(default_factory=dict)
    """Share to who ended it: ids of shares, or empty for the lease's holder."""

    def ended_count(self, by: str | None = None) -> int:
        return sum(len(enders) if by is None else by in enders for enders in self.ended.values())


class ShareBook:
    """By lease. For one thread at a time."""

    def __init__(self) -> None:
        self._leases: dict[str, _Leaf] = {}

    def show(self, chain: Chain, *, key: str, now_ms: int, now_ns: int) -> Entry:
        """The entry of a chain that is proved, and judged to be for who has this `key`; `now_ms` by
        wall clock.

        Raises:
            Revoked: it was ended, or one that it was made of.
            RateLimited: too many shares of one lease.
        """
        root = chain.root
        leaf = self._leaf(root.lease_id, root.epoch)
        deadline_ns = now_ns + (chain.scope.end_ms - now_ms) * NS_PER_MS
        known = leaf.entries.get(chain.digest)
        if known is not None:
            known.deadline_ns = min(known.deadline_ns, deadline_ns)
        if _is_ended(leaf, chain.lineage):
            raise _ended_by_giver(root.lease_id, root.epoch)
        if known is not None:
            if len(known.keys) < KEYS_MAX:
                known.keys.add(key)
            return known
        if len(leaf.entries) >= SHOWN_MAX:
            _drop_over(leaf, now_ns)
        if len(leaf.entries) >= SHOWN_MAX:
            raise failure.of("RATE", "too many shares of one lease", lease_id=root.lease_id)
        entry = Entry(
            chain.digest, root.lease_id, root.epoch, root.holder_thumbprint, chain.lineage,
            chain.scope, deadline_ns,
        )  # fmt: skip
        entry.keys.add(key)
        leaf.entries[chain.digest] = entry
        return entry

    def find(self, lease_id: str, digest: str, key: str) -> Entry:
        """The entry, if who has this key has shown its chain; it may be over."""
        leaf = self._leases.get(lease_id)
        entry = leaf.entries.get(digest) if leaf is not None else None
        if entry is None or key not in entry.keys:
            raise failure.of("NOT_FOUND")
        return entry

    def end(self, lease_id: str, epoch: int, share_id: str, *, by: str) -> list[Entry]:
        """Strike a share out; the entries that this ends, those first that were made of others, and
        also those that had been ended before.

        `by`: the share whose holder says so; empty: the lease's holder. What he has no say over is
        not touched, and he is not told whether it is there. Idempotent.

        Raises:
            RateLimited: more were ended than are remembered.
        """
        leaf = self._leaf(lease_id, epoch)
        enders = leaf.ended.setdefault(share_id, set())
        if by not in enders:
            of_one = leaf.ended_count(by) >= ENDED_BY_SHARE_MAX if by else False
            if of_one or leaf.ended_count() >= ENDED_MAX:
                if not enders:
                    del leaf.ended[share_id]
                raise failure.of("RATE", "too many ended shares of one lease", lease_id=lease_id)
            enders.add(by)
        struck = [
            each for each in leaf.entries.values()
            if share_id in each.lineage and _is_ended(leaf, each.lineage)
        ]  # fmt: skip
        struck.sort(key=lambda entry: -len(entry.lineage))
        for entry in struck:
            entry.cause = entry.cause or _ended_by_giver(lease_id, epoch)
        return struck

    def ended(self, lease_id: str) -> list[tuple[str, str]]:
        """(share, who ended it) of a lease: what another book must be told to know the same."""
        leaf = self._leases.get(lease_id)
        pairs = leaf.ended.items() if leaf is not None else ()
        return sorted((share_id, by) for share_id, enders in pairs for by in enders)

    def forget(self, lease_id: str) -> None:
        """The lease is over, and its shares with it."""
        self._leases.pop(lease_id, None)

    def tree(self, lease_id: str, *, below: str, now_ns: int) -> list[View]:
        """The shares that were shown, below one or, if empty, all: parents before children."""
        leaf = self._leases.get(lease_id)
        entries: Iterable[Entry] = leaf.entries.values() if leaf is not None else ()
        found = [
            each for each in entries if not below or below in each.lineage[:-1]
        ]  # fmt: skip
        return [_view(each, now_ns) for each in sorted(found, key=lambda each: each.lineage)]

    def _leaf(self, lease_id: str, epoch: int) -> _Leaf:
        leaf = self._leases.get(lease_id)
        if leaf is None or leaf.epoch != epoch:
            leaf = self._leases[lease_id] = _Leaf(epoch)
        return leaf


def _drop_over(leaf: _Leaf, now_ns: int) -> None:
    """Entries whose time has run out give way, but only when there is no room otherwise."""
    for digest, entry in list(leaf.entries.items()):
        if now_ns >= entry.deadline_ns and not entry.in_flight:
            del leaf.entries[digest]


def _is_ended(leaf: _Leaf, lineage: tuple[str, ...]) -> bool:
    """Whether one of these was ended by somebody who has a say over it."""
    for at, share_id in enumerate(lineage):
        for by in leaf.ended.get(share_id, ()):
            if not by or by in lineage[: at + 1]:
                return True
    return False


def _ended_by_giver(lease_id: str, epoch: int) -> FabricError:
    return failure.of("REVOKED", "the share was ended", lease_id=lease_id, epoch=epoch)


def _view(entry: Entry, now_ns: int) -> View:
    left_ms = max(0, entry.deadline_ns - now_ns) // NS_PER_MS
    state = "ended" if entry.cause is not None else "open" if left_ms else "over"
    parent = entry.lineage[-2] if len(entry.lineage) > 1 else ""
    return View(
        entry.share_id, parent, len(entry.lineage), entry.scope,
        0 if entry.cause is not None else left_ms, state,
    )  # fmt: skip
