"""The laws, asserted after every event of a simulation, and once more when the day is over."""

from __future__ import annotations

from grafos_core.commands import Event
from grafos_core.lease import HELD, LeaseId, LeaseState
from grafos_core.node import NodeCore
from grafos_core.node_lease import FenceView
from grafos_core.quarantine import PROBE_MS_MIN
from grafos_core.receipt import Cleared
from tests.sim.holder import Holder
from tests.sim.ledger import Ledger
from tests.sim.node import CAPACITY, Node
from tests.sim.world import LawBroken


class Laws:
    def __init__(self, ledger: Ledger, nodes: list[Node], holders: list[Holder]) -> None:
        self.ledger, self.nodes, self.holders = ledger, nodes, holders
        self._free: dict[tuple[str, str], int] = {}
        self._epochs: dict[tuple[str, str], int] = {}
        self._seen = 0
        self._fences: dict[str, set[str]] = {}

    def after_each(self) -> None:
        """Of what changed with this event, everything."""
        if self._ledger_events():
            self.ledger.lessor.check()
            touched = self.nodes
        else:
            touched = [node for node in self.nodes if node.touched]
        for node in touched:
            node.touched = False
            if node.core is not None:
                node.core.check()
                self._node(node, node.core)

    def _ledger_events(self) -> bool:
        """Laws 3 and 7, from what the ledger made durable; whether that is anything new."""
        fresh = self.ledger.durable[self._seen :]
        if not fresh:
            return False
        self._seen = len(self.ledger.durable)
        released = {event.lease_id for event in fresh if event.kind == "lease.released"}
        self._whole_bundles(fresh)
        for event in fresh:
            if event.kind == "lease.released":
                self._credit(event)
            if event.kind == "lease.granted":
                where = (event.body["node_id"], event.body["kind"])
                if event.epoch <= self._epochs.get(where, 0):
                    raise LawBroken(f"law 7: epoch {event.epoch} at {where} again")
                self._epochs[where] = event.epoch
        for node_id, node in self.ledger.lessor.state.nodes.items():
            for kind, book in node.books.items():
                view = book.view(available=True)
                total = view.free + view.leased + view.ending + view.fenced
                if total != CAPACITY[kind]:
                    raise LawBroken(f"law 2: {total} of {CAPACITY[kind]} at {node_id}")
                before = self._free.get((node_id, kind), CAPACITY[kind])
                if view.free > before and not released:
                    raise LawBroken(f"law 3: {kind} at {node_id} is free without a receipt")
                self._free[node_id, kind] = view.free
        return True

    def _whole_bundles(self, fresh: list[Event]) -> None:
        """Law 1 for several things at once: what one step made durable has all members or none."""
        granted: dict[str, list[Event]] = {}
        for event in fresh:
            if event.kind == "lease.granted" and "bundle" in event.body:
                granted.setdefault(event.body["bundle"], []).append(event)
        for request_id, events in granted.items():
            if len(events) != events[0].body["members"]:
                raise LawBroken(f"law 1: {len(events)} members of bundle {request_id} are granted")

    def _credit(self, event: Event) -> None:
        """Law 3, S12: what is credited was erased, and measured after that; except where a person
        accepted residue. What was fenced is free by an order, or by a policy that is on."""
        lease = self.ledger.lessor.state.released.get(LeaseId(event.lease_id))
        cleared = event.body.get("cleared")
        if lease is None or cleared == Cleared.RESIDUE:
            return
        node = self.ledger.nodes[lease.node_id]
        slice_ = node.slices.get((lease.lease_id, lease.epoch))
        if slice_ is not None and not (slice_.erased and slice_.measured):
            raise LawBroken(f"law 3: {lease.lease_id[:6]} is credited, and its bytes are there")
        if cleared == Cleared.POLICY and not node.policy:
            raise LawBroken(f"S12: {lease.lease_id[:6]} was cleared by a policy that is off")

    def _node(self, node: Node, core: NodeCore) -> None:
        """Laws 1 and 10 across both: what a node has not proved back, the ledger has not freed."""
        state = self.ledger.lessor.state
        views = core.leases(node.clock.instant())
        for lease in views:
            known = state.leases.get(lease.lease_id)
            if known is None or known.state not in HELD:
                raise LawBroken(
                    f"law 1: {lease.lease_id[:6]} is charged at {node.node_id} ({lease.stage}) "
                    "and free in the ledger"
                )
        self._fenced_stays(node, {x.lease_id for x in views if x.stage == "fenced"})
        for view in views:
            if view.fence is not None:
                self._looked_at(node, view.lease_id, view.fence)

    def _fenced_stays(self, node: Node, now: set[str]) -> None:
        for lease_id in self._fences.get(node.node_id, set()) - now:
            cleared = [
                record
                for batch in node.disk.batches
                for record in batch.records
                if record.kind == "agent.cleared" and record.lease_id == lease_id
            ]
            if not cleared:
                raise LawBroken(f"law 10: the fence of {lease_id[:6]} is gone without a clear")
            if not cleared[0].body["operator"] and not node.policy:
                raise LawBroken(f"S12: the fence of {lease_id[:6]} is gone, and nobody ordered it")
        self._fences[node.node_id] = now

    def _looked_at(self, node: Node, lease_id: str, fence: FenceView) -> None:
        """L2: a fence is looked at by itself, and nobody waits for ever for the next look."""
        bound_ms = PROBE_MS_MIN << min(fence.probes, 6)
        if fence.next_probe_ms is not None and fence.next_probe_ms > bound_ms:
            raise LawBroken(f"L2: {lease_id[:6]} is looked at in {fence.next_probe_ms} ms only")

    def at_the_end(self) -> None:
        """L1: everything came to rest. A7: each grant had one fate. Law 9: one chain each."""
        for lease in self.ledger.lessor.state.leases.values():
            if lease.state is not LeaseState.FENCED:
                raise LawBroken(
                    f"L1: {lease.lease_id[:6]} is still {lease.state} on {lease.node_id}"
                )
        if self.ledger.time.why:
            raise LawBroken(f"L2: nothing is granted: {self.ledger.time.why}")
        for node in self.nodes:
            self._fates(node)
            self._seen_to(node)

    def _seen_to(self, node: Node) -> None:
        """After a minute without faults, each fence has been looked at in this boot, and where the
        policy is on, nothing that is clean is fenced any more."""
        assert node.core is not None
        for view in node.core.leases(node.clock.instant()):
            if view.fence is None:
                continue
            if view.fence.latest is None:
                raise LawBroken(f"L2: nobody has looked at the fence of {view.lease_id[:6]}")
            if node.policy and view.fence.latest.clean:
                raise LawBroken(f"L2: {view.lease_id[:6]} is proved clean, and not cleared")

    def _fates(self, node: Node) -> None:
        """One bind, one proof. An order that comes again later, when all is forgotten, is answered
        with another "nothing is there"; that is no second end."""
        binds: dict[str, int] = {}
        proofs: dict[str, int] = {}
        burns: set[str] = set()
        for batch in node.disk.batches:
            for record in batch.records:
                if record.kind == "agent.bound":
                    binds[record.lease_id] = binds.get(record.lease_id, 0) + 1
                elif record.kind in ("agent.teardown_end", "agent.fenced"):
                    proofs[record.lease_id] = proofs.get(record.lease_id, 0) + 1
                elif record.kind == "agent.burnt":
                    burns.add(record.lease_id)
        for lease_id, count in binds.items():
            proved = proofs.get(lease_id, 0)
            if count != 1 or proved > 1 or (proved == 0 and lease_id not in burns):
                raise LawBroken(f"A7: {lease_id[:6]} has {count} binds, {proved} proofs")
