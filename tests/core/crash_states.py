"""Every disk that a power cut or a kill can leave behind, while the real surface is at work.

A disk that remembers cuts each write into pieces. Of the pieces that were not synced yet, any
subset may have reached the disk: each subset is one crash state. After a kill, the next process
sees all that was written, synced or not, goes on with it, and only then the power is cut.

    law   recovery succeeds, with every record that was reported, on the true chain, with the
          state that those records add up to, and with a boot epoch no lower than one reported

Source of the idea: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from grafos_core import surface
from grafos_core.chain import Chain, EventKind, Record, Seal
from grafos_core.failure import FabricError, InvariantViolation
from grafos_core.surface import (
    DropSegment,
    Effect,
    Surface,
    SyncHead,
    SyncSpool,
    WriteSlot,
    WriteSpool,
)
from grafos_core.surface_state import SurfaceState

INCARNATION = "4f" * 16
SEGMENT_BYTES, BATCH_BYTES_MAX = 3072, 768
PIECES_PER_WRITE = 8
PENDING_MAX = 11
"""Subsets double with each piece; of more, the older ones count as lost."""

File = int
"""A segment's number; `HEAD` for the head file."""
HEAD: File = -1

Tamper = Callable[[list[Effect]], list[Effect]]
"""A planted mistake: what becomes of the effects of one step."""


@dataclass(frozen=True, slots=True)
class Piece:
    file: File
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Sync:
    file: File


@dataclass(frozen=True, slots=True)
class Reported:
    """Somebody was told: from here on this much must survive."""

    number: int = 0
    boot_epoch: int = 0


@dataclass
class Disk:
    """What is durable, and what was only written."""

    durable: dict[File, bytes] = field(default_factory=dict)
    pending: list[Piece] = field(default_factory=list)

    def image(self, kept: Sequence[Piece]) -> dict[File, bytes]:
        files = {name: bytearray(data) for name, data in self.durable.items()}
        for piece in kept:
            put(files.setdefault(piece.file, bytearray()), piece)
        return {name: bytes(data) for name, data in files.items()}

    def seen(self) -> dict[File, bytes]:
        """What a process reads: everything that was written."""
        return self.image(self.pending)

    def write(self, file: File, offset: int, data: bytes, pieces_count: int) -> list[Piece]:
        """Cut in pieces; what stands there already in the same bytes needs no piece."""
        there = self.seen().get(file, b"")
        old = there[offset : offset + len(data)]
        used = max(len(data.rstrip(b"\0")), len(old.rstrip(b"\0")), 1)
        step = -(-used // pieces_count)
        cuts = [Piece(file, offset + at, data[at : at + step]) for at in range(0, used, step)]
        new = [p for p in cuts if there[p.offset : p.offset + len(p.data)] != p.data]
        self.pending += new
        return new

    def sync(self, file: File) -> None:
        mine = [piece for piece in self.pending if piece.file == file]
        self.durable = self.image(mine) if mine else self.durable
        self.pending = [piece for piece in self.pending if piece.file != file]

    def after_power_cut(self) -> Iterator[dict[File, bytes]]:
        recent = self.pending[-PENDING_MAX:]
        for mask in range(1 << len(recent)):
            yield self.image([piece for i, piece in enumerate(recent) if mask >> i & 1])


def put(data: bytearray, piece: Piece) -> None:
    end = piece.offset + len(piece.data)
    data.extend(bytes(max(0, end - len(data))))
    data[piece.offset : end] = piece.data


def seal_of(record: Record) -> Seal:
    return Seal(record.number, record.hash, "k1", hashlib.sha256(record.hash).digest())


class Agent:
    """A node's control process as far as its durable surface goes, on a disk that remembers."""

    def __init__(self, disk: Disk, tamper: Tamper, pieces_per_write: int) -> None:
        self.disk, self.tamper, self.pieces_per_write = disk, tamper, pieces_per_write
        self.reported = Reported()
        self.truth: dict[int, tuple[bytes, bytes]] = {0: (bytes(32), SurfaceState().tables_hash())}
        """Head and hash of the state after each batch's last record."""
        self.states = 0
        self.chain: Chain
        self.surface: Surface
        self.state: SurfaceState

    def format(self) -> None:
        self.disk.durable = {0: bytes(SEGMENT_BYTES), HEAD: bytes(surface.HEAD_BYTES)}
        self.perform(self.tamper(surface.formatted(INCARNATION)), judged=False)

    def boot(self) -> None:
        found = recovered(self.disk.seen())
        self.surface, effects = surface.resume(
            found, segment_bytes=SEGMENT_BYTES, batch_bytes_max=BATCH_BYTES_MAX
        )
        self.perform(self.tamper(effects), judged=True)
        slot = self.surface.slot
        self.chain = Chain("node-1", INCARNATION, slot.boot_epoch, slot.head, slot.number)
        self.state = found.state
        self.reported = replace(self.reported, boot_epoch=slot.boot_epoch)

    def record(self, events: Sequence[tuple[str, str, int, dict[str, object]]]) -> None:
        """One batch; a segment that is full is left first."""
        if self.surface.should_roll():
            whole = self.state.tables_hash()
            kind = EventKind.AGENT_TABLES
            tables = [self._add(kind, "", 0, part) for part in self.state.tables()]
            self._persist(self.surface.begin_segment(tables, seal_of(tables[-1]), whole), tables)
        records = [self._add(*event) for event in events]
        self._persist(self.surface.append(records, seal_of(records[-1])), records)

    def _add(self, kind: str, lease_id: str, epoch: int, body: dict[str, object]) -> Record:
        record = self.chain.append(
            kind, wall_ms=1, boottime_ns=1, lease_id=lease_id, epoch=epoch, body=body
        )
        self.state.fold(record)
        return record

    def _persist(self, effects: list[Effect], records: Sequence[Record]) -> None:
        last = records[-1]
        self.truth[last.number] = (last.hash, self.state.tables_hash())
        self.perform(self.tamper(effects), judged=True)
        self.reported = replace(self.reported, number=last.number)
        self.judge()

    def perform(self, effects: Sequence[Effect], *, judged: bool) -> None:
        for effect in effects:
            match effect:
                case WriteSpool(segment, offset, data):
                    self.disk.write(segment, offset, data, self.pieces_per_write)
                case WriteSlot(index, data):
                    offset = index * surface.SLOT_BYTES
                    self.disk.write(HEAD, offset, data, self.pieces_per_write)
                case SyncSpool() | SyncHead():
                    if judged:
                        self.judge()
                    self.disk.sync(effect.segment if isinstance(effect, SyncSpool) else HEAD)
                case DropSegment():
                    raise AssertionError("nothing is acknowledged here")

    def judge(self) -> None:
        """Cut the power here, in every way."""
        for image in self.disk.after_power_cut():
            self.states += 1
            problem = self.problem_with(image)
            if problem:
                raise Found(f"after {self.states} states: {problem}")

    def problem_with(self, image: dict[File, bytes]) -> str:
        try:
            found = recovered(image)
        except (FabricError, InvariantViolation) as refused:
            return f"not ready: {refused}"
        if found.number < self.reported.number:
            return f"record {self.reported.number} was reported and is lost"
        if found.number not in self.truth:
            return f"record {found.number} ends no batch"
        head, tables_hash = self.truth[found.number]
        if found.head != head:
            return "forked"
        if found.state.tables_hash() != tables_hash:
            return "the state is another"
        if found.slot.boot_epoch < self.reported.boot_epoch:
            return "the boot epoch fell"
        return ""


class Found(Exception):
    """A crash state that breaks the law."""


def recovered(image: dict[File, bytes]) -> surface.Recovered:
    segments = [image[file] for file in sorted(image) if file != HEAD]
    return surface.recover(segments, image[HEAD])


def as_it_is(effects: list[Effect]) -> list[Effect]:
    return effects


def slice_body(amount: int, **more: object) -> dict[str, object]:
    return {"kind": "mem", "amount": amount, "extent_offset": 0} | more


def events() -> list[list[tuple[str, str, int, dict[str, object]]]]:
    """Twelve batches of all that a node goes through, enough to leave a segment."""
    ids = [f"{i:032x}" for i in range(8)]
    bound = {i: slice_body(i + 1, generation=1, holder_key="T" * 43) for i in range(8)}
    run = {"kind": "block", "amount": 4, "extent_offset": 8, "generation": 1, "holder_key": "T"}
    end: dict[str, object] = {"measured": "zeros"}
    begun = EventKind.AGENT_TEARDOWN_BEGIN
    return [
        [(EventKind.AGENT_FORMATTED, "", 0, {})],
        [(EventKind.AGENT_BOUND, ids[1], 5, bound[1])],
        [(EventKind.AGENT_BOUND, ids[2], 4, bound[2])],
        [(EventKind.AGENT_EXTENDED, ids[1], 5, {"generation": 2})],
        [(begun, ids[1], 5, {}), (EventKind.AGENT_TEARDOWN_END, ids[1], 5, end)],
        [(EventKind.AGENT_BURNT, ids[3], 6, slice_body(7))],
        [(EventKind.AGENT_FENCED, ids[2], 4, {"cause": "erase"})],
        [(EventKind.AGENT_BOUND, ids[4], 7, dict(run))],
        [(EventKind.AGENT_ATTACHED, ids[4], 7, {"generation": 3, "holder_key": "U"})],
        [(EventKind.AGENT_CLEARED, ids[2], 4, {"nonce": "n"})],
        [(begun, ids[4], 7, {}), (EventKind.AGENT_TEARDOWN_END, ids[4], 7, end)],
        [(EventKind.AGENT_BOUND, ids[5], 9, bound[5])],
    ]


def power_cuts(tamper: Tamper = as_it_is, *, pieces: int = PIECES_PER_WRITE) -> Agent:
    """The whole story once, with the power cut at every instant of it. Raises `Found`."""
    agent = Agent(Disk(), tamper, pieces)
    agent.format()
    agent.judge()
    agent.boot()
    for batch in events():
        agent.record(batch)
    return agent


def kills(tamper: Tamper = as_it_is, *, after_events: Sequence[int], pieces: int = 4) -> int:
    """Kill the process after each effect of the batches named; go on; then cut the power."""
    states = 0
    for count in after_events:
        for done in range(1, len(surface.ORDER) + 1):
            agent = Agent(Disk(), tamper, pieces)
            agent.format()
            agent.boot()
            for batch in events()[:count]:
                agent.record(batch)
            agent.states = 0
            leave_half_done(agent, events()[count], done)
            agent.boot()
            agent.record([(EventKind.AGENT_CLOCK, "", 0, {"after": "restart"})])
            agent.record([(EventKind.AGENT_CLOCK, "", 0, {"after": "that"})])
            states += agent.states
    return states


def leave_half_done(
    agent: Agent, batch: Sequence[tuple[str, str, int, dict[str, object]]], done: int
) -> None:
    """The first `done` effects of an append, then SIGKILL."""
    if agent.surface.should_roll():
        whole = agent.state.tables_hash()
        made = [agent._add(EventKind.AGENT_TABLES, "", 0, part) for part in agent.state.tables()]
        effects = agent.surface.begin_segment(made, seal_of(made[-1]), whole)
    else:
        made = [agent._add(*event) for event in batch]
        effects = agent.surface.append(made, seal_of(made[-1]))
    agent.truth[made[-1].number] = (made[-1].hash, agent.state.tables_hash())
    agent.perform(effects[:done], judged=False)
