"""The ledger dies or hangs at every bad moment: no token without a grant, no call that hangs."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from grafos_core.failure import Degraded, Disconnected, FabricError
from grafos_proto.v1 import admission_pb2, ledger_pb2
from tests.services.admission.world import (
    Client,
    Fabric,
    PaperNode,
    ask,
    at_once,
    eventually,
    of_lease,
    readiness,
)


def is_open(fabric: Fabric, gate: str = "ledger") -> bool:
    return readiness(fabric.admission)[gate]


def known(fabric: Fabric, request_id: str) -> list[str]:
    """The leases that the ledger was ever asked for by this request."""
    listing = fabric.of_ledger()("List", admission_pb2.ListLeasesRequest())
    return [lease.lease_id for lease in listing.leases if lease.request_id == request_id]


def restart_with(fabric: Fabric, fault: str) -> None:
    """A ledger that dies at its next grant, and is known to admission as ready.

    It knows admission's key before, so that nothing else is left to commit.
    """
    eventually(lambda: is_open(fabric, "key"))
    fabric.ledger.kill()
    eventually(lambda: not is_open(fabric))
    fabric.start_ledger(fault)
    eventually(lambda: is_open(fabric))
    fabric.until_ready()


@pytest.mark.parametrize(
    ("point", "is_durable"), [("ledger.commit", False), ("ledger.committed", True)]
)
def test_no_token_is_given_for_a_grant_that_is_not_durable(
    point: str, is_durable: bool, fabric: Fabric, node: PaperNode
) -> None:
    """S4, P4: killed right before and right after the transaction ends."""
    web, request = fabric.holder(), ask()
    restart_with(fabric, f"{point}:kill:2")  # the first is its own start
    began_s = time.monotonic()
    refusal = web.refused("Acquire", request, timeout_s=5)
    assert isinstance(refusal, Disconnected)
    assert time.monotonic() - began_s < 5
    assert fabric.ledger.process.wait(5) == -signal.SIGKILL
    fabric.start_ledger()
    assert len(known(fabric, request.request_id)) == is_durable
    fabric.until_ready()
    answer = web("Acquire", request)
    assert known(fabric, request.request_id) == [answer.lease.lease_id]
    assert answer.token


@pytest.mark.parametrize("point", ["ledger.commit", "ledger.committed"])
def test_a_ledger_that_comes_back_in_time_is_asked_again_and_grants_once(
    point: str, fabric: Fabric, node: PaperNode
) -> None:
    """S4, P4: the holder does not notice; what it is given, the restarted ledger knows."""
    web, request = fabric.holder(), ask(wait_ms=15_000, has_wait=True)
    restart_with(fabric, f"{point}:kill:2")
    dying = fabric.ledger.process

    def revive() -> None:
        dying.wait(10)
        fabric.start_ledger()

    reviving = threading.Thread(target=revive)
    reviving.start()
    try:
        answer = web("Acquire", request, 20)
    except Disconnected:  # it came back later than the retries of one commit go on
        reviving.join(20)
        fabric.until_ready()
        answer = web("Acquire", request)
    reviving.join(20)
    assert known(fabric, request.request_id) == [answer.lease.lease_id]
    assert web.get(answer.lease) == answer.lease


@pytest.mark.parametrize(("point", "expected"), [("admission.commit", 0), ("admission.mint", 1)])
def test_an_admission_that_dies_leaves_at_most_a_grant_that_a_retry_finds(
    point: str, expected: int, fabric: Fabric, node: PaperNode
) -> None:
    """S4. Its own key is the first thing that it commits."""
    passage = 2 if point == "admission.commit" else 1
    frail = fabric.start_admission("frail", f"{point}:kill:{passage}")
    web, request = fabric.holder(admission=frail), ask()
    eventually(lambda: readiness(frail)["key"])
    eventually(lambda: web.explain().admissible)
    assert isinstance(web.refused("Acquire", request, timeout_s=3), Disconnected)
    assert frail.process.wait(5) == -signal.SIGKILL
    found = known(fabric, request.request_id)
    assert len(found) == expected
    answer = fabric.holder()("Acquire", request)
    assert answer.lease.lease_id in (found or known(fabric, request.request_id))


def calls(web: Client, lease: Any) -> list[tuple[str, Any]]:
    return [
        ("Acquire", ask()),
        ("Renew", of_lease(admission_pb2.RenewRequest, lease)),
        ("Attach", of_lease(admission_pb2.AttachRequest, lease)),
        ("Release", of_lease(admission_pb2.ReleaseRequest, lease)),
        ("Revoke", admission_pb2.RevokeRequest(request_id="r", lease_ids=[lease.lease_id])),
        ("Get", admission_pb2.GetLeaseRequest(lease_id=lease.lease_id)),
        ("List", admission_pb2.ListLeasesRequest()),
        ("Explain", ask()),
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_while_the_ledger_is_away_every_call_ends_typed_and_in_time(
    how: signal.Signals, fabric: Fabric, node: PaperNode
) -> None:
    """And admission says so at its readiness, and recovers by itself."""
    web = fabric.holder()
    lease = web.acquire().lease
    eventually(lambda: is_open(fabric))
    fabric.ledger.process.send_signal(how)

    def timed(method: str, request: Any) -> tuple[FabricError, float]:
        began_s = time.monotonic()
        return web.refused(method, request, timeout_s=2.0), time.monotonic() - began_s

    for _ in range(2):  # at first with fresh evidence, then without
        asks = [lambda a=a: timed(*a) for a in calls(web, lease)]
        for refusal, took_s in at_once(*asks):
            assert isinstance(refusal, Disconnected | Degraded), refusal
            assert took_s < 2.6
    eventually(lambda: not is_open(fabric))
    assert fabric.admission.process.poll() is None
    if how is signal.SIGSTOP:  # silent for 5 s: no evidence that admission has can be fresh
        assert web.denied(timeout_s=5).code == "NODE_NOT_READY"
    if how is signal.SIGKILL:
        fabric.ledger.process.wait(5)
        fabric.start_ledger()
    else:
        fabric.ledger.process.send_signal(signal.SIGCONT)
    eventually(lambda: is_open(fabric), 20)
    fabric.until_ready()
    assert fabric.holder().acquire().token


def test_refusals_while_the_ledger_is_away_are_on_the_record_when_it_is_back(
    fabric: Fabric, node: PaperNode
) -> None:
    web = fabric.holder()
    fabric.ledger.kill()
    names = [f"while-away-{n}" for n in range(5)]
    for name in names:
        web.denied(request_id=name, where={"node": "nowhere"}, timeout_s=1)
    threading.Event().wait(4)  # beyond the retries of whoever wanted to hand them in
    fabric.start_ledger()

    def recorded() -> bool:
        text = b"\n".join(fabric.records("lease.denied"))
        return all(name.encode() in text for name in names)

    eventually(recorded, 20)


def test_a_ledger_without_our_key_is_given_it_again(fabric: Fabric, node: PaperNode) -> None:
    """As after a restored backup: nodes would refuse every token."""
    eventually(lambda: is_open(fabric, "key"))
    fabric.ledger.stop()
    for file in fabric.folder.glob("ledger/events/*"):
        file.unlink()
    fabric.start_ledger()

    def published() -> bool:
        keys = fabric.of_ledger()("Snapshot", ledger_pb2.SnapshotRequest()).keys
        return any(key.use == "lease" for key in keys)

    eventually(published, 20)


def test_a_fault_on_the_way_to_the_ledger_hurts_one_message_and_not_the_next(
    fabric: Fabric, node: PaperNode
) -> None:
    frail = fabric.start_admission("frail", "admission.commit:EIO:2")
    web = fabric.holder(admission=frail)
    eventually(lambda: readiness(frail)["key"])
    eventually(lambda: web.explain().admissible)
    assert web.denied().code == "INTERNAL"
    assert web.acquire(timeout_s=3).token
