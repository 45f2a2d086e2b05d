"""Leases as messages and messages as leases.

Rules. A message that names a kind, state or policy that this version does not know is refused; a
number of a proto enum never reaches the core. Zero stands for "none" where proto3 has no absence.
`ended_at_ms` stays at home: it is of use to the ledger only.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypeVar

from grafos_core import failure
from grafos_core import lease as core
from grafos_core.lease import (
    EndCause,
    Isolation,
    Kind,
    Lease,
    LeaseState,
    OnDisconnect,
    OnHolderExit,
    Policy,
    Priority,
    RevokeStage,
)
from grafos_proto.v1 import lease_pb2

RECONNECT_MS_MAX: Final = 600_000

_KINDS: Final = {
    Kind.MEM: lease_pb2.KIND_MEM,
    Kind.BLOCK: lease_pb2.KIND_BLOCK,
    Kind.GPU: lease_pb2.KIND_GPU,
    Kind.CPU: lease_pb2.KIND_CPU,
    Kind.NET: lease_pb2.KIND_NET,
}
_KINDS_BACK: Final = {number: kind for kind, number in _KINDS.items()}
_STATES: Final = {
    LeaseState.PENDING: lease_pb2.LEASE_STATE_PENDING,
    LeaseState.ACTIVE: lease_pb2.LEASE_STATE_ACTIVE,
    LeaseState.ENDING: lease_pb2.LEASE_STATE_ENDING,
    LeaseState.RELEASED: lease_pb2.LEASE_STATE_RELEASED,
    LeaseState.FENCED: lease_pb2.LEASE_STATE_FENCED,
}
_STATES_BACK: Final = {number: state for state, number in _STATES.items()}
_Label = TypeVar("_Label", bound=StrEnum)


def kind_to_proto(kind: Kind) -> lease_pb2.Kind.ValueType:
    return _KINDS[kind]


def kind_from_proto(number: lease_pb2.Kind.ValueType) -> Kind:
    """The kind; one that was left out or is not known is refused."""
    found = _KINDS_BACK.get(number)
    if found is None:
        raise failure.of("MISSING_FIELD" if number == 0 else "INVALID", "kind")
    return found


def state_to_proto(state: LeaseState) -> lease_pb2.LeaseState.ValueType:
    return _STATES[state]


def state_from_proto(number: lease_pb2.LeaseState.ValueType) -> LeaseState:
    found = _STATES_BACK.get(number)
    if found is None:
        raise failure.of("MISSING_FIELD" if number == 0 else "INVALID", "state")
    return found


def policy_to_proto(policy: Policy) -> lease_pb2.Policy:
    return lease_pb2.Policy(
        on_holder_exit=policy.on_holder_exit.value,
        reconnect_ms=policy.reconnect_ms,
        stop_after_ms=policy.stop_after_ms or 0,
        isolation=policy.isolation.value,
        scrub=policy.scrub,
        priority=policy.priority.value,
        on_disconnect=policy.on_disconnect.value,
    )


def policy_from_proto(message: lease_pb2.Policy) -> Policy:
    """The policy; what the message leaves out has its default."""
    if message.reconnect_ms > RECONNECT_MS_MAX:
        raise failure.of("RANGE", f"reconnect_ms: at most {RECONNECT_MS_MAX}")
    return Policy(
        on_holder_exit=_label(OnHolderExit, message.on_holder_exit, OnHolderExit.RELEASE),
        reconnect_ms=message.reconnect_ms or core.RECONNECT_MS_DEFAULT,
        stop_after_ms=message.stop_after_ms or None,
        isolation=_label(Isolation, message.isolation, Isolation.NONE),
        scrub=message.scrub,
        priority=_label(Priority, message.priority, Priority.STANDARD),
        on_disconnect=_label(OnDisconnect, message.on_disconnect, OnDisconnect.GRACE),
    )


def lease_to_proto(lease: Lease) -> lease_pb2.Lease:
    return lease_pb2.Lease(
        lease_id=lease.lease_id,
        tenant=lease.tenant,
        holder=lease.holder,
        kind=kind_to_proto(lease.kind),
        node_id=lease.node_id,
        incarnation=lease.incarnation,
        amount=lease.amount,
        extent_offset=lease.extent_offset,
        epoch=lease.epoch,
        generation=lease.generation,
        ttl_ms=lease.ttl_ms,
        granted_at_ms=lease.granted_at_ms,
        end_ms=lease.end_ms,
        lifetime_end_ms=lease.lifetime_end_ms or 0,
        state=state_to_proto(lease.state),
        stage=lease.stage.value,
        cause=lease.cause.value if lease.cause else "",
        reason=lease.reason,
        unconfirmed=lease.unconfirmed,
        policy=policy_to_proto(lease.policy),
        fence_cause=lease.fence_cause,
        fence_evidence={name: str(value) for name, value in lease.fence_evidence.items()},
        fenced_at_ms=lease.fenced_at_ms or 0,
        bind_by_ms=lease.bind_by_ms,
        holder_key=lease.holder_key,
        request_id=lease.request_id,
        grace_ms=lease.grace_ms,
        key_ids=lease.key_ids,
        cleared=lease.cleared,
    )


def lease_from_proto(message: lease_pb2.Lease) -> Lease:
    return Lease(
        lease_id=core.check_lease_id(message.lease_id),
        request_id=message.request_id,
        tenant=core.TenantId(message.tenant),
        holder=message.holder,
        holder_key=message.holder_key,
        kind=kind_from_proto(message.kind),
        node_id=core.NodeId(message.node_id),
        incarnation=message.incarnation,
        amount=message.amount,
        extent_offset=message.extent_offset,
        epoch=message.epoch,
        generation=message.generation,
        ttl_ms=message.ttl_ms,
        granted_at_ms=message.granted_at_ms,
        end_ms=message.end_ms,
        lifetime_end_ms=message.lifetime_end_ms or None,
        bind_by_ms=message.bind_by_ms,
        policy=policy_from_proto(message.policy),
        state=state_from_proto(message.state),
        stage=_label(RevokeStage, message.stage, RevokeStage.ACTIVE),
        cause=_label(EndCause, message.cause, EndCause.RELEASE) if message.cause else None,
        reason=message.reason,
        unconfirmed=message.unconfirmed,
        grace_ms=message.grace_ms,
        key_ids=tuple(message.key_ids),
        cleared=message.cleared,
        fence_cause=message.fence_cause,
        fence_evidence=dict(message.fence_evidence),
        fenced_at_ms=message.fenced_at_ms or None,
    )


def _label(labels: type[_Label], text: str, default: _Label) -> _Label:
    if not text:
        return default
    try:
        return labels(text)
    except ValueError:
        known = ", ".join(labels)
        raise failure.of("INVALID", f"{labels.__name__}: one of {known}") from None
