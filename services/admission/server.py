"""What admission answers: requests in, the core's decision, the ledger's commit, a token out.

Rules. The decision is core's (placement.evaluate); the ledger checks it once more against the very
instant. A node that turned out full is left out and the next one tried. A request waits while it
may: for fresh evidence 3 s unless it says otherwise, for capacity only where it says so. Refusals
are recorded with the next commit. A holder sees and touches its own leases alone; to others a lease
that is not theirs does not exist.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

import grpc

from grafos_core import bundle, failure, placement, spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import (
    USABLE,
    Lease,
    LeaseId,
    NodeId,
    check_lease_id,
    check_request_id,
)
from grafos_core.lessor import (
    NodeView,
    ended_failure,
    principal,
)
from grafos_core.packing import NoPlace
from grafos_core.placement import Admit, Deny, Request
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2
from grafos_proto.v1.admission_pb2_grpc import AdmissionServiceServicer
from grafos_proto.wire import convert
from grafos_proto.wire.failures import detail_of
from services.admission import asking
from services.admission.asking import ELSEWHERE, holder, read_request, time_left_ms
from services.admission.batches import REQUESTS_MAX, Batches, attempt, lease_or_failure
from services.admission.bundles import NOWHERE, Bundles
from services.admission.ledger import Ledger
from services.admission.revocations import Revocations, sees
from services.admission.tokens import Minter
from services.admission.view import FabricView
from services.runtime.clock import Clock
from services.runtime.faults import fault
from services.runtime.server import peer
from services.runtime.telemetry import Metrics

LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX = 1_000, 10_000
LIST_BYTES_MAX: Final = 512 * 1024
LOOK_AGAIN_MS: Final = 250
WATCHES_MAX: Final = 32
"""Each takes a thread here and a stream of our one connection to the ledger, which has 64."""
WATCHES_PER_CALLER_MAX: Final = 8

BUNDLE: Final = "bundle"
"""The kind under which the waiting of a bundle is counted."""

T = TypeVar("T")
_Asked = admission_pb2.ListLeasesRequest
_Listing = admission_pb2.ListLeasesResponse


class AdmissionServicer(AdmissionServiceServicer):
    def __init__(
        self, view: FabricView, ledger: Ledger, minter: Minter, clock: Clock, metrics: Metrics
    ) -> None:
        self._view, self._ledger, self._minter, self._clock = view, ledger, minter, clock
        self._places = WatchPlaces()
        self._revocations = Revocations(ledger)
        self._batches, self._bundles = Batches(ledger, minter), Bundles(ledger, minter)
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
        who = holder()
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
        return self._waiting(
            request, ask.kind.value,
            lambda nodes: self._try_once(ask, request, who, nodes),
            lambda: self._granted_before(ask, request, who),
        )  # fmt: skip

    def _waiting(
        self, request: admission_pb2.AcquireRequest | admission_pb2.AcquireBundleRequest, kind: str,
        try_once: Callable[[Sequence[NodeView]], T | Deny | NoPlace | FabricError],
        granted_before: Callable[[], T | None],
    ) -> T:  # fmt: skip
        """The first success, as long as the request may wait; looked for at every change."""
        started_ms = self._clock.boot_ms()
        until_ms = started_ms + asking.waits_ms(request)
        asked_before = False
        while True:
            nodes, version = self._view.nodes()
            outcome = try_once(nodes)
            if isinstance(outcome, Deny | NoPlace) and self._view.loaded and not asked_before:
                asked_before = True
                outcome = granted_before() or outcome
            if isinstance(outcome, Deny | NoPlace):
                outcome = outcome.failure()
            if not isinstance(outcome, FabricError):
                waited_ms = self._clock.boot_ms() - started_ms
                self._waited.labels(kind).observe(waited_ms / 1000)
                return outcome
            left_ms = until_ms - self._clock.boot_ms()
            if left_ms <= 0 or not asking.may_wait(outcome, request.has_wait):
                raise outcome
            self._view.wait_change(version, min(left_ms, LOOK_AGAIN_MS))

    def AcquireBundle(
        self, request: admission_pb2.AcquireBundleRequest, context: grpc.ServicerContext
    ) -> admission_pb2.AcquireBundleResponse:
        fault("admission.decide")
        asks, who = asking.read_bundle(request), holder()
        try:
            leases: list[Lease] = self._waiting(
                request, BUNDLE,
                lambda nodes: self._bundles.try_once(asks, request, who, nodes),
                lambda: self._bundles.granted_before(asks, request, who),
            )  # fmt: skip
        except FabricError as refusal:
            self._refused(asks[bundle.member_of(refusal) or 0], who, refusal)
            raise
        self._decisions.labels("admit", "").inc(len(leases))
        members = []
        for index, lease in enumerate(leases):
            with bundle.named(index, lease.kind.value):
                members.append(self._answer(lease))
        return admission_pb2.AcquireBundleResponse(members=members)

    def AcquireMany(
        self, request: admission_pb2.AcquireManyRequest, context: grpc.ServicerContext
    ) -> admission_pb2.AcquireManyResponse:
        asking.check_many(request.requests, REQUESTS_MAX)
        fault("admission.decide")
        who, nodes = holder(), self._view.nodes()[0]
        found = self._batches.acquire(request.requests, who, nodes)
        response = admission_pb2.AcquireManyResponse()
        for asked, (ask, outcome) in zip(request.requests, found, strict=True):
            answer = _or_failure(outcome, self._answer)
            if isinstance(answer, FabricError):
                response.answers.add(failure=detail_of(answer))
                waits = asking.may_wait(answer, asked.has_wait) and asking.waits_ms(asked) > 0
                if ask is not None and not waits:
                    self._refused(ask, who, answer)
            else:
                response.answers.add(response=answer)
                self._decisions.labels("admit", "").inc()
        return response

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
        grant = asking.grant_of(ask, request, who, place, self._minter.key_id)
        outcome = self._ledger.commit(ledger_pb2.Command(grant=grant), time_left_ms())
        return lease_or_failure(outcome)

    def Attach(
        self, request: admission_pb2.AttachRequest, context: grpc.ServicerContext
    ) -> admission_pb2.AcquireResponse:
        who = holder()
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
        renewal = self._renewal(request, holder())
        return self._renewed(_read_outcome(self._ledger.renew(renewal, time_left_ms())))

    def RenewMany(
        self, request: admission_pb2.RenewManyRequest, context: grpc.ServicerContext
    ) -> admission_pb2.RenewManyResponse:
        asking.check_many(request.requests, REQUESTS_MAX)
        who = holder()
        renewals = [
            attempt(lambda one=one: self._renewal(one, who))  # type: ignore[misc]
            for one in request.requests
        ]
        response = admission_pb2.RenewManyResponse()
        for outcome in self._batches.renew(renewals):
            answer = _or_failure(outcome, self._renewed)
            if isinstance(answer, FabricError):
                self._not_renewed.labels(answer.code).inc()
                response.answers.add(failure=detail_of(answer))
            else:
                response.answers.add(response=answer)
        return response

    def _renewal(
        self, request: admission_pb2.RenewRequest, who: Identity
    ) -> ledger_pb2.LedgerRenew:
        return ledger_pb2.LedgerRenew(
            request_id=check_request_id(request.request_id),
            lease_id=check_lease_id(request.lease_id),
            ttl_ms=request.ttl_ms,
            tenant=who.tenant or "",
            holder=str(who),
            key_id=self._minter.key_id,
        )

    def _renewed(self, lease: Lease) -> admission_pb2.RenewResponse:
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
        lease = self._commit(ledger_pb2.Command(end=_released(request, peer().identity)))
        return admission_pb2.ReleaseResponse(lease=convert.lease_to_proto(lease))

    def ReleaseMany(
        self, request: admission_pb2.ReleaseManyRequest, context: grpc.ServicerContext
    ) -> admission_pb2.ReleaseManyResponse:
        asking.check_many(request.requests, REQUESTS_MAX)
        who = peer().identity
        ends = [
            attempt(lambda one=one: _released(one, who))  # type: ignore[misc]
            for one in request.requests
        ]
        response = admission_pb2.ReleaseManyResponse()
        for outcome in self._batches.end(ends):
            if isinstance(outcome, FabricError):
                response.answers.add(failure=detail_of(outcome))
            else:
                response.answers.add().response.lease.CopyFrom(convert.lease_to_proto(outcome))
        return response

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
        return _read_outcome(self._ledger.commit(command, time_left_ms()))

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
        self._ledger.record_refusal(asking.refusal_of(ask, who, refusal))


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


def _released(request: admission_pb2.ReleaseRequest, who: Identity) -> ledger_pb2.EndLease:
    return ledger_pb2.EndLease(
        request_id=check_request_id(request.request_id),
        lease_id=check_lease_id(request.lease_id),
        cause="release",
        by=str(who),
        tenant=who.tenant or "",
        holder=str(who) if who.role is Role.HOLDER else "",
    )


def _or_failure(outcome: Lease | FabricError, make: Callable[[Lease], T]) -> T | FabricError:
    return outcome if isinstance(outcome, FabricError) else attempt(lambda: make(outcome))


def _read_outcome(outcome: ledger_pb2.Outcome) -> Lease:
    found = lease_or_failure(outcome)
    if isinstance(found, FabricError):
        raise found
    return found
