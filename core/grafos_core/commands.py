"""What may be asked of the ledger, and what it answers. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grafos_core.failure import FabricError
from grafos_core.lease import (
    EndCause,
    Kind,
    Lease,
    LeaseId,
    NodeId,
    Policy,
    RevokeStage,
    TenantId,
)
from grafos_core.quota import Limit
from grafos_core.receipt import TeardownReceipt


@dataclass(frozen=True, slots=True)
class Grant:
    """Admission's decision. The ledger checks its preconditions now, and picks the extent."""

    request_id: str
    lease_id: LeaseId
    tenant: TenantId
    holder: str
    holder_key: str
    kind: Kind
    node_id: NodeId
    incarnation: str
    amount: int
    ttl_ms: int
    lifetime_ms: int | None
    bind_within_ms: int
    policy: Policy = field(default_factory=Policy)
    decision: str = ""
    key_id: str = ""
    """With which the token will be signed."""


@dataclass(frozen=True, slots=True)
class GrantBundle:
    """Several grants of one holder, all of them or none; each under a request id of its own, see
    `bundle.member_id`."""

    request_id: str
    grants: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class Attach:
    request_id: str
    lease_id: LeaseId
    tenant: TenantId
    holder: str
    holder_key: str
    bind_within_ms: int
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class Renew:
    request_id: str
    lease_id: LeaseId
    ttl_ms: int | None
    tenant: TenantId
    holder: str
    key_id: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """By the holder (cause RELEASE) or an authority (REVOKED). `tenant` None: by an operator."""

    request_id: str
    lease_id: LeaseId
    cause: EndCause
    by: str
    reason: str = ""
    grace_ms: int = 0
    tenant: TenantId | None = None
    holder: str = ""


@dataclass(frozen=True, slots=True)
class ReportBound:
    node_id: NodeId
    incarnation: str
    lease_id: LeaseId
    epoch: int
    generation: int
    stage: RevokeStage | None = None
    """How far a revocation has come there; None: none is under way."""


@dataclass(frozen=True, slots=True)
class Credit:
    """`receipt` had a valid signature of the node that `signer_node` names."""

    receipt: TeardownReceipt
    signer_node: NodeId


@dataclass(frozen=True, slots=True)
class Burn:
    lease_id: LeaseId
    reason: str


@dataclass(frozen=True, slots=True)
class ClearFence:
    request_id: str
    lease_id: LeaseId
    reason: str
    accept_residue: bool
    operator: str
    nonce: str
    """128 random bits from the shell, hexadecimal; used once."""


@dataclass(frozen=True, slots=True)
class SetQuota:
    tenant: TenantId
    kind: Kind
    limit: Limit


@dataclass(frozen=True, slots=True)
class ForgetNode:
    node_id: NodeId
    accept_residue: bool
    reason: str
    operator: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """For the record: what admission refused."""

    request_id: str
    tenant: TenantId
    holder: str
    kind: Kind
    amount: int
    code: str


@dataclass(frozen=True, slots=True)
class PublishedKey:
    """A public key that others verify with. `not_after_ms` 0: no end yet."""

    key_id: str
    owner: str
    use: str
    public_key: bytes
    not_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class PublishKey:
    key: PublishedKey


@dataclass(frozen=True, slots=True)
class RevokeKey:
    """Nothing that this key signs counts any more; whoever orders it ends the leases, too."""

    key_id: str
    reason: str
    operator: str


@dataclass(frozen=True, slots=True)
class LiveLease:
    lease_id: LeaseId
    epoch: int
    generation: int


@dataclass(frozen=True, slots=True)
class Register:
    """A node's place in the fabric, renewed each second. `live` None: not told this time."""

    node_id: NodeId
    incarnation: str
    boot_epoch: int
    offers: Mapping[Kind, int]
    high_waters: Mapping[Kind, int]
    ready_kinds: frozenset[Kind]
    closed_gates: Mapping[str, str]
    front_endpoint: str
    control_endpoint: str
    labels: Mapping[str, str]
    receipt_key: PublishedKey
    live: tuple[LiveLease, ...] | None = None
    clears_proved_clean: bool = False
    """Its operator has told it to clear the fences that it proves clean."""


@dataclass(frozen=True, slots=True)
class SetMode:
    node_id: NodeId
    mode: str
    operator: str
    reason: str = ""


Command = (
    Grant | GrantBundle | Attach | Renew | End | ReportBound | Credit | Burn | ClearFence | SetQuota
    | ForgetNode | Refusal | PublishKey | RevokeKey | Register | SetMode
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for good. State is what the events make of it and nothing else."""

    kind: str
    at_ms: int
    lease_id: str = ""
    epoch: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)
    """Integers, text, bytes, booleans, None, and lists and maps of these."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command's effect, in this order: make `events` durable, then answer, then wake `nodes`.

    With `failure` set nothing happened, but for events that the failure itself is recorded by.
    """

    events: tuple[Event, ...] = ()
    lease: Lease | None = None
    failure: FabricError | None = None
    leases: tuple[Lease, ...] = ()
    """Of a bundle, in its order."""
    nodes: frozenset[NodeId] = frozenset()
    """Nodes that have a new obligation; they also ask each second."""


@dataclass(frozen=True, slots=True)
class Obligation:
    """What the ledger still wants of a node; repeated until the receipt arrives."""

    lease: Lease
    action: str
    """burn, release, revoke or clear."""
    nonce: str = ""
    reason: str = ""
    operator: str = ""
    accept_residue: bool = False
    ordered_at_ms: int = 0
