"""Commands out of messages, and the ledger's views into messages.

Rules. Every text and number has a bound, so that what the core decides can always be written down
as a record. Zero stands for "none" where proto3 has no absence. An id that a caller claims for
itself is compared with its certificate in server.py, not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from grafos_core import bundle, failure, spiffe
from grafos_core import commands as c
from grafos_core.books import BookView
from grafos_core.lease import (
    AMOUNT_MAX,
    REPORTED_STAGES,
    TOKEN_MS_DEFAULT,
    TTL_MS_MAX,
    EndCause,
    Kind,
    NodeId,
    RevokeStage,
    TenantId,
    check_lease_id,
)
from grafos_core.lessor import REASON_CHARS_MAX, NodeView
from grafos_core.quota import Limit
from grafos_proto.v1 import lease_pb2, ledger_pb2
from grafos_proto.wire.convert import kind_from_proto, kind_to_proto, policy_from_proto
from services.runtime.signing import key_id_of

LIFETIME_MS_MAX: Final = 3_660 * 86_400_000
"""Ten years: what somebody may ask for beyond "none"."""
HOLDER_KEY: Final = re.compile(r"[A-Za-z0-9_-]{43}")
KEY_ID: Final = re.compile(r"[0-9a-f]{16}")
INCARNATION: Final = re.compile(r"[0-9a-f]{32}")
LABELS_MAX: Final = 64
LABEL_CHARS_MAX: Final = 253
ENDPOINT_CHARS_MAX: Final = 256
EPOCH_CLAIM_MAX: Final = 2**63 - 1
"""What a node may claim as its highest epoch, and still be granted as many again."""
BOOT_EPOCH_MAX: Final = 2**53 - 1
USES: Final = frozenset({"lease", "receipt", "clear", "seal", "revoke"})
NEVER_READ: Final = "its live leases are not read yet"


def grant(ask: ledger_pb2.Grant) -> c.Grant:
    if ask.lifetime_ms > LIFETIME_MS_MAX:
        raise failure.of("RANGE", f"lifetime_ms: at most {LIFETIME_MS_MAX}")
    if ask.policy.stop_after_ms > TTL_MS_MAX:
        raise failure.of("RANGE", f"stop_after_ms: at most {TTL_MS_MAX}")
    return c.Grant(
        request_id=ask.request_id,
        lease_id=check_lease_id(ask.lease_id),
        tenant=tenant(ask.tenant),
        holder=spiffe_id(ask.holder),
        holder_key=holder_key(ask.holder_key),
        kind=kind_from_proto(ask.kind),
        node_id=node_id(ask.node_id),
        incarnation=incarnation(ask.incarnation),
        amount=ask.amount,
        ttl_ms=ask.ttl_ms,
        lifetime_ms=ask.lifetime_ms or None,
        bind_within_ms=ask.bind_within_ms or TOKEN_MS_DEFAULT,
        policy=policy_from_proto(ask.policy),
        decision=ask.decision[:REASON_CHARS_MAX],
        key_id=key_id(ask.key_id),
    )


def grant_bundle(ask: ledger_pb2.GrantBundle) -> c.GrantBundle:
    bundle.check_count(len(ask.grants))
    return c.GrantBundle(ask.request_id, tuple(grant(each) for each in ask.grants))


def attach(ask: ledger_pb2.AttachLease) -> c.Attach:
    return c.Attach(
        request_id=ask.request_id,
        lease_id=check_lease_id(ask.lease_id),
        tenant=tenant(ask.tenant),
        holder=spiffe_id(ask.holder),
        holder_key=holder_key(ask.holder_key),
        bind_within_ms=TOKEN_MS_DEFAULT,
        key_id=key_id(ask.key_id),
    )


def renew(ask: ledger_pb2.LedgerRenew) -> c.Renew:
    return c.Renew(
        request_id=ask.request_id,
        lease_id=check_lease_id(ask.lease_id),
        ttl_ms=ask.ttl_ms or None,
        tenant=tenant(ask.tenant),
        holder=spiffe_id(ask.holder),
        key_id=key_id(ask.key_id),
    )


def end(ask: ledger_pb2.EndLease, by: str) -> c.End:
    return c.End(
        request_id=ask.request_id,
        lease_id=check_lease_id(ask.lease_id),
        cause=_end_cause(ask.cause),
        by=spiffe_id(by),
        reason=words(ask.reason),
        grace_ms=ask.grace_ms,
        tenant=tenant(ask.tenant) if ask.tenant else None,
        holder=spiffe_id(ask.holder) if ask.tenant else "",
    )


def clear(ask: ledger_pb2.ClearFence, operator: str, nonce: str) -> c.ClearFence:
    return c.ClearFence(
        request_id=ask.request_id,
        lease_id=check_lease_id(ask.lease_id),
        reason=words(ask.reason),
        accept_residue=ask.accept_residue,
        operator=operator,
        nonce=nonce,
    )


def set_quota(ask: ledger_pb2.SetQuota) -> c.SetQuota:
    limit = Limit(ask.amount, ask.count)
    return c.SetQuota(tenant(ask.tenant), kind_from_proto(ask.kind), limit)


def revoke_key(ask: ledger_pb2.RevokeKey, operator: str) -> c.RevokeKey:
    return c.RevokeKey(key_id(ask.key_id), words(ask.reason), spiffe_id(operator))


def forget(ask: ledger_pb2.ForgetNode, operator: str) -> c.ForgetNode:
    return c.ForgetNode(node_id(ask.node_id), ask.accept_residue, words(ask.reason), operator)


def refusal(ask: ledger_pb2.Refusal) -> c.Refusal:
    return c.Refusal(
        request_id=ask.request_id[:64],
        tenant=tenant(ask.tenant),
        holder=spiffe_id(ask.holder),
        kind=kind_from_proto(ask.kind),
        amount=min(ask.amount, AMOUNT_MAX),
        code=ask.code[:64],
    )


def published_key(key: lease_pb2.VerificationKey) -> c.PublishedKey:
    if key.use not in USES:
        raise failure.of("INVALID", f"use: one of {', '.join(sorted(USES))}")
    if key.key_id != key_id_of(key.public_key):
        raise failure.of("INVALID", "key_id: 16 digits of the key's SHA-256")
    if key.not_after_ms > EPOCH_CLAIM_MAX:
        raise failure.of("RANGE", "not_after_ms")
    return c.PublishedKey(
        key.key_id, spiffe_id(key.owner), key.use, key.public_key, key.not_after_ms
    )


def register(ask: ledger_pb2.RegisterRequest) -> c.Register:
    if len(ask.labels) > LABELS_MAX:
        raise failure.of("RANGE", f"labels: at most {LABELS_MAX}")
    for text in (*ask.labels, *ask.labels.values()):
        bounded(text, LABEL_CHARS_MAX, "labels")
    if not 0 < ask.boot_epoch <= BOOT_EPOCH_MAX:
        raise failure.of("RANGE", "boot_epoch")
    return c.Register(
        node_id=node_id(ask.node_id),
        incarnation=incarnation(ask.incarnation),
        boot_epoch=ask.boot_epoch,
        offers=_offers(ask),
        high_waters=_high_waters(ask),
        ready_kinds=frozenset(kind_from_proto(kind) for kind in ask.readiness.ready_kinds),
        closed_gates={
            bounded(gate, LABEL_CHARS_MAX, "gate"): why[:LABEL_CHARS_MAX]
            for gate, why in list(ask.readiness.closed_gates.items())[:LABELS_MAX]
        },
        front_endpoint=bounded(ask.front_endpoint, ENDPOINT_CHARS_MAX, "front_endpoint"),
        control_endpoint=bounded(ask.control_endpoint, ENDPOINT_CHARS_MAX, "control_endpoint"),
        labels=dict(ask.labels),
        receipt_key=published_key(ask.receipt_key),
        live=tuple(_live(bound) for bound in ask.live) if ask.has_live else None,
        clears_proved_clean=ask.clears_proved_clean,
    )


def _offers(ask: ledger_pb2.RegisterRequest) -> Mapping[Kind, int]:
    offers = {kind_from_proto(offer.kind): offer.total for offer in ask.offers}
    if len(offers) != len(ask.offers) or any(total > AMOUNT_MAX for total in offers.values()):
        raise failure.of("RANGE", f"offers: each kind once, at most {AMOUNT_MAX}")
    return offers


def _high_waters(ask: ledger_pb2.RegisterRequest) -> Mapping[Kind, int]:
    found = {kind_from_proto(each.kind): each.epoch for each in ask.high_waters}
    if len(found) != len(ask.high_waters) or any(x > EPOCH_CLAIM_MAX for x in found.values()):
        raise failure.of("EPOCH_RANGE", "high_waters")
    return found


def _live(bound: ledger_pb2.Bound) -> c.LiveLease:
    return c.LiveLease(check_lease_id(bound.lease_id), bound.epoch, bound.generation)


def stage(label: str) -> RevokeStage | None:
    """Of a revocation, as a node tells it."""
    if not label:
        return None
    if label not in REPORTED_STAGES:
        raise failure.of("INVALID", f"stage: one of {', '.join(sorted(REPORTED_STAGES))}")
    return RevokeStage(label)


def _end_cause(text: str) -> EndCause:
    if text not in ("release", "revoked"):
        raise failure.of("INVALID", "cause: release or revoked")
    return EndCause(text)


def tenant(text: str) -> TenantId:
    return TenantId(spiffe.check_identifier(text, what="tenant"))


def node_id(text: str) -> NodeId:
    return NodeId(spiffe.check_identifier(text, what="node id"))


def spiffe_id(text: str) -> str:
    return str(spiffe.parse_id(text))


def holder_key(text: str) -> str:
    if not HOLDER_KEY.fullmatch(text):
        raise failure.of("IDENTIFIER", "holder_key: 43 characters of base64url")
    return text


def key_id(text: str) -> str:
    if text and not KEY_ID.fullmatch(text):
        raise failure.of("IDENTIFIER", "key_id: 16 hexadecimal digits")
    return text


def incarnation(text: str) -> str:
    if not INCARNATION.fullmatch(text):
        raise failure.of("IDENTIFIER", "incarnation: 32 hexadecimal digits")
    return text


def words(text: str) -> str:
    """What a person wrote, for the record: one line."""
    if len(text) > REASON_CHARS_MAX or not text.isprintable():
        raise failure.of("RANGE", f"reason: at most {REASON_CHARS_MAX} printable characters")
    return text


def bounded(text: str, chars_max: int, what: str) -> str:
    if len(text) > chars_max or not text.isprintable():
        raise failure.of("RANGE", f"{what}: at most {chars_max} printable characters")
    return text


# views ---------------------------------------------------------------------------------------


def node_to_proto(view: NodeView) -> lease_pb2.Node:
    closed = dict(view.closed_gates)
    if not view.live_known:
        closed["ledger"] = NEVER_READ
    return lease_pb2.Node(
        node_id=view.node_id,
        incarnation=view.incarnation,
        boot_epoch=view.boot_epoch,
        mode=view.mode,
        lost=view.lost,
        readiness=lease_pb2.Readiness(
            ready=not closed and not view.lost,
            closed_gates=closed,
            ready_kinds=[kind_to_proto(kind) for kind in sorted(view.ready_kinds)],
        ),
        evidence_age_ms=max(0, view.evidence_age_ms),
        front_endpoint=view.front_endpoint,
        control_endpoint=view.control_endpoint,
        books=[_book(kind, book) for kind, book in view.books.items()],
        labels=dict(view.labels),
        lease_count=view.lease_count,
        registered_until_ms=view.registered_until_ms,
        clears_proved_clean=view.clears_proved_clean,
    )


def _book(kind: Kind, book: BookView) -> lease_pb2.Book:
    return lease_pb2.Book(
        kind=kind_to_proto(kind), total=book.total, free=book.free, leased=book.leased,
        ending=book.ending, fenced=book.fenced, withheld=book.withheld,
        largest_free_extent=book.largest_free_extent,
    )  # fmt: skip


def key_to_proto(key: c.PublishedKey) -> lease_pb2.VerificationKey:
    return lease_pb2.VerificationKey(
        key_id=key.key_id, owner=key.owner, use=key.use, public_key=key.public_key,
        not_after_ms=key.not_after_ms,
    )  # fmt: skip
