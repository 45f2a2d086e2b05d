"""What the ledger's events add up to: leases, books, quotas, nodes, keys.

`apply(event)` is the only way in which this state changes. It decides and refuses nothing: an event
that does not fit is a broken invariant. Whoever replays the same events has the same state.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from grafos_core import failure
from grafos_core.books import BookView, CapacityBook, Place
from grafos_core.commands import Event, PublishedKey
from grafos_core.lease import (
    CLOCK_ERROR_MS,
    IN_GRACE,
    USABLE,
    EndCause,
    Isolation,
    Kind,
    Lease,
    LeaseId,
    LeaseState,
    NodeId,
    OnDisconnect,
    OnHolderExit,
    Policy,
    Priority,
    RevokeStage,
    TenantId,
)
from grafos_core.quota import Limit, QuotaBook
from grafos_core.receipt import Cleared

RELEASED_KEPT_MAX: Final = 100_000
"""Ended leases that Get still answers for; retried requests of older ones count as new."""

PLACE_OF: Final[Mapping[LeaseState, Place]] = {
    LeaseState.PENDING: Place.LEASED,
    LeaseState.ACTIVE: Place.LEASED,
    LeaseState.ENDING: Place.ENDING,
    LeaseState.FENCED: Place.FENCED,
    LeaseState.RELEASED: Place.FREE,
}


@dataclass(slots=True)
class ClearOrder:
    nonce: str
    operator: str
    reason: str
    accept_residue: bool
    ordered_at_ms: int


@dataclass(slots=True)
class Node:
    node_id: NodeId
    incarnation: str
    boot_epoch: int = 0
    mode: str = "accepting"
    front_endpoint: str = ""
    control_endpoint: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    clears_proved_clean: bool = False
    receipt_key_id: str = ""
    books: dict[Kind, CapacityBook] = field(default_factory=dict)
    epochs: dict[Kind, int] = field(default_factory=dict)
    """Highest epoch that was ever granted here; only rises."""
    held: set[LeaseId] = field(default_factory=set)
    """Every lease that is charged to this node."""
    owing: set[LeaseId] = field(default_factory=set)
    """Leases whose receipt, or clear, is outstanding."""


class LedgerState:
    def __init__(self, default_limit: Limit | None = None) -> None:
        self.leases: dict[LeaseId, Lease] = {}
        self.released: OrderedDict[LeaseId, Lease] = OrderedDict()
        self.residues: dict[LeaseId, Lease] = {}
        """Released by a clear that accepted residue: each the act of a person, and never let go."""
        self.nodes: dict[NodeId, Node] = {}
        self.quotas = QuotaBook(default_limit)
        self.keys: dict[str, PublishedKey] = {}
        self.revoked_keys: set[str] = set()
        """Never published again: a key id is the key's own hash."""
        self.requests: dict[tuple[TenantId, str], LeaseId] = {}
        """Of each lease the grant's request and the latest one that changed it. By tenant, so that
        nobody's choice of a request id can stand in another's way."""
        self._latest_request: dict[LeaseId, str] = {}
        self.clear_orders: dict[LeaseId, ClearOrder] = {}
        self.residue_orders: dict[LeaseId, ClearOrder] = {}
        """Of these the one that accepted residue: a later order does not take that back, for its
        node may have carried out the first."""
        self.now_ms = 0
        """The latest time that any event carries: the ledger's time floor."""
        self._due: list[tuple[int, LeaseId]] = []
        self._appliers: dict[str, Callable[[Event], None]] = {
            "ledger.started": lambda event: None,
            "lease.denied": lambda event: None,
            "node.lost": lambda event: None,
            "node.returned": lambda event: None,
            "lease.granted": self._granted,
            "lease.bound": self._bound,
            "lease.renewed": self._renewed,
            "lease.attached": self._attached,
            "lease.signed": self._signed,
            "lease.ending": self._ending,
            "lease.revoke_sooner": self._sooner,
            "lease.revoking": self._revoking,
            "lease.unconfirmed": self._unconfirmed,
            "lease.released": self._released,
            "lease.fenced": self._fenced,
            "lease.clear_ordered": self._clear_ordered,
            "lease.clear_expired": self._clear_expired,
            "node.registered": self._registered,
            "node.mode": self._mode,
            "node.forgotten": self._forgotten,
            "tenant.quota": self._quota,
            "key.published": self._key,
            "key.revoked": lambda event: self.revoked_keys.add(event.body["key_id"]),
        }

    # queries

    def find(self, lease_id: LeaseId) -> Lease | None:
        known = self.leases.get(lease_id) or self.released.get(lease_id)
        return known or self.residues.get(lease_id)

    def book_view(self, node: Node, kind: Kind, *, available: bool) -> BookView:
        return node.books[kind].view(available=available)

    def pop_due(self, now_ms: int) -> Iterator[Lease]:
        """Leases of which something fell due; what is done with one is done before the next.

        Costs what is due, not what exists: a lease keeps its entry, and moves it when popped.
        """
        while self._due and self._due[0][0] <= now_ms:
            _, lease_id = heapq.heappop(self._due)
            lease = self.leases.get(lease_id)
            due_ms = due_at_ms(lease) if lease else None
            if lease is None or due_ms is None:
                continue
            if due_ms <= now_ms:
                yield lease
            else:
                heapq.heappush(self._due, (due_ms, lease_id))

    def next_due_ms(self) -> int | None:
        return self._due[0][0] if self._due else None

    # the one mutator

    def apply(self, event: Event) -> None:
        applier = self._appliers.get(event.kind)
        failure.invariant(applier is not None, f"unknown event {event.kind}")
        assert applier is not None
        applier(event)
        self.now_ms = max(self.now_ms, event.at_ms)

    def _granted(self, event: Event) -> None:
        lease = lease_from_body(event.lease_id, event.epoch, event.body)
        node = self.nodes[lease.node_id]
        failure.invariant(lease.lease_id not in self.leases, "lease id granted twice")
        failure.invariant(lease.epoch > node.epochs.get(lease.kind, 0), "epoch does not rise")
        node.books[lease.kind].take(lease.extent_offset, lease.amount)
        node.epochs[lease.kind] = lease.epoch
        node.held.add(lease.lease_id)
        self.quotas.charge(lease.tenant, lease.kind, lease.amount)
        self.requests[lease.tenant, lease.request_id] = lease.lease_id
        self._put(lease)

    def _bound(self, event: Event) -> None:
        lease = self._lease(event)
        self._put(lease.moved(LeaseState.ACTIVE, bound_at_ms=event.at_ms))

    def _renewed(self, event: Event) -> None:
        lease, body = self._lease(event), event.body
        failure.invariant(lease.state in USABLE, "only a live lease is renewed")
        failure.invariant(body["end_ms"] >= lease.end_ms, "a renewal shortens")
        failure.invariant(body["generation"] > lease.generation, "the generation does not rise")
        self.leases[lease.lease_id] = replace(
            lease, end_ms=body["end_ms"], ttl_ms=body["ttl_ms"], generation=body["generation"],
            former_end_ms=lease.node_end_ms,
        ).signed_by(body.get("key_id", ""))  # fmt: skip
        self._remember(lease, body["request_id"])

    def _attached(self, event: Event) -> None:
        lease, body = self._lease(event), event.body
        failure.invariant(body["generation"] > lease.generation, "the generation does not rise")
        self._put(
            replace(
                lease, holder=body["holder"], holder_key=body["holder_key"],
                generation=body["generation"], bind_by_ms=body["bind_by_ms"],
            ).signed_by(body.get("key_id", ""))
        )  # fmt: skip
        self._remember(lease, body["request_id"])

    def _signed(self, event: Event) -> None:
        lease = self._lease(event)
        self.leases[lease.lease_id] = lease.signed_by(event.body["key_id"])

    def _ending(self, event: Event) -> None:
        lease, body = self._lease(event), event.body
        node = self.nodes[lease.node_id]
        node.books[lease.kind].move(Place.LEASED, Place.ENDING, lease.amount)
        node.owing.add(lease.lease_id)
        self.quotas.discharge(lease.tenant, lease.kind, lease.amount)
        self._put(
            lease.moved(
                LeaseState.ENDING, cause=EndCause(body["cause"]), reason=body["reason"],
                ended_at_ms=event.at_ms, grace_ms=body["grace_ms"],
            )
        )  # fmt: skip

    def _sooner(self, event: Event) -> None:
        lease, body = self._lease(event), event.body
        ends_ms = event.at_ms + body["grace_ms"]
        failure.invariant(lease.stage in IN_GRACE, "only a grace is shortened")
        failure.invariant(ends_ms < (lease.ended_at_ms or 0) + lease.grace_ms, "a grace is longer")
        self._put(
            replace(
                lease, ended_at_ms=event.at_ms, grace_ms=body["grace_ms"], reason=body["reason"]
            )
        )

    def _revoking(self, event: Event) -> None:
        lease = self._lease(event).at_stage(RevokeStage(event.body["stage"]))
        self.leases[lease.lease_id] = lease

    def _unconfirmed(self, event: Event) -> None:
        """Told twice where the node may not have heard of the order: once more when the lease's
        own end has closed it there."""
        lease = replace(self._lease(event), unconfirmed=True)
        if event.at_ms >= lease.closed_by_ms:
            lease = lease.at_stage(RevokeStage.FAILED_CLOSED)
        self._put(lease)

    def _released(self, event: Event) -> None:
        lease = self._lease(event)
        node = self.nodes[lease.node_id]
        node.books[lease.kind].give_back(PLACE_OF[lease.state], lease.extent_offset, lease.amount)
        node.held.discard(lease.lease_id)
        node.owing.discard(lease.lease_id)
        self._drop_orders(lease.lease_id)
        cleared = event.body.get("cleared", "")
        self._archive(lease.moved(LeaseState.RELEASED, unconfirmed=False, cleared=cleared))

    def _fenced(self, event: Event) -> None:
        lease, body = self._lease(event), event.body
        node = self.nodes[lease.node_id]
        node.books[lease.kind].move(Place.ENDING, Place.FENCED, lease.amount)
        node.owing.discard(lease.lease_id)
        self._put(
            lease.moved(
                LeaseState.FENCED, unconfirmed=False, fence_cause=body["cause"],
                fence_evidence=dict(body["evidence"]), fenced_at_ms=event.at_ms,
            )
        )  # fmt: skip

    def _clear_ordered(self, event: Event) -> None:
        lease, body = self._lease(event), event.body
        failure.invariant(lease.state is LeaseState.FENCED, "only what is fenced is cleared")
        order = self.clear_orders[lease.lease_id] = ClearOrder(
            nonce=body["nonce"], operator=body["operator"], reason=body["reason"],
            accept_residue=body["accept_residue"], ordered_at_ms=event.at_ms,
        )  # fmt: skip
        if order.accept_residue:
            self.residue_orders[lease.lease_id] = order
        self.nodes[lease.node_id].owing.add(lease.lease_id)

    def _drop_orders(self, lease_id: LeaseId) -> None:
        self.clear_orders.pop(lease_id, None)
        self.residue_orders.pop(lease_id, None)

    def _clear_expired(self, event: Event) -> None:
        """The slice stays fenced, and its node owes nothing any more."""
        lease = self._lease(event)
        self._drop_orders(lease.lease_id)
        self.nodes[lease.node_id].owing.discard(lease.lease_id)

    def _registered(self, event: Event) -> None:
        body = event.body
        node_id = NodeId(body["node_id"])
        node = self.nodes.get(node_id)
        if node is None or node.incarnation != body["incarnation"]:
            failure.invariant(node is None or not node.held, "a new node stands on live leases")
            node = self.nodes[node_id] = Node(node_id, body["incarnation"])
        node.boot_epoch = body["boot_epoch"]
        node.front_endpoint, node.control_endpoint = body["front"], body["control"]
        node.labels = dict(body["labels"])
        node.clears_proved_clean = body.get("clears_proved_clean", False)
        node.receipt_key_id = body["receipt_key_id"]
        for name, epoch in body["epochs"].items():
            node.epochs[Kind(name)] = max(node.epochs.get(Kind(name), 0), epoch)
        for name, total in body["totals"].items():
            kind = Kind(name)
            book = node.books.get(kind)
            if book is None:
                node.books[kind] = CapacityBook(total, extents=kind.has_extents)
            else:
                failure.invariant(book.resize(total), "an offer below what is held was accepted")

    def _mode(self, event: Event) -> None:
        self.nodes[NodeId(event.body["node_id"])].mode = event.body["mode"]

    def _forgotten(self, event: Event) -> None:
        node = self.nodes.pop(NodeId(event.body["node_id"]))
        for lease_id in sorted(node.held):
            lease = self.leases[lease_id]
            if lease.state in USABLE:
                self.quotas.discharge(lease.tenant, lease.kind, lease.amount)
                lease = lease.moved(LeaseState.ENDING, cause=EndCause.AGENT_LOST)
            self._drop_orders(lease_id)
            self._archive(replace(lease, reason="node forgotten", ended_at_ms=event.at_ms))

    def _quota(self, event: Event) -> None:
        body = event.body
        limit = Limit(body["amount"], body["count"])
        self.quotas.set_limit(TenantId(body["tenant"]), Kind(body["kind"]), limit)

    def _key(self, event: Event) -> None:
        body = event.body
        self.keys[body["key_id"]] = PublishedKey(
            body["key_id"], body["owner"], body["use"], body["public_key"], body["not_after_ms"]
        )

    def _lease(self, event: Event) -> Lease:
        lease = self.leases.get(LeaseId(event.lease_id))
        failure.invariant(lease is not None, f"{event.kind} of a lease that is not held")
        assert lease is not None
        return lease

    def _put(self, lease: Lease) -> None:
        self.leases[lease.lease_id] = lease
        due_ms = due_at_ms(lease)
        if due_ms is not None:
            heapq.heappush(self._due, (due_ms, lease.lease_id))

    def _remember(self, lease: Lease, request_id: str) -> None:
        former = self._latest_request.get(lease.lease_id)
        if former is not None:
            self.requests.pop((lease.tenant, former), None)
        self._latest_request[lease.lease_id] = request_id
        self.requests[lease.tenant, request_id] = lease.lease_id

    def _archive(self, lease: Lease) -> None:
        self.leases.pop(lease.lease_id, None)
        if lease.cleared == Cleared.RESIDUE:
            self.residues[lease.lease_id] = lease
            return
        self.released[lease.lease_id] = lease
        if len(self.released) > RELEASED_KEPT_MAX:
            _, oldest = self.released.popitem(last=False)
            latest = self._latest_request.pop(oldest.lease_id, "")
            for request_id in (oldest.request_id, latest):
                self.requests.pop((oldest.tenant, request_id), None)

    def check(self) -> None:
        """Laws 1 and 2, and the tenants' book, recomputed from the leases themselves."""
        self._check_nodes()
        charged: dict[tuple[TenantId, Kind], tuple[int, int]] = {}
        for lease in self.leases.values():
            if lease.state in USABLE:
                amount, count = charged.get((lease.tenant, lease.kind), (0, 0))
                charged[lease.tenant, lease.kind] = (amount + lease.amount, count + 1)
        for tenant, kind, _, usage in self.quotas.entries():
            expected = charged.pop((tenant, kind), (0, 0))
            failure.invariant((usage.amount, usage.count) == expected, "a tenant's book is wrong")
        failure.invariant(not charged, "a lease is charged to no tenant")

    def _check_nodes(self) -> None:
        by_node: dict[NodeId, list[Lease]] = {node_id: [] for node_id in self.nodes}
        for lease in self.leases.values():
            by_node[lease.node_id].append(lease)
        for node_id, leases in by_node.items():
            node = self.nodes[node_id]
            failure.invariant(node.held == {x.lease_id for x in leases}, "held leases differ")
            for kind, book in node.books.items():
                book.check()
                mine = [lease for lease in leases if lease.kind is kind]
                for place in (Place.LEASED, Place.ENDING, Place.FENCED):
                    total = sum(x.amount for x in mine if PLACE_OF[x.state] is place)
                    failure.invariant(total == book.amount(place), f"{place.value} differs")
                if kind.has_extents:
                    check_disjoint(mine)


def check_disjoint(leases: list[Lease]) -> None:
    runs = sorted((lease.extent_offset, lease.extent_end) for lease in leases)
    for (_, end), (start, _) in itertools.pairwise(runs):
        failure.invariant(end <= start, "two leases hold the same blocks")


def due_at_ms(lease: Lease) -> int | None:
    """When the ledger has to look at this lease again; None: only when something happens."""
    if lease.state is LeaseState.PENDING:
        return min(lease.bind_by_ms, lease.end_ms) + CLOCK_ERROR_MS
    if lease.state is LeaseState.ACTIVE:
        return lease.end_ms + CLOCK_ERROR_MS
    if lease.state is not LeaseState.ENDING or lease.stage is RevokeStage.FAILED_CLOSED:
        return None
    return lease.closed_by_ms if lease.unconfirmed else lease.receipt_due_ms


def lease_to_body(lease: Lease) -> dict[str, Any]:
    """What a grant event carries; everything that `lease_from_body` needs."""
    policy = lease.policy
    return {
        "request_id": lease.request_id, "tenant": lease.tenant, "holder": lease.holder,
        "holder_key": lease.holder_key, "kind": lease.kind.value, "node_id": lease.node_id,
        "incarnation": lease.incarnation, "amount": lease.amount,
        "extent_offset": lease.extent_offset, "generation": lease.generation,
        "ttl_ms": lease.ttl_ms, "granted_at_ms": lease.granted_at_ms, "end_ms": lease.end_ms,
        "lifetime_end_ms": lease.lifetime_end_ms, "bind_by_ms": lease.bind_by_ms,
        "policy": {
            "on_holder_exit": policy.on_holder_exit.value, "reconnect_ms": policy.reconnect_ms,
            "stop_after_ms": policy.stop_after_ms, "isolation": policy.isolation.value,
            "scrub": policy.scrub, "priority": policy.priority.value,
            "on_disconnect": policy.on_disconnect.value,
        },
        "key_ids": list(lease.key_ids),
    }  # fmt: skip


def lease_from_body(lease_id: str, epoch: int, body: Mapping[str, Any]) -> Lease:
    policy = body["policy"]
    return Lease(
        lease_id=LeaseId(lease_id), request_id=body["request_id"],
        tenant=TenantId(body["tenant"]), holder=body["holder"], holder_key=body["holder_key"],
        kind=Kind(body["kind"]), node_id=NodeId(body["node_id"]),
        incarnation=body["incarnation"], amount=body["amount"],
        extent_offset=body["extent_offset"], epoch=epoch, generation=body["generation"],
        ttl_ms=body["ttl_ms"], granted_at_ms=body["granted_at_ms"], end_ms=body["end_ms"],
        lifetime_end_ms=body["lifetime_end_ms"], bind_by_ms=body["bind_by_ms"],
        policy=Policy(
            on_holder_exit=OnHolderExit(policy["on_holder_exit"]),
            reconnect_ms=policy["reconnect_ms"], stop_after_ms=policy["stop_after_ms"],
            isolation=Isolation(policy["isolation"]), scrub=policy["scrub"],
            priority=Priority(policy["priority"]),
            on_disconnect=OnDisconnect(policy.get("on_disconnect", OnDisconnect.GRACE)),
        ),
        key_ids=tuple(body.get("key_ids", ())),
    )  # fmt: skip
