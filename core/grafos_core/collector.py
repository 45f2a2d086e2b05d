"""The collector: takes in everybody's audit chains, and notices when one of them changes its story.

A notary with one page per writer. Each time he is shown the next entries he checks that they follow
from the last one he signed for, and signs for them only when they are in his own book. Whoever
shows him another entry under a number that he has seen is caught, and both entries are kept.

    offer ──► GAP          records are missing: send again from the number that is named
          ──► ENCODING     not the one encoding of a record
          ──► CHAIN        it does not link to what is known
          ──► SEAL_KEY     not sealed by a key of this chain: unknown, retired too early, an old
                           incarnation's, another node's
          ──► FORK         another record under a known number: both kept, the chain quarantined
          ──► Accepted     to be stored; only `stored` moves the state, and only then is it answered

Rules. A batch ends with a seal over its last record. Records that are known already, and the same,
change nothing. Only sealed records can be evidence, so that nobody without the key can have a chain
quarantined. A head never moves back. The collector has a chain of its own, in which it countersigns
the heads of the others: so it cannot change its story either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from grafos_core import chain, failure
from grafos_core.chain import GENESIS, Chain, EventKind, Record, Seal, VerifySeal

RECORDS_MAX: Final = 1024
"""In one offer; protects the collector's memory."""
HEADS_MAX: Final = 256
"""Countersigned in one record; the rest in the next."""
EVIDENCE_MAX: Final = 16
"""Forks kept per chain; the first proves it, the rest is history."""

Lookup = Callable[[str, str, int], bytes | None]
"""(origin, incarnation, number) → the stored record; None where it was pruned."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a chain is known."""

    number: int
    head: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the shell must store before it calls `stored` and answers."""

    origin: str
    incarnation: str
    number: int
    head: bytes
    records: tuple[Record, ...]
    """Those that are new; none where all were known."""
    seals: tuple[Seal, ...]
    """Those of new records."""


@dataclass(frozen=True, slots=True)
class Fork:
    """Two records under one number: proof that the writer, or its disk, cannot be trusted."""

    origin: str
    incarnation: str
    number: int
    known: bytes
    offered: bytes
    seal: Seal
    """Over the offered records."""


@dataclass(slots=True)
class _Page:
    """What is known of one chain."""

    keys: dict[str, int | None] = field(default_factory=dict)
    """Key id → the last record number it may seal; None while it is in use."""
    number: int = 0
    head: bytes = GENESIS
    last: Record | None = None
    quarantine: str = ""
    """The code of the failure that led to it; empty: none."""
    forks: list[Fork] = field(default_factory=list)
    countersigned: int = 0


class Collector:
    """The one writer of what is known. Give it what comes; store what it returns."""

    def __init__(self, own: Chain, stored: Lookup) -> None:
        self._own = own
        self._lookup = stored
        self._pages: dict[tuple[str, str], _Page] = {}
        self._incarnation: dict[str, str] = {}
        """The one incarnation of each origin that may still grow."""

    # Who may write -------------------------------------------------------------------------

    def admit(self, origin: str, incarnation: str, key_id: str) -> None:
        """From now on this key seals that chain. An origin's older incarnations grow no more."""
        page = self._pages.setdefault((origin, incarnation), _Page())
        page.keys[key_id] = None
        self._incarnation[origin] = incarnation

    def retire(self, origin: str, incarnation: str, key_id: str, *, last_number: int) -> None:
        """The key seals nothing after `last_number`; what it sealed before may still arrive."""
        keys = self._pages[(origin, incarnation)].keys
        failure.invariant(key_id in keys, "only a known key is retired")
        keys[key_id] = last_number

    # What is known -------------------------------------------------------------------------

    def position(self, origin: str, incarnation: str) -> Position:
        page = self._pages.get((origin, incarnation), _Page())
        return Position(page.number, page.head)

    def quarantine(self, origin: str, incarnation: str) -> str:
        """`FORK` or `ROLLBACK`; empty where the chain is trusted."""
        return self._pages.get((origin, incarnation), _Page()).quarantine

    def forks(self) -> list[Fork]:
        """The evidence, oldest first per chain."""
        return [fork for page in self._pages.values() for fork in page.forks]

    def announce(self, origin: str, incarnation: str, number: int, head: bytes) -> Position:
        """A writer says where its chain is; the answer says from where to send.

        A writer behind what it was told is acknowledged has lost records: its disk was rolled back.
        """
        page = self._trusted(origin, incarnation)
        if number < page.number:
            page.quarantine = "ROLLBACK"
            raise _at(page, "ROLLBACK", f"record {page.number} was acknowledged, {number} came")
        if number == page.number and head != page.head:
            page.quarantine = "FORK"
            raise _at(page, "FORK", f"another record {number} was acknowledged")
        return Position(page.number, page.head)

    def _trusted(self, origin: str, incarnation: str) -> _Page:
        page = self._pages.get((origin, incarnation))
        if page is None or self._incarnation[origin] != incarnation:
            raise failure.of("SEAL_KEY", "no key was admitted for this chain")
        if page.quarantine:
            raise _at(page, page.quarantine, "the chain is quarantined")
        return page

    # Taking in -----------------------------------------------------------------------------

    def offer(
        self,
        origin: str,
        incarnation: str,
        records: Sequence[bytes],
        seals: Sequence[Seal],
        verify: VerifySeal,
    ) -> Accepted:
        """Check a batch. Nothing changes, except that a fork is kept and quarantines."""
        page = self._trusted(origin, incarnation)
        parsed = _linked(records, origin, incarnation)
        _check_seals(parsed, seals, page, incarnation, verify)
        fresh = [record for record in parsed if record.number > page.number]
        self._compare(parsed[: len(parsed) - len(fresh)], page, seals[-1])
        if fresh:
            chain.check_link(fresh[0], prev=page.head, number=page.number, before=page.last)
        last = fresh[-1] if fresh else None
        return Accepted(
            origin=origin,
            incarnation=incarnation,
            number=last.number if last else page.number,
            head=last.hash if last else page.head,
            records=tuple(fresh),
            seals=tuple(seal for seal in seals if seal.number > page.number),
        )

    def _compare(self, known: Sequence[Record], page: _Page, seal: Seal) -> None:
        """Records under numbers that were acknowledged must be the very same."""
        for record in known:
            stored = self._lookup(record.origin, record.incarnation, record.number)
            if stored is None:
                raise failure.of("CHAIN", f"record {record.number} was acknowledged and is pruned")
            if stored == record.data:
                continue
            page.quarantine = "FORK"
            if len(page.forks) < EVIDENCE_MAX:
                page.forks.append(
                    Fork(
                        record.origin, record.incarnation, record.number, stored, record.data, seal
                    )
                )  # fmt: skip
            raise _at(page, "FORK", f"another record {record.number} was acknowledged")

    def stored(self, accepted: Accepted) -> None:
        """It is durable: from here on it is known. Only now may it be acknowledged."""
        if not accepted.records:
            return
        page = self._pages[(accepted.origin, accepted.incarnation)]
        first, last = accepted.records[0], accepted.records[-1]
        follows = first.number == page.number + 1 and first.prev_hash == page.head
        failure.invariant(follows, "what was accepted is stored once, in order")
        page.number, page.head, page.last = last.number, last.hash, last

    # The collector's own chain -------------------------------------------------------------

    @property
    def head(self) -> Position:
        """Of the collector's own chain."""
        return Position(self._own.number, self._own.head)

    def countersign(self, wall_ms: int, boottime_ns: int) -> Record | None:
        """A record of all heads that moved since the last; None where none did.

        The chain moves on when the shell has stored it: see `countersigned`.
        """
        heads = self._moved()[:HEADS_MAX]
        if not heads:
            return None
        body = {
            "heads": [
                [origin, bytes.fromhex(incarnation), page.number, page.head]
                for (origin, incarnation), page in heads
            ]
        }
        return self._own.draft(
            EventKind.AUDIT_COUNTERSIGNED, wall_ms=wall_ms, boottime_ns=boottime_ns, body=body
        )

    def _moved(self) -> list[tuple[tuple[str, str], _Page]]:
        pages = sorted(self._pages.items())
        return [(name, page) for name, page in pages if page.number > page.countersigned]

    def countersigned(self, record: Record) -> None:
        """The record is durable."""
        self._own.advance(record)
        for origin, incarnation, number, _ in record.body["heads"]:
            page = self._pages[(origin, incarnation.hex())]
            page.countersigned = max(page.countersigned, number)

    # Remembering ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that is known, as a value that the codec can write."""
        return {
            "chains": [
                [
                    origin, incarnation, page.number, page.head, page.countersigned,
                    page.quarantine, dict(page.keys),
                    [[f.number, f.known, f.offered, *_seal_value(f.seal)] for f in page.forks],
                ]
                for (origin, incarnation), page in sorted(self._pages.items())
            ],
            "incarnations": dict(self._incarnation),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`. The collector must be new; its own chain was given to it."""
        failure.invariant(not self._pages, "only a new collector is restored")
        for origin, incarnation, number, head, countersigned, quarantine, keys, forks in state[
            "chains"
        ]:
            stored = self._lookup(origin, incarnation, number) if number else None
            last = chain.parse(stored) if stored is not None else None
            if last is not None and last.hash != head:
                raise failure.of("STORAGE", f"record {number} of {origin} is not the one known")
            self._pages[(origin, incarnation)] = _Page(
                keys=dict(keys),
                number=number,
                head=head,
                last=last,
                quarantine=quarantine,
                forks=[
                    Fork(origin, incarnation, at, known, offered, Seal(*seal))
                    for at, known, offered, *seal in forks
                ],
                countersigned=countersigned,
            )
        self._incarnation = dict(state["incarnations"])


def _at(page: _Page, code: str, detail: str) -> failure.FabricError:
    """A refusal that says how far the chain is known."""
    details = {"known_number": str(page.number), "known_head": page.head.hex()}
    return failure.of(code, detail, details=details)


def _seal_value(seal: Seal) -> list[Any]:
    return [seal.number, seal.hash, seal.key_id, seal.signature]


def _linked(records: Sequence[bytes], origin: str, incarnation: str) -> list[Record]:
    """The records of one offer: of this chain, and each linked to the one before."""
    if not records:
        raise failure.of("EMPTY")
    if len(records) > RECORDS_MAX:
        raise failure.of("RANGE", f"at most {RECORDS_MAX} records at a time")
    parsed = [chain.parse(data) for data in records]
    first = parsed[0]
    if (first.origin, first.incarnation) != (origin, incarnation):
        raise failure.of("CHAIN", f"record {first.number} is of another chain")
    before = None
    prev, number = first.prev_hash, first.number - 1
    if first.number == 0 or (number == 0) != (prev == GENESIS):
        raise failure.of("CHAIN", f"record {first.number} cannot be the first of a chain")
    for record in parsed:
        chain.check_link(record, prev=prev, number=number, before=before)
        prev, number, before = record.hash, record.number, record
    return parsed


def _check_seals(
    records: Sequence[Record],
    seals: Sequence[Seal],
    page: _Page,
    incarnation: str,
    verify: VerifySeal,
) -> None:
    """Each seal is over a record of the batch, by a key of the chain; the last over the last."""
    hashes = {record.number: record.hash for record in records}
    if not seals or seals[-1].number != records[-1].number:
        raise failure.of("SEAL_KEY", "the last record is not sealed")
    if len(seals) > len(records):
        raise failure.of("CHAIN", "more seals than records")
    for seal in seals:
        if hashes.get(seal.number) != seal.hash:
            raise failure.of("CHAIN", f"the seal of record {seal.number} is over another")
        last_number = page.keys.get(seal.key_id, 0)
        if last_number is not None and seal.number > last_number:
            raise failure.of("SEAL_KEY", f"not a key of this chain at record {seal.number}")
        chain.check_seal(seal, incarnation, verify)
