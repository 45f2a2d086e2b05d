"""Taking leases back: the warning, the grace, the report, the end; and holders who are lost."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from grafos import (
    Denied,
    Fabric,
    Incompatible,
    LeaseStatus,
    MemBuilder,
    MemLease,
    Notice,
    Revocation,
    Revoked,
)
from grafos.testing import VirtualFabric
from grafos_proto.wire import certificates
from grafos_proto.wire.identity import request_identity
from tests.conformance.conftest import Running

LetPass = Callable[[float], None]
Until = Callable[[Callable[[], bool]], None]


def page() -> MemBuilder:
    return MemBuilder().min_bytes(4096).lease_secs(30)


@pytest.fixture
def until(let_pass: LetPass) -> Until:
    """Lets time pass until something is so."""

    def wait(what: Callable[[], bool]) -> None:
        for _ in range(100):
            if what():
                return
            let_pass(0.05)
        pytest.fail("it did not come to that")

    return wait


def hears(running: Running, heard: list[Notice]) -> bool:
    running.connection.poll()
    return bool(heard)


def stage(running: Running, lease: MemLease) -> str:
    return running.connection.describe(lease.lease_id).stage.value


def test_who_reports_within_the_grace_ends_it_and_has_the_receipt_to_show(
    running: Running, until: Until
) -> None:
    heard: list[Notice] = []
    lease = page().acquire()
    lease.on_notice(heard.append)
    running.connection.revoke(lease.lease_id, reason="drill", grace=20)
    until(lambda: hears(running, heard))
    warning = heard[0]
    assert (warning.kind, warning.reason) == ("revoke_warning", "drill")
    assert warning.grace_ms == 20_000
    until(lambda: stage(running, lease) == "grace_running")
    lease.mem().write(0, b"saved")
    receipt = lease.checkpoint_done()
    assert (receipt.outcome, receipt.cause) == ("torndown", "revoked")
    assert receipt.revoke_stage == "checkpoint_reported"
    assert receipt.verify(running.connection.keys()).credited
    assert (lease.status, lease.release()) == (LeaseStatus.REVOKED, receipt)
    with pytest.raises(Revoked):
        lease.mem().read(0, 1)
    assert stage(running, lease) == "torndown"


def test_who_is_silent_is_torn_down_by_force(
    running: Running, let_pass: LetPass, until: Until
) -> None:
    lease = page().acquire()
    running.connection.revoke(lease.lease_id, grace=0.3)
    until(lambda: stage(running, lease) != "revoke_warning")
    lease.mem().read(0, 1)
    let_pass(0.5)
    with pytest.raises(Revoked):
        lease.mem().write(0, b"too late")
    with pytest.raises(Revoked):
        lease.checkpoint_done()
    assert lease.release().revoke_stage == "forced_teardown"


def test_nobody_reports_what_nobody_revokes(running: Running) -> None:
    with page().acquire() as lease:
        with pytest.raises(Incompatible) as refused:
            lease.checkpoint_done()
        assert refused.value.code == "PRECONDITION"
        lease.mem().write(0, b"goes on")


def test_a_second_order_shortens_the_grace_and_never_lengthens_it(
    running: Running, let_pass: LetPass, until: Until
) -> None:
    lease = page().acquire()
    for grace in (20, 25, 1):
        running.connection.revoke(lease.lease_id, grace=grace)
    until(lambda: stage(running, lease) == "grace_running")
    lease.mem().read(0, 1)
    let_pass(1.5)
    with pytest.raises(Revoked):
        lease.mem().read(0, 1)


def test_a_revoked_lease_is_not_renewed(running: Running) -> None:
    lease = page().acquire()
    running.connection.revoke(lease.lease_id, grace=20)
    with pytest.raises(Revoked):
        lease.renew()
    assert lease.valid
    lease.release()


def test_leases_are_chosen_by_holder_and_node_and_each_has_its_outcome(
    running: Running, until: Until
) -> None:
    leases = [page().acquire() for _ in range(3)]
    connection = running.connection
    assert connection.revoke(holder=connection.identity, node="n9") == []
    unknown = "f" * 32
    first, second = connection.revoke(leases[0].lease_id, unknown)
    assert (first.lease_id, first.failure) == (leases[0].lease_id, None)
    assert first.lease is not None
    assert second.failure is not None
    assert (second.lease_id, second.lease, second.failure.code) == (unknown, None, "NOT_FOUND")
    assert connection.revoke(holder=connection.identity, kind="block") == []
    assert connection.revoke(holder_prefix=connection.identity[:-1]) == []
    user = connection.identity.rpartition("/")[0]
    taken = connection.revoke(holder_prefix=user, kind="mem", node="n1")
    assert {each.lease_id for each in taken} >= {each.lease_id for each in leases[1:]}
    for each in leases:
        until(lambda lease=each: not lease.valid)  # type: ignore[misc]
        with pytest.raises(Revoked):
            each.mem().read(0, 1)


@pytest.mark.parametrize("wrong", [{}, {"kind": "tape"}])
def test_a_revocation_says_which_leases(running: Running, wrong: dict[str, str]) -> None:
    with pytest.raises(Incompatible):
        by_operator(running, **wrong)
    with pytest.raises(Incompatible):
        running.connection.revoke("f" * 32, kind="mem")
    with pytest.raises(Incompatible):
        running.connection.revoke()


def by_operator(running: Running, **chosen: str) -> list[Revocation]:
    if isinstance(running, VirtualFabric):
        return running.revoke(None, "drill", 0, **chosen)
    where = running.description
    now_ms = time.time_ns() // 1_000_000
    key = certificates.new_tls_key()
    shown = request_identity(where.identity_socket, key, "operator", now_ms=now_ms)
    operator = Fabric(where.admission_control, lambda: shown)
    try:
        return operator.revoke(reason="drill", **chosen)  # type: ignore[arg-type]
    finally:
        operator.close()


def test_a_signing_key_is_revoked_with_what_it_signed_and_another_signs_from_then_on(
    running: Running,
) -> None:
    before = page().acquire()
    before.renew()
    connection = running.connection
    (key_id,) = connection.describe(before.lease_id).key_ids
    with pytest.raises(Denied) as refused:
        connection.revoke(key=key_id)
    assert refused.value.code == "ROLE"
    with pytest.raises(Denied) as refused:
        by_operator(running, key="0" * 16)
    assert refused.value.code == "NOT_FOUND"
    assert [each.lease_id for each in by_operator(running, key=key_id)] == [before.lease_id]
    assert by_operator(running, key=key_id) == []
    with pytest.raises(Revoked):
        before.renew()
    with pytest.raises(Revoked):
        before.mem().read(0, 1)
    with page().acquire() as after:
        after.renew()
        (other,) = connection.describe(after.lease_id).key_ids
        assert other != key_id
        assert by_operator(running, key=key_id) == [], "what another key signed is not touched"
        after.mem().write(0, b"under the new key")
    assert after.release().verify(connection.keys()).credited


@pytest.mark.parametrize("bad", ["now", -1, 0, 0.9, 601, True])
def test_on_disconnect_takes_two_words_and_seconds(bad: object) -> None:
    with pytest.raises(Incompatible):
        page().on_disconnect(bad)  # type: ignore[arg-type]


def test_what_follows_a_lost_connection_is_fixed_with_the_grant(running: Running) -> None:
    policies = {}
    for what in ("release", "keep", 2.5):
        with page().on_disconnect(what).acquire() as lease:
            policy = running.connection.describe(lease.lease_id).policy
            policies[what] = (policy.on_disconnect.value, policy.reconnect_ms)
    assert policies == {"release": ("release", 5000), "keep": ("keep", 5000), 2.5: ("grace", 2500)}
