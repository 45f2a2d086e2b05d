"""The laws of the fabric, judged from outside on what an onlooker has read and written down.

Rules. A function gets what was seen and returns what is wrong with it, one sentence per violation;
nothing wrong is an empty list. Nothing here asks a service, reads a file or a clock, so that each
law can be shown to fail on data that was made wrong on purpose. Histories are read from the sealed
chains, so they tell of every instant and not only of those at which somebody looked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from grafos_core import chain
from grafos_core.chain import Record
from grafos_core.failure import FabricError

BLOCK: Final = "block"
HELD_UNTIL: Final = frozenset({"lease.released"})
PROVING: Final = frozenset(
    {"agent.teardown_end", "agent.fenced", "agent.burnt", "agent.cleared"}
)  # fmt: skip
"""Records of a node that a receipt may stand on."""
TAKEN_BACK: Final = frozenset({"agent.teardown_end", "agent.burnt", "agent.cleared"})

Wrong = list[str]
Place = tuple[str, str]
"""Node and kind."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What one lease has of one resource."""

    lease_id: str
    node_id: str
    kind: str
    amount: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Book:
    """One line of the ledger's books."""

    node_id: str
    kind: str
    total: int
    free: int
    leased: int
    ending: int
    fenced: int
    withheld: int


@dataclass(frozen=True, slots=True)
class MemorySeen:
    """A memory of a lease that some process has open."""

    pid: int
    incarnation: str
    lease_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Told:
    """What a service has told a holder, and must therefore be on disk."""

    verb: str
    """`acquire`, `attach`, `renew`, `release`; `detach`: it is about to be asked for."""
    lease_id: str
    node_id: str
    epoch: int
    generation: int = 0
    credited: bool = False
    record_number: int = 0
    """Of a release: the record that its receipt names."""
    record_hash: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """All that was read from outside at one quiet moment."""

    books: Sequence[Book]
    ledger_held: Sequence[Slice]
    """Charged by the ledger: every lease that is not released."""
    node_held: Sequence[Slice]
    """Charged by the nodes, as they say themselves."""
    memories: Sequence[MemorySeen]
    ledger_chain: Sequence[Record]
    node_chains: Mapping[str, Sequence[Record]]
    """By node id, of the present incarnation."""
    told: Sequence[Told]
    collected: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    """By origin, as the audit collector exported them."""
    owed: Mapping[str, int] = field(default_factory=dict)
    """By origin, how many records there were before the export, which it must have; else all."""


def every_law(scene: Scene) -> Wrong:
    """All of them."""
    totals = {(book.node_id, book.kind): book.total for book in scene.books}
    wrong = conserved(scene.books)
    wrong += exclusive("the ledger", scene.ledger_held, totals)
    wrong += exclusive("the nodes", scene.node_held, totals)
    wrong += memories_belong(scene.memories, scene.node_held)
    wrong += history_exclusive(scene.ledger_chain)
    for node_id, records in scene.node_chains.items():
        wrong += node_history_exclusive(node_id, records, totals)
    wrong += free_is_free(scene.books, scene.node_held)
    wrong += proved_back(scene.ledger_chain, scene.node_chains)
    wrong += durable_first(scene.told, scene.ledger_chain, scene.node_chains)
    wrong += rising(scene.ledger_chain)
    for origin, records in _own_chains(scene).items():
        wrong += linked(origin, records)
        owed = scene.owed.get(origin, len(records))
        wrong += same_chain(origin, records, scene.collected.get(origin, ()), owed)
    return wrong


def _own_chains(scene: Scene) -> dict[str, Sequence[Record]]:
    return {"ledger": scene.ledger_chain, **scene.node_chains}


# Law 1: exclusive -----------------------------------------------------------------------------


def exclusive(whose: str, held: Iterable[Slice], totals: Mapping[Place, int]) -> Wrong:
    """No two slices overlap where there are extents; elsewhere they fit into the whole."""
    places: dict[Place, list[Slice]] = defaultdict(list)
    for each in held:
        places[each.node_id, each.kind].append(each)
    wrong: Wrong = []
    for place, slices in sorted(places.items()):
        name = f"law 1, {whose}, {place[1]} of {place[0]}"
        total = totals.get(place, 0)
        amount = sum(each.amount for each in slices)
        if amount > total:
            wrong.append(f"{name}: {amount} is held of {total}")
        if place[1] == BLOCK:
            wrong += [f"{name}: {two}" for two in _overlaps(slices, total)]
    return wrong


def _overlaps(slices: Iterable[Slice], total: int) -> Iterable[str]:
    ordered = sorted(slices, key=lambda each: each.offset)
    for one, other in pairwise(ordered):
        if one.offset + one.amount > other.offset:
            yield f"{one.lease_id} and {other.lease_id} share block {other.offset}"
    for each in ordered:
        if each.offset + each.amount > total:
            yield f"{each.lease_id} ends behind the last block"


def history_exclusive(records: Iterable[Record]) -> Wrong:
    """At no record of the ledger's chain was more granted than there is, or a block twice."""
    totals: dict[Place, int] = {}
    held: dict[str, Slice] = {}
    wrong: Wrong = []
    for record in records:
        if record.kind == "node.registered":
            for kind, total in record.body["totals"].items():
                totals[record.body["node_id"], kind] = total
        elif record.kind == "lease.granted":
            made = _slice_of(record, record.body["node_id"])
            wrong += _would_share(f"record {record.number} of the ledger", made, held, totals)
            held[record.lease_id] = made
        elif record.kind in HELD_UNTIL:
            held.pop(record.lease_id, None)
    return wrong


def node_history_exclusive(
    node_id: str, records: Iterable[Record], totals: Mapping[Place, int]
) -> Wrong:
    """The same of a node's own chain: from the bind to the sealed end of the teardown."""
    held: dict[str, Slice] = {}
    wrong: Wrong = []
    for record in records:
        if record.kind == "agent.bound":
            made = _slice_of(record, node_id)
            wrong += _would_share(f"record {record.number} of {node_id}", made, held, totals)
            held[record.lease_id] = made
        elif record.kind in TAKEN_BACK:
            held.pop(record.lease_id, None)
    return wrong


def _slice_of(record: Record, node_id: str) -> Slice:
    body = record.body
    return Slice(record.lease_id, node_id, body["kind"], body["amount"], body["extent_offset"])


def _would_share(
    where: str, made: Slice, held: Mapping[str, Slice], totals: Mapping[Place, int]
) -> Wrong:
    place = (made.node_id, made.kind)
    beside = [each for each in held.values() if (each.node_id, each.kind) == place]
    if made.lease_id in held:
        return [f"law 1, {where}: {made.lease_id} is given twice"]
    return exclusive(where, [*beside, made], totals)


def memories_belong(memories: Iterable[MemorySeen], node_held: Iterable[Slice]) -> Wrong:
    """Memory that still has bytes belongs to a lease that its node still charges."""
    alive = {each.lease_id for each in node_held}
    return [
        f"law 1: process {each.pid} has {each.size_bytes} bytes of the ended lease {each.lease_id}"
        for each in memories
        if each.size_bytes and each.lease_id not in alive
    ]


def memories_are_gone(memories: Iterable[MemorySeen], given_back: Collection[str]) -> Wrong:
    """Of a lease that was known to be given back before the look, nobody has any byte."""
    return [
        f"law 1: process {each.pid} still has {each.size_bytes} bytes of {each.lease_id}, "
        "which was given back"
        for each in memories
        if each.size_bytes and each.lease_id in given_back
    ]


# Law 2: conserved -----------------------------------------------------------------------------


def conserved(books: Iterable[Book]) -> Wrong:
    """Every line sums to its total, and no part is negative."""
    wrong: Wrong = []
    for book in books:
        parts = (book.free, book.leased, book.ending, book.fenced, book.withheld)
        if sum(parts) != book.total or min(parts) < 0:
            wrong.append(f"law 2, {book.kind} of {book.node_id}: {parts} is not {book.total}")
    return wrong


# Law 3: proved back ---------------------------------------------------------------------------


def free_is_free(books: Iterable[Book], node_held: Iterable[Slice]) -> Wrong:
    """What the ledger calls free, the node does not charge to anybody."""
    charged: dict[Place, int] = defaultdict(int)
    for each in node_held:
        charged[each.node_id, each.kind] += each.amount
    wrong: Wrong = []
    for book in books:
        left = book.total - charged[book.node_id, book.kind]
        if book.free > left:
            place = f"{book.kind} of {book.node_id}"
            wrong.append(f"law 3, {place}: {book.free} is free, but the node has only {left}")
    return wrong


def proved_back(ledger: Iterable[Record], nodes: Mapping[str, Iterable[Record]]) -> Wrong:
    """Each credit names the very record in its node's chain that says what was measured."""
    proofs = {
        (record.number, record.hash.hex(), record.lease_id, record.epoch): record.kind
        for records in nodes.values()
        for record in records
    }
    wrong: Wrong = []
    for record in ledger:
        if record.kind != "lease.released":
            continue
        body = record.body
        proof = (body["record_number"], body["record_hash"], record.lease_id, record.epoch)
        if proofs.get(proof) not in PROVING:
            wrong.append(f"law 3: lease {record.lease_id} was credited without its proof")
    return wrong


# Law 6: durable first -------------------------------------------------------------------------


def durable_first(
    told: Iterable[Told], ledger: Iterable[Record], nodes: Mapping[str, Iterable[Record]]
) -> Wrong:
    """Whatever a holder was told is in the chains of those who answer for it."""
    in_ledger = _written(ledger)
    in_nodes = {node_id: _written(records) for node_id, records in nodes.items()}
    wrong: Wrong = []
    for each in told:
        for whose, what in _needed(each):
            written = in_ledger if whose == "ledger" else in_nodes.get(each.node_id, set())
            if what not in written:
                text = f"{each.verb} of {each.lease_id} was told, {whose} has no {what[0]}"
                wrong.append(f"law 6: {text}")
    return wrong


def _needed(told: Told) -> Iterable[tuple[str, tuple[Any, ...]]]:
    of = (told.lease_id, told.epoch)
    if told.verb == "acquire":
        yield "ledger", ("lease.granted", *of)
        yield "node", ("agent.bound", *of)
    elif told.verb == "attach":
        yield "ledger", ("lease.attached", *of, told.generation)
        yield "node", ("agent.attached", *of, told.generation)
    elif told.verb == "renew":
        yield "ledger", ("lease.renewed", *of, told.generation)
        yield "node", ("agent.extended", *of, told.generation)
    elif told.verb == "release":
        if told.record_hash:
            yield "node", ("hash", told.record_number, told.record_hash)
        if told.credited:
            yield "ledger", ("lease.released", *of)


def _written(records: Iterable[Record]) -> set[tuple[Any, ...]]:
    found: set[tuple[Any, ...]] = set()
    for record in records:
        of = (record.kind, record.lease_id, record.epoch)
        found.add(of)
        found.add(("hash", record.number, record.hash.hex()))
        if "generation" in record.body:
            found.add((*of, record.body["generation"]))
    return found


# Law 7: rising --------------------------------------------------------------------------------


def rising(ledger: Iterable[Record]) -> Wrong:
    """Each grant has a higher epoch than every one before it, per node, incarnation and kind."""
    highest: dict[tuple[str, str, str], int] = {}
    wrong: Wrong = []
    for record in ledger:
        if record.kind != "lease.granted":
            continue
        body = record.body
        place = (body["node_id"], body["incarnation"], body["kind"])
        before = highest.get(place, 0)
        if record.epoch <= before:
            text = f"epoch {record.epoch} of {place[2]} on {place[0]} after {before}"
            wrong.append(f"law 7, record {record.number}: {text}")
        highest[place] = max(before, record.epoch)
    return wrong


# Law 9: linked --------------------------------------------------------------------------------


def linked(origin: str, records: Sequence[Record]) -> Wrong:
    """From record 1 on without a gap, each naming the hash of the one before."""
    try:
        chain.verify([record.data for record in records])
    except FabricError as refused:
        return [f"law 9, {origin}: {refused.detail}"]
    return []


def same_chain(origin: str, own: Sequence[Record], collected: Sequence[Record], owed: int) -> Wrong:
    """The collector has at least the first `owed` that the origin has, and none that it has not."""
    for mine, kept in zip(own, collected, strict=False):
        if mine.data != kept.data:
            return [f"law 9, {origin}: the collector has another record {mine.number}"]
    if not owed <= len(collected) <= len(own):
        return [
            f"law 9, {origin}: the collector has {len(collected)} records, not {owed} to {len(own)}"
        ]
    return []
