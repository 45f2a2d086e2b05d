"""Who listens to what happens in the ledger, and what each of them has not been sent yet.

Rules. Only what is durable is published, in the order of its revisions and without gaps. Each
watcher has a bounded queue; one that does not keep up is let go, and told from where to come back:
nobody's slowness holds the ledger up. What has revision 0 is presence: true now, and no history.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from grafos_core import failure
from grafos_core.lease import Lease
from grafos_core.lessor import NodeView
from grafos_proto.v1 import ledger_pb2
from grafos_proto.wire.convert import lease_to_proto
from services.ledger.proto import node_to_proto

WAITING_MAX: Final = 8_192
"""Events that one watcher may be behind. About 10 MiB at worst."""
EVENTS_MAX: Final = 256
BYTES_MAX: Final = 256 * 1024
"""Of records in one message."""
GATHER_MS: Final = 5
"""What happens within this time goes together: a message costs more than the event in it."""


@dataclass(slots=True)
class Happening:
    """One thing to tell. The message is made once, by whichever watcher sends it first."""

    revision: int
    kind: str
    record: bytes = b""
    lease: Lease | None = None
    node: NodeView | None = None
    _event: ledger_pb2.Event | None = field(default=None, repr=False)

    @property
    def node_id(self) -> str:
        if self.lease is not None:
            return self.lease.node_id
        return self.node.node_id if self.node is not None else ""

    def event(self) -> ledger_pb2.Event:
        made = self._event
        if made is None:
            made = ledger_pb2.Event(revision=self.revision, record=self.record, kind=self.kind)
            if self.lease is not None:
                made.lease.CopyFrom(lease_to_proto(self.lease))
            if self.node is not None:
                made.node.CopyFrom(node_to_proto(self.node))
            self._event = made
        return made


class Watcher:
    """One listener's queue. The ledger puts, one call's thread takes."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._waiting: deque[Happening] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._lost = False
        self._gather = threading.Event()
        """Never set: to wait on it is to wait."""

    def put(self, happenings: Sequence[Happening]) -> None:
        wanted = [x for x in happenings if self._node_id in ("", x.node_id)]
        if not wanted:
            return
        with self._changed:
            if len(self._waiting) + len(wanted) > WAITING_MAX:
                self._lost = True
                self._waiting.clear()
            if not self._lost:
                self._waiting.extend(wanted)
            self._changed.notify()

    def take(self, timeout_ms: int) -> list[Happening]:
        """What is next, as much as one message holds; nothing after `timeout_ms`."""
        with self._changed:
            if not self._waiting and not self._lost:
                self._changed.wait(timeout_ms / 1000)
        self._gather.wait(GATHER_MS / 1000)
        with self._changed:
            if self._lost:
                raise failure.of("RETRY_LATER", "the watcher is too slow: resume from its revision")
            return next_message(self._waiting)


def next_message(waiting: deque[Happening]) -> list[Happening]:
    """Taken from the front: as many as one message may hold."""
    taken: list[Happening] = []
    size = 0
    while waiting and len(taken) < EVENTS_MAX:
        size += len(waiting[0].record)
        if taken and size > BYTES_MAX:
            break
        taken.append(waiting.popleft())
    return taken


class Watchers:
    """All listeners. Joined and published to in the ledger's own thread; left from any."""

    def __init__(self) -> None:
        self._all: set[Watcher] = set()
        self._lock = threading.Lock()
        self.revision = 0
        """The last one that was published."""

    def join(self, watcher: Watcher) -> None:
        with self._lock:
            self._all.add(watcher)

    def leave(self, watcher: Watcher) -> None:
        with self._lock:
            self._all.discard(watcher)

    def count(self) -> int:
        return len(self._all)

    def publish(self, happenings: Sequence[Happening], revision: int) -> None:
        self.revision = revision
        with self._lock:
            everyone = list(self._all)
        for watcher in everyone:
            watcher.put(happenings)
