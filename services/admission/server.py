"""What admission answers: requests in, the core's decision, the ledger's commit, a token out.

Rules. The decision is core's (placement.evaluate); the ledger checks it once more against the very
instant. A node that turned out full is left out and the next one tried. A request waits while it
may: for fresh evidence 3 s unless it says otherwise, for capacity only where it says so. Refusals
are recorded with the next commit. A holder sees and touches its own leases alone; to others a lease
that is not theirs does not exist.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import grpc

from grafos_core import failure, placement, spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import (
    AMOUNT_MAX,
    TOKEN_MS_DEFAULT,
    TTL_MS_DEFAULT,
    Lease,
    LeaseId,
    check_lease_id,
    check_request_id,
    check_ttl,
)
from grafos_core.lessor import GRACE_MS_MAX, REASON_CHARS_MAX, principal
from grafos_core.placement import Admit, Deny, Request
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2
from grafos_proto.v1.admission_pb2_grpc import AdmissionServiceServicer
from grafos_proto.v1.ledger_pb2_grpc import LedgerServiceStub
from grafos_proto.wire import convert
from grafos_proto.wire.failures import failure_of
from services.admission.commits import BATCH_MAX, Coalescer
from services.admission.tokens import Minter
from services.admission.view import FabricView
from services.runtime.client import Remote
from services.runtime.clock import Clock
from services.runtime.faults import fault
from services.runtime.server import deadline_left_ms, peer
from services.runtime.telemetry import Metrics

EVIDENCE_WAIT_MS: Final = 3_000
WAIT_MS_MAX: Final = 600_000
RETURN_OVERHEAD_MS: Final = 200
"""Kept back of the caller's deadline, so that the inner refusal is the one it hears."""
LABELS_MAX: Final = 16
REVOKE_MAX: Final = 256
LIST_LIMIT_MAX: Final = 10_000
REFUSALS_MAX: Final = 64
"""Refusals that one commit takes along; more are counted and not recorded one by one."""
LOOK_AGAIN_MS: Final = 250
LOOK_TIMEOUT_MS: Final = 5_000

COMMIT_TIMEOUT_MS: Final = 10_000


class Ledger:
    """The ledger as admission uses it: batched commits and renewals, plain look-ups."""

    def __init__(self, remote: Remote[LedgerServiceStub]) -> None:
        self._remote = remote
        self._refusals: list[ledger_pb2.Command] = []
        self.commit: Coalescer[ledger_pb2.Command, ledger_pb2.Outcome] = Coalescer(self._commit)
        self.renew: Coalescer[ledger_pb2.LedgerRenew, ledger_pb2.Outcome] = Coalescer(self._renew)

    def record_refusal(self, refusal: ledger_pb2.Refusal) -> None:
        """With the next commit, or when `flush_refusals` is called."""
        if len(self._refusals) < REFUSALS_MAX:
            self._refusals.append(ledger_pb2.Command(refusal=refusal))

    def flush_refusals(self) -> None:
        if self._refusals:
            self._commit([])

    def _commit(self, commands: Sequence[ledger_pb2.Command]) -> Sequence[ledger_pb2.Outcome]:
        fault("admission.commit")
        refusals, self._refusals = self._refusals, []
        room = max(0, BATCH_MAX - len(commands))
        request = ledger_pb2.CommitRequest(commands=[*commands, *refusals[:room]])
        response = self._remote.call("Commit", request, timeout_ms=COMMIT_TIMEOUT_MS)
        outcomes: list[ledger_pb2.Outcome] = list(response.outcomes[: len(commands)])
        return outcomes

    def _renew(self, asks: Sequence[ledger_pb2.LedgerRenew]) -> Sequence[ledger_pb2.Outcome]:
        request = ledger_pb2.LedgerRenewRequest(renewals=asks)
        response = self._remote.call("Renew", request, timeout_ms=COMMIT_TIMEOUT_MS)
        outcomes: list[ledger_pb2.Outcome] = list(response.outcomes)
        return outcomes

    def get(self, lease_id: LeaseId) -> lease_pb2.Lease:
        request = admission_pb2.GetLeaseRequest(lease_id=lease_id)
        found: lease_pb2.Lease = self._remote.call("Get", request, timeout_ms=LOOK_TIMEOUT_MS)
        return found

    def list(self, request: admission_pb2.ListLeasesRequest) -> admission_pb2.ListLeasesResponse:
        found: admission_pb2.ListLeasesResponse = self._remote.call(
            "List", request, timeout_ms=COMMIT_TIMEOUT_MS
        )
        return found

    def watch(
        self, request: ledger_pb2.WatchRequest
    ) -> tuple[Iterator[ledger_pb2.WatchResponse], Callable[[], Any]]:
        """The events, and what ends them."""
        return self._remote.stream("Watch", request)


class AdmissionServicer(AdmissionServiceServicer):
    def __init__(
        self, view: FabricView, ledger: Ledger, minter: Minter, clock: Clock, metrics: Metrics
    ) -> None:
        self._view, self._ledger, self._minter, self._clock = view, ledger, minter, clock
        self._decisions = metrics.counter("grafos_admission_decisions")
        self._waited = metrics.histogram("grafos_admission_wait_seconds")

    # asking

    def Acquire(
        self, request: admission_pb2.AcquireRequest, context: grpc.ServicerContext
    ) -> admission_pb2.AcquireResponse:
        fault("admission.decide")
        ask = read_request(request)
        who = _holder()
        try:
            lease = self._acquire(ask, request, who)
        except FabricError as refusal:
            self._refused(ask, who, refusal)
            raise
        self._decisions.labels("admit", "").inc()
        return self._answer(lease)

    def _acquire(self, ask: Request, request: admission_pb2.AcquireRequest, who: Identity) -> Lease:
        started_ms = self._clock.boot_ms()
        wait_ms = request.wait_ms if request.has_wait else EVIDENCE_WAIT_MS
        until_ms = started_ms + min(wait_ms, max(0, deadline_left_ms() - RETURN_OVERHEAD_MS))
        while True:
            nodes, version = self._view.nodes()
            decision = placement.evaluate(ask, nodes)
            refusal = decision.failure() if isinstance(decision, Deny) else None
            for place in placement.candidates(ask, nodes) if refusal is None else ():
                outcome = self._grant(ask, request, who, place)
                if isinstance(outcome, Lease):
                    waited_ms = self._clock.boot_ms() - started_ms
                    self._waited.labels(ask.kind.value).observe(waited_ms / 1000)
                    return outcome
                refusal = outcome
                if refusal.code not in ELSEWHERE:
                    raise refusal
            assert refusal is not None
            left_ms = until_ms - self._clock.boot_ms()
            if left_ms <= 0 or not _may_wait(refusal, request.has_wait):
                raise refusal
            self._view.wait_change(version, min(left_ms, LOOK_AGAIN_MS))

    def _grant(
        self, ask: Request, request: admission_pb2.AcquireRequest, who: Identity, place: Admit
    ) -> Lease | FabricError:
        grant = ledger_pb2.Grant(
            request_id=ask.request_id,
            lease_id=secrets.token_hex(16),
            tenant=who.tenant or "",
            holder=str(who),
            holder_key=peer().key_thumbprint,
            kind=request.kind,
            node_id=place.node_id,
            incarnation=place.incarnation,
            amount=place.amount,
            ttl_ms=request.ttl_ms or TTL_MS_DEFAULT,
            lifetime_ms=request.lifetime_ms,
            bind_within_ms=TOKEN_MS_DEFAULT,
            policy=convert.policy_to_proto(ask.policy),
            decision=f"admit {place.node_id}: {place.reason}",
        )
        outcome = self._ledger.commit(ledger_pb2.Command(grant=grant), self._time_left())
        if outcome.HasField("failure"):
            return failure_of(outcome.failure)
        return convert.lease_from_proto(outcome.lease)

    def Attach(
        self, request: admission_pb2.AttachRequest, context: grpc.ServicerContext
    ) -> admission_pb2.AcquireResponse:
        who = _holder()
        attach = ledger_pb2.AttachLease(
            request_id=check_request_id(request.request_id),
            lease_id=check_lease_id(request.lease_id),
            tenant=who.tenant or "",
            holder=str(who),
            holder_key=peer().key_thumbprint,
        )
        return self._answer(self._commit(ledger_pb2.Command(attach=attach)))

    def Renew(
        self, request: admission_pb2.RenewRequest, context: grpc.ServicerContext
    ) -> admission_pb2.RenewResponse:
        who = _holder()
        ask = ledger_pb2.LedgerRenew(
            request_id=check_request_id(request.request_id),
            lease_id=check_lease_id(request.lease_id),
            ttl_ms=request.ttl_ms,
            tenant=who.tenant or "",
            holder=str(who),
        )
        lease = _read_outcome(self._ledger.renew(ask, self._time_left()))
        text, _ = self._mint(lease)
        return admission_pb2.RenewResponse(lease=convert.lease_to_proto(lease), token=text)

    def Explain(
        self, request: admission_pb2.AcquireRequest, context: grpc.ServicerContext
    ) -> admission_pb2.ExplainResponse:
        ask = read_request(request)
        listing = admission_pb2.ListLeasesRequest(kind=request.kind, limit=LIST_LIMIT_MAX)
        leases = [convert.lease_from_proto(x) for x in self._ledger.list(listing).leases]
        nodes, _ = self._view.nodes()
        decision, reports = placement.explain(ask, nodes, leases)
        return explanation(decision, reports, own=_own_leases(leases))

    # ending

    def Release(
        self, request: admission_pb2.ReleaseRequest, context: grpc.ServicerContext
    ) -> admission_pb2.ReleaseResponse:
        who = peer().identity
        end = ledger_pb2.EndLease(
            request_id=check_request_id(request.request_id),
            lease_id=check_lease_id(request.lease_id),
            cause="release",
            by=str(who),
            tenant=who.tenant or "",
            holder=str(who) if who.role is Role.HOLDER else "",
        )
        lease = self._commit(ledger_pb2.Command(end=end))
        return admission_pb2.ReleaseResponse(lease=convert.lease_to_proto(lease))

    def Revoke(
        self, request: admission_pb2.RevokeRequest, context: grpc.ServicerContext
    ) -> admission_pb2.RevokeResponse:
        who = peer().identity
        if not 0 < len(request.lease_ids) <= REVOKE_MAX:
            raise failure.of("RANGE", f"lease_ids: 1 to {REVOKE_MAX}")
        if len(request.reason) > REASON_CHARS_MAX:
            raise failure.of("RANGE", f"reason: at most {REASON_CHARS_MAX} characters")
        if request.grace_ms > GRACE_MS_MAX:
            raise failure.of("RANGE", f"grace_ms: at most {GRACE_MS_MAX}")
        ids = [check_lease_id(lease_id) for lease_id in request.lease_ids]
        ended = []
        for lease_id in ids:
            end = ledger_pb2.EndLease(
                request_id=check_request_id(request.request_id), lease_id=lease_id,
                cause="revoked", reason=request.reason, grace_ms=request.grace_ms, by=str(who),
                tenant=who.tenant or "", holder=str(who) if who.role is Role.HOLDER else "",
            )  # fmt: skip
            ended.append(self._commit(ledger_pb2.Command(end=end)))
        return admission_pb2.RevokeResponse(leases=[convert.lease_to_proto(x) for x in ended])

    # looking

    def Get(
        self, request: admission_pb2.GetLeaseRequest, context: grpc.ServicerContext
    ) -> lease_pb2.Lease:
        lease_id = check_lease_id(request.lease_id)
        lease = self._ledger.get(lease_id)
        if not _sees(lease):
            raise failure.of("NOT_FOUND", lease_id=lease_id)
        return lease

    def List(
        self, request: admission_pb2.ListLeasesRequest, context: grpc.ServicerContext
    ) -> admission_pb2.ListLeasesResponse:
        if request.limit > LIST_LIMIT_MAX:
            raise failure.of("RANGE", f"limit: at most {LIST_LIMIT_MAX}")
        asked = admission_pb2.ListLeasesRequest()
        asked.CopyFrom(request)
        who = peer().identity
        if who.role is Role.HOLDER:
            asked.tenant = who.tenant or ""
        found = self._ledger.list(asked)
        seen = [lease for lease in found.leases if _sees(lease)]
        return admission_pb2.ListLeasesResponse(
            leases=seen, next=found.next, revision=found.revision
        )

    def Watch(
        self, request: admission_pb2.WatchLeasesRequest, context: grpc.ServicerContext
    ) -> Iterator[admission_pb2.WatchLeasesResponse]:
        if request.lease_id:
            check_lease_id(request.lease_id)
        revision = request.from_revision
        if revision == 0:
            found = self._ledger.list(admission_pb2.ListLeasesRequest(limit=LIST_LIMIT_MAX))
            revision = found.revision
            for lease in found.leases:
                if _sees(lease) and request.lease_id in ("", lease.lease_id):
                    yield admission_pb2.WatchLeasesResponse(
                        revision=revision, event="snapshot", lease=lease
                    )
        events, cancel = self._ledger.watch(ledger_pb2.WatchRequest(from_revision=revision))
        context.add_callback(lambda: cancel())
        for response in events:
            yield from _lease_events(response, request.lease_id)

    # helpers

    def _commit(self, command: ledger_pb2.Command) -> Lease:
        return _read_outcome(self._ledger.commit(command, self._time_left()))

    def _time_left(self) -> int:
        left_ms = deadline_left_ms()
        if left_ms <= 0:
            raise failure.of("DEADLINE")
        return left_ms

    def _mint(self, lease: Lease) -> tuple[str, int]:
        fault("admission.mint")
        return self._minter.mint(lease, self._clock.wall_ms())

    def _answer(self, lease: Lease) -> admission_pb2.AcquireResponse:
        text, expires_in_ms = self._mint(lease)
        nodes, _ = self._view.nodes()
        endpoint = next((n.front_endpoint for n in nodes if n.node_id == lease.node_id), "")
        return admission_pb2.AcquireResponse(
            lease=convert.lease_to_proto(lease), token=text, node_endpoint=endpoint,
            token_expires_in_ms=expires_in_ms,
        )  # fmt: skip

    def _refused(self, ask: Request, who: Identity, refusal: FabricError) -> None:
        self._decisions.labels("deny", refusal.code).inc()
        self._ledger.record_refusal(
            ledger_pb2.Refusal(
                request_id=ask.request_id, tenant=who.tenant or "", holder=str(who),
                kind=convert.kind_to_proto(ask.kind), amount=ask.amount, code=refusal.code,
            )
        )  # fmt: skip


ELSEWHERE: Final = frozenset(
    {"NO_CAPACITY", "NODE_NOT_READY", "PRECONDITION", "LEDGER_BEHIND", "NO_MATCH"}
)
"""Refusals of the ledger that another node may not meet."""


def _may_wait(refusal: FabricError, wait_was_asked: bool) -> bool:
    if refusal.code in ("NODE_NOT_READY", "LEDGER_BEHIND", "PRECONDITION"):
        return True
    return wait_was_asked and refusal.code in ("NO_CAPACITY", "QUOTA")


def read_request(request: admission_pb2.AcquireRequest) -> Request:
    """The request, every field of it checked."""
    check_request_id(request.request_id)
    kind = convert.kind_from_proto(request.kind)
    if not 0 < request.amount <= AMOUNT_MAX:
        raise failure.of("RANGE", f"amount: 1 to {AMOUNT_MAX}")
    check_ttl(request.ttl_ms or TTL_MS_DEFAULT)
    if request.wait_ms > WAIT_MS_MAX:
        raise failure.of("RANGE", f"wait_ms: at most {WAIT_MS_MAX}")
    if len(request.where) > LABELS_MAX:
        raise failure.of("RANGE", f"where: at most {LABELS_MAX} labels")
    where = dict(request.where)
    for name, value in where.items():
        spiffe.check_identifier(name, what="label")
        spiffe.check_identifier(value, what="label value")
    policy = convert.policy_from_proto(request.policy)
    return Request(request.request_id, kind, request.amount, policy, where)


def explanation(
    decision: placement.Decision,
    reports: Sequence[placement.NodeReport],
    own: Mapping[LeaseId, bool],
) -> admission_pb2.ExplainResponse:
    """As a message. Leases of others that stand in the way are counted, not named."""
    response = admission_pb2.ExplainResponse(admissible=isinstance(decision, Admit))
    if isinstance(decision, Admit):
        response.node_id, response.summary = decision.node_id, f"fits on {decision.node_id}"
    elif isinstance(decision, Deny):
        response.code, response.summary = decision.code, decision.reason
        response.earliest_ms = decision.earliest_ms or 0
        response.no_bound = decision.earliest_ms is None
    for report in reports:
        node = response.nodes.add(node_id=report.node_id, free_by_ms=report.free_by_ms or 0)
        for term in report.terms:
            node.terms.add(name=term.name, holds=term.holds, detail=term.detail)
        node.held_by.extend(x if own.get(x) else "another holder's" for x in report.held_by)
    return response


def _holder() -> Identity:
    """The caller, who must have a tenant: an operator holds nothing."""
    who = peer().identity
    if who.role is not Role.HOLDER:
        raise failure.of("ROLE", "leases are for holders")
    return who


def _sees(lease: lease_pb2.Lease) -> bool:
    who = peer().identity
    if who.role is Role.OPERATOR:
        return True
    return lease.tenant == who.tenant and principal(lease.holder) == principal(str(who))


def _own_leases(leases: Sequence[Lease]) -> dict[LeaseId, bool]:
    who = peer().identity
    everything = who.role is Role.OPERATOR
    mine = principal(str(who))
    return {x.lease_id: everything or principal(x.holder) == mine for x in leases}


def _lease_events(
    response: ledger_pb2.WatchResponse, lease_id: str
) -> Iterator[admission_pb2.WatchLeasesResponse]:
    for event in response.events:
        if not event.HasField("lease") or not _sees(event.lease):
            continue
        if lease_id in ("", event.lease.lease_id):
            yield admission_pb2.WatchLeasesResponse(
                revision=event.revision, event=event.kind, lease=event.lease
            )
    if not response.events:
        yield admission_pb2.WatchLeasesResponse(revision=response.revision, event="progress")


def _read_outcome(outcome: ledger_pb2.Outcome) -> Lease:
    if outcome.HasField("failure"):
        raise failure_of(outcome.failure)
    return convert.lease_from_proto(outcome.lease)
