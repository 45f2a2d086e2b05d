"""What admission answers: requests in, the core's decision, the ledger's commit, a token out.

Rules. The decision is core's (placement.evaluate); the ledger checks it once more against the very
instant. A node that turned out full is left out and the next one tried. A request waits while it
may: for fresh evidence 3 s unless it says otherwise, for capacity only where it says so. Refusals
are recorded with the next commit. A holder sees and touches its own leases alone; to others a lease
that is not theirs does not exist.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import grpc

from grafos_core import failure, placement, spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import (
    AMOUNT_MAX,
    TOKEN_MS_DEFAULT,
    TTL_MS_DEFAULT,
    USABLE,
    Lease,
    LeaseId,
    NodeId,
    check_lease_id,
    check_request_id,
    check_ttl,
)
from grafos_core.lessor import (
    NodeView,
    ended_failure,
    principal,
)
from grafos_core.placement import Admit, Deny, Request
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2
from grafos_proto.v1.admission_pb2_grpc import AdmissionServiceServicer
from grafos_proto.wire import convert
from grafos_proto.wire.failures import failure_of
from services.admission.ledger import Ledger
from services.admission.revocations import Revocations, sees
from services.admission.tokens import Minter
from services.admission.view import FabricView
from services.runtime.clock import Clock
from services.runtime.faults import fault
from services.runtime.server import deadline_left_ms, peer
from services.runtime.telemetry import Metrics

EVIDENCE_WAIT_MS: Final = 3_000
WAIT_MS_MAX: Final = 600_000
RETURN_OVERHEAD_MS: Final = 200
"""Kept back of the caller's deadline, so that the inner refusal is the one it hears."""
LABELS_MAX: Final = 16
LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX = 1_000, 10_000
LIST_BYTES_MAX: Final = 512 * 1024
LOOK_AGAIN_MS: Final = 250
WATCHES_MAX: Final = 32
"""Each takes a thread here and a stream of our one connection to the ledger, which has 64."""
WATCHES_PER_CALLER_MAX: Final = 8
NOWHERE: Final = "0" * 32
"""The incarnation of no node."""


_Asked = admission_pb2.ListLeasesRequest
_Listing = admission_pb2.ListLeasesResponse


class AdmissionServicer(AdmissionServiceServicer):
    def __init__(
        self, view: FabricView, ledger: Ledger, minter: Minter, clock: Clock, metrics: Metrics
    ) -> None:
        self._view, self._ledger, self._minter, self._clock = view, ledger, minter, clock
        self._places = WatchPlaces()
        self._revocations = Revocations(ledger)
        self._decisions = metrics.counter("grafos_admission_decisions")
        self._waited = metrics.histogram("grafos_admission_wait_seconds")
        self._took = metrics.histogram("grafos_lease_acquire_seconds")
        self._not_renewed = metrics.counter("grafos_lease_renew_failures")

    # asking

    def Acquire(
        self, request: admission_pb2.AcquireRequest, context: grpc.ServicerContext
    ) -> admission_pb2.AcquireResponse:
        fault("admission.decide")
        ask = read_request(request)
        who = _holder()
        started_ns = self._clock.boot_ns()
        try:
            return self._answer(self._decide(ask, request, who))
        finally:
            took_ns = self._clock.boot_ns() - started_ns
            self._took.labels(ask.kind.value).observe(took_ns / 1e9)

    def _decide(self, ask: Request, request: admission_pb2.AcquireRequest, who: Identity) -> Lease:
        try:
            lease = self._acquire(ask, request, who)
        except FabricError as refusal:
            self._refused(ask, who, refusal)
            raise
        self._decisions.labels("admit", "").inc()
        return lease

    def _acquire(self, ask: Request, request: admission_pb2.AcquireRequest, who: Identity) -> Lease:
        started_ms = self._clock.boot_ms()
        wait_ms = request.wait_ms if request.has_wait else EVIDENCE_WAIT_MS
        until_ms = started_ms + min(wait_ms, deadline_left_ms() - RETURN_OVERHEAD_MS)
        asked_before = False
        while True:
            nodes, version = self._view.nodes()
            outcome = self._try_once(ask, request, who, nodes)
            if isinstance(outcome, Deny) and self._view.loaded and not asked_before:
                asked_before = True
                outcome = self._granted_before(ask, request, who) or outcome
            if isinstance(outcome, Lease):
                waited_ms = self._clock.boot_ms() - started_ms
                self._waited.labels(ask.kind.value).observe(waited_ms / 1000)
                return outcome
            refusal = outcome.failure() if isinstance(outcome, Deny) else outcome
            left_ms = until_ms - self._clock.boot_ms()
            if left_ms <= 0 or not _may_wait(refusal, request.has_wait):
                raise refusal
            self._view.wait_change(version, min(left_ms, LOOK_AGAIN_MS))

    def _try_once(
        self, ask: Request, request: admission_pb2.AcquireRequest, who: Identity,
        nodes: Sequence[NodeView],
    ) -> Lease | Deny | FabricError:  # fmt: skip
        """The best node, and the next best where the ledger says that it is full by now."""
        refusal: FabricError | None = None
        for place in placement.candidates(ask, nodes):
            outcome = self._grant(ask, request, who, place)
            if isinstance(outcome, Lease) or outcome.code not in ELSEWHERE:
                return outcome
            refusal = outcome
        if refusal is not None:
            return refusal
        decision = placement.evaluate(ask, nodes)
        failure.invariant(isinstance(decision, Deny), "no node fits and none is refused")
        assert isinstance(decision, Deny)
        return decision

    def _granted_before(
        self, ask: Request, request: admission_pb2.AcquireRequest, who: Identity
    ) -> Lease | None:
        """The lease that an earlier try of this request was granted, when no node fits any more.

        The ledger answers a request id that it knows with its lease; a grant that names no node's
        incarnation asks for nothing else.
        """
        node_id = request.where.get("node") or "none"
        place = Admit(NodeId(node_id), NOWHERE, "", placement.rounded(ask.kind, ask.amount))
        outcome = self._grant(ask, request, who, place)
        return outcome if isinstance(outcome, Lease) else None

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
            key_id=self._minter.key_id,
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
            key_id=self._minter.key_id,
        )
        return self._answer(self._commit(ledger_pb2.Command(attach=attach)))

    def Renew(
        self, request: admission_pb2.RenewRequest, context: grpc.ServicerContext
    ) -> admission_pb2.RenewResponse:
        try:
            return self._renew(request)
        except FabricError as refusal:
            self._not_renewed.labels(refusal.code).inc()
            raise

    def _renew(self, request: admission_pb2.RenewRequest) -> admission_pb2.RenewResponse:
        who = _holder()
        ask = ledger_pb2.LedgerRenew(
            request_id=check_request_id(request.request_id),
            lease_id=check_lease_id(request.lease_id),
            ttl_ms=request.ttl_ms,
            tenant=who.tenant or "",
            holder=str(who),
            key_id=self._minter.key_id,
        )
        lease = _read_outcome(self._ledger.renew(ask, self._time_left()))
        text, _ = self._mint(lease)
        return admission_pb2.RenewResponse(lease=convert.lease_to_proto(lease), token=text)

    def Explain(
        self, request: admission_pb2.AcquireRequest, context: grpc.ServicerContext
    ) -> admission_pb2.ExplainResponse:
        ask = read_request(request)
        listing = admission_pb2.ListLeasesRequest(kind=request.kind)
        pages = self._ledger.pages(listing)
        leases = [convert.lease_from_proto(x) for page in pages for x in page.leases]
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
        return self._revocations.answer(request)

    # looking

    def Get(
        self, request: admission_pb2.GetLeaseRequest, context: grpc.ServicerContext
    ) -> lease_pb2.Lease:
        lease_id = check_lease_id(request.lease_id)
        lease = self._ledger.get(lease_id)
        if not sees(lease):
            raise failure.of("NOT_FOUND", lease_id=lease_id)
        return lease

    def List(
        self, request: admission_pb2.ListLeasesRequest, context: grpc.ServicerContext
    ) -> admission_pb2.ListLeasesResponse:
        if request.limit > LIST_LIMIT_MAX:
            raise failure.of("RANGE", f"limit: at most {LIST_LIMIT_MAX}")
        limit, size, response = request.limit or LIST_LIMIT_DEFAULT, 0, _Listing()
        for page in self._ledger.pages(_of_caller(request)):
            response.revision = response.revision or page.revision
            for lease in filter(sees, page.leases):
                size += lease.ByteSize()
                if len(response.leases) == limit or size > LIST_BYTES_MAX:
                    response.next = response.leases[-1].lease_id
                    return response
                response.leases.append(lease)
        return response

    def Keys(
        self, request: admission_pb2.KeysRequest, context: grpc.ServicerContext
    ) -> admission_pb2.KeysResponse:
        keys = self._ledger.receipt_keys()
        if request.node_id:
            spiffe.check_identifier(request.node_id, what="node id")
            keys = [key for key in keys if spiffe.parse_id(key.owner).name == request.node_id]
        return admission_pb2.KeysResponse(keys=keys)

    def Watch(
        self, request: admission_pb2.WatchLeasesRequest, context: grpc.ServicerContext
    ) -> Iterator[admission_pb2.WatchLeasesResponse]:
        if request.lease_id:
            check_lease_id(request.lease_id)
        with self._places.taken(str(peer().identity)):
            revision = request.from_revision
            if revision == 0:
                revision = yield from self._snapshot(request.lease_id)
            events, cancel = self._ledger.watch(ledger_pb2.WatchRequest(from_revision=revision))
            try:
                if context.add_callback(cancel):
                    for response in events:
                        yield from _lease_events(response, request.lease_id)
            finally:
                cancel()

    def _snapshot(self, lease_id: str) -> Generator[admission_pb2.WatchLeasesResponse, None, int]:
        """The live leases, then from where to follow. They carry no revision: whoever is cut off in
        the middle of them begins anew."""
        revision = 0
        for page in self._ledger.pages(_of_caller(_Asked())):
            revision = revision or page.revision
            for lease in page.leases:
                if sees(lease) and lease_id in ("", lease.lease_id):
                    yield admission_pb2.WatchLeasesResponse(event="snapshot", lease=lease)
        return revision

    # helpers

    def _commit(self, command: ledger_pb2.Command) -> Lease:
        return _read_outcome(self._ledger.commit(command, self._time_left()))

    def _time_left(self) -> int:
        """How long the ledger may take; less than the caller waits, so that it hears why."""
        left_ms = deadline_left_ms()
        if left_ms <= 0:
            raise failure.of("DEADLINE")
        return max(left_ms // 2, left_ms - RETURN_OVERHEAD_MS)

    def _mint(self, lease: Lease) -> tuple[str, int]:
        """For a lease that may be used now; a retried request may have come too late for that."""
        fault("admission.mint")
        if lease.state not in USABLE:
            raise ended_failure(lease)
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
    {"NO_CAPACITY", "NODE_NOT_READY", "PRECONDITION", "LEDGER_BEHIND", "NO_MATCH", "NOT_FOUND"}
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


def _of_caller(request: _Asked) -> _Asked:
    """The request, of a holder's own tenant alone."""
    asked = _Asked()
    asked.CopyFrom(request)
    who = peer().identity
    if who.role is Role.HOLDER:
        asked.tenant = who.tenant or ""
    return asked


class WatchPlaces:
    """How many may watch at a time, each and all together."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, who: str) -> Generator[None, None, None]:
        with self._lock:
            if self._taken[who] >= WATCHES_PER_CALLER_MAX or self._taken.total() >= WATCHES_MAX:
                raise failure.of("STREAMS", "watches", retry_after_ms=1_000)
            self._taken[who] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[who] -= 1
                self._taken += Counter()  # forget those who watch no longer


def _own_leases(leases: Sequence[Lease]) -> dict[LeaseId, bool]:
    who = peer().identity
    everything = who.role is Role.OPERATOR
    mine = principal(str(who))
    return {x.lease_id: everything or principal(x.holder) == mine for x in leases}


def _lease_events(
    response: ledger_pb2.WatchResponse, lease_id: str
) -> Iterator[admission_pb2.WatchLeasesResponse]:
    """What of it the caller may see; where that is nothing, how far it has heard."""
    shown = False
    for event in response.events:
        if not event.HasField("lease") or not sees(event.lease):
            continue
        if lease_id in ("", event.lease.lease_id):
            shown = True
            yield admission_pb2.WatchLeasesResponse(
                revision=event.revision, event=event.kind, lease=event.lease
            )
    if not shown:
        yield admission_pb2.WatchLeasesResponse(revision=response.revision, event="progress")


def _read_outcome(outcome: ledger_pb2.Outcome) -> Lease:
    if outcome.HasField("failure"):
        raise failure_of(outcome.failure)
    return convert.lease_from_proto(outcome.lease)
