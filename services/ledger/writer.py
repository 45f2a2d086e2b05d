"""The one thread that decides: commands in, events on disk, then answers.

    many calls ──► batch ──► decide each ──► one transaction, sealed ──► answer ──► tell watchers

Rules. While the disk is busy with one batch the next one gathers by itself: that is the whole group
commit, and nobody waits for it when there is no load. Whatever is answered, also what is only read,
is on disk before. If a commit may have failed the process halts; the next one reads the truth back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from grafos_core import chain, failure
from grafos_core import commands as c
from grafos_core.commands import Command, Event, Step
from grafos_core.failure import FabricError
from grafos_core.lease import Lease, LeaseId, NodeId
from grafos_core.lessor import Lessor, NodeView
from services.ledger.meters import Meters
from services.ledger.records import seals_over, to_records
from services.ledger.store import Store
from services.ledger.wall import LedgerTime
from services.ledger.watchers import Happening, Watchers
from services.runtime.clock import Clock, Instant
from services.runtime.health import Readiness
from services.runtime.logs import Log
from services.runtime.loop import Batcher, Loop

ROOM_MS: Final = 1_000
"""How often a full disk is looked at again."""
PAGE_EVENTS: Final = 256
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Ask:
    """Commands that one caller hands in together, and what it wants to see when they are done."""

    commands: Sequence[Command]
    then: Callable[[Lessor, int], Any] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    steps: tuple[Step, ...]
    seen: Any
    revision: int


class Ledger:
    """Lessor, store and time of one ledger, owned by one thread from `start` on."""

    def __init__(
        self, store: Store, lessor: Lessor, *, clock: Clock, log: Log, meters: Meters,
        readiness: Readiness, halt: Callable[[], None],
    ) -> None:  # fmt: skip
        self._store, self._lessor, self._clock, self._log = store, lessor, clock, log
        self._meters, self._readiness, self._halt = meters, readiness, halt
        self._chain = store.chain()
        self._time = LedgerTime(lessor.state.now_ms)
        self._room_at_ms = 0
        self.watchers = Watchers()
        self.watchers.revision = store.number
        self.revocations = 0
        """Revocations so far, or what a node said it has seen: only rises."""
        self.on_obligations: Callable[[frozenset[NodeId]], None] = lambda nodes: None
        self.on_events: Callable[[Sequence[Event]], None] = lambda events: None
        self._loop = Loop(
            "ledger", on_tick=self._tick, log=log, halt=halt, clock=clock, after=self._timeout_ms
        )
        self._batcher: Batcher[Ask, Answer] = Batcher(self._loop, self._handle)

    def begin(self, commands: Sequence[Command], body: dict[str, Any]) -> None:
        """The first records of this boot, before anybody can ask."""
        now_ms = self._now_ms()
        events = [Event("ledger.started", now_ms, body=body)]
        self._lessor.replay(events[0])
        for command in commands:
            step = self._lessor.handle(command, now_ms)
            if step.failure is not None:
                raise step.failure
            events += step.events
        self._commit(events)
        self._publish(events, [], now_ms)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> bool:
        return self._loop.stop()

    # from any thread

    def submit(self, ask: Ask, timeout_ms: int | None = None) -> Answer:
        """Decide, make durable, answer."""
        return self._batcher.submit(ask, timeout_ms)

    def read(
        self, question: Callable[[Lessor, int], _Result], timeout_ms: int | None = None
    ) -> _Result:
        """Look at the state as it is on disk."""
        return self._loop.call(lambda: question(self._lessor, self._now_ms()), timeout_ms)

    def with_store(
        self, question: Callable[[Store], _Result], timeout_ms: int | None = None
    ) -> _Result:
        """Read from the event table, through its one connection."""
        return self._loop.call(lambda: question(self._store), timeout_ms)

    # in the owner thread

    def _handle(self, asks: list[Ask]) -> list[Answer | FabricError]:
        now_ms = self._now_ms()
        decided = [tuple(self._decide(each, now_ms) for each in ask.commands) for ask in asks]
        events = [event for steps in decided for step in steps for event in step.events]
        self._commit(events)
        answers: list[Answer | FabricError] = []
        for ask, steps in zip(asks, decided, strict=True):
            answers.append(self._see(ask, steps, now_ms))
        heard = [each.node_id for ask in asks for each in ask.commands if type(each) is c.Register]
        self._publish(events, heard, now_ms)
        nodes = frozenset[NodeId]().union(*(step.nodes for steps in decided for step in steps))
        if nodes:
            self.on_obligations(nodes)
        return answers

    def _decide(self, command: Command, now_ms: int) -> Step:
        if isinstance(command, c.Grant | c.GrantBundle | c.Attach):
            if self._store.full:
                return Step(failure=failure.of("DISK", "the ledger's; renewals and releases go on"))
            if self._time.why:
                return Step(failure=failure.of("CLOCK_REGRESSED", self._time.why))
        if isinstance(command, c.Refusal) and self._store.full:
            return Step()  # only for the record, and the record has no room
        return self._lessor.handle(command, now_ms)

    def _see(self, ask: Ask, steps: tuple[Step, ...], now_ms: int) -> Answer | FabricError:
        try:
            seen = ask.then(self._lessor, now_ms) if ask.then else None
        except FabricError as refused:
            return refused
        return Answer(steps, seen, self._store.number)

    def _tick(self, now: Instant) -> int:
        now_ms = self._now_ms(now)
        step = self._lessor.tick(now_ms)
        self._commit(step.events)
        self._publish(step.events, [], now_ms)
        if step.nodes:
            self.on_obligations(step.nodes)
        self._store.maintain()
        if now_ms >= self._room_at_ms:
            self._room_at_ms = now_ms + ROOM_MS
            self._store.seek_room()
        self._show_gates()
        return self._timeout_ms()

    def _timeout_ms(self) -> int:
        timeout_ms = self._lessor.timeout_ms(self._now_ms())
        return min(ROOM_MS, max(1, timeout_ms if timeout_ms is not None else ROOM_MS))

    def _now_ms(self, now: Instant | None = None) -> int:
        return self._time.read(now or self._clock.instant())

    def _commit(self, events: Sequence[Event]) -> None:
        if not events:
            return
        began_ns = self._clock.boot_ns()
        records = to_records(events, self._chain, began_ns)
        try:
            self._store.append(records, seals_over(records, self._store.key))
        except (FabricError, OSError) as error:
            # In memory it has happened, on disk perhaps not: nobody may be answered from here on.
            self._log.error("ledger.commit_failed", error)
            self._halt()
            raise failure.InvariantViolation("a batch is not known to be on disk") from error
        self._meters.committed(len(events), self._clock.boot_ns() - began_ns)
        self._records = records

    def _publish(self, events: Sequence[Event], heard: Sequence[NodeId], now_ms: int) -> None:
        """Tell watchers what is on disk, and which nodes were heard."""
        views: dict[NodeId, NodeView | None] = {}

        def view(node_id: NodeId) -> NodeView | None:
            if node_id not in views:
                known = node_id in self._lessor.state.nodes
                views[node_id] = self._lessor.node_view(node_id, now_ms) if known else None
            return views[node_id]

        happenings = []
        for event, record in zip(events, self._records if events else (), strict=True):
            lease = self._lessor.state.find(LeaseId(event.lease_id)) if event.lease_id else None
            node_id = lease.node_id if lease else NodeId(str(event.body.get("node_id", "")))
            node = view(node_id) if node_id else None
            happenings.append(Happening(record.number, event.kind, record.data, lease, node))
            self._meters.happened(event, lease)
            if event.kind == "lease.ending" and event.body["cause"] == "revoked":
                self.revocations += 1
        for node_id in heard:
            if view(node_id) is not None:
                happenings.append(Happening(0, "node.presence", node=view(node_id)))
        if happenings:
            self.watchers.publish(happenings, self._store.number)
        if events:
            self.on_events(events)

    def _show_gates(self) -> None:
        for gate, why in (
            ("clock", self._time.why),
            ("disk", "the disk is full; the reserve is in use" if self._store.full else ""),
        ):
            if why:
                self._readiness.close(gate, why)
            else:
                self._readiness.open(gate)


def page(ledger: Ledger, after: int, timeout_ms: int | None) -> list[Happening]:
    """Events that follow a revision, with their leases and nodes as they are by now."""
    rows = ledger.with_store(lambda store: store.page(after, PAGE_EVENTS), timeout_ms)
    records = [chain.parse(data) for _, data in rows]

    def find(lessor: Lessor, now_ms: int) -> list[tuple[Lease | None, NodeView | None]]:
        found = []
        for record in records:
            lease = lessor.state.find(LeaseId(record.lease_id)) if record.lease_id else None
            node_id = lease.node_id if lease else NodeId(str(record.body.get("node_id", "")))
            known = node_id in lessor.state.nodes
            found.append((lease, lessor.node_view(node_id, now_ms) if known else None))
        return found

    return [
        Happening(record.number, record.kind, record.data, lease, node)
        for record, (lease, node) in zip(records, ledger.read(find, timeout_ms), strict=True)
    ]
