"""The lessor: the authority that owns leases, and decides each request against this very instant.

    command ──► decide against the present state ──► events ──► apply ──► Step
                                                                (events, answer, nodes to wake)

The order is the contract: whoever drives it makes `Step.events` durable before anyone hears the
answer, and halts when that fails; the next process replays the events and has the same state.
Capacity comes back by `Credit` of a receipt or of a clear, never because time passed. Nothing here
reads a clock: `now_ms` is the ledger's wall clock, kept from going back by whoever drives it.

Where a node stands right now (its registration, its readiness evidence) is presence, not history:
it is forgotten at a restart, so nothing is granted on a node before it has been heard again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from grafos_core import bundle, failure, spiffe
from grafos_core.books import BookView, CapacityBook, Place
from grafos_core.commands import (
    Attach,
    Burn,
    ClearFence,
    Command,
    Credit,
    End,
    Event,
    ForgetNode,
    Grant,
    GrantBundle,
    LiveLease,
    Obligation,
    PublishedKey,
    PublishKey,
    Refusal,
    Register,
    Renew,
    ReportBound,
    RevokeKey,
    SetMode,
    SetQuota,
    Step,
)
from grafos_core.failure import FabricError
from grafos_core.lease import (
    AMOUNT_MAX,
    EPOCH_MAX,
    IN_GRACE,
    LATER_STAGES,
    LIFETIME_MS_MAX,
    REPORTED_STAGES,
    TOKEN_MS_MAX,
    TTL_MS_MIN,
    USABLE,
    EndCause,
    Kind,
    Lease,
    LeaseId,
    LeaseState,
    NodeId,
    check_lease_id,
    check_request_id,
    check_ttl,
)
from grafos_core.ledger_state import LedgerState, Node, lease_to_body
from grafos_core.quota import Limit
from grafos_core.receipt import Cleared, Outcome, TeardownReceipt

REGISTRATION_TTL_MS: Final = 3_000
"""A node not heard for so long is lost: its free capacity is withheld."""
EVIDENCE_MS_MAX: Final = 3_000
REASON_CHARS_MAX: Final = 256
CLEAR_ORDER_MS: Final = 60_000
POLICY_REASON: Final = "proved clean, cleared by the policy of its node"
GRACE_MS_MAX: Final = 600_000
KEY_CHANGE_MS: Final = 250
NODE_MODES: Final[Mapping[str, frozenset[str]]] = {
    "accepting": frozenset({"draining", "fence_lost"}),
    "draining": frozenset({"drained", "accepting", "fence_lost"}),
    "drained": frozenset({"maintenance", "returning"}),
    "maintenance": frozenset({"returning"}),
    "returning": frozenset({"accepting"}),
    "fence_lost": frozenset({"returning"}),
}


@dataclass(slots=True)
class Presence:
    """What a node last said of itself in this boot of the ledger."""

    heard_at_ms: int
    boot_epoch: int
    ready_kinds: frozenset[Kind]
    closed_gates: dict[str, str]
    live_known: bool = False
    strangers: dict[LeaseId, LiveLease] = field(default_factory=dict)
    """Live at the node, unknown here: this ledger was restored from an older state."""
    lost: bool = False


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as admission sees it."""

    node_id: NodeId
    incarnation: str
    boot_epoch: int
    mode: str
    lost: bool
    ready_kinds: frozenset[Kind]
    closed_gates: Mapping[str, str]
    evidence_age_ms: int
    front_endpoint: str
    control_endpoint: str
    labels: Mapping[str, str]
    books: Mapping[Kind, BookView]
    lease_count: int
    live_known: bool
    registered_until_ms: int
    clears_proved_clean: bool = False


class Lessor:
    def __init__(
        self, *, default_limit: Limit | None = None, state: LedgerState | None = None
    ) -> None:
        self.state = state or LedgerState(default_limit)
        self._presence: dict[NodeId, Presence] = {}
        self._deciders: dict[type, Callable[[Any, int], Step]] = {
            Grant: self._grant, GrantBundle: self._grant_bundle, Attach: self._attach,
            Renew: self._renew, End: self._end,
            ReportBound: self._report_bound, Credit: self._credit, Burn: self._burn,
            ClearFence: self._clear, SetQuota: self._set_quota, ForgetNode: self._forget,
            Refusal: self._refusal, PublishKey: self._publish_key, Register: self._register,
            SetMode: self._set_mode, RevokeKey: self._revoke_key,
        }  # fmt: skip

    # input

    def handle(self, command: Command, now_ms: int) -> Step:
        """Decide and apply. A refusal is an answer, in `Step.failure`, and changes nothing."""
        failure.invariant(now_ms >= self.state.now_ms, "the ledger's time went back")
        try:
            return self._deciders[type(command)](command, now_ms)
        except FabricError as refusal:
            return Step(failure=refusal)

    def tick(self, now_ms: int) -> Step:
        """What fell due: ends, burns, overdue receipts, lost nodes. Extra ticks do nothing."""
        failure.invariant(now_ms >= self.state.now_ms, "the ledger's time went back")
        events: list[Event] = []
        nodes: set[NodeId] = set()
        for lease in self.state.pop_due(now_ms):
            event = self._due_event(lease, now_ms)
            nodes.add(lease.node_id)
            events.append(event)
            self.state.apply(event)
        events += self._expire_clear_orders(now_ms)
        events += self._find_lost_nodes(now_ms)
        return Step(tuple(events), nodes=frozenset(nodes))

    def replay(self, event: Event) -> None:
        """Apply what was durable before this process began."""
        self.state.apply(event)

    # queries

    def timeout_ms(self, now_ms: int) -> int | None:
        """How long nothing falls due; None: until something happens."""
        heard = [p.heard_at_ms for p in self._presence.values() if not p.lost]
        instants = [heard_ms + REGISTRATION_TTL_MS + 1 for heard_ms in heard]
        due_ms = self.state.next_due_ms()
        instants += [due_ms] if due_ms is not None else []
        orders = self.state.clear_orders.values()
        instants += [order.ordered_at_ms + CLEAR_ORDER_MS + 1 for order in orders]
        return max(0, min(instants) - now_ms) if instants else None

    def lease(self, lease_id: LeaseId) -> Lease:
        found = self.state.find(lease_id)
        if found is None:
            raise failure.of("NOT_FOUND", lease_id=lease_id)
        return found

    def obligations(self, node_id: NodeId) -> list[Obligation]:
        """What this node still owes: receipts of ended leases, and clears that were ordered."""
        node = self.state.nodes.get(node_id)
        if node is None:
            return []
        return [self._obligation(self.state.leases[i]) for i in sorted(node.owing)]

    def strangers(self, node_id: NodeId) -> list[LiveLease]:
        presence = self._presence.get(node_id)
        return list(presence.strangers.values()) if presence else []

    def wants_live(self, node_id: NodeId) -> bool:
        presence = self._presence.get(node_id)
        return presence is None or not presence.live_known

    def node_view(self, node_id: NodeId, now_ms: int) -> NodeView:
        node, presence = self.state.nodes[node_id], self._presence.get(node_id)
        heard_ms = presence.heard_at_ms if presence else 0
        lost = presence is None or now_ms - heard_ms > REGISTRATION_TTL_MS
        available = not lost and node.mode == "accepting"
        return NodeView(
            node_id=node_id, incarnation=node.incarnation, boot_epoch=node.boot_epoch,
            mode=node.mode, lost=lost,
            ready_kinds=presence.ready_kinds if presence else frozenset(),
            closed_gates=presence.closed_gates if presence else {},
            evidence_age_ms=now_ms - heard_ms, front_endpoint=node.front_endpoint,
            control_endpoint=node.control_endpoint, labels=node.labels,
            books={k: b.view(available=available) for k, b in node.books.items()},
            lease_count=len(node.held),
            live_known=presence is not None and presence.live_known and not presence.strangers,
            registered_until_ms=heard_ms + REGISTRATION_TTL_MS if presence else 0,
            clears_proved_clean=node.clears_proved_clean,
        )  # fmt: skip

    def nodes(self, now_ms: int) -> list[NodeView]:
        return [self.node_view(node_id, now_ms) for node_id in sorted(self.state.nodes)]

    def check(self) -> None:
        """Every law that the ledger can see."""
        self.state.check()
        for lease in self.state.leases.values():
            node = self.state.nodes[lease.node_id]
            failure.invariant(lease.epoch <= node.epochs[lease.kind], "an epoch was never granted")
            failure.invariant(lease.incarnation == node.incarnation, "a lease of a former node")
            if lease.lifetime_end_ms is not None:
                failure.invariant(lease.end_ms <= lease.lifetime_end_ms, "end past lifetime")

    # decisions

    def _commit(self, *events: Event, lease_id: LeaseId | None = None,
                nodes: frozenset[NodeId] = frozenset()) -> Step:  # fmt: skip
        for event in events:
            self.state.apply(event)
        return Step(events, self.state.find(lease_id) if lease_id else None, nodes=nodes)

    def _grant(self, ask: Grant, now_ms: int) -> Step:
        check_request_id(ask.request_id)
        known = self.state.requests.get((ask.tenant, ask.request_id))
        if known is not None:
            return self._again(self._own(known, ask.tenant, ask.holder), ask.key_id, now_ms)
        lease = self._decided(ask, [], now_ms)
        return self._commit(_granted(lease, ask), lease_id=lease.lease_id)

    def _decided(self, ask: Grant, before: list[Lease], now_ms: int) -> Lease:
        """The lease that is granted. `before` are those that are granted with it: their place is
        taken in the books of the nodes already, and is not charged to the tenant yet."""
        self._check_shape(ask)
        node = self._check_node(ask, now_ms)
        offset = node.books[ask.kind].find(ask.amount)
        if offset is None:
            view = node.books[ask.kind].view(available=True)
            text = f"{ask.kind}: {view.free} free, {ask.amount} asked"
            raise failure.of("NO_CAPACITY", text, retry_after_ms=1000)
        alike = [lease for lease in before if lease.kind is ask.kind]
        amount = ask.amount + sum(lease.amount for lease in alike)
        self.state.quotas.check_charge(ask.tenant, ask.kind, amount, len(alike) + 1)
        epoch = node.epochs.get(ask.kind, 0) + 1
        epoch += sum(lease.node_id == ask.node_id for lease in alike)
        return self._make_lease(ask, node, offset, epoch, now_ms)

    def _grant_bundle(self, ask: GrantBundle, now_ms: int) -> Step:
        """All or none: one step, whose events become durable together."""
        bundle.check(ask)
        known = bundle.granted_before(ask, self.state.requests)
        if known:
            return self._bundle_again(ask, known, now_ms)
        leases = self._decided_together(ask.grants, now_ms)
        tag = {"bundle": ask.request_id, "members": len(leases)}
        events = [_granted(x, grant, tag) for x, grant in zip(leases, ask.grants, strict=True)]
        step = self._commit(*events)
        return replace(step, leases=tuple(self.state.leases[x.lease_id] for x in leases))

    def _decided_together(self, grants: tuple[Grant, ...], now_ms: int) -> list[Lease]:
        """Each as if those before it were granted already; nothing stays changed."""
        made: list[Lease] = []
        try:
            for index, grant in enumerate(grants):
                with bundle.named(index, grant.kind):
                    lease = self._decided(grant, made, now_ms)
                self._book(lease).take(lease.extent_offset, lease.amount)
                made.append(lease)
        finally:
            for lease in reversed(made):
                self._book(lease).give_back(Place.LEASED, lease.extent_offset, lease.amount)
        return made

    def _bundle_again(self, ask: GrantBundle, known: list[LeaseId], now_ms: int) -> Step:
        steps = []
        for grant, lease_id in zip(ask.grants, known, strict=True):
            lease = self._own(lease_id, grant.tenant, grant.holder)
            if (grant.kind, grant.amount) != (lease.kind, lease.amount):
                raise bundle.other_content()
            self._check_signer(grant.key_id)
            steps.append((lease, grant.key_id))
        again = [self._again(lease, key_id, now_ms) for lease, key_id in steps]
        events = tuple(event for step in again for event in step.events)
        return Step(events, leases=tuple(step.lease for step in again if step.lease))

    def _book(self, lease: Lease) -> CapacityBook:
        return self.state.nodes[lease.node_id].books[lease.kind]

    def _again(self, lease: Lease, key_id: str, now_ms: int) -> Step:
        """A request that was answered before; its new token may be signed by another key."""
        self._check_signer(key_id)
        if lease.signed_by(key_id) is lease or lease.state not in USABLE:
            return Step(lease=lease)
        body = {"key_id": key_id}
        event = Event("lease.signed", now_ms, lease.lease_id, lease.epoch, body)
        return self._commit(event, lease_id=lease.lease_id)

    def _check_shape(self, ask: Grant) -> None:
        check_lease_id(ask.lease_id)
        self._check_signer(ask.key_id)
        spiffe.check_identifier(ask.tenant, what="tenant")
        check_ttl(ask.ttl_ms)
        if self.state.find(ask.lease_id) is not None:
            raise failure.of("PRECONDITION", "the lease id is in use")
        if not 0 < ask.amount <= AMOUNT_MAX:
            raise failure.of("RANGE", f"amount: 1 to {AMOUNT_MAX}")
        if ask.amount % ask.kind.granule:
            raise failure.of("RANGE", f"amount: a multiple of {ask.kind.granule}")
        if not 0 < ask.bind_within_ms <= TOKEN_MS_MAX:
            raise failure.of("RANGE", f"bind_within_ms: 1 to {TOKEN_MS_MAX}")
        if ask.lifetime_ms is not None and ask.lifetime_ms < TTL_MS_MIN:
            raise failure.of("RANGE", f"lifetime_ms: at least {TTL_MS_MIN}")

    def _check_node(self, ask: Grant, now_ms: int) -> Node:
        node, presence = self.state.nodes.get(ask.node_id), self._presence.get(ask.node_id)
        if node is None:
            raise failure.of("NOT_FOUND", "no such node")
        if node.incarnation != ask.incarnation:
            raise failure.of("PRECONDITION", "the node has a new incarnation")
        if presence is None or now_ms - presence.heard_at_ms > EVIDENCE_MS_MAX:
            raise failure.of("NODE_NOT_READY", "its evidence is older than 3 s")
        if node.mode != "accepting":
            raise failure.of("NODE_NOT_READY", f"the node is {node.mode}")
        if presence.boot_epoch != node.boot_epoch:
            raise failure.of("NODE_NOT_READY", "its evidence is of an earlier boot")
        if not presence.live_known or presence.strangers:
            raise failure.of("LEDGER_BEHIND")
        if ask.kind not in node.books:
            raise failure.of("NO_MATCH", f"the node does not offer {ask.kind}")
        if ask.kind not in presence.ready_kinds:
            raise failure.of("NODE_NOT_READY", f"{ask.kind} is not ready there")
        return node

    def _make_lease(self, ask: Grant, node: Node, offset: int, epoch: int, now_ms: int) -> Lease:
        class_ms = LIFETIME_MS_MAX[ask.policy.priority]
        bounds = [ms for ms in (class_ms, ask.lifetime_ms) if ms is not None]
        lifetime_end_ms = now_ms + min(bounds) if bounds else None
        end_ms = now_ms + ask.ttl_ms
        if lifetime_end_ms is not None:
            end_ms = min(end_ms, lifetime_end_ms)
        failure.invariant(epoch <= EPOCH_MAX, "the epochs of a node are used up")
        return Lease(
            lease_id=ask.lease_id, request_id=ask.request_id, tenant=ask.tenant,
            holder=ask.holder, holder_key=ask.holder_key, kind=ask.kind, node_id=ask.node_id,
            incarnation=node.incarnation, amount=ask.amount, extent_offset=offset, epoch=epoch,
            generation=1, ttl_ms=ask.ttl_ms, granted_at_ms=now_ms, end_ms=end_ms,
            lifetime_end_ms=lifetime_end_ms,
            bind_by_ms=min(now_ms + ask.bind_within_ms, end_ms), policy=ask.policy,
            key_ids=(ask.key_id,) if ask.key_id else (),
        )  # fmt: skip

    def _renew(self, ask: Renew, now_ms: int) -> Step:
        check_request_id(ask.request_id)
        lease = self._own(ask.lease_id, ask.tenant, ask.holder)
        if self.state.requests.get((lease.tenant, ask.request_id)) == lease.lease_id:
            return self._again(lease, ask.key_id, now_ms)
        self._check_usable(lease, now_ms)
        self._check_signer(ask.key_id)
        ttl_ms = check_ttl(ask.ttl_ms if ask.ttl_ms is not None else lease.ttl_ms)
        end_ms = max(lease.end_ms, now_ms + ttl_ms)
        if lease.lifetime_end_ms is not None:
            if lease.end_ms >= lease.lifetime_end_ms:
                raise failure.of("LIFETIME", lease_id=lease.lease_id, epoch=lease.epoch)
            end_ms = min(end_ms, lease.lifetime_end_ms)
        body = {"end_ms": end_ms, "ttl_ms": ttl_ms, "generation": lease.generation + 1,
                "request_id": ask.request_id, "key_id": ask.key_id}  # fmt: skip
        event = Event("lease.renewed", now_ms, lease.lease_id, lease.epoch, body)
        return self._commit(event, lease_id=lease.lease_id)

    def _attach(self, ask: Attach, now_ms: int) -> Step:
        check_request_id(ask.request_id)
        lease = self._own(ask.lease_id, ask.tenant, ask.holder)
        if self.state.requests.get((lease.tenant, ask.request_id)) == lease.lease_id:
            return self._again(lease, ask.key_id, now_ms)
        self._check_usable(lease, now_ms)
        self._check_signer(ask.key_id)
        if not 0 < ask.bind_within_ms <= TOKEN_MS_MAX:
            raise failure.of("RANGE", f"bind_within_ms: 1 to {TOKEN_MS_MAX}")
        bind_by_ms = min(max(lease.bind_by_ms, now_ms + ask.bind_within_ms), lease.end_ms)
        body = {"generation": lease.generation + 1, "holder": ask.holder,
                "holder_key": ask.holder_key, "bind_by_ms": bind_by_ms,
                "request_id": ask.request_id, "key_id": ask.key_id}  # fmt: skip
        event = Event("lease.attached", now_ms, lease.lease_id, lease.epoch, body)
        return self._commit(event, lease_id=lease.lease_id)

    def _end(self, ask: End, now_ms: int) -> Step:
        if ask.cause not in (EndCause.RELEASE, EndCause.REVOKED):
            raise failure.of("INVALID", "cause: release or revoked")
        if not 0 <= ask.grace_ms <= GRACE_MS_MAX:
            raise failure.of("RANGE", f"grace_ms: 0 to {GRACE_MS_MAX}")
        if ask.tenant is None:
            lease = self.lease(ask.lease_id)
        else:
            lease = self._own(ask.lease_id, ask.tenant, ask.holder)
        if lease.state not in USABLE:
            return self._end_sooner(lease, ask, now_ms)
        grace_ms = min(ask.grace_ms, max(0, lease.end_ms - now_ms))
        event = _ending(lease, ask.cause, now_ms, reason=ask.reason, grace_ms=grace_ms, by=ask.by)
        return self._commit(event, lease_id=lease.lease_id, nodes=frozenset({lease.node_id}))

    def _end_sooner(self, lease: Lease, ask: End, now_ms: int) -> Step:
        """A second order may shorten a grace that still runs, and changes nothing else."""
        known_ms = (lease.ended_at_ms or 0) + lease.grace_ms
        in_grace = lease.state is LeaseState.ENDING and lease.stage in IN_GRACE
        if not in_grace or now_ms + ask.grace_ms >= known_ms:
            return Step(lease=lease)
        body = {"grace_ms": ask.grace_ms, "reason": ask.reason[:REASON_CHARS_MAX] or lease.reason,
                "by": ask.by}  # fmt: skip
        event = Event("lease.revoke_sooner", now_ms, lease.lease_id, lease.epoch, body)
        return self._commit(event, lease_id=lease.lease_id, nodes=frozenset({lease.node_id}))

    def _burn(self, ask: Burn, now_ms: int) -> Step:
        lease = self.lease(ask.lease_id)
        if lease.state is not LeaseState.PENDING:
            return Step(lease=lease)
        event = _ending(lease, EndCause.BURNT, now_ms, reason=ask.reason)
        return self._commit(event, lease_id=lease.lease_id, nodes=frozenset({lease.node_id}))

    def _report_bound(self, ask: ReportBound, now_ms: int) -> Step:
        lease = self.lease(ask.lease_id)
        theirs = (ask.node_id, ask.incarnation, ask.epoch)
        if theirs != (lease.node_id, lease.incarnation, lease.epoch):
            raise failure.of("DENIED", "not this node's lease", lease_id=ask.lease_id)
        if lease.state is not LeaseState.PENDING:
            return self._report_stage(lease, ask, now_ms)
        event = Event("lease.bound", now_ms, lease.lease_id, lease.epoch, {"node_id": ask.node_id})
        return self._commit(event, lease_id=lease.lease_id)

    def _report_stage(self, lease: Lease, ask: ReportBound, now_ms: int) -> Step:
        """What is known already, or passed by, is no event; nor what this ledger never ordered."""
        later = ask.stage in REPORTED_STAGES and ask.stage in LATER_STAGES[lease.stage]
        if lease.state is not LeaseState.ENDING or ask.stage is None or not later:
            return Step(lease=lease)
        body = {"node_id": ask.node_id, "stage": ask.stage.value}
        event = Event("lease.revoking", now_ms, lease.lease_id, lease.epoch, body)
        return self._commit(event, lease_id=lease.lease_id)

    def _credit(self, ask: Credit, now_ms: int) -> Step:
        receipt = ask.receipt
        lease = self.lease(LeaseId(receipt.lease_id))
        self._check_receipt(receipt, ask.signer_node, lease)
        if lease.lease_id not in self.state.leases:  # credited before, or forgotten with its node
            return Step(lease=lease)
        if lease.state is LeaseState.FENCED:
            return self._credit_fenced(receipt, lease, now_ms)
        if receipt.outcome is Outcome.CLEARED:
            raise failure.of("RECEIPT", "nothing was fenced", lease_id=lease.lease_id)
        if receipt.outcome is Outcome.NOTHING_CREATED and lease.bound_at_ms is not None:
            raise failure.of("RECEIPT", "the lease was bound", lease_id=lease.lease_id)
        events = []
        if lease.state in USABLE:
            events.append(_ending(lease, receipt.cause, now_ms, by=f"node {lease.node_id}"))
        events.append(_settled(lease, receipt, now_ms))
        return self._commit(*events, lease_id=lease.lease_id)

    def _credit_fenced(self, receipt: TeardownReceipt, lease: Lease, now_ms: int) -> Step:
        """Only a clear that was ordered takes a slice out of quarantine; or one by the node itself,
        where it is registered with the policy for that. Residue counts only where it was accepted.
        An order for a slice that its node has cleared meanwhile agrees to that."""
        if receipt.outcome is Outcome.FENCED:
            return Step(lease=lease)
        order = self.state.clear_orders.get(lease.lease_id)
        by_policy = receipt.cleared is Cleared.POLICY
        may = self.state.nodes[lease.node_id].clears_proved_clean
        if receipt.outcome is not Outcome.CLEARED or (order is None and not (by_policy and may)):
            raise failure.of("RECEIPT", "the slice is fenced", lease_id=lease.lease_id)
        if receipt.cleared is Cleared.RESIDUE:
            order = self.state.residue_orders.get(lease.lease_id)
            if order is None:
                raise failure.of("RECEIPT", "nobody accepted residue", lease_id=lease.lease_id)
        who = ("", POLICY_REASON) if order is None else (order.operator, order.reason)
        body = _receipt_body(receipt) | {"operator": who[0], "reason": who[1]}
        event = Event("lease.released", now_ms, lease.lease_id, lease.epoch, body)
        return self._commit(event, lease_id=lease.lease_id)

    def _check_receipt(self, receipt: TeardownReceipt, signer: NodeId, lease: Lease) -> None:
        said = (receipt.node_id, receipt.incarnation, receipt.epoch, receipt.kind, receipt.amount)
        ours = (lease.node_id, lease.incarnation, lease.epoch, lease.kind.value, lease.amount)
        if signer != lease.node_id or said != ours:
            raise failure.of("RECEIPT", lease_id=lease.lease_id, epoch=lease.epoch)

    def _clear(self, ask: ClearFence, now_ms: int) -> Step:
        lease = self.lease(ask.lease_id)
        is_held = lease.lease_id in self.state.leases  # else it was forgotten with its node
        if lease.state is not LeaseState.FENCED or not is_held:
            raise failure.of("CLEAR", "the lease is not fenced", lease_id=lease.lease_id)
        if not ask.reason or len(ask.reason) > REASON_CHARS_MAX:
            raise failure.of("CLEAR", f"a reason of 1 to {REASON_CHARS_MAX} characters is required")
        body = {"nonce": ask.nonce, "operator": ask.operator, "reason": ask.reason,
                "accept_residue": ask.accept_residue}  # fmt: skip
        event = Event("lease.clear_ordered", now_ms, lease.lease_id, lease.epoch, body)
        return self._commit(event, lease_id=lease.lease_id, nodes=frozenset({lease.node_id}))

    def _set_quota(self, ask: SetQuota, now_ms: int) -> Step:
        spiffe.check_identifier(ask.tenant, what="tenant")
        limit = ask.limit
        body = {"tenant": ask.tenant, "kind": ask.kind.value, "amount": limit.amount,
                "count": limit.count}  # fmt: skip
        self.state.quotas.set_limit(ask.tenant, ask.kind, limit)
        return self._commit(Event("tenant.quota", now_ms, body=body))

    def _refusal(self, ask: Refusal, now_ms: int) -> Step:
        body = {"tenant": ask.tenant, "holder": ask.holder, "kind": ask.kind.value,
                "amount": ask.amount, "code": ask.code, "request_id": ask.request_id}  # fmt: skip
        return self._commit(Event("lease.denied", now_ms, body=body))

    def _publish_key(self, ask: PublishKey, now_ms: int) -> Step:
        self._check_key(ask.key)
        if self.state.keys.get(ask.key.key_id) == ask.key:
            return Step()
        return self._commit(_key_event(ask.key, now_ms))

    def _revoke_key(self, ask: RevokeKey, now_ms: int) -> Step:
        known = self.state.keys.get(ask.key_id)
        if known is None or known.use != "lease":
            raise failure.of("NOT_FOUND", "no key of this id signs tokens")
        if ask.key_id in self.state.revoked_keys:
            return Step()
        body = {"key_id": ask.key_id, "owner": known.owner, "operator": ask.operator,
                "reason": ask.reason[:REASON_CHARS_MAX]}  # fmt: skip
        return self._commit(Event("key.revoked", now_ms, body=body))

    def _check_signer(self, key_id: str) -> None:
        if key_id in self.state.revoked_keys:
            why = "the key that would sign its token is revoked; another is being made"
            raise failure.of("RETRY_LATER", why, retry_after_ms=KEY_CHANGE_MS)

    def _check_key(self, key: PublishedKey) -> None:
        """What somebody published is theirs: who knows a public key cannot claim it."""
        if key.key_id in self.state.revoked_keys:
            raise failure.of("PRECONDITION", "the key is revoked; make another")
        known = self.state.keys.get(key.key_id)
        theirs = (key.public_key, key.owner, key.use)
        if known is not None and theirs != (known.public_key, known.owner, known.use):
            raise failure.of("DENIED", "another key or owner has this id")

    # nodes

    def _register(self, ask: Register, now_ms: int) -> Step:
        """Presence is renewed; only what changed becomes an event."""
        spiffe.check_identifier(ask.node_id, what="node id")
        node = self.state.nodes.get(ask.node_id)
        self._check_registration(ask, node)
        events: list[Event] = []
        if self.state.keys.get(ask.receipt_key.key_id) != ask.receipt_key:
            events.append(_key_event(ask.receipt_key, now_ms))
        if node is None or self._differs(ask, node):
            events.append(_registered(ask, now_ms))
        for event in events:
            self.state.apply(event)
        returned = self._hear(ask, now_ms)
        more = [returned] if returned else []
        if ask.live is not None:
            more += self._reconcile(ask, now_ms)
        for event in more:
            self.state.apply(event)
        return Step((*events, *more))

    def _check_registration(self, ask: Register, node: Node | None) -> None:
        self._check_key(ask.receipt_key)
        if node is not None and node.incarnation != ask.incarnation and node.held:
            raise failure.of(
                "LIVE_LEASES",
                "a former incarnation of this node still holds capacity; "
                "`grafos node forget` removes it",
            )
        if node is None or node.incarnation != ask.incarnation:
            return
        if ask.boot_epoch < node.boot_epoch:
            raise failure.of("ROLLBACK", "the node's boot epoch went back")
        for kind, total in ask.offers.items():
            book = node.books.get(kind)
            if book is not None and total < book.least_total():
                raise failure.of("LIVE_LEASES", f"{kind}: more is held than is offered now")

    def _differs(self, ask: Register, node: Node) -> bool:
        totals = {kind: book.total for kind, book in node.books.items()}
        raised = any(epoch > node.epochs.get(kind, 0) for kind, epoch in ask.high_waters.items())
        return raised or (
            node.incarnation, node.boot_epoch, node.front_endpoint, node.control_endpoint,
            node.labels, node.receipt_key_id, totals, node.clears_proved_clean,
        ) != (
            ask.incarnation, ask.boot_epoch, ask.front_endpoint, ask.control_endpoint,
            dict(ask.labels), ask.receipt_key.key_id, totals | dict(ask.offers),
            ask.clears_proved_clean,
        )  # fmt: skip

    def _hear(self, ask: Register, now_ms: int) -> Event | None:
        former = self._presence.get(ask.node_id)
        same_boot = former is not None and former.boot_epoch == ask.boot_epoch
        presence = Presence(
            now_ms, ask.boot_epoch, ask.ready_kinds, dict(ask.closed_gates),
            live_known=same_boot and former is not None and former.live_known,
            strangers=former.strangers if same_boot and former else {},
        )  # fmt: skip
        self._presence[ask.node_id] = presence
        if former is not None and former.lost:
            return Event("node.returned", now_ms, body={"node_id": ask.node_id})
        return None

    def _reconcile(self, ask: Register, now_ms: int) -> list[Event]:
        """The node said what lives there. What the ledger thinks bound and is not, has ended."""
        assert ask.live is not None
        presence, node = self._presence[ask.node_id], self.state.nodes[ask.node_id]
        live = {lease.lease_id: lease for lease in ask.live}
        presence.live_known = True
        presence.strangers = {i: lease for i, lease in live.items() if i not in node.held}
        return [
            _ending(lease, EndCause.AGENT_LOST, now_ms, by=f"node {ask.node_id}")
            for lease in (self.state.leases[i] for i in sorted(node.held))
            if lease.state is LeaseState.ACTIVE and lease.lease_id not in live
        ]

    def _forget(self, ask: ForgetNode, now_ms: int) -> Step:
        node = self.state.nodes.get(ask.node_id)
        if node is None:
            raise failure.of("NOT_FOUND", "no such node")
        presence = self._presence.get(ask.node_id)
        if presence is not None and now_ms - presence.heard_at_ms <= REGISTRATION_TTL_MS:
            raise failure.of("PRECONDITION", "the node is alive; stop it first")
        if node.held and not ask.accept_residue:
            raise failure.of("LIVE_LEASES", f"{len(node.held)} leases; --i-accept-residue forgets")
        self._presence.pop(ask.node_id, None)
        body = {"node_id": ask.node_id, "incarnation": node.incarnation, "reason": ask.reason,
                "operator": ask.operator, "lease_count": len(node.held)}  # fmt: skip
        return self._commit(Event("node.forgotten", now_ms, body=body))

    def _set_mode(self, ask: SetMode, now_ms: int) -> Step:
        node = self.state.nodes.get(ask.node_id)
        if node is None:
            raise failure.of("NOT_FOUND", "no such node")
        if ask.mode not in NODE_MODES[node.mode]:
            raise failure.of("PRECONDITION", f"a node that is {node.mode} cannot be {ask.mode}")
        body = {"node_id": ask.node_id, "mode": ask.mode, "operator": ask.operator,
                "reason": ask.reason}  # fmt: skip
        return self._commit(Event("node.mode", now_ms, body=body))

    def _expire_clear_orders(self, now_ms: int) -> list[Event]:
        """An order that its node could not carry out is not repeated for ever."""
        events = []
        for lease_id, order in self.state.clear_orders.items():
            if now_ms - order.ordered_at_ms > CLEAR_ORDER_MS:
                epoch = self.state.leases[lease_id].epoch
                events.append(Event("lease.clear_expired", now_ms, lease_id, epoch))
        for event in events:
            self.state.apply(event)
        return events

    def _find_lost_nodes(self, now_ms: int) -> list[Event]:
        events = []
        for node_id, presence in self._presence.items():
            if not presence.lost and now_ms - presence.heard_at_ms > REGISTRATION_TTL_MS:
                presence.lost = True
                events.append(Event("node.lost", now_ms, body={"node_id": node_id}))
        for event in events:
            self.state.apply(event)
        return events

    # leases

    def _due_event(self, lease: Lease, now_ms: int) -> Event:
        if lease.state is LeaseState.ENDING:
            return Event("lease.unconfirmed", now_ms, lease.lease_id, lease.epoch)
        burnt = lease.state is LeaseState.PENDING
        cause = EndCause.BURNT if burnt else EndCause.EXPIRED
        return _ending(lease, cause, now_ms, by="ledger")

    def _own(self, lease_id: LeaseId, tenant: str, holder: str) -> Lease:
        """Outsiders learn nothing: another tenant's lease does not exist for them."""
        lease = self.state.find(check_lease_id(lease_id))
        if lease is None or lease.tenant != tenant:
            raise failure.of("NOT_FOUND", lease_id=lease_id)
        if principal(lease.holder) != principal(holder):
            raise failure.of("DENIED", "another holder's lease", lease_id=lease_id)
        return lease

    def _check_usable(self, lease: Lease, now_ms: int) -> None:
        if lease.state not in USABLE:
            raise ended_failure(lease)
        if now_ms >= lease.end_ms:
            raise failure.of("LEASE_EXPIRED", lease_id=lease.lease_id, epoch=lease.epoch)

    def _obligation(self, lease: Lease) -> Obligation:
        order = self.state.clear_orders.get(lease.lease_id)
        if order is not None:
            return Obligation(
                lease, "clear", order.nonce, order.reason, order.operator, order.accept_residue,
                order.ordered_at_ms,
            )  # fmt: skip
        if lease.bound_at_ms is None and lease.cause in (EndCause.BURNT, EndCause.EXPIRED):
            return Obligation(lease, "burn", reason=lease.reason)
        action = "revoke" if lease.cause is EndCause.REVOKED else "release"
        return Obligation(lease, action, reason=lease.reason)


def principal(holder: str) -> str:
    """Who somebody is, whichever of their processes speaks: the last segment of a local holder's
    SPIFFE id names the process, and the one before it the user."""
    head, marker, name = holder.partition("/holder/")
    return head + marker + name.split("/", 1)[0]


def ended_failure(lease: Lease) -> FabricError:
    """What somebody meets who comes back to a lease that is over."""
    code = {
        EndCause.RELEASE: "LEASE_RELEASED", EndCause.HOLDER_EXIT: "LEASE_RELEASED",
        EndCause.EXPIRED: "LEASE_EXPIRED", EndCause.DISCONNECTED: "LEASE_EXPIRED",
        EndCause.REVOKED: "REVOKED", EndCause.AGENT_LOST: "AGENT_LOST",
        EndCause.DEVICE_FAILED: "IO",
        EndCause.BURNT: "EPOCH_BURNT", EndCause.BIND_FAILED: "EPOCH_BURNT",
    }.get(lease.cause or EndCause.EXPIRED, "LEASE_EXPIRED")  # fmt: skip
    if lease.state is LeaseState.FENCED:
        code = "QUARANTINED"
    return failure.of(
        code, lease.reason, lease_id=lease.lease_id, epoch=lease.epoch,
        cause=lease.cause.value if lease.cause else "",
    )  # fmt: skip


def _granted(lease: Lease, ask: Grant, tag: Mapping[str, Any] | None = None) -> Event:
    body = lease_to_body(lease) | {"decision": ask.decision[:REASON_CHARS_MAX]} | dict(tag or {})
    return Event("lease.granted", lease.granted_at_ms, lease.lease_id, lease.epoch, body)


def _ending(lease: Lease, cause: EndCause, now_ms: int, *, reason: str = "", grace_ms: int = 0,
            by: str = "") -> Event:  # fmt: skip
    body = {"cause": cause.value, "reason": reason[:REASON_CHARS_MAX], "grace_ms": grace_ms,
            "by": by}  # fmt: skip
    return Event("lease.ending", now_ms, lease.lease_id, lease.epoch, body)


def _settled(lease: Lease, receipt: TeardownReceipt, now_ms: int) -> Event:
    """A receipt of a failed teardown quarantines exactly this slice; any other credits it."""
    body = _receipt_body(receipt)
    if receipt.outcome is Outcome.FENCED:
        body |= {"cause": str(receipt.measured.get("cause", "teardown")),
                 "evidence": {k: str(v) for k, v in receipt.measured.items()}}  # fmt: skip
        return Event("lease.fenced", now_ms, lease.lease_id, lease.epoch, body)
    return Event("lease.released", now_ms, lease.lease_id, lease.epoch, body)


def _receipt_body(receipt: TeardownReceipt) -> dict[str, Any]:
    cleared = {} if receipt.cleared is None else {"cleared": receipt.cleared.value}
    return cleared | {
        "outcome": receipt.outcome.value, "assurance": receipt.assurance.value,
        "ended_by": receipt.cause.value,
        "measured": dict(receipt.measured), "record_number": receipt.record_number,
        "record_hash": receipt.record_hash, "boot_epoch": receipt.boot_epoch,
    }  # fmt: skip


def _registered(ask: Register, now_ms: int) -> Event:
    body = {
        "node_id": ask.node_id, "incarnation": ask.incarnation, "boot_epoch": ask.boot_epoch,
        "front": ask.front_endpoint, "control": ask.control_endpoint, "labels": dict(ask.labels),
        "receipt_key_id": ask.receipt_key.key_id,
        "epochs": {kind.value: epoch for kind, epoch in ask.high_waters.items()},
        "totals": {kind.value: total for kind, total in ask.offers.items()},
        "clears_proved_clean": ask.clears_proved_clean,
    }  # fmt: skip
    return Event("node.registered", now_ms, body=body)


def _key_event(key: PublishedKey, now_ms: int) -> Event:
    body = {"key_id": key.key_id, "owner": key.owner, "use": key.use,
            "public_key": key.public_key, "not_after_ms": key.not_after_ms}  # fmt: skip
    return Event("key.published", now_ms, body=body)
