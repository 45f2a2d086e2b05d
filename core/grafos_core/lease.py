"""A lease: the time-limited right of one holder to one slice of one resource.

What the ledger knows of a lease, and the one table of how it may change:

            grant              bound
    (none) ───────► PENDING ─────────► ACTIVE ◄─┐ renew, attach
                       │ burn, release,   │ └───┘
                       │ revoke           │ release, expire, revoke, agent lost
                       ▼                  ▼
                       └──────────────► ENDING ──── receipt ────► RELEASED
                                          │                          ▲
                                          └── teardown failed ► FENCED
                                                                clear, with evidence

RELEASED is the end. Capacity is charged to the node in every other state: PENDING and ACTIVE count
as leased, ENDING as ending, FENCED as fenced. The tenant is charged only while PENDING or ACTIVE.

Inside ENDING a revocation passes through named stages, drawn at `REVOKE_STAGES`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NewType

from grafos_core import failure

LeaseId = NewType("LeaseId", str)
"""128 random bits as 32 lower-case hexadecimal digits."""
NodeId = NewType("NodeId", str)
TenantId = NewType("TenantId", str)

TTL_MS_MIN: Final = 1_000
TTL_MS_MAX: Final = 86_400_000
TTL_MS_DEFAULT: Final = 60_000
TOKEN_MS_DEFAULT: Final = 30_000
TOKEN_MS_MAX: Final = 300_000
CLOCK_ERROR_MS: Final = 500
"""Largest difference between the wall clocks of two synced machines (eps)."""
RATE_ERROR: Final = 500
"""Clocks run at most 1/500 too fast or too slow (rho)."""
TEARDOWN_MS_MAX: Final = 5_000
"""A teardown that takes longer fences its slice. Slurm waits 60 s and drains the whole node."""
EPOCH_MAX: Final = 2**64 - 2
AMOUNT_MAX: Final = 2**62
BLOCK_BYTES: Final = 4096
"""Unit of block leases; amounts of other kinds are bytes, cores per mille or bits per second."""
RECONNECT_MS_DEFAULT: Final = 5_000
RETURN_MS: Final = 1_000
"""A connection that is opened anew within it was never lost: connections are renewed by the minute,
and whoever holds a lease moves from one kind to another."""
KEY_IDS_MAX: Final = 8
"""Keys are changed by the month; a lease that has seen more was renewed for most of a year."""
PAGE_BYTES: Final = 4096
"""Granule of leases that are counted in bytes."""


class Kind(enum.StrEnum):
    """What can be leased. Block is cut in extents, all others are amounts."""

    MEM = "mem"
    BLOCK = "block"
    GPU = "gpu"
    CPU = "cpu"
    NET = "net"

    @property
    def has_extents(self) -> bool:
        return self is Kind.BLOCK

    @property
    def granule(self) -> int:
        """Amounts are multiples of this."""
        return PAGE_BYTES if self in (Kind.MEM, Kind.GPU) else 1


class LeaseState(enum.StrEnum):
    PENDING = "pending"
    ACTIVE = "active"
    ENDING = "ending"
    RELEASED = "released"
    FENCED = "fenced"


class EndCause(enum.StrEnum):
    """Why a lease ended. `holder_exit` and `disconnected` are the node's findings."""

    RELEASE = "release"
    EXPIRED = "expired"
    REVOKED = "revoked"
    BURNT = "burnt"
    HOLDER_EXIT = "holder_exit"
    DISCONNECTED = "disconnected"
    AGENT_LOST = "agent_lost"
    BIND_FAILED = "bind_failed"
    DEVICE_FAILED = "device_failed"
    CLEARED = "cleared"


class Priority(enum.StrEnum):
    GUARANTEED = "guaranteed"
    STANDARD = "standard"
    SCAVENGER = "scavenger"


LIFETIME_MS_MAX: Final[Mapping[Priority, int | None]] = {
    Priority.GUARANTEED: None,
    Priority.STANDARD: 86_400_000,
    Priority.SCAVENGER: 600_000,
}
"""No renewal passes grant + this. None: no bound unless the holder asks for one."""


class Isolation(enum.StrEnum):
    """How far a lease is kept from its neighbours, weakest first."""

    NONE = "none"
    SOFT = "soft"
    CONTEXT = "context"
    PARTITION = "partition"


class OnHolderExit(enum.StrEnum):
    RELEASE = "release"
    KEEP = "keep"


class OnDisconnect(enum.StrEnum):
    """What follows when a holder's connection is lost while its process may live."""

    GRACE = "grace"
    """It has `reconnect_ms` to come back."""
    RELEASE = "release"
    """The lease ends, unless it is back within `RETURN_MS`."""
    KEEP = "keep"
    """Nothing: the lease lives to its deadline, or to the end of the process."""


TRANSITIONS: Final[Mapping[LeaseState | None, frozenset[LeaseState]]] = {
    None: frozenset({LeaseState.PENDING}),
    LeaseState.PENDING: frozenset({LeaseState.ACTIVE, LeaseState.ENDING}),
    LeaseState.ACTIVE: frozenset({LeaseState.ENDING}),
    LeaseState.ENDING: frozenset({LeaseState.RELEASED, LeaseState.FENCED}),
    LeaseState.FENCED: frozenset({LeaseState.RELEASED}),
    LeaseState.RELEASED: frozenset(),
}

HELD: Final = frozenset(
    {LeaseState.PENDING, LeaseState.ACTIVE, LeaseState.ENDING, LeaseState.FENCED}
)
"""States in which the slice is charged to its node."""
USABLE: Final = frozenset({LeaseState.PENDING, LeaseState.ACTIVE})
"""States in which the tenant is charged and the lease may be renewed."""


class RevokeStage(enum.StrEnum):
    """How far a lease's end has come; the labels are the wire's.

    Grace and checkpoints are between the node and the holder, so their truth is at the node. The
    ledger shows what it ordered and what the node has reported since: it may be behind, never
    ahead.
    """

    ACTIVE = "active"
    REVOKE_WARNING = "revoke_warning"
    GRACE_RUNNING = "grace_running"
    CHECKPOINT_REPORTED = "checkpoint_reported"
    FORCED_TEARDOWN = "forced_teardown"
    TORNDOWN = "torndown"
    EXPIRED = "expired"
    FENCED = "fenced"
    FAILED_CLOSED = "failed_closed"


_ENDS: Final = frozenset({RevokeStage.TORNDOWN, RevokeStage.FENCED, RevokeStage.FAILED_CLOSED})

REVOKE_STAGES: Final[Mapping[RevokeStage, frozenset[RevokeStage]]] = {
    RevokeStage.ACTIVE: frozenset(
        {RevokeStage.REVOKE_WARNING, RevokeStage.FORCED_TEARDOWN, RevokeStage.EXPIRED}
    ),
    RevokeStage.REVOKE_WARNING: frozenset(
        {RevokeStage.GRACE_RUNNING, RevokeStage.FORCED_TEARDOWN, RevokeStage.EXPIRED}
    ),
    RevokeStage.GRACE_RUNNING: frozenset(
        {RevokeStage.CHECKPOINT_REPORTED, RevokeStage.FORCED_TEARDOWN, RevokeStage.EXPIRED}
    ),
    RevokeStage.CHECKPOINT_REPORTED: _ENDS,
    RevokeStage.FORCED_TEARDOWN: _ENDS,
    RevokeStage.EXPIRED: _ENDS,
    RevokeStage.FAILED_CLOSED: frozenset({RevokeStage.TORNDOWN, RevokeStage.FENCED}),
    RevokeStage.TORNDOWN: frozenset(),
    RevokeStage.FENCED: frozenset({RevokeStage.TORNDOWN}),
}
"""failed_closed is the end of access with the receipt outstanding; the receipt still settles it.
What is fenced is torn down by its clear."""


def _later(stage: RevokeStage) -> frozenset[RevokeStage]:
    return REVOKE_STAGES[stage].union(*(_later(after) for after in REVOKE_STAGES[stage]))


LATER_STAGES: Final[Mapping[RevokeStage, frozenset[RevokeStage]]] = {
    stage: _later(stage) for stage in RevokeStage
}
REPORTED_STAGES: Final = frozenset(
    {RevokeStage.GRACE_RUNNING, RevokeStage.CHECKPOINT_REPORTED, RevokeStage.FORCED_TEARDOWN}
)
"""What a node tells of a revocation before its receipt does."""
IN_GRACE: Final = frozenset({RevokeStage.REVOKE_WARNING, RevokeStage.GRACE_RUNNING})
"""The holder may still use the lease, and report that it has saved its work."""


def next_stage(known: RevokeStage, reached: RevokeStage, lease_id: str) -> RevokeStage:
    """The stage after `known`, where it is one. Stages are passed over, never gone back."""
    failure.invariant(
        reached is known or reached in LATER_STAGES[known],
        f"the end of {lease_id} cannot go from {known} to {reached}",
    )
    return reached


@dataclass(frozen=True, slots=True)
class Policy:
    """What a lease carries from its grant to its teardown; never looked up again."""

    on_holder_exit: OnHolderExit = OnHolderExit.RELEASE
    reconnect_ms: int = RECONNECT_MS_DEFAULT
    """How long a lost connection may stay lost, with `on_disconnect` grace."""
    stop_after_ms: int | None = None
    """None: a lease outlives the control plane's absence to its deadline; else it ends after it."""
    isolation: Isolation = Isolation.NONE
    scrub: bool = False
    """Overwrite with zeros before the pages are given back."""
    priority: Priority = Priority.STANDARD
    on_disconnect: OnDisconnect = OnDisconnect.GRACE


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease as the ledger remembers it. `amount` is in the kind's unit."""

    lease_id: LeaseId
    request_id: str
    tenant: TenantId
    holder: str
    """SPIFFE id."""
    holder_key: str
    """SHA-256 of the holder's TLS public key, base64url."""
    kind: Kind
    node_id: NodeId
    incarnation: str
    amount: int
    extent_offset: int
    """In blocks; 0 for kinds without extents."""
    epoch: int
    generation: int
    ttl_ms: int
    granted_at_ms: int
    end_ms: int
    lifetime_end_ms: int | None
    bind_by_ms: int
    """When its token has run out: a grant not bound by then (+ eps) is burnt."""
    policy: Policy = field(default_factory=Policy)
    state: LeaseState = LeaseState.PENDING
    stage: RevokeStage = RevokeStage.ACTIVE
    cause: EndCause | None = None
    reason: str = ""
    """Words of the authority that ended it."""
    bound_at_ms: int | None = None
    ended_at_ms: int | None = None
    """When its end was ordered, or ordered sooner."""
    grace_ms: int = 0
    """From then on."""
    unconfirmed: bool = False
    former_end_ms: int = 0
    """`node_end_ms` before the latest renewal, which its node need not have heard of."""
    key_ids: tuple[str, ...] = ()
    """Of the keys that signed tokens of it, each once, the latest last."""
    fence_cause: str = ""
    fence_evidence: Mapping[str, Any] = field(default_factory=dict)
    fenced_at_ms: int | None = None
    cleared: str = ""
    """On whose word its fence was cleared: `operator`, `policy`, or `residue`, where an operator
    accepted that something may be left. Kept for ever."""

    def moved(self, state: LeaseState, **changes: Any) -> Lease:
        """The lease in `state`. An illegal transition is a broken invariant and changes nothing."""
        failure.invariant(
            state in TRANSITIONS[self.state],
            f"lease {self.lease_id} cannot go from {self.state} to {state}",
        )
        return replace(self, state=state, **changes).staged()

    def staged(self) -> Lease:
        """With the stage that its state and cause say."""
        return self.at_stage(self._reached())

    def signed_by(self, key_id: str) -> Lease:
        """With one key more that signed a token of it; the oldest give way."""
        if not key_id or key_id in self.key_ids[-1:]:
            return self
        others = tuple(each for each in self.key_ids if each != key_id)
        return replace(self, key_ids=(*others, key_id)[-KEY_IDS_MAX:])

    def at_stage(self, stage: RevokeStage) -> Lease:
        """With a stage that it has reached by now."""
        reached = next_stage(self.stage, stage, self.lease_id)
        return self if reached is self.stage else replace(self, stage=reached)

    def _reached(self) -> RevokeStage:
        match self.state:
            case LeaseState.PENDING | LeaseState.ACTIVE:
                return RevokeStage.ACTIVE
            case LeaseState.FENCED:
                return RevokeStage.FENCED
            case LeaseState.RELEASED:
                return RevokeStage.TORNDOWN
        if self.stage is not RevokeStage.ACTIVE:
            return self.stage
        if self.cause is EndCause.EXPIRED:
            return RevokeStage.EXPIRED
        return RevokeStage.REVOKE_WARNING if self.grace_ms else RevokeStage.FORCED_TEARDOWN

    @property
    def receipt_due_ms(self) -> int:
        """When the receipt of an end that was ordered is overdue."""
        assert self.ended_at_ms is not None
        due_ms = self.ended_at_ms + self.grace_ms + self._receipt_margin_ms
        return max(due_ms, self._node_proved_ms) if self.cause is EndCause.EXPIRED else due_ms

    @property
    def closed_by_ms(self) -> int:
        """When its access is certainly over, whether its node has heard of an order or not."""
        ordered = self.cause in (EndCause.REVOKED, EndCause.RELEASE)
        told = self.stage in (RevokeStage.CHECKPOINT_REPORTED, RevokeStage.FAILED_CLOSED)
        if told or not ordered:
            return self.receipt_due_ms
        return max(self.receipt_due_ms, self._node_proved_ms)

    @property
    def node_end_ms(self) -> int:
        """When its node ends it, if that has the slowest clock that is allowed and heard of no
        renewal, or of all: one that asked for less than was left shortens nothing there."""
        return max(self.former_end_ms, self.end_ms + rate_margin_ms(self.ttl_ms))

    @property
    def _node_proved_ms(self) -> int:
        return self.node_end_ms + CLOCK_ERROR_MS + TEARDOWN_MS_MAX

    @property
    def _receipt_margin_ms(self) -> int:
        return CLOCK_ERROR_MS + rate_margin_ms(self.ttl_ms) + TEARDOWN_MS_MAX

    @property
    def extent_end(self) -> int:
        return self.extent_offset + self.amount


_LEASE_ID = re.compile(r"[0-9a-f]{32}")
_REQUEST_ID = re.compile(r"[0-9a-zA-Z_.:-]{1,64}")


def check_lease_id(text: str) -> LeaseId:
    if not _LEASE_ID.fullmatch(text):
        raise failure.of("IDENTIFIER", "lease id: 32 hexadecimal digits")
    return LeaseId(text)


def check_request_id(text: str) -> str:
    if not _REQUEST_ID.fullmatch(text):
        raise failure.of("IDENTIFIER", "request id: 1 to 64 of A-Z a-z 0-9 _ . : -")
    return text


def check_ttl(ttl_ms: int) -> int:
    if not TTL_MS_MIN <= ttl_ms <= TTL_MS_MAX:
        raise failure.of("RANGE", f"ttl_ms: {TTL_MS_MIN} to {TTL_MS_MAX}")
    return ttl_ms


def rate_margin_ms(duration_ms: int) -> int:
    """How much a clock of bounded rate error may be off after `duration_ms`, rounded up."""
    return -(-duration_ms // RATE_ERROR)
