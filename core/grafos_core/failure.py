"""The eight ways in which an operation can fail, as values that a program can act on.

    FabricError
    ├── LeaseExpired     the TTL or the lifetime ran out: acquire again
    ├── Revoked          taken back by an authority: do not retry
    ├── Fenced           quarantined, burnt, or overtaken by a newer epoch: acquire again
    ├── Disconnected     node or service unreachable while the lease may live: retry
    │   └── DeadlineExceeded   the caller's own deadline passed (also a TimeoutError)
    ├── Degraded         reduced service: stale evidence, jeopardy, contention: by contract
    ├── Incompatible     the request does not fit: change it
    │   └── Denied       identity, right or unknown id refused
    ├── RateLimited      quota, rate or back-pressure: after `retry_after_ms`
    └── InternalError    our bug: report `incident_id`

Each cause has one stable code; one table below says which failure a code is, which gRPC status it
travels under and the one fixed sentence that outsiders read. On every path the same cause gives the
same code. A broken invariant is no failure but `InvariantViolation`: the process halts.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


class InvariantViolation(AssertionError):
    """A law does not hold. Never caught: whoever sees it halts and is recovered from disk."""


def invariant(holds: bool, what: str) -> None:
    """Raise `InvariantViolation(what)` unless `holds`. Unlike `assert`, `-O` cannot remove it."""
    if not holds:
        raise InvariantViolation(what)


class Failure(enum.Enum):
    """The names of the eight, as they stand on the wire and in contracts."""

    LeaseExpired = "LeaseExpired"
    Revoked = "Revoked"
    Fenced = "Fenced"
    Disconnected = "Disconnected"
    Degraded = "Degraded"
    Incompatible = "Incompatible"
    RateLimited = "RateLimited"
    InternalError = "InternalError"


class FabricError(Exception):
    """An expected refusal. Read `code` for the exact cause and `retryable` before trying again."""

    failure: ClassVar[Failure] = Failure.InternalError
    retryable: ClassVar[bool] = False
    default_code: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "",
        detail: str = "",
        lease_id: str = "",
        epoch: int = 0,
        retry_after_ms: int | None = None,
        cause: str = "",
        incident_id: str = "",
        details: Mapping[str, str] | None = None,
    ) -> None:
        self.code = code or self.default_code
        self.detail = detail
        """What exactly was wrong with this request; never a path, a key or a token."""
        self.lease_id = lease_id
        self.epoch = epoch
        self.retry_after_ms = retry_after_ms
        self.cause = cause
        """Why an authority acted: `preempted`, `operator`, `agent_lost`, …"""
        self.incident_id = incident_id
        self.details = dict(details or {})
        known = CODES.get(self.code)
        text = message or (known.message if known else self.code)
        super().__init__(f"{text} ({detail})" if detail else text)

    @property
    def status(self) -> str:
        """The name of the gRPC status code under which this failure travels."""
        known = CODES.get(self.code)
        return known.status if known else "UNKNOWN"

    def fields(self) -> dict[str, Any]:
        """What `from_fields` needs to make this failure again, on another machine."""
        return {
            "code": self.code, "detail": self.detail, "lease_id": self.lease_id,
            "epoch": self.epoch, "retry_after_ms": self.retry_after_ms, "cause": self.cause,
            "incident_id": self.incident_id, "details": dict(self.details),
        }  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        return (from_fields, (type(self).__name__, self.fields()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FabricError) or type(other) is not type(self):
            return NotImplemented
        return other.fields() == self.fields()

    __hash__ = Exception.__hash__


class LeaseExpired(FabricError):
    """The TTL or the lifetime ran out. Deterministic and expected: acquire again."""

    failure, default_code = Failure.LeaseExpired, "LEASE_EXPIRED"


class Revoked(FabricError):
    """Recalled by authority or preemption; `cause` says which."""

    failure, default_code = Failure.Revoked, "REVOKED"


class Fenced(FabricError):
    """Quarantined or overtaken: nothing under this epoch takes effect any more."""

    failure, default_code = Failure.Fenced, "FENCED"


class Disconnected(FabricError):
    """The node or service is unreachable; the lease may still live."""

    failure, default_code, retryable = Failure.Disconnected, "UNREACHABLE", True


class DeadlineExceeded(Disconnected, TimeoutError):
    """The call's own deadline passed; whether it took effect is not known."""

    default_code = "DEADLINE"


class Degraded(FabricError):
    """Reduced service; the contract of the caller says what to do."""

    failure, default_code, retryable = Failure.Degraded, "DEGRADED", True


class Incompatible(FabricError):
    """The request's shape does not match the resource or this version."""

    failure, default_code = Failure.Incompatible, "INVALID"


class Denied(Incompatible):
    """Identity or right refused, or an id that the caller may not know of."""

    default_code = "DENIED"


class RateLimited(FabricError):
    """Throttled by quota, admission or back-pressure: wait `retry_after_ms`."""

    failure, default_code, retryable = Failure.RateLimited, "RATE", True


class InternalError(FabricError):
    """An implementation fault. Only its incident id leaves the service."""


@dataclass(frozen=True, slots=True)
class Code:
    """What a code means on the wire."""

    kind: type[FabricError]
    status: str
    message: str


_E, _R, _F, _X, _T, _G, _I, _D, _L, _B = (
    LeaseExpired, Revoked, Fenced, Disconnected, DeadlineExceeded, Degraded, Incompatible, Denied,
    RateLimited, InternalError,
)  # fmt: skip
_PRE, _ARG, _RANGE = "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE"
_PERM, _AUTH, _UNAV, _RES, _LOSS = (
    "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DATA_LOSS",
)  # fmt: skip

CODES: dict[str, Code] = {
    # lease and epoch
    "LEASE_EXPIRED": Code(_E, _PRE, "the lease's time ran out"),
    "LEASE_RELEASED": Code(_E, _PRE, "the lease was released"),
    "LIFETIME": Code(_E, _PRE, "the lease has reached the end of its lifetime"),
    "REVOKED": Code(_R, _PERM, "the lease was revoked"),
    "FENCED": Code(_F, _PRE, "the lease is fenced"),
    "AGENT_LOST": Code(_F, _PRE, "the node agent that served the lease was lost"),
    "EPOCH_STALE": Code(_F, _PRE, "a newer epoch is in force"),
    "EPOCH_BURNT": Code(_F, _PRE, "this epoch was used up or given up"),
    "QUARANTINED": Code(_F, _PRE, "the resource is quarantined after a failed teardown"),
    "SLOT_BUSY": Code(_F, _PRE, "an earlier lease on this resource is not torn down yet"),
    "IO": Code(_F, _LOSS, "the device failed; the extent is quarantined"),
    "TORN": Code(_F, _LOSS, "the device returned something that was not written last"),
    "STORAGE": Code(_F, _LOSS, "durable storage failed"),
    # reachability
    "UNREACHABLE": Code(_X, _UNAV, "the service cannot be reached"),
    "RETRY_LATER": Code(_X, _UNAV, "the service is shutting down or starting"),
    "DEADLINE": Code(_T, "DEADLINE_EXCEEDED", "the deadline passed"),
    "FORKED_CHILD": Code(_X, _PRE, "this handle belongs to the parent process"),
    "CLOSED": Code(_X, _PRE, "the handle is closed"),
    # reduced service
    "DEGRADED": Code(_G, _UNAV, "reduced service"),
    "JEOPARDY": Code(_G, _UNAV, "the lease cannot be renewed for now; its deadline stands"),
    "NODE_NOT_READY": Code(_G, _PRE, "no node with fresh readiness evidence fits"),
    "NOT_READY": Code(_G, _UNAV, "the service is not ready"),
    "REVOCATION_STALE": Code(_G, _UNAV, "the revocation list is too old to bind on"),
    "LEDGER_BEHIND": Code(_G, _UNAV, "the ledger has not read this node's state yet"),
    "CONTENDED": Code(_G, _UNAV, "the word is contended"),
    "WARDEN_LOST": Code(_G, _UNAV, "the node's warden is being replaced"),
    "SPOOL_FULL": Code(_G, _UNAV, "the audit spool is full"),
    "COLLECTOR_DISK": Code(_G, _UNAV, "the collector could not store the records"),
    # requests that do not fit
    "INVALID": Code(_I, _ARG, "the request is not valid"),
    "OPTION": Code(_I, _ARG, "this option is not available"),
    "RANGE": Code(_I, _ARG, "a size or range is out of bounds"),
    "IDENTIFIER": Code(_I, _ARG, "an identifier is not well formed"),
    "EXTENT": Code(_I, _RANGE, "the operation lies outside the lease"),
    "LENGTH": Code(_I, _ARG, "the stated length and the payload differ"),
    "CHUNK": Code(_I, _ARG, "the chunk is too large"),
    "CHECKSUM": Code(_I, _LOSS, "the payload does not match its checksum"),
    "DEADLINE_REQUIRED": Code(_I, _ARG, "a call that changes something needs a deadline"),
    "UNKNOWN_FIELDS": Code(_I, _ARG, "the message has fields that this version does not know"),
    "MISSING_FIELD": Code(_I, _ARG, "a required field is missing or of the wrong type"),
    "VERSION": Code(_I, _PRE, "the versions do not match"),
    "CAPACITY": Code(_I, _RES, "no node has this much of the resource at all"),
    "NO_MATCH": Code(_I, _PRE, "no node matches the request"),
    "PRECONDITION": Code(_I, "ABORTED", "the state changed in the meantime"),
    "DISK": Code(_I, _RES, "the disk is full"),
    "MESSAGE_SIZE": Code(_I, _RES, "the message is too large"),
    "LEASE_BOUND": Code(_I, "ALREADY_EXISTS", "the lease is bound by this generation already"),
    "LIVE_LEASES": Code(_I, _PRE, "live leases stand in the way"),
    "EMPTY": Code(_I, _ARG, "the request is empty"),
    # identity and right
    "DENIED": Code(_D, _PERM, "not allowed"),
    "ROLE": Code(_D, _PERM, "this identity may not call this method"),
    "IDENTITY": Code(_D, _AUTH, "the certificate carries no identity of this fabric"),
    "CERT_EXPIRED": Code(_D, _AUTH, "the certificate has expired"),
    "NOT_FOUND": Code(_D, "NOT_FOUND", "no such lease, node or record"),
    "HOLDER_MISMATCH": Code(_D, _PERM, "the token belongs to another holder"),
    "SCOPE": Code(_D, _PERM, "the token does not allow this operation"),
    "TOKEN_HEADER": Code(_D, _AUTH, "the token's header is not one of ours"),
    "TOKEN_KEY_UNKNOWN": Code(_D, _AUTH, "the token's key is not known"),
    "TOKEN_ENCODING": Code(_D, _AUTH, "the token is not well formed"),
    "TOKEN_PAYLOAD": Code(_D, _AUTH, "the token's claims are not canonical"),
    "TOKEN_SIGNATURE": Code(_D, _AUTH, "the token's signature is wrong"),
    "TOKEN_CLAIM": Code(_D, _AUTH, "a claim of the token is missing or of the wrong type"),
    "TOKEN_ISSUER": Code(_D, _AUTH, "the token was issued by someone else"),
    "TOKEN_AUDIENCE": Code(_D, _AUTH, "the token is for another node"),
    "TOKEN_TTL": Code(_D, _AUTH, "the token's times are out of bounds"),
    "TOKEN_EXPIRED": Code(_D, _AUTH, "the token has expired"),
    "TOKEN_IMMATURE": Code(_D, _AUTH, "the token is not valid yet"),
    "ATTESTATION": Code(_D, _PERM, "attestation is missing or stale"),
    "RECEIPT": Code(_D, _PERM, "the receipt does not prove this teardown"),
    "CLEAR": Code(_D, _PERM, "the clear order is not valid"),
    "EPOCH_RANGE": Code(_I, _ARG, "the epoch is out of range"),
    "JOIN_TOKEN": Code(_D, _PERM, "the join token is not valid"),
    # limits
    "RATE": Code(_L, _RES, "too many requests"),
    "QUOTA": Code(_L, _RES, "the tenant's quota is used up"),
    "NO_CAPACITY": Code(_L, _RES, "the capacity is in use"),
    "STREAMS": Code(_L, _RES, "too many calls at a time"),
    "LEASE_COUNT": Code(_L, _RES, "too many leases"),
    # audit ingest
    "GAP": Code(_I, _RANGE, "records are missing before this one"),
    "FORK": Code(_F, _LOSS, "another record stands at this number"),
    "CHAIN": Code(_F, _LOSS, "the record does not link to the one before"),
    "SEAL_KEY": Code(_D, _PERM, "the seal's key is not this chain's"),
    "ENCODING": Code(_I, _ARG, "the record is not in the canonical encoding"),
    "ROLLBACK": Code(_F, _PRE, "the chain is behind what was acknowledged"),
    # time
    "CLOCK_REGRESSED": Code(_G, _PRE, "the wall clock is behind the time floor"),
    # ours
    "INTERNAL": Code(_B, "INTERNAL", "internal fault"),
}  # fmt: skip

_CLASSES: dict[str, type[FabricError]] = {
    kind.__name__: kind for kind in (_E, _R, _F, _X, _T, _G, _I, _D, _L, _B, FabricError)
}


def of(code: str, detail: str = "", **fields: Any) -> FabricError:
    """The failure that `code` stands for. An unknown code is our own bug."""
    invariant(code in CODES, f"unknown failure code {code}")
    return CODES[code].kind(code=code, detail=detail, **fields)


def from_fields(class_name: str, fields: Mapping[str, Any]) -> FabricError:
    """Make a failure again from what `FabricError.fields` gave; unknown classes stay typed."""
    kind = _CLASSES.get(class_name)
    if kind is None:
        known = CODES.get(str(fields.get("code", "")))
        kind = known.kind if known else InternalError
    return kind(**fields)


def exception_of(failure: Failure) -> type[FabricError]:
    """The exception class of the same name."""
    return _CLASSES[failure.value]
