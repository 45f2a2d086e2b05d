"""What is asked of admission, read and checked; and what it then asks of the ledger."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

from grafos_core import bundle, failure, spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import (
    AMOUNT_MAX,
    TOKEN_MS_DEFAULT,
    TTL_MS_DEFAULT,
    check_request_id,
    check_ttl,
)
from grafos_core.placement import Admit, Request
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import admission_pb2, ledger_pb2
from grafos_proto.wire import convert
from services.runtime.server import deadline_left_ms, peer

EVIDENCE_WAIT_MS: Final = 3_000
WAIT_MS_MAX: Final = 600_000
RETURN_OVERHEAD_MS: Final = 200
"""Kept back of the caller's deadline, so that the inner refusal is the one it hears."""
LABELS_MAX: Final = 16
ELSEWHERE: Final = frozenset(
    {"NO_CAPACITY", "NODE_NOT_READY", "PRECONDITION", "LEDGER_BEHIND", "NO_MATCH", "NOT_FOUND"}
)
"""Refusals of the ledger that another node may not meet."""


def holder() -> Identity:
    """The caller, who must have a tenant: an operator holds nothing."""
    who = peer().identity
    if who.role is not Role.HOLDER:
        raise failure.of("ROLE", "leases are for holders")
    return who


def time_left_ms() -> int:
    """How long the ledger may take; less than the caller waits, so that it hears why."""
    left_ms = deadline_left_ms()
    if left_ms <= 0:
        raise failure.of("DEADLINE")
    return max(left_ms // 2, left_ms - RETURN_OVERHEAD_MS)


def waits_ms(request: admission_pb2.AcquireRequest | admission_pb2.AcquireBundleRequest) -> int:
    """How long it may wait, by its own word and by its deadline."""
    wait_ms = request.wait_ms if request.has_wait else EVIDENCE_WAIT_MS
    return min(wait_ms, deadline_left_ms() - RETURN_OVERHEAD_MS)


def may_wait(refusal: FabricError, wait_was_asked: bool) -> bool:
    """Whether this refusal may be another one in a moment."""
    if refusal.code in ("NODE_NOT_READY", "LEDGER_BEHIND", "PRECONDITION"):
        return True
    return wait_was_asked and refusal.code in ("NO_CAPACITY", "QUOTA")


def read_request(request: admission_pb2.AcquireRequest) -> Request:
    """The request, every field of it checked."""
    check_request_id(request.request_id)
    return _read(request, request.request_id)


def read_bundle(request: admission_pb2.AcquireBundleRequest) -> list[Request]:
    """Its members, every field of them checked."""
    bundle.check_id(request.request_id)
    bundle.check_count(len(request.members))
    _check_wait(request.wait_ms)
    asks = []
    for index, member in enumerate(request.members):
        with bundle.named(index, "asked for"):
            if member.request_id or member.wait_ms or member.has_wait:
                raise failure.of("INVALID", "request id and waiting are the bundle's")
            asks.append(_read(member, bundle.member_id(request.request_id, index)))
    return asks


def _read(request: admission_pb2.AcquireRequest, request_id: str) -> Request:
    kind = convert.kind_from_proto(request.kind)
    if not 0 < request.amount <= AMOUNT_MAX:
        raise failure.of("RANGE", f"amount: 1 to {AMOUNT_MAX}")
    check_ttl(request.ttl_ms or TTL_MS_DEFAULT)
    _check_wait(request.wait_ms)
    if len(request.where) > LABELS_MAX:
        raise failure.of("RANGE", f"where: at most {LABELS_MAX} labels")
    where = dict(request.where)
    for name, value in where.items():
        spiffe.check_identifier(name, what="label")
        spiffe.check_identifier(value, what="label value")
    policy = convert.policy_from_proto(request.policy)
    return Request(request_id, kind, request.amount, policy, where)


def _check_wait(wait_ms: int) -> None:
    if wait_ms > WAIT_MS_MAX:
        raise failure.of("RANGE", f"wait_ms: at most {WAIT_MS_MAX}")


def grant_of(
    ask: Request, request: admission_pb2.AcquireRequest, who: Identity, place: Admit, key_id: str
) -> ledger_pb2.Grant:
    """What the ledger is asked to grant. `key_id` is of the key that will sign its token."""
    return ledger_pb2.Grant(
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
        key_id=key_id,
    )


def refusal_of(ask: Request, who: Identity, refused: FabricError) -> ledger_pb2.Refusal:
    """For the record."""
    return ledger_pb2.Refusal(
        request_id=ask.request_id, tenant=who.tenant or "", holder=str(who),
        kind=convert.kind_to_proto(ask.kind), amount=ask.amount, code=refused.code,
    )  # fmt: skip


def check_many(requests: Sequence[object], most: int) -> None:
    if not requests:
        raise failure.of("EMPTY")
    if len(requests) > most:
        raise failure.of("RANGE", f"at most {most} in one call")
