"""Takes leases back: named by id, or chosen by tenant, holder, node or signing key.

Rules. Every lease has an outcome of its own: one whose order is refused keeps none of the others
from being taken back, and an order that was lost is told as that. A holder may revoke what is its
own, an operator everything. A signing key is revoked before the leases are looked for that it
signed tokens of: what is granted meanwhile is signed by another. A page at a time: whoever asked
asks again with `next` until there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from grafos_core import failure, spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import IN_GRACE, check_lease_id, check_request_id
from grafos_core.lessor import GRACE_MS_MAX, REASON_CHARS_MAX, principal
from grafos_core.spiffe import Role
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2
from grafos_proto.wire import failures
from services.admission.ledger import BATCH_MAX, Ledger
from services.runtime.server import peer

IDS_MAX: Final = 1_024
PAGE: Final = 1_024
"""Leases that one call takes back; an outcome has a few hundred bytes."""
_LIVE: Final = (lease_pb2.LEASE_STATE_PENDING, lease_pb2.LEASE_STATE_ACTIVE)


class Revocations:
    """Safe from any thread."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def answer(self, request: admission_pb2.RevokeRequest) -> admission_pb2.RevokeResponse:
        _check(request)
        if not request.HasField("select"):
            ids: list[str] = [check_lease_id(lease_id) for lease_id in request.lease_ids]
            return self._end(request, ids)
        if request.select.key_id and not request.after:
            self._revoke_key(request)
        ids = list(islice(self._chosen(request), PAGE))
        found = self._end(request, ids)
        if len(ids) == PAGE:
            found.next = ids[-1]
        return found

    def _chosen(self, request: admission_pb2.RevokeRequest) -> Iterator[str]:
        """In the order of their ids, so that a page says where the next one begins."""
        select = request.select
        asked = admission_pb2.ListLeasesRequest(
            kind=select.kind, tenant=select.tenant, holder=select.holder, node_id=select.node_id,
            after=request.after,
        )  # fmt: skip
        own = peer().identity.tenant or ""
        if own and select.tenant not in ("", own):
            return
        asked.tenant = own or select.tenant
        for page in self._ledger.pages(asked):
            for lease in page.leases:
                if _fits(lease, select) and sees(lease):
                    yield lease.lease_id

    def _end(
        self, request: admission_pb2.RevokeRequest, ids: Sequence[str]
    ) -> admission_pb2.RevokeResponse:
        response, lost = admission_pb2.RevokeResponse(), None
        for first in range(0, len(ids), BATCH_MAX):
            batch = ids[first : first + BATCH_MAX]
            commands = [_end_command(request, lease_id) for lease_id in batch]
            try:
                answers = self._ledger.commit_all(commands)
            except FabricError as error:
                lost = error
                answers = [ledger_pb2.Outcome(failure=failures.detail_of(error))] * len(batch)
            for lease_id, answer in zip(batch, answers, strict=True):
                if answer.HasField("failure"):
                    response.refusals.add(lease_id=lease_id, failure=answer.failure)
                else:
                    response.leases.append(answer.lease)
        if lost is not None and not response.leases:
            raise lost
        return response

    def _revoke_key(self, request: admission_pb2.RevokeRequest) -> None:
        order = ledger_pb2.RevokeKey(
            key_id=request.select.key_id, reason=request.reason, operator=str(peer().identity)
        )
        (outcome,) = self._ledger.commit_all([ledger_pb2.Command(revoke_key=order)])
        if outcome.HasField("failure"):
            raise failures.failure_of(outcome.failure)


def _check(request: admission_pb2.RevokeRequest) -> None:
    select, who = request.select, peer().identity
    check_request_id(request.request_id)
    if bool(request.lease_ids) is request.HasField("select"):
        raise failure.of("INVALID", "lease_ids or select, one of them")
    if len(request.lease_ids) > IDS_MAX:
        raise failure.of("RANGE", f"lease_ids: at most {IDS_MAX}")
    if request.HasField("select") and not select.ListFields():
        raise failure.of("MISSING_FIELD", "select: tenant, holder, node_id, key_id, kind, …")
    if select.key_id and who.role is not Role.OPERATOR:
        raise failure.of("ROLE", "signing keys are for operators")
    if select.holder:
        spiffe.parse_id(select.holder)
    if len(request.reason) > REASON_CHARS_MAX or not request.reason.isprintable():
        raise failure.of("RANGE", f"reason: at most {REASON_CHARS_MAX} printable characters")
    if request.grace_ms > GRACE_MS_MAX:
        raise failure.of("RANGE", f"grace_ms: at most {GRACE_MS_MAX}")


def _end_command(request: admission_pb2.RevokeRequest, lease_id: str) -> ledger_pb2.Command:
    who = peer().identity
    return ledger_pb2.Command(
        end=ledger_pb2.EndLease(
            request_id=request.request_id, lease_id=lease_id, cause="revoked",
            reason=request.reason, grace_ms=request.grace_ms, by=str(who),
            tenant=who.tenant or "", holder=str(who) if who.role is Role.HOLDER else "",
        )
    )  # fmt: skip


def _fits(lease: lease_pb2.Lease, select: admission_pb2.LeaseSelector) -> bool:
    """In what the ledger's list has not asked for."""
    signed = select.key_id in ("", *lease.key_ids)
    below = spiffe.is_below(lease.holder, select.holder_prefix)
    return signed and below and _is_revocable(lease)


def _is_revocable(lease: lease_pb2.Lease) -> bool:
    """It lives; or is in a grace, which a second order may shorten."""
    in_grace = lease.state == lease_pb2.LEASE_STATE_ENDING and lease.stage in IN_GRACE
    return lease.state in _LIVE or in_grace


def sees(lease: lease_pb2.Lease) -> bool:
    """Whether the caller may know of it: his own, or any for an operator."""
    who = peer().identity
    if who.role is Role.OPERATOR:
        return True
    return lease.tenant == who.tenant and principal(lease.holder) == principal(str(who))
