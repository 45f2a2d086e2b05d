"""The control plane of a virtual fabric: the lessor and placement that ship, without services.

A call comes in as the message that would have gone over the wire, and its answer is the message
that would have come back; between them stands what the core decides and nothing of our own. The
rules of the services that are not the core's are kept: who may see which lease, what is waited for,
that another node is tried where the first one turned out full.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from grafos.testing._keys import SigningKey, hex_of
from grafos.testing._time import VirtualTime
from grafos_core import bundle, failure, jws, packing, placement, receipt
from grafos_core import commands as c
from grafos_core.failure import FabricError
from grafos_core.lease import (
    IN_GRACE,
    TOKEN_MS_DEFAULT,
    TTL_MS_DEFAULT,
    USABLE,
    EndCause,
    Kind,
    Lease,
    LeaseId,
    LeaseState,
    NodeId,
    RevokeStage,
    TenantId,
    check_lease_id,
    check_request_id,
    check_ttl,
)
from grafos_core.lessor import Lessor, ended_failure, principal
from grafos_core.quota import Limit
from grafos_core.receipt import Outcome, TeardownReceipt
from grafos_core.spiffe import Identity, Role, is_below, parse_id
from grafos_core.token import LEASE, LeaseToken, audience_of, mint
from grafos_proto.v1 import admission_pb2, lease_pb2
from grafos_proto.wire import convert, failures

if TYPE_CHECKING:
    from grafos.testing._agent import Agent

TRUST_DOMAIN: Final = "grafos.testing"
ISSUER: Final = f"spiffe://{TRUST_DOMAIN}/service/admission"
OPERATOR: Final = f"spiffe://{TRUST_DOMAIN}/operator/test"
EVIDENCE_WAIT_MS: Final = 3_000
LIST_LIMIT: Final = 1_000
_ELSEWHERE: Final = frozenset(
    {"NO_CAPACITY", "NODE_NOT_READY", "PRECONDITION", "LEDGER_BEHIND", "NO_MATCH", "NOT_FOUND"}
)
_COMING_UP: Final = frozenset({"NODE_NOT_READY", "LEDGER_BEHIND", "PRECONDITION"})
_IN_USE: Final = frozenset({"NO_CAPACITY", "QUOTA"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as his certificate would say."""

    identity: Identity
    key: str
    """Thumbprint."""

    @property
    def name(self) -> str:
        return str(self.identity)

    @property
    def tenant(self) -> TenantId:
        return TenantId(self.identity.tenant or "")

    @property
    def is_operator(self) -> bool:
        return self.identity.role is Role.OPERATOR

    def sees(self, lease: Lease) -> bool:
        if self.is_operator:
            return True
        return lease.tenant == self.tenant and principal(lease.holder) == principal(self.name)


class Control:
    """Ledger and admission."""

    def __init__(self, time: VirtualTime, dice: random.Random) -> None:
        self._time, self._dice = time, dice
        self.lessor = Lessor()
        self.agents: dict[str, Agent] = {}
        self.token_key = SigningKey.draw(dice)
        self._receipt_keys = jws.Keys()
        self.methods: dict[str, Callable[[Any, Caller], Any]] = {
            "Acquire": self._acquire, "AcquireBundle": self._acquire_bundle,
            "Attach": self._attach, "Renew": self._renew,
            "Release": self._release, "Revoke": self._revoke, "Get": self._get,
            "AcquireMany": self._many(self._acquire, admission_pb2.AcquireManyResponse),
            "RenewMany": self._many(self._renew, admission_pb2.RenewManyResponse),
            "ReleaseMany": self._many(self._release, admission_pb2.ReleaseManyResponse),
            "List": self._list, "Keys": self._keys, "Explain": self._explain,
        }  # fmt: skip

    @property
    def now_ms(self) -> int:
        return self._time.now_ms

    def start(self) -> None:
        """Publish the key that tokens are signed with; nodes take it from here."""
        key = self.token_key
        published = c.PublishedKey(key.key_id, ISSUER, "lease", key.public)
        self._step(self.lessor.handle(c.PublishKey(published), self.now_ms))
        for agent in self.agents.values():
            if agent.hears_control:
                agent.trust(key, self.lessor.state.revoked_keys)

    def do(self, command: c.Command) -> Lease:
        """The lease that the command is about, as it is now.

        Raises:
            FabricError: the ledger refuses.
        """
        with self._time.lock:
            step = self._step(self.lessor.handle(command, self.now_ms))
            if step.failure is not None:
                raise step.failure
            lease = step.lease
            if lease is None:
                raise failure.of("NOT_FOUND")
            return self.lessor.state.find(lease.lease_id) or lease

    def tick(self) -> None:
        self._step(self.lessor.tick(self.now_ms))

    def next_ms(self, *, all_are_heard: bool) -> int | None:
        """Wall clock at which something falls due here.

        While all nodes are heard, that they were heard lately is no alarm: they will be again.
        """
        if not all_are_heard:
            timeout_ms = self.lessor.timeout_ms(self.now_ms)
            return None if timeout_ms is None else self.now_ms + timeout_ms
        orders = [x.ordered_at_ms for x in self.lessor.state.clear_orders.values()]
        due = [self.lessor.state.next_due_ms(), *(at + 60_001 for at in orders)]
        return min((at_ms for at_ms in due if at_ms is not None), default=None)

    def _step(self, step: c.Step) -> c.Step:
        """What the ledger did is durable at once; then its nodes hear what they owe."""
        for node_id in sorted(step.nodes):
            self._push(node_id)
        return step

    def _push(self, node_id: NodeId) -> None:
        agent = self.agents[node_id]
        if agent.hears_control:
            for obligation in self.lessor.obligations(node_id):
                agent.oblige(obligation, self.now_ms)

    # What nodes ask

    def register(self, ask: c.Register) -> tuple[list[c.Obligation], bool]:
        """What the node owes, and whether it is to say what lives there."""
        key = ask.receipt_key
        step = self._step(self.lessor.handle(ask, self.now_ms))
        if step.failure is not None:
            raise step.failure
        owner = audience_of(ask.node_id, ask.incarnation)
        self._receipt_keys.add(
            jws.RECEIPT, key.key_id, self.agents[ask.node_id].key.verify, owner=owner
        )
        return self.lessor.obligations(ask.node_id), self.lessor.wants_live(ask.node_id)

    def bound(self, report: c.ReportBound) -> None:
        self._step(self.lessor.handle(report, self.now_ms))

    def credit(self, slip: str) -> Outcome | None:
        """Take a signed receipt; what it said, or None where it changed nothing."""
        found: TeardownReceipt = receipt.verify(slip, self._receipt_keys)
        step = self._step(self.lessor.handle(c.Credit(found, NodeId(found.node_id)), self.now_ms))
        return None if step.failure is not None else found.outcome

    # What holders ask

    def _many(
        self, one: Callable[[Any, Caller], Any], answers: Callable[[], Any]
    ) -> Callable[[Any, Caller], Any]:
        """Each by itself; the answers together."""

        def answer(request: Any, who: Caller) -> Any:
            response = answers()
            for each in request.requests:
                try:
                    response.answers.add(response=one(each, who))
                except FabricError as refused:
                    response.answers.add(failure=failures.detail_of(refused))
            return response

        return answer

    def _acquire(self, request: Any, who: Caller) -> Any:
        check_request_id(request.request_id)
        ask = _read(request, request.request_id)
        lease = self._waiting(request, lambda: self._try_once(ask, request, who))
        return self._answer(lease)

    def _acquire_bundle(self, request: Any, who: Caller) -> Any:
        bundle.check_id(request.request_id)
        bundle.check_count(len(request.members))
        asks = []
        for index, member in enumerate(request.members):
            with bundle.named(index, "asked for"):
                asks.append(_read(member, bundle.member_id(request.request_id, index)))
        leases = self._waiting(request, lambda: self._try_bundle(asks, request, who))
        return admission_pb2.AcquireBundleResponse(
            members=[self._answer(lease) for lease in leases]
        )

    def _waiting(self, request: Any, attempt: Callable[[], T | FabricError]) -> T:
        wait_ms = request.wait_ms if request.has_wait else EVIDENCE_WAIT_MS
        until_ms = self._time.boot_ms + wait_ms
        while True:
            with self._time.lock:
                outcome = attempt()
                if not isinstance(outcome, FabricError):
                    return outcome
            waits = _COMING_UP | (_IN_USE if request.has_wait else frozenset())
            if outcome.code not in waits or self._time.boot_ms >= until_ms:
                raise outcome
            self._time.step(until_ms * 1_000_000)

    def _try_once(self, ask: placement.Request, request: Any, who: Caller) -> Lease | FabricError:
        nodes = self.lessor.nodes(self.now_ms)
        refusal: FabricError | None = None
        for place in placement.candidates(ask, nodes):
            outcome = self._grant(ask, request, who, place)
            if isinstance(outcome, Lease) or outcome.code not in _ELSEWHERE:
                return outcome
            refusal = outcome
        known = self.lessor.state.requests.get((who.tenant, ask.request_id))
        if known is not None:  # asked before, when there was room
            return self.lessor.lease(known)
        if refusal is not None:
            return refusal
        decision = placement.evaluate(ask, nodes)
        failure.invariant(isinstance(decision, placement.Deny), "no node fits, none refused")
        assert isinstance(decision, placement.Deny)
        return decision.failure()

    def _try_bundle(
        self, asks: list[placement.Request], request: Any, who: Caller
    ) -> list[Lease] | FabricError:
        places = packing.place_all(asks, self.lessor.nodes(self.now_ms))
        known = self.lessor.state.requests.get((who.tenant, asks[0].request_id))
        if isinstance(places, packing.NoPlace):
            if known is None:
                return places.failure()
            amounts = [placement.rounded(ask.kind, ask.amount) for ask in asks]
            nowhere = (placement.Admit(NodeId("none"), "0" * 32, "", each) for each in amounts)
            places = tuple(nowhere)
        grants = tuple(
            self._grant_of(ask, member, who, place)
            for ask, member, place in zip(asks, request.members, places, strict=True)
        )
        whole = c.GrantBundle(request.request_id, grants)
        step = self._step(self.lessor.handle(whole, self.now_ms))
        return step.failure or list(step.leases)

    def _grant(
        self, ask: placement.Request, request: Any, who: Caller, place: placement.Admit
    ) -> Lease | FabricError:
        try:
            return self.do(self._grant_of(ask, request, who, place))
        except FabricError as refused:
            return refused

    def _grant_of(
        self, ask: placement.Request, request: Any, who: Caller, place: placement.Admit
    ) -> c.Grant:
        return c.Grant(
            ask.request_id, LeaseId(hex_of(self._dice)), who.tenant, who.name, who.key, ask.kind,
            place.node_id, place.incarnation, place.amount, request.ttl_ms or TTL_MS_DEFAULT,
            request.lifetime_ms or None, TOKEN_MS_DEFAULT, ask.policy,
            f"admit {place.node_id}: {place.reason}", self.token_key.key_id,
        )  # fmt: skip

    def _attach(self, request: Any, who: Caller) -> Any:
        lease_id = check_lease_id(request.lease_id)
        return self._answer(
            self.do(
                c.Attach(
                    request.request_id, lease_id, who.tenant, who.name, who.key, TOKEN_MS_DEFAULT,
                    self.token_key.key_id,
                )
            )
        )  # fmt: skip

    def _renew(self, request: Any, who: Caller) -> Any:
        lease_id = check_lease_id(request.lease_id)
        ttl_ms = request.ttl_ms or None
        key_id = self.token_key.key_id
        lease = self.do(c.Renew(request.request_id, lease_id, ttl_ms, who.tenant, who.name, key_id))
        answer = self._answer(lease)
        return admission_pb2.RenewResponse(lease=answer.lease, token=answer.token)

    def _release(self, request: Any, who: Caller) -> Any:
        lease = self.do(self._end(request, request.lease_id, EndCause.RELEASE, who))
        return admission_pb2.ReleaseResponse(lease=convert.lease_to_proto(lease))

    def _revoke(self, request: Any, who: Caller) -> Any:
        _check_selection(request, who)
        if request.select.key_id:
            self._revoke_key(request.select.key_id, request.reason)
        answer = admission_pb2.RevokeResponse()
        for lease_id in request.lease_ids or self._chosen(request.select, who):
            try:
                lease = self.do(self._end(request, lease_id, EndCause.REVOKED, who))
            except FabricError as refused:
                answer.refusals.add(lease_id=lease_id, failure=failures.detail_of(refused))
            else:
                answer.leases.append(convert.lease_to_proto(lease))
        return answer

    def _chosen(self, select: Any, who: Caller) -> list[str]:
        kind = convert.kind_from_proto(select.kind) if select.kind else None
        return sorted(
            each.lease_id for each in self.lessor.state.leases.values()
            if who.sees(each) and each.stage in (RevokeStage.ACTIVE, *IN_GRACE)
            and select.tenant in ("", each.tenant) and select.holder in ("", each.holder)
            and select.node_id in ("", each.node_id) and kind in (None, each.kind)
            and select.key_id in ("", *each.key_ids) and is_below(each.holder, select.holder_prefix)
        )  # fmt: skip

    def _revoke_key(self, key_id: str, reason: str) -> None:
        """It signs no more, and no node takes it; from now on there is another."""
        with self._time.lock:
            step = self._step(
                self.lessor.handle(c.RevokeKey(key_id, reason, OPERATOR), self.now_ms)
            )
            if step.failure is not None:
                raise step.failure
            if key_id == self.token_key.key_id:
                self.token_key = SigningKey.draw(self._dice)
                self.start()

    def _end(self, request: Any, lease_id: str, cause: EndCause, who: Caller) -> c.End:
        check_request_id(request.request_id)
        revoked = cause is EndCause.REVOKED
        return c.End(
            request.request_id, check_lease_id(lease_id), cause, who.name,
            request.reason if revoked else "", request.grace_ms if revoked else 0,
            None if who.is_operator else who.tenant, "" if who.is_operator else who.name,
        )  # fmt: skip

    def _get(self, request: Any, who: Caller) -> Any:
        lease = self.lessor.lease(check_lease_id(request.lease_id))
        if not who.sees(lease):
            raise failure.of("NOT_FOUND", lease_id=request.lease_id)
        return convert.lease_to_proto(lease)

    def _list(self, request: Any, who: Caller) -> Any:
        kind = convert.kind_from_proto(request.kind) if request.kind else None
        state = convert.state_from_proto(request.state) if request.state else None
        found = list(self.lessor.state.leases.values())
        if state is LeaseState.RELEASED or request.prefix:
            found += self.lessor.state.released.values()
        matching = sorted(
            (
                lease for lease in found
                if who.sees(lease) and lease.lease_id > request.after
                and lease.lease_id.startswith(request.prefix)
                and request.node_id in ("", lease.node_id) and kind in (None, lease.kind)
                and state in (None, lease.state) and request.holder in ("", lease.holder)
            ),
            key=lambda lease: lease.lease_id,
        )  # fmt: skip
        limit = request.limit or LIST_LIMIT
        page = matching[:limit]
        return admission_pb2.ListLeasesResponse(
            leases=[convert.lease_to_proto(lease) for lease in page],
            next=page[-1].lease_id if len(matching) > limit else "",
        )

    def _keys(self, request: Any, who: Caller) -> Any:
        return admission_pb2.KeysResponse(
            keys=[
                lease_pb2.VerificationKey(
                    key_id=key.key_id, owner=key.owner, use=key.use, public_key=key.public_key
                )
                for key in self.lessor.state.keys.values()
                if key.use == "receipt"
                if not request.node_id or key.owner.endswith(f"/node/{request.node_id}")
            ]
        )

    def _explain(self, request: Any, who: Caller) -> Any:
        raise failure.of("VERSION", "a virtual fabric does not explain")

    def _answer(self, lease: Lease) -> Any:
        """With a token for its node, as long as it may be used."""
        if lease.state not in USABLE:
            raise ended_failure(lease)
        return admission_pb2.AcquireResponse(
            lease=convert.lease_to_proto(lease), token=self._mint(lease),
            node_endpoint=self.agents[lease.node_id].endpoint,
        )  # fmt: skip

    def _mint(self, lease: Lease) -> str:
        now_ms = self.now_ms
        until_ms = lease.bind_by_ms if lease.state is LeaseState.PENDING else lease.end_ms
        expires_ms = min(now_ms + TOKEN_MS_DEFAULT, lease.end_ms, until_ms)
        if expires_ms <= now_ms:
            raise failure.of("LEASE_EXPIRED", lease_id=lease.lease_id, epoch=lease.epoch)
        claims = LeaseToken(
            ISSUER, lease.holder, audience_of(lease.node_id, lease.incarnation), hex_of(self._dice),
            now_ms, now_ms, expires_ms, lease.holder_key, lease.lease_id, lease.kind, lease.amount,
            ("read", "write"), lease.epoch, lease.generation, lease.ttl_ms, lease.end_ms,
            lease.extent_offset, lease.lifetime_end_ms, lease.policy,
        ).to_claims()  # fmt: skip
        return mint(LEASE, self.token_key.key_id, claims, self.token_key.sign)

    # What an operator asks

    def clear(self, lease_id: str, reason: str, *, accept_residue: bool) -> Lease:
        nonce = hex_of(self._dice)
        return self.do(
            c.ClearFence(
                hex_of(self._dice), check_lease_id(lease_id), reason, accept_residue, OPERATOR,
                nonce,
            )
        )  # fmt: skip

    def revoke(self, order: Any) -> Any:
        """A `RevokeRequest`, as if an operator had sent it."""
        order.request_id = hex_of(self._dice)
        return self._revoke(order, Caller(parse_id(OPERATOR), ""))

    def set_quota(self, tenant: str, kind: Kind, limit: Limit) -> None:
        with self._time.lock:
            step = self._step(
                self.lessor.handle(c.SetQuota(TenantId(tenant), kind, limit), self.now_ms)
            )
            if step.failure is not None:
                raise step.failure


def _check_selection(request: Any, who: Caller) -> None:
    check_request_id(request.request_id)
    if bool(request.lease_ids) is request.HasField("select"):
        raise failure.of("INVALID", "lease_ids or select, one of them")
    if request.HasField("select") and not request.select.ListFields():
        raise failure.of("MISSING_FIELD", "select: tenant, holder, node_id, key_id, kind, …")
    if request.select.key_id and not who.is_operator:
        raise failure.of("ROLE", "signing keys are for operators")


def _read(request: Any, request_id: str) -> placement.Request:
    check_ttl(request.ttl_ms or TTL_MS_DEFAULT)
    return placement.Request(
        request_id, convert.kind_from_proto(request.kind), request.amount,
        convert.policy_from_proto(request.policy), dict(request.where),
    )  # fmt: skip
