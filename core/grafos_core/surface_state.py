"""What a node must still know after a power cut: numbers used up, what was bound, what is fenced.

It is kept in no file of its own. It is what the records of the agent's chain add up to, like a
balance that is the sum of a book's entries; so it cannot differ from the book. The book is cut in
segments, and each begins with the balance brought forward, so that old ones may be thrown away.

What the records of these kinds must hold, beside `lease_id` and `epoch` of the record itself:

    agent.bound                      kind, amount, extent_offset, generation, holder_key
    agent.extended, agent.attached   generation; holder_key where it changed
    agent.burnt                      kind, amount, extent_offset
    agent.teardown_end               nothing: the lease is no longer open
    agent.fenced                     cause; and as agent.bound, if the lease was not open
    agent.cleared                    nothing: the fence is gone
    agent.tables                     made by `SurfaceState.tables`

They may hold more. Other kinds change nothing here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from grafos_core import codec, failure
from grafos_core.chain import BATCH_RECORDS_MAX, EventKind, Record
from grafos_core.epochs import EpochWindow, ExtentEpochs
from grafos_core.lease import Kind

PART_BYTES_MAX: Final = 60_000
"""Entries of the tables in one record: with its other fields it stays below 64 KiB."""


@dataclass(frozen=True, slots=True)
class OpenBind:
    """A lease that was bound and whose teardown is not sealed; or, fenced, that never will be."""

    lease_id: str
    kind: Kind
    epoch: int
    generation: int
    amount: int
    extent_offset: int
    holder_key: str

    def value(self) -> list[Any]:
        return [
            self.lease_id, self.kind.value, self.epoch, self.generation, self.amount,
            self.extent_offset, self.holder_key,
        ]  # fmt: skip

    @staticmethod
    def of(value: list[Any]) -> OpenBind:
        lease_id, kind, epoch, generation, amount, extent_offset, holder_key = value
        return OpenBind(
            lease_id, Kind(kind), epoch, generation, amount, extent_offset, holder_key
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fence:
    """A slice that is quarantined: its teardown failed, or was overdue."""

    slice: OpenBind
    cause: str


class SurfaceState:
    """The sum of an agent's records. `fold` is the only way to change it."""

    def __init__(self, *, from_start: bool = True) -> None:
        """`from_start` is False where the first record folded will be a balance, not the first."""
        self._known = from_start
        self._epochs: dict[Kind, EpochWindow | ExtentEpochs] = {}
        self._open: dict[str, OpenBind] = {}
        self._fences: dict[str, Fence] = {}
        self._arriving: SurfaceState | None = None
        self._parts_read = 0

    def epochs(self, kind: Kind) -> EpochWindow | ExtentEpochs:
        """Which epochs of this kind are used up."""
        return self._epochs.setdefault(
            kind, ExtentEpochs() if kind.has_extents else EpochWindow()
        )  # fmt: skip

    def open_binds(self) -> dict[str, OpenBind]:
        """Leases bound and not ended, by lease id. After a restart these are to be torn down."""
        return dict(self._open)

    def fences(self) -> dict[str, Fence]:
        return dict(self._fences)

    def fold(self, record: Record) -> None:
        """Add one record. One that does not fit the others is a broken book: `STORAGE`."""
        try:
            if not self._known and record.kind != EventKind.AGENT_TABLES:
                raise ValueError("no balance stands before it")
            self._fold(record)
        except (KeyError, TypeError, ValueError) as wrong:
            detail = f"record {record.number} ({record.kind}) does not fit: {wrong!r}"
            raise failure.of("STORAGE", detail) from wrong

    def _fold(self, record: Record) -> None:
        body = record.body
        match record.kind:
            case EventKind.AGENT_BOUND:
                bound = _slice(record)
                self._use(bound)
                self._open[bound.lease_id] = bound
            case EventKind.AGENT_EXTENDED | EventKind.AGENT_ATTACHED:
                was = self._open[record.lease_id]
                self._open[record.lease_id] = replace(
                    was,
                    generation=int(body["generation"]),
                    holder_key=str(body.get("holder_key", was.holder_key)),
                )
            case EventKind.AGENT_BURNT:
                self._use(_slice(record))
                self._open.pop(record.lease_id, None)  # a bind that failed left nothing behind
            case EventKind.AGENT_TEARDOWN_END:
                self._open.pop(record.lease_id, None)
            case EventKind.AGENT_FENCED:
                open_bind = self._open.pop(record.lease_id, None)
                fenced = open_bind or _slice(record)
                self._fences[record.lease_id] = Fence(fenced, str(body["cause"]))
            case EventKind.AGENT_CLEARED:
                del self._fences[record.lease_id]
            case EventKind.AGENT_TABLES:
                self._fold_part(body)

    def _use(self, bound: OpenBind) -> None:
        epochs = self.epochs(bound.kind)
        if isinstance(epochs, EpochWindow):
            epochs.use(bound.epoch)
        else:
            end = bound.extent_offset + bound.amount
            epochs.use(bound.extent_offset, end, bound.epoch)

    # The balance brought forward -----------------------------------------------------------

    def tables(self) -> list[dict[str, Any]]:
        """The whole state as bodies of `agent.tables` records, which begin a segment together."""
        parts: list[list[list[Any]]] = [[]]
        room = PART_BYTES_MAX
        for entry in self._entries():
            size = len(codec.encode(entry))
            if size > room:
                parts.append([])
                room = PART_BYTES_MAX
            parts[-1].append(entry)
            room -= size
        failure.invariant(len(parts) <= BATCH_RECORDS_MAX, "the tables fit one batch")
        return [
            {"part": part, "parts": len(parts), "entries": entries}
            for part, entries in enumerate(parts)
        ]

    def tables_hash(self) -> bytes:
        """SHA-256 of the whole state, however many records it takes."""
        data = codec.encode(list(self._entries()))
        return hashlib.sha256(b"grafos-tables-v1\0" + data).digest()

    def _entries(self) -> Iterator[list[Any]]:
        """One short list per fact, in one order, so that equal states have equal entries."""
        for kind, epochs in sorted(self._epochs.items()):
            if isinstance(epochs, EpochWindow):
                if epochs.floor != 1:
                    yield ["floor", kind.value, epochs.floor]
                yield from (["burnt", kind.value, epoch] for epoch in sorted(epochs.burnt))
            else:
                yield from (["run", kind.value, *run] for run in epochs.runs)
        for _, bound in sorted(self._open.items()):
            yield ["open", *bound.value()]
        for _, fence in sorted(self._fences.items()):
            yield ["fence", fence.cause, *fence.slice.value()]

    def _fold_part(self, body: Mapping[str, Any]) -> None:
        """Parts come in order. What they say must be what was known, if anything was."""
        if body["part"] == 0:
            self._arriving, self._parts_read = SurfaceState(), 0
        if self._arriving is None or body["part"] != self._parts_read:
            raise ValueError("a part of the tables is missing")
        for entry in body["entries"]:
            self._arriving._take(entry)
        self._parts_read += 1
        if self._parts_read < body["parts"]:
            return
        arrived, self._arriving = self._arriving, None
        if self._known and arrived.tables_hash() != self.tables_hash():
            raise ValueError("the tables differ from the records before them")
        self._epochs, self._open, self._fences = arrived._epochs, arrived._open, arrived._fences
        self._known = True

    def _take(self, entry: list[Any]) -> None:
        match entry:
            case ["floor", kind, floor]:
                self._epochs[Kind(kind)] = EpochWindow(floor)
            case ["burnt", kind, epoch]:
                window = self.epochs(Kind(kind))
                if not isinstance(window, EpochWindow) or not window.use(epoch):
                    raise ValueError("a used epoch that cannot be")
            case ["run", kind, start, end, epoch]:
                runs = self.epochs(Kind(kind))
                if not isinstance(runs, ExtentEpochs) or not runs.use(start, end, epoch):
                    raise ValueError("a run of blocks that cannot be")
            case ["open", *value]:
                bound = OpenBind.of(value)
                self._open[bound.lease_id] = bound
            case ["fence", cause, *value]:
                fenced = OpenBind.of(value)
                self._fences[fenced.lease_id] = Fence(fenced, cause)
            case _:
                raise ValueError("an entry of a kind that is not known")


def _slice(record: Record) -> OpenBind:
    """The slice that a record is about. Only one that was bound has a holder."""
    was_bound = record.kind == EventKind.AGENT_BOUND
    return OpenBind(
        lease_id=record.lease_id,
        kind=Kind(record.body["kind"]),
        epoch=record.epoch,
        generation=int(record.body["generation"]) if was_bound else 0,
        amount=int(record.body["amount"]),
        extent_offset=int(record.body["extent_offset"]),
        holder_key=str(record.body["holder_key"]) if was_bound else "",
    )
