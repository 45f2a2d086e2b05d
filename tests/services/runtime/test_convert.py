"""Leases are the same after a journey as messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import failure
from grafos_core.lease import (
    EndCause,
    Isolation,
    Kind,
    Lease,
    LeaseId,
    LeaseState,
    NodeId,
    OnHolderExit,
    Policy,
    Priority,
    RevokeStage,
    TenantId,
)
from grafos_proto.v1 import lease_pb2
from grafos_proto.wire import convert

U64, POSITIVE = st.integers(0, 2**64 - 1), st.integers(1, 2**63)
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)
POLICIES = st.builds(
    Policy,
    on_holder_exit=st.sampled_from(OnHolderExit),
    reconnect_ms=st.integers(1, convert.RECONNECT_MS_MAX),
    stop_after_ms=st.none() | POSITIVE,
    isolation=st.sampled_from(Isolation),
    scrub=st.booleans(),
    priority=st.sampled_from(Priority),
)
LEASES = st.builds(
    Lease,
    lease_id=st.from_regex(r"\A[0-9a-f]{32}\Z").map(LeaseId),
    request_id=TEXT, tenant=TEXT.map(TenantId), holder=TEXT, holder_key=TEXT,
    kind=st.sampled_from(Kind), node_id=TEXT.map(NodeId), incarnation=TEXT,
    amount=U64, extent_offset=U64, epoch=U64, generation=U64, ttl_ms=U64, granted_at_ms=U64,
    end_ms=U64, lifetime_end_ms=st.none() | POSITIVE, bind_by_ms=U64, policy=POLICIES,
    state=st.sampled_from(LeaseState), stage=st.sampled_from(RevokeStage),
    cause=st.none() | st.sampled_from(EndCause), reason=TEXT, ended_at_ms=st.none() | POSITIVE,
    unconfirmed=st.booleans(), fence_cause=TEXT,
    fence_evidence=st.dictionaries(TEXT, TEXT, max_size=4), fenced_at_ms=st.none() | POSITIVE,
)  # fmt: skip


@given(LEASES)
def test_a_lease_is_the_same_after_the_journey_but_for_what_stays_at_home(lease: Lease) -> None:
    data = convert.lease_to_proto(lease).SerializeToString()
    assert convert.lease_from_proto(lease_pb2.Lease.FromString(data)) == replace(
        lease, ended_at_ms=None
    )


def test_each_kind_and_state_has_its_number_and_comes_back() -> None:
    for kind in Kind:
        assert convert.kind_from_proto(convert.kind_to_proto(kind)) is kind
    for state in LeaseState:
        assert convert.state_from_proto(convert.state_to_proto(state)) is state


def test_an_empty_policy_is_the_default() -> None:
    assert convert.policy_from_proto(lease_pb2.Policy()) == Policy()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"kind": 0}, "MISSING_FIELD"),
        ({"kind": 99}, "INVALID"),
        ({"state": 0}, "MISSING_FIELD"),
        ({"state": 99}, "INVALID"),
        ({"stage": "nowhere"}, "INVALID"),
        ({"cause": "weather"}, "INVALID"),
        ({"lease_id": "A" * 32}, "IDENTIFIER"),
        ({"policy": lease_pb2.Policy(isolation="iron")}, "INVALID"),
        ({"policy": lease_pb2.Policy(reconnect_ms=600_001)}, "RANGE"),
    ],
)
def test_what_this_version_does_not_know_is_refused(change: dict[str, Any], code: str) -> None:
    good: dict[str, Any] = {
        "lease_id": "a" * 32, "kind": lease_pb2.KIND_MEM, "state": lease_pb2.LEASE_STATE_ACTIVE,
    }  # fmt: skip
    convert.lease_from_proto(lease_pb2.Lease(**good))
    with pytest.raises(failure.Incompatible) as caught:
        convert.lease_from_proto(lease_pb2.Lease(**(good | change)))
    assert caught.value.code == code
