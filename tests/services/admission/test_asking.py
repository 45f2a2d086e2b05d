"""What may be asked for, by whom, and what comes back: a token that nobody else can use."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grafos_core import jws, token
from grafos_core.failure import FabricError, Incompatible
from grafos_core.lease import Kind
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2
from grafos_proto.wire import convert
from services.admission.tokens import Minter
from services.runtime import signing
from services.runtime.signing import SigningKey, key_id_of
from tests.services.admission.world import (
    BLOCK,
    ENDING,
    MEM,
    PAGE,
    PENDING,
    RELEASED,
    Client,
    Fabric,
    PaperNode,
    ask,
    at_once,
    codes,
    eventually,
    of_lease,
)
from tests.services.ledger.house import DOMAIN

RIGHT_TO_LEFT = "n\u202e1"
TEN_KIB = "a" * 10_240


def lease_keys(fabric: Fabric) -> jws.Keys:
    """What a node verifies tokens with, as the ledger tells it."""
    keys = jws.Keys()
    for key in fabric.of_ledger()("Snapshot", ledger_pb2.SnapshotRequest()).keys:
        if key.use == "lease":
            assert key.key_id == key_id_of(key.public_key)
            keys.add(jws.LEASE, key.key_id, signing.verifier(key.public_key), owner=key.owner)
    return keys


def accepted(fabric: Fabric, answer: Any, client: Client) -> token.LeaseToken:
    """The token as its node reads it from this client's connection."""
    lease = answer.lease
    until_published(fabric, lease.key_ids[-1])
    return token.accept(
        answer.token, lease_keys(fabric), issuer=f"spiffe://{DOMAIN}/service/admission",
        audience=token.audience_of(lease.node_id, lease.incarnation),
        holder_thumbprint=client.credentials.thumbprint, now_ms=time.time_ns() // 1_000_000,
    )  # fmt: skip


def test_a_lease_lives_from_acquire_to_credit(shared: Fabric) -> None:
    node, web = shared.node("whole", offers={Kind.MEM: 10 * PAGE}), shared.holder()
    answer = web.acquire(where={"node": "whole"}, amount=PAGE + 1)
    lease = answer.lease
    assert (lease.amount, lease.state, lease.node_id) == (2 * PAGE, PENDING, "whole")
    assert answer.node_endpoint == "127.0.0.1:1"
    node.bound(lease)
    renewed = web.renew(lease, ttl_ms=90_000)
    assert renewed.lease.end_ms > lease.end_ms
    assert renewed.lease.generation == 2
    attached = web.attach(lease)
    assert attached.lease.generation == 3
    assert web.release(lease).state == ENDING
    assert node.settle(lease).state == RELEASED
    assert web.get(lease).state == RELEASED
    node.stop()


def test_the_token_is_for_this_lease_this_node_and_this_key(shared: Fabric) -> None:
    """K14: it carries the thumbprint of the key that the caller proved."""
    web, other = shared.holder(), shared.holder("batch")
    for answer in (web.acquire(), web.acquire(kind=BLOCK, amount=3)):
        read = accepted(shared, answer, web)
        assert (read.lease_id, read.epoch) == (answer.lease.lease_id, answer.lease.epoch)
        assert read.holder_thumbprint == answer.lease.holder_key
        assert read.exp_ms <= min(answer.lease.end_ms, answer.lease.bind_by_ms)
        assert 0 < answer.token_expires_in_ms <= 30_000
        with pytest.raises(Incompatible) as refused:
            accepted(shared, answer, other)
        assert refused.value.code == "HOLDER_MISMATCH"


def test_a_second_process_of_the_same_holder_attaches_with_its_own_key(shared: Fabric) -> None:
    first = shared.client("tenant/default/holder/uid-7/100-1")
    second = shared.client("tenant/default/holder/uid-7/200-2")
    third = shared.client("tenant/default/holder/uid-8/300-3")
    answer = first.acquire()
    taken = second.attach(answer.lease)
    assert taken.lease.generation == answer.lease.generation + 1
    assert accepted(shared, taken, second).generation == taken.lease.generation
    with pytest.raises(Incompatible):
        accepted(shared, taken, first)
    foreign = of_lease(admission_pb2.AttachRequest, answer.lease)
    assert third.refused("Attach", foreign).code == "DENIED"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"amount": 0}, "RANGE"), ({"amount": 2**62 + 1}, "RANGE"), ({"amount": 2**63}, "RANGE"),
        ({"amount": 2**64 - 1}, "RANGE"), ({"amount": 2**62}, "CAPACITY"),
        ({"ttl_ms": 999}, "RANGE"), ({"ttl_ms": 86_400_001}, "RANGE"),
        ({"ttl_ms": 2**64 - 1}, "RANGE"), ({"wait_ms": 600_001, "has_wait": True}, "RANGE"),
        ({"lifetime_ms": 999}, "RANGE"), ({"lifetime_ms": 2**64 - 1}, "RANGE"),
        ({"policy": lease_pb2.Policy(reconnect_ms=600_001)}, "RANGE"),
        ({"policy": lease_pb2.Policy(stop_after_ms=2**63)}, "RANGE"),
    ],
)  # fmt: skip
def test_sizes_and_times_out_of_bounds_are_refused(
    fields: dict[str, Any], expected: str, shared: Fabric
) -> None:
    """G1. Nothing negative can be sent: the fields are unsigned."""
    refusal = shared.holder().denied(**fields)
    assert isinstance(refusal, Incompatible)
    assert refusal.code == expected


@pytest.mark.parametrize("ttl_ms", [1_000, 86_400_000])
def test_the_bounds_themselves_are_granted(ttl_ms: int, shared: Fabric) -> None:
    """G1."""
    assert shared.holder().acquire(ttl_ms=ttl_ms).lease.ttl_ms == ttl_ms


@pytest.mark.parametrize("bad", ["a/b", "a\0b", RIGHT_TO_LEFT, TEN_KIB, "", "A", "../n1", " "])
@pytest.mark.parametrize("field", ["request_id", "label", "label_value", "node"])
def test_what_is_no_identifier_is_refused(field: str, bad: str, shared: Fabric) -> None:
    """G2. Lone surrogates cannot be put into a protobuf string at all, as the next test shows."""
    if field == "request_id" and bad == "A":
        return  # request ids may have capitals
    every: dict[str, dict[str, Any]] = {
        "request_id": {"request_id": bad}, "label": {"where": {bad: "x"}},
        "label_value": {"where": {"zone": bad}}, "node": {"where": {"node": bad}},
    }  # fmt: skip
    fields = every[field]
    assert shared.holder().denied(**fields).code == "IDENTIFIER"
    assert shared.holder().refused("Explain", ask(**fields)).code == "IDENTIFIER"


def test_a_lone_surrogate_does_not_get_into_a_message() -> None:
    """G2."""
    with pytest.raises(UnicodeEncodeError):
        ask(request_id="a\ud800")


@pytest.mark.parametrize("bad", ["a/b", "a\0b", RIGHT_TO_LEFT, TEN_KIB, "", "F" * 32, "f" * 31])
def test_what_is_no_lease_id_is_refused_by_every_method(bad: str, shared: Fabric) -> None:
    """G2."""
    web, lease = shared.holder(), lease_pb2.Lease(lease_id=bad)
    for method, make in (
        ("Attach", admission_pb2.AttachRequest), ("Renew", admission_pb2.RenewRequest),
        ("Release", admission_pb2.ReleaseRequest),
    ):  # fmt: skip
        assert web.refused(method, of_lease(make, lease)).code == "IDENTIFIER"
    revoke = admission_pb2.RevokeRequest(request_id="r", lease_ids=[bad])
    assert web.refused("Revoke", revoke).code == "IDENTIFIER"
    if bad:  # an empty message is refused as such
        get = admission_pb2.GetLeaseRequest(lease_id=bad)
        assert web.refused("Get", get).code == "IDENTIFIER"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": 0}, "MISSING_FIELD"), ({"kind": 99}, "INVALID"),
        ({"policy": lease_pb2.Policy(isolation="total")}, "INVALID"),
        ({"policy": lease_pb2.Policy(priority="a" * 1_000)}, "INVALID"),
        ({"where": {"node": "nowhere"}}, "NO_MATCH"), ({"kind": lease_pb2.KIND_GPU}, "NO_MATCH"),
        ({"where": {f"l{n}": "x" for n in range(17)}}, "RANGE"),
        ({"policy": lease_pb2.Policy(isolation="partition")}, "NO_MATCH"),
    ],
)  # fmt: skip
def test_what_nobody_offers_is_refused_at_once(
    fields: dict[str, Any], expected: str, shared: Fabric
) -> None:
    """G2."""
    began_s = time.monotonic()
    assert shared.holder().denied(**fields).code == expected
    assert time.monotonic() - began_s < 2


@pytest.mark.parametrize(
    "path", ["operator/alice", "node/n1", "service/admission", "service/ledger"]
)
def test_only_holders_acquire(path: str, shared: Fabric) -> None:
    assert shared.client(path).denied().code == "ROLE"


def test_nodes_call_nothing_here_and_operators_only_look_and_end(shared: Fabric) -> None:
    lease = shared.holder("looked-at").acquire().lease
    get = admission_pb2.GetLeaseRequest(lease_id=lease.lease_id)
    calls = [
        ("Get", get), ("List", admission_pb2.ListLeasesRequest()), ("Explain", ask()),
        ("Release", of_lease(admission_pb2.ReleaseRequest, lease)),
    ]  # fmt: skip
    node, operator = shared.client("node/n1"), shared.client("operator/alice")
    assert [node.refused(method, request).code for method, request in calls] == ["ROLE"] * 4
    for method, make in (
        ("Attach", admission_pb2.AttachRequest), ("Renew", admission_pb2.RenewRequest),
    ):  # fmt: skip
        assert operator.refused(method, of_lease(make, lease)).code == "ROLE"
    assert operator.get(lease) == lease
    assert operator.release(lease).state == ENDING


def test_what_changes_something_needs_a_deadline(shared: Fabric) -> None:
    with pytest.raises(Incompatible) as refused:
        shared.holder()("Acquire", ask(), timeout_s=None)
    assert refused.value.code == "DEADLINE_REQUIRED"


# the same request again


def test_a_retried_request_has_the_effect_of_one(shared: Fabric) -> None:
    """P4."""
    web = shared.holder(tenant="twice")
    request = ask()
    first, second = web("Acquire", request), web("Acquire", request)
    assert first.lease == second.lease
    assert web.leases() == [first.lease.lease_id]
    renewal = of_lease(admission_pb2.RenewRequest, first.lease, request_id="again")
    assert web("Renew", renewal).lease == web("Renew", renewal).lease


def test_the_same_request_from_two_connections_at_a_time_gives_one_lease(shared: Fabric) -> None:
    """P4."""
    for round_number in range(10):
        request = ask(request_id=f"round-{round_number}")
        clients = [shared.holder(tenant="racing") for _ in range(2)]
        answers = at_once(*(partial(each, "Acquire", request) for each in clients))
        assert codes(answers) == ["", ""], answers
        assert answers[0].lease == answers[1].lease
        for client in clients:
            client.close()
    assert len(shared.holder(tenant="racing").leases()) == 10


def test_a_request_id_of_another_tenant_is_nobodys_business(shared: Fabric) -> None:
    request = ask(request_id="the-same")
    answers = [shared.holder(tenant=tenant)("Acquire", request) for tenant in ("red", "blue")]
    assert answers[0].lease.lease_id != answers[1].lease.lease_id


def test_a_retry_finds_its_lease_also_when_nothing_else_would_fit(shared: Fabric) -> None:
    """P4: the first answer was lost, and its own lease is what stands in the way."""
    node, web = shared.node("full", offers={Kind.MEM: PAGE}), shared.holder(tenant="full")
    request = ask(where={"node": "full"})
    first = web("Acquire", request)
    assert web.denied(where={"node": "full"}).code == "NO_CAPACITY"
    assert web("Acquire", request).lease == first.lease
    rival = shared.holder("rival", tenant="full")
    assert rival.refused("Acquire", request).code == "NO_CAPACITY"
    node.stop()


def test_a_retry_after_the_end_is_told_so_and_gets_no_token(shared: Fabric) -> None:
    web, request = shared.holder(), ask()
    lease = web("Acquire", request).lease
    web.release(lease)
    refusal = web.refused("Acquire", request)
    assert (refusal.code, refusal.lease_id) == ("LEASE_RELEASED", lease.lease_id)
    assert web.refused("Renew", of_lease(admission_pb2.RenewRequest, lease)).code == (
        "LEASE_RELEASED"
    )


def test_no_token_outlives_the_moment_at_which_its_grant_is_burnt(shared: Fabric) -> None:
    web, request = shared.holder(), ask()
    first = web("Acquire", request)
    late = web("Acquire", request)
    for answer in (first, late):
        read = accepted(shared, answer, web)
        assert read.exp_ms <= first.lease.bind_by_ms


# ending


def test_a_release_is_idempotent_and_tells_outsiders_nothing(shared: Fabric) -> None:
    """G8: OK, NOT_FOUND, PERMISSION_DENIED, and to outsiders the same as NOT_FOUND."""
    web = shared.holder()
    lease = web.acquire().lease
    assert [web.release(lease).state, web.release(lease).state] == [ENDING, ENDING]
    unknown = lease_pb2.Lease(lease_id="e" * 32)
    make = admission_pb2.ReleaseRequest
    assert web.refused("Release", of_lease(make, unknown)).code == "NOT_FOUND"
    assert shared.holder("batch").refused("Release", of_lease(make, lease)).code == "DENIED"
    outsider = shared.holder(tenant="rival")
    told = [outsider.refused("Release", of_lease(make, each)) for each in (lease, unknown)]
    assert told[0].fields() | {"lease_id": ""} == told[1].fields() | {"lease_id": ""}
    assert told[0].code == "NOT_FOUND"


@pytest.mark.parametrize("method", ["Attach", "Renew", "Release", "Revoke", "Get"])
@pytest.mark.parametrize("insider", [True, False])
def test_nobody_touches_what_is_anothers(method: str, insider: bool, shared: Fabric) -> None:
    """G8."""
    lease = shared.holder(tenant="touched").acquire().lease
    other = shared.holder("other", tenant="touched" if insider else "rival")
    request: Any = admission_pb2.GetLeaseRequest(lease_id=lease.lease_id)
    if method == "Revoke":
        request = admission_pb2.RevokeRequest(request_id="r", lease_ids=[lease.lease_id])
    elif method != "Get":
        request = of_lease(getattr(admission_pb2, f"{method}Request"), lease)
    expected = "DENIED" if insider and method != "Get" else "NOT_FOUND"
    if method == "Revoke":
        (refusal,) = other(method, request).refusals
        assert (refusal.lease_id, refusal.failure.code) == (lease.lease_id, expected)
    else:
        assert other.refused(method, request).code == expected
    assert shared.holder(tenant="touched").get(lease) == lease


def test_a_holder_revokes_its_own_and_an_operator_any(shared: Fabric) -> None:
    web, operator = shared.holder(tenant="revoked"), shared.client("operator/alice")
    own, other = (web.acquire().lease for _ in range(2))
    words = admission_pb2.RevokeRequest(
        request_id="r1", lease_ids=[own.lease_id], reason="moving house"
    )
    (ended,) = web("Revoke", words).leases
    assert (ended.state, ended.cause, ended.reason) == (ENDING, "revoked", "moving house")
    words.lease_ids[:] = [own.lease_id, other.lease_id]
    assert [each.cause for each in operator("Revoke", words).leases] == ["revoked"] * 2
    refusal = web.refused("Renew", of_lease(admission_pb2.RenewRequest, own))
    assert (refusal.code, refusal.detail) == ("REVOKED", "moving house")


def test_one_revocation_takes_many_leases(shared: Fabric) -> None:
    """With the longest words, in which a message of 256 would be too large for one commit."""
    web = shared.holder(tenant="many")
    leases = [web.acquire().lease for _ in range(200)]
    words = admission_pb2.RevokeRequest(
        request_id="r", reason="\U0001f512" * 256, lease_ids=[lease.lease_id for lease in leases]
    )
    ended = web("Revoke", words).leases
    assert [each.lease_id for each in ended] == list(words.lease_ids)
    assert {each.state for each in ended} == {ENDING}


def test_each_lease_of_a_revocation_has_its_own_outcome(shared: Fabric) -> None:
    web = shared.holder(tenant="own-outcome")
    mine, unknown = web.acquire().lease, "f" * 32
    theirs = shared.holder("other", tenant="own-outcome").acquire().lease
    ids = [unknown, mine.lease_id, theirs.lease_id]
    answer = web("Revoke", admission_pb2.RevokeRequest(request_id="r", lease_ids=ids))
    assert [each.lease_id for each in answer.leases] == [mine.lease_id]
    refused = {each.lease_id: each.failure.code for each in answer.refusals}
    assert refused == {unknown: "NOT_FOUND", theirs.lease_id: "DENIED"}


def test_leases_are_chosen_by_tenant_holder_and_node_and_only_ones_own(shared: Fabric) -> None:
    operator, first = shared.client("operator/alice"), shared.holder("one", tenant="chosen")
    second = shared.holder("two", tenant="chosen")
    one, two = first.acquire().lease, second.acquire().lease

    def revoked(asked: Client, **select: Any) -> list[str]:
        chosen = admission_pb2.LeaseSelector(**select)
        words = admission_pb2.RevokeRequest(request_id="r", select=chosen, grace_ms=30_000)
        return sorted(each.lease_id for each in asked("Revoke", words).leases)

    assert revoked(operator, tenant="nobody") == []
    assert revoked(operator, tenant="chosen", node_id="elsewhere") == []
    assert revoked(operator, tenant="chosen", kind=lease_pb2.KIND_BLOCK) == []
    assert revoked(operator, holder_prefix=one.holder[:-1]) == []
    assert revoked(second, tenant="elsewhere") == []
    assert revoked(second, tenant="chosen") == [two.lease_id]
    assert revoked(operator, holder=one.holder) == [one.lease_id]
    assert revoked(operator, tenant="chosen") == sorted([one.lease_id, two.lease_id])
    assert first.get(one).stage == "revoke_warning"


def test_a_revoked_key_ends_what_it_signed_and_signs_nothing_more(
    fabric: Fabric, node: PaperNode
) -> None:
    operator, web = fabric.client("operator/alice"), fabric.holder()
    before = web.acquire().lease
    (key_id,) = before.key_ids
    until_published(fabric, key_id)
    words = admission_pb2.RevokeRequest(
        request_id="r",
        reason="the key was seen elsewhere",
        select=admission_pb2.LeaseSelector(key_id=key_id),
    )
    assert web.refused("Revoke", words).code == "ROLE"
    assert [each.lease_id for each in operator("Revoke", words).leases] == [before.lease_id]
    after = eventually(lambda: again(web))
    assert len(after.lease.key_ids) == 1
    assert key_id not in after.lease.key_ids
    assert web.refused("Renew", of_lease(admission_pb2.RenewRequest, before)).code == "REVOKED"
    assert web("Renew", of_lease(admission_pb2.RenewRequest, after.lease)).token


def test_a_key_that_was_revoked_while_its_admission_was_away_signs_nothing_more(
    fabric: Fabric, node: PaperNode
) -> None:
    (key_id,) = fabric.holder().acquire().lease.key_ids
    until_published(fabric, key_id)
    fabric.admission.kill()
    order = ledger_pb2.RevokeKey(key_id=key_id, reason="seen elsewhere")
    (outcome,) = fabric.of_ledger("operator/alice").commit(ledger_pb2.Command(revoke_key=order))
    assert not isinstance(outcome, FabricError), outcome
    fabric.admission = fabric.start_admission()
    web = fabric.holder()
    after = eventually(lambda: again(web))
    assert key_id not in after.lease.key_ids


@pytest.mark.parametrize(("recorded", "signs"), [("its", True), ("another's", False)])
def test_admission_signs_with_the_key_that_is_on_record_or_asks_again(
    recorded: str, signs: bool, shared: Fabric, tmp_path: Path
) -> None:
    lease = convert.lease_from_proto(shared.holder(tenant="minted").acquire().lease)
    minter = Minter("spiffe://f/service/admission", SigningKey.make(tmp_path / "key"))
    lease = replace(lease, key_ids=("0" * 16, minter.key_id if recorded == "its" else "1" * 16))
    if signs:
        assert minter.mint(lease, lease.granted_at_ms)[0]
        return
    with pytest.raises(FabricError) as refused:
        minter.mint(lease, lease.granted_at_ms)
    assert refused.value.code == "RETRY_LATER"


def until_published(fabric: Fabric, key_id: str) -> None:
    snapshot = partial(fabric.of_ledger(), "Snapshot", ledger_pb2.SnapshotRequest())
    eventually(lambda: key_id in {key.key_id for key in snapshot().keys})


def again(web: Client) -> Any:
    """A lease, once another key signs its token."""
    try:
        return web.acquire()
    except FabricError as refusal:
        assert refusal.code in ("RETRY_LATER", "NODE_NOT_READY", "UNREACHABLE")
        return None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lease_ids": []}, "INVALID"), ({"lease_ids": ["a" * 32] * 1025}, "RANGE"),
        ({"select": {"tenant": "t"}}, "INVALID"),
        ({"lease_ids": [], "select": {}}, "MISSING_FIELD"),
        ({"lease_ids": [], "select": {"holder": "h"}}, "IDENTIFIER"),
        ({"lease_ids": [], "select": {"key_id": "0" * 16}}, "NOT_FOUND"),
        ({"reason": "x" * 257}, "RANGE"), ({"reason": "a\nb"}, "RANGE"),
        ({"grace_ms": 600_001}, "RANGE"), ({"request_id": ""}, "IDENTIFIER"),
    ],
)  # fmt: skip
def test_a_revocation_that_is_not_in_order_is_refused(
    fields: dict[str, Any], expected: str, shared: Fabric
) -> None:
    values = {"request_id": "r", "lease_ids": ["a" * 32]} | fields
    request = admission_pb2.RevokeRequest(**values)
    assert shared.client("operator/alice").refused("Revoke", request).code == expected


def test_one_kind_does_not_stand_for_another(shared: Fabric) -> None:
    web = shared.holder(tenant="kinds")
    made = {web.acquire(kind=kind, amount=PAGE).lease.kind for kind in (MEM, BLOCK)}
    assert made == {MEM, BLOCK}
