"""A token: a signed slip that lets one holder use one lease on one node, for a short while.

The node that reads it asks nobody. Its form, and the steps 1 to 4 that check it, are in jws.py;
here is what it says:

    5 types    exactly the claims of a lease token, each of exactly its type
    6 meaning  issuer, audience, times, epoch, holder, in this order

What the lease's state says (epoch burnt, revoked, bound already) is not the token's to decide: that
is the gate's. `exp_ms` counts; `exp`, the same instant in whole seconds rounded up, is for other
people's tools. There is leeway at the start, since clocks differ, and none at the end.
"""

from __future__ import annotations

import hashlib
import heapq
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grafos_core import failure, jws
from grafos_core.jws import CLEAR, LEASE, READY, RECEIPT, REVOKE, SHARE, Keys, mint, verify
from grafos_core.lease import (
    CLOCK_ERROR_MS,
    EPOCH_MAX,
    TOKEN_MS_MAX,
    TTL_MS_MAX,
    TTL_MS_MIN,
    Isolation,
    Kind,
    OnDisconnect,
    OnHolderExit,
    Policy,
    Priority,
)

__all__ = [
    "CLEAR",
    "LEASE",
    "READY",
    "RECEIPT",
    "REVOKE",
    "SHARE",
    "Keys",
    "LeaseToken",
    "VerifiedCache",
    "accept",
    "audience_of",
    "judge",
    "mint",
    "verify",
]

_THUMBPRINT = re.compile(r"[A-Za-z0-9_-]{43}")
_OPERATION = re.compile(r"[a-z_]{1,16}")
_CNF: Final = frozenset({"jkt"})


def slice_claims(kind: Kind, amount: int, extent_offset: int) -> dict[str, Any]:
    """What is leased: an extent of blocks, or an amount; one claim, never both."""
    if kind.has_extents:
        return {"extent": [str(extent_offset), str(amount)]}
    return {"amount": str(amount)}


def read_slice(claims: Mapping[str, Any], kind: Kind) -> tuple[int, int]:
    """Amount and offset, from the claim that `slice_claims` made."""
    if not kind.has_extents:
        return jws.u64(claims, "amount"), 0
    extent = claims["extent"]
    if type(extent) is not list or len(extent) != 2:
        jws.refuse("TOKEN_CLAIM", "extent")
    offset, amount = (jws.u64_text(part, "extent") for part in extent)
    if offset + amount >= 1 << 64:
        jws.refuse("TOKEN_CLAIM", "extent")
    return amount, offset


def read_kind(claims: Mapping[str, Any]) -> Kind:
    """The kind; it decides which claims there must be, so it is read before they are counted."""
    try:
        return Kind(str(claims.get("kind")))
    except ValueError:
        jws.refuse("TOKEN_CLAIM", "kind")


_CLAIMS: Final = frozenset(
    {
        "iss", "sub", "aud", "jti", "iat", "nbf", "exp", "exp_ms", "cnf", "lease", "kind", "ops",
        "epoch", "generation", "ttl_ms", "lease_end_ms", "lifetime_end_ms", "policy",
    }
)  # fmt: skip
_POLICY: Final = frozenset(
    {
        "isolation", "on_disconnect", "on_holder_exit", "priority", "reconnect_ms", "scrub",
        "stop_after_ms",
    }
)  # fmt: skip


def slice_name(kind: Kind) -> frozenset[str]:
    return frozenset({"extent" if kind.has_extents else "amount"})


def audience_of(node_id: str, incarnation: str) -> str:
    """Whom a node's token is for: a wiped node is another audience."""
    return f"{node_id}/{incarnation}"


@dataclass(frozen=True, slots=True)
class LeaseToken:
    """What a lease token says. It is for binding; what it binds lives to the lease's end."""

    issuer: str
    subject: str
    """SPIFFE id of the holder."""
    audience: str
    """`audience_of(node_id, incarnation)`."""
    jti: str
    """128 random bits as hexadecimal digits."""
    iat_ms: int
    """Instants of issue and first validity travel in whole seconds, rounded down."""
    nbf_ms: int
    exp_ms: int
    holder_thumbprint: str
    """SHA-256 of the public key (SubjectPublicKeyInfo) of the holder's TLS key, base64url."""
    lease_id: str
    kind: Kind
    amount: int
    """In the kind's unit; for extents the length in blocks."""
    ops: tuple[str, ...]
    """What the holder may do, for instance `("read", "write")`; sorted, each once."""
    epoch: int
    generation: int
    ttl_ms: int
    lease_end_ms: int
    extent_offset: int = 0
    """In blocks; 0 for kinds without extents."""
    lifetime_end_ms: int | None = None
    policy: Policy = field(default_factory=Policy)

    @property
    def node_id(self) -> str:
        return self.audience.partition("/")[0]

    @property
    def incarnation(self) -> str:
        return self.audience.partition("/")[2]

    @property
    def extent_length(self) -> int:
        """In blocks; 0 for kinds without extents."""
        return self.amount if self.kind.has_extents else 0

    def to_claims(self) -> dict[str, Any]:
        return {
            "iss": self.issuer,
            "sub": self.subject,
            "aud": self.audience,
            "jti": self.jti,
            "iat": self.iat_ms // 1000,
            "nbf": self.nbf_ms // 1000,
            "exp": -(-self.exp_ms // 1000),
            "exp_ms": self.exp_ms,
            "cnf": {"jkt": self.holder_thumbprint},
            "lease": self.lease_id,
            "kind": self.kind.value,
            "ops": list(self.ops),
            "epoch": str(self.epoch),
            "generation": self.generation,
            "ttl_ms": self.ttl_ms,
            "lease_end_ms": self.lease_end_ms,
            "lifetime_end_ms": self.lifetime_end_ms,
            "policy": {
                "isolation": self.policy.isolation.value,
                "on_disconnect": self.policy.on_disconnect.value,
                "on_holder_exit": self.policy.on_holder_exit.value,
                "priority": self.policy.priority.value,
                "reconnect_ms": self.policy.reconnect_ms,
                "scrub": self.policy.scrub,
                "stop_after_ms": self.policy.stop_after_ms,
            },
        } | slice_claims(self.kind, self.amount, self.extent_offset)

    @staticmethod
    def from_claims(claims: Mapping[str, Any]) -> LeaseToken:
        """Step 5: exactly these claims, each of exactly its type and within its bounds."""
        kind = read_kind(claims)
        jws.exactly(claims, _CLAIMS | slice_name(kind))
        amount, extent_offset = read_slice(claims, kind)
        token = LeaseToken(
            issuer=jws.text(claims, "iss"),
            subject=jws.text(claims, "sub"),
            audience=jws.text(claims, "aud"),
            jti=jws.text(claims, "jti", jws.HEX_128),
            iat_ms=jws.number(claims, "iat", jws.SAFE_INT_MAX // 1000) * 1000,
            nbf_ms=jws.number(claims, "nbf", jws.SAFE_INT_MAX // 1000) * 1000,
            exp_ms=jws.number(claims, "exp_ms"),
            holder_thumbprint=jws.text(jws.table(claims, "cnf", _CNF), "jkt", _THUMBPRINT),
            lease_id=jws.text(claims, "lease", jws.HEX_128),
            kind=kind,
            amount=amount,
            ops=_read_ops(claims),
            epoch=jws.u64(claims, "epoch"),
            generation=jws.number(claims, "generation"),
            ttl_ms=_read_ttl(claims),
            lease_end_ms=jws.number(claims, "lease_end_ms"),
            extent_offset=extent_offset,
            lifetime_end_ms=jws.number_or_none(claims, "lifetime_end_ms"),
            policy=_read_policy(jws.table(claims, "policy", _POLICY)),
        )
        if jws.number(claims, "exp") != -(-token.exp_ms // 1000):
            jws.refuse("TOKEN_CLAIM", "exp and exp_ms disagree")
        return token

    def require(self, *, kind: Kind, op: str) -> None:
        """Refuse a use that this token does not allow."""
        if kind is not self.kind or op not in self.ops:
            jws.refuse("SCOPE")


def _read_ttl(claims: Mapping[str, Any]) -> int:
    """Only the type: whether it is within bounds is judged with the other times."""
    if type(claims["ttl_ms"]) is not int:
        jws.refuse("TOKEN_CLAIM", "ttl_ms")
    return int(claims["ttl_ms"])


def _read_ops(claims: Mapping[str, Any]) -> tuple[str, ...]:
    ops = claims["ops"]
    if type(ops) is not list or not 0 < len(ops) <= 16:
        jws.refuse("TOKEN_CLAIM", "ops")
    if not all(type(op) is str and _OPERATION.fullmatch(op) for op in ops):
        jws.refuse("TOKEN_CLAIM", "ops")
    if ops != sorted(set(ops)):
        jws.refuse("TOKEN_CLAIM", "ops: sorted, each once")
    return tuple(ops)


def _read_policy(claims: Mapping[str, Any]) -> Policy:
    try:
        return Policy(
            on_holder_exit=OnHolderExit(claims["on_holder_exit"]),
            reconnect_ms=jws.number(claims, "reconnect_ms", TTL_MS_MAX),
            stop_after_ms=jws.number_or_none(claims, "stop_after_ms"),
            isolation=Isolation(claims["isolation"]),
            scrub=jws.flag(claims, "scrub"),
            priority=Priority(claims["priority"]),
            on_disconnect=OnDisconnect(claims["on_disconnect"]),
        )
    except ValueError:
        jws.refuse("TOKEN_CLAIM", "policy")


def judge(
    token: LeaseToken,
    *,
    issuer: str,
    audience: str,
    holder_thumbprint: str,
    now_ms: int,
    skew_ms: int = CLOCK_ERROR_MS,
) -> None:
    """Step 6: refuse a well-formed token that is not for this issuer, node, moment and holder."""
    judge_issuer(token, issuer)
    judge_audience(token, audience)
    judge_times(token)
    judge_moment(token, now_ms, skew_ms)
    judge_epoch(token)
    judge_holder(token, holder_thumbprint)


def judge_issuer(token: LeaseToken, issuer: str) -> None:
    if token.issuer != issuer:
        jws.refuse("TOKEN_ISSUER")


def judge_audience(token: LeaseToken, audience: str) -> None:
    if token.audience != audience:
        jws.refuse("TOKEN_AUDIENCE")


def judge_moment(token: LeaseToken, now_ms: int, skew_ms: int = CLOCK_ERROR_MS) -> None:
    if now_ms >= token.exp_ms:
        jws.refuse("TOKEN_EXPIRED")
    if now_ms + skew_ms < max(token.nbf_ms, token.iat_ms):
        jws.refuse("TOKEN_IMMATURE")


def judge_epoch(token: LeaseToken) -> None:
    if not 0 < token.epoch <= EPOCH_MAX:
        jws.refuse("EPOCH_RANGE")


def judge_holder(token: LeaseToken, thumbprint: str) -> None:
    if not hmac.compare_digest(token.holder_thumbprint.encode(), thumbprint.encode()):
        jws.refuse("HOLDER_MISMATCH")


def judge_times(token: LeaseToken) -> None:
    """Whether the times agree with each other, whatever the time is now."""
    if not TTL_MS_MIN <= token.ttl_ms <= TTL_MS_MAX:
        jws.refuse("TOKEN_TTL", "the lease's TTL")
    if token.exp_ms > token.lease_end_ms:
        jws.refuse("TOKEN_TTL", "the token outlives its lease")
    if token.lifetime_end_ms is not None and token.lease_end_ms > token.lifetime_end_ms:
        jws.refuse("TOKEN_TTL", "the lease outlives its lifetime")
    if max(token.iat_ms, token.nbf_ms) > token.exp_ms:
        jws.refuse("TOKEN_TTL", "it ends before it begins")
    rounding_ms = 1000  # `iat` was rounded down
    if token.exp_ms > token.iat_ms + TOKEN_MS_MAX + rounding_ms:
        jws.refuse("TOKEN_TTL", "the token's own life")


def accept(
    token: str | bytes,
    keys: Keys,
    *,
    issuer: str,
    audience: str,
    holder_thumbprint: str,
    now_ms: int,
    skew_ms: int = CLOCK_ERROR_MS,
    cache: VerifiedCache | None = None,
) -> LeaseToken:
    """All six steps. A cache spares the first five for a token that passed them before."""
    known = cache.get(token) if cache is not None else None
    read = known or LeaseToken.from_claims(verify(token, LEASE, keys))
    judge(
        read,
        issuer=issuer,
        audience=audience,
        holder_thumbprint=holder_thumbprint,
        now_ms=now_ms,
        skew_ms=skew_ms,
    )
    if cache is not None and known is None:
        cache.put(token, read, now_ms=now_ms)
    return read


class VerifiedCache:
    """Tokens whose signature was found good, by their SHA-256, each until its lease is over.

    Only signature and form are remembered; the meaning is judged each time. A live entry is never
    put out for a new one: full is `RATE`. Whoever changes the keys must `clear` it.
    """

    def __init__(self, entries_max: int) -> None:
        failure.invariant(entries_max > 0, "a cache has room")
        self._entries_max = entries_max
        self._tokens: dict[bytes, LeaseToken] = {}
        self._by_lease: dict[str, set[bytes]] = {}
        self._ends: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def get(self, token: str | bytes) -> LeaseToken | None:
        return self._tokens.get(hashlib.sha256(jws.as_ascii(token)).digest())

    def put(self, token: str | bytes, verified: LeaseToken, *, now_ms: int) -> None:
        self._drop_over(now_ms)
        key = hashlib.sha256(jws.as_ascii(token)).digest()
        if key in self._tokens:
            return
        if len(self._tokens) >= self._entries_max:
            raise failure.of("RATE", "too many live tokens")
        self._tokens[key] = verified
        self._by_lease.setdefault(verified.lease_id, set()).add(key)
        heapq.heappush(self._ends, (verified.lease_end_ms, key))

    def forget(self, lease_id: str) -> None:
        """The lease is over."""
        for key in self._by_lease.pop(lease_id, set()):
            del self._tokens[key]
        if len(self._ends) > 2 * len(self._tokens) + 64:  # most of it is of forgotten leases
            self._ends = [(end_ms, key) for end_ms, key in self._ends if key in self._tokens]
            heapq.heapify(self._ends)

    def clear(self) -> None:
        self._tokens.clear()
        self._by_lease.clear()
        self._ends.clear()

    def _drop_over(self, now_ms: int) -> None:
        while self._ends and self._ends[0][0] <= now_ms:
            _, key = heapq.heappop(self._ends)
            gone = self._tokens.pop(key, None)
            if gone is None:
                continue
            of_lease = self._by_lease[gone.lease_id]
            of_lease.discard(key)
            if not of_lease:
                del self._by_lease[gone.lease_id]
