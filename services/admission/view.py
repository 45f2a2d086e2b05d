"""The fabric as the ledger tells it: which nodes there are, and what is free on them.

A snapshot, and from then on the ledger's watch; when the watch breaks, from the beginning. The view
may be a moment old: the ledger checks every precondition again at the commit. Evidence ages here as
it ages there, by this machine's boot-time clock, so a ledger that falls silent makes no node look
fresh.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

from grafos_core import chain
from grafos_core.books import BookView
from grafos_core.failure import FabricError
from grafos_core.lease import Kind, NodeId
from grafos_core.lessor import NodeView
from grafos_proto.v1 import lease_pb2, ledger_pb2
from grafos_proto.v1.ledger_pb2_grpc import LedgerServiceStub
from grafos_proto.wire import convert
from services.runtime.client import Remote
from services.runtime.clock import Clock

SNAPSHOT_TIMEOUT_MS = 5_000
SILENCE_MS_MAX = 5_000
"""A watch that says nothing for so long, not even progress, counts as broken."""


class FabricView:
    def __init__(self, remote: Remote[LedgerServiceStub], clock: Clock) -> None:
        self._remote, self._clock = remote, clock
        self._changed = threading.Condition()
        self._nodes: dict[NodeId, tuple[NodeView, int]] = {}
        self._version = 0
        self._heard_at_ms = 0
        self._loaded = False
        self.snapshots = 0
        """How often it began anew: after each, the ledger may be another or an older one."""
        self.revoked_keys: set[str] = set()
        """Of those that were revoked while this process looked on."""

    def nodes(self) -> tuple[list[NodeView], int]:
        """The nodes as of now, and the version to wait upon with `wait_change`."""
        now_ms = self._clock.boot_ms()
        with self._changed:
            aged = [
                replace(view, evidence_age_ms=view.evidence_age_ms + now_ms - read_at_ms)
                for view, read_at_ms in self._nodes.values()
            ]
            return aged, self._version

    def wait_change(self, version: int, timeout_ms: int) -> bool:
        """Until the view is newer than `version`. False: the time passed first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._version != version, timeout=max(0, timeout_ms) / 1000
            )

    @property
    def loaded(self) -> bool:
        """Whether a snapshot was read and the watch has been heard since."""
        return self._loaded and self._clock.boot_ms() - self._heard_at_ms <= SILENCE_MS_MAX

    def follow(self, stopped: threading.Event) -> None:
        """Read a snapshot and follow the watch until it breaks. Raises what broke it."""
        snapshot = self._remote.call(
            "Snapshot", ledger_pb2.SnapshotRequest(), timeout_ms=SNAPSHOT_TIMEOUT_MS, tries_max=1
        )
        self._take(snapshot.nodes, whole=True)
        request = ledger_pb2.WatchRequest(from_revision=snapshot.revision)
        events, cancel = self._remote.stream("Watch", request)
        try:
            for response in events:
                self._take([event.node for event in response.events if event.HasField("node")])
                self._forget(response.events)
                if stopped.is_set() or response.compacted_to:
                    return
        except FabricError:
            self._loaded = False
            raise
        finally:
            cancel()

    def _take(self, nodes: Iterable[lease_pb2.Node], *, whole: bool = False) -> None:
        read_at_ms = self._clock.boot_ms()
        latest = {node.node_id: node for node in nodes}  # of many events at once, the last counts
        views = [node_view(node) for node in latest.values()]
        with self._changed:
            if whole:
                self._nodes.clear()
                self._loaded = True
                self.snapshots += 1
            for view in views:
                self._nodes[view.node_id] = (view, read_at_ms)
            self._heard_at_ms = read_at_ms
            if views or whole:
                self._version += 1
                self._changed.notify_all()

    def _forget(self, events: Iterable[ledger_pb2.Event]) -> None:
        """What an operator gave up, unless the ledger already knows a new node of that name."""
        for event in events:
            if event.kind == "key.revoked":
                self.revoked_keys.add(str(chain.parse(event.record).body["key_id"]))
            if event.kind == "node.forgotten" and not event.HasField("node"):
                body = chain.parse(event.record).body
                with self._changed:
                    self._nodes.pop(NodeId(str(body["node_id"])), None)


def node_view(message: lease_pb2.Node) -> NodeView:
    books: dict[Kind, BookView] = {}
    for book in message.books:
        books[convert.kind_from_proto(book.kind)] = BookView(
            book.total, book.free, book.leased, book.ending, book.fenced, book.withheld,
            book.largest_free_extent,
        )  # fmt: skip
    ready = message.readiness
    return NodeView(
        node_id=NodeId(message.node_id),
        incarnation=message.incarnation,
        boot_epoch=message.boot_epoch,
        mode=message.mode,
        lost=message.lost,
        ready_kinds=frozenset(convert.kind_from_proto(kind) for kind in ready.ready_kinds),
        closed_gates=dict(ready.closed_gates),
        evidence_age_ms=message.evidence_age_ms,
        front_endpoint=message.front_endpoint,
        control_endpoint=message.control_endpoint,
        labels=dict(message.labels),
        books=books,
        lease_count=message.lease_count,
        live_known="ledger" not in ready.closed_gates,
        registered_until_ms=message.registered_until_ms,
    )
