"""Bundles and batches over the wire: one commit, each answer its own; what a dead ledger does."""

from __future__ import annotations

import secrets
import signal
from typing import Any

import pytest

from grafos_core import bundle
from grafos_core.failure import Disconnected, FabricError
from grafos_core.lease import Kind
from grafos_proto.v1 import admission_pb2
from grafos_proto.wire.failures import failure_of
from tests.services.admission.test_durable import restart_with
from tests.services.admission.world import (
    ACTIVE,
    BLOCK,
    MEM,
    PAGE,
    PENDING,
    Client,
    Fabric,
    PaperNode,
    ask,
    metric,
    of_lease,
)

COMMITS = 'grafos_call_seconds_count{method="/grafos.v1.LedgerService/Commit"}'


def member(**fields: Any) -> admission_pb2.AcquireRequest:
    return admission_pb2.AcquireRequest(**({"kind": MEM, "amount": PAGE} | fields))


def whole(*members: admission_pb2.AcquireRequest, **fields: Any) -> Any:
    fields = {"request_id": secrets.token_hex(8)} | fields
    return admission_pb2.AcquireBundleRequest(members=members, **fields)


def live(client: Client) -> int:
    listing = client("List", admission_pb2.ListLeasesRequest())
    return sum(1 for lease in listing.leases if lease.state in (PENDING, ACTIVE))


class TestBundles:
    def test_members_go_to_the_nodes_they_ask_for_and_each_has_a_token(
        self, fabric: Fabric, node: PaperNode
    ) -> None:
        fabric.node("n2", offers={Kind.MEM: 64 * PAGE, Kind.BLOCK: 64})
        web = fabric.holder()
        request = whole(
            member(where={"node": "n1"}), member(kind=BLOCK, amount=3, where={"node": "n2"})
        )
        answer = web("AcquireBundle", request)
        assert [x.lease.node_id for x in answer.members] == ["n1", "n2"]
        assert all(x.token and x.token_expires_in_ms for x in answer.members)
        again = web("AcquireBundle", request)
        assert [x.lease for x in again.members] == [x.lease for x in answer.members]
        other = whole(member(), request_id=request.request_id)
        assert web.refused("AcquireBundle", other).code == "PRECONDITION"
        assert live(web) == 2

    def test_nothing_is_granted_where_one_member_cannot_be(self, shared: Fabric) -> None:
        web = shared.holder(tenant="whole")
        refusal = web.refused("AcquireBundle", whole(member(), member(amount=1 << 60)))
        assert (refusal.code, bundle.member_of(refusal)) == ("CAPACITY", 1)
        assert "in all" in refusal.detail
        shared.set_quota("whole", count=2)
        refusal = web.refused("AcquireBundle", whole(member(), member(), member()))
        assert (refusal.code, bundle.member_of(refusal)) == ("QUOTA", 2)
        assert live(web) == 0

    @pytest.mark.parametrize(
        ("request_", "code", "index"),
        [
            (whole(), "EMPTY", None),
            (whole(*[member()] * 17), "RANGE", None),
            (whole(member(), request_id="x" * 61), "IDENTIFIER", None),
            (whole(member(), wait_ms=10**6, has_wait=True), "RANGE", None),
            (whole(member(), member(kind=77)), "INVALID", 1),
            (whole(member(request_id="mine")), "INVALID", 0),
            (whole(member(), member(wait_ms=5)), "INVALID", 1),
            (whole(member(amount=0)), "RANGE", 0),
        ],
    )
    def test_bad_bundles_are_refused_and_the_member_named(
        self, request_: Any, code: str, index: int | None, shared: Fabric
    ) -> None:
        refusal = shared.holder(tenant="bad").refused("AcquireBundle", request_)
        assert (refusal.code, bundle.member_of(refusal)) == (code, index)

    @pytest.mark.parametrize(("point", "count"), [("ledger.commit", 0), ("ledger.committed", 3)])
    def test_a_ledger_that_dies_has_granted_all_or_none(
        self, point: str, count: int, fabric: Fabric, node: PaperNode
    ) -> None:
        web, request = fabric.holder(), whole(member(), member(), member())
        restart_with(fabric, f"{point}:kill:2")
        assert isinstance(web.refused("AcquireBundle", request, timeout_s=5), Disconnected)
        assert fabric.ledger.process.wait(5) == -signal.SIGKILL
        fabric.start_ledger()
        fabric.until_ready()
        assert live(web) == count
        answer = web("AcquireBundle", request)
        assert len(answer.members) == live(web) == 3


def outcomes(answer: Any) -> list[str]:
    """What became of each: "" or the code."""
    return [each.failure.code if each.HasField("failure") else "" for each in answer.answers]


class TestBatches:
    def test_a_batch_is_one_commit(self, fabric: Fabric, node: PaperNode) -> None:
        """Of 48 grants; beside it the ledger may be handed a key, or a refusal."""
        before = metric(fabric.ledger, COMMITS)
        asks = [ask() for _ in range(48)]
        fabric.holder()("AcquireMany", admission_pb2.AcquireManyRequest(requests=asks))
        assert metric(fabric.ledger, COMMITS) - before <= 4

    def test_each_request_succeeds_or_fails_alone(self, fabric: Fabric, node: PaperNode) -> None:
        web = fabric.holder()
        asks = [ask(), ask(amount=0), ask(where={"node": "n9"}), ask(), ask(kind=77)]
        answer = web("AcquireMany", admission_pb2.AcquireManyRequest(requests=asks))
        assert outcomes(answer) == ["", "RANGE", "NO_MATCH", "", "INVALID"]
        leases = [each.response.lease for each in answer.answers if each.HasField("response")]
        assert [x.request_id for x in leases] == [asks[0].request_id, asks[3].request_id]
        again = web("AcquireMany", admission_pb2.AcquireManyRequest(requests=asks))
        assert [x.response.lease for x in again.answers] == [
            x.response.lease for x in answer.answers
        ]

        renewals = [
            of_lease(admission_pb2.RenewRequest, leases[0], ttl_ms=90_000),
            admission_pb2.RenewRequest(request_id="r", lease_id="0" * 32),
            admission_pb2.RenewRequest(request_id="r", lease_id="nonsense"),
        ]
        answer = web("RenewMany", admission_pb2.RenewManyRequest(requests=renewals))
        assert outcomes(answer) == ["", "NOT_FOUND", "IDENTIFIER"]
        assert answer.answers[0].response.lease.ttl_ms == 90_000
        assert answer.answers[0].response.token

        ends = [
            of_lease(admission_pb2.ReleaseRequest, leases[1]),
            admission_pb2.ReleaseRequest(request_id="r", lease_id="0" * 32),
            of_lease(admission_pb2.ReleaseRequest, leases[0]),
        ]
        answer = web("ReleaseMany", admission_pb2.ReleaseManyRequest(requests=ends))
        assert outcomes(answer) == ["", "NOT_FOUND", ""]
        assert live(web) == 0

    def test_one_that_finds_a_node_full_goes_to_the_next(
        self, fabric: Fabric, node: PaperNode
    ) -> None:
        """Admission sees both nodes empty, and the ledger knows better from the first grant on."""
        fabric.node("n2")
        web, most = fabric.holder(), node.offers[Kind.MEM]
        asks = [ask(amount=most) for _ in range(3)]
        answer = web("AcquireMany", admission_pb2.AcquireManyRequest(requests=asks))
        assert sorted(outcomes(answer)) == ["", "", "NO_CAPACITY"]
        nodes = {x.response.lease.node_id for x in answer.answers if x.HasField("response")}
        assert nodes == {"n1", "n2"}

    @pytest.mark.parametrize("method", ["Acquire", "Renew", "Release"])
    def test_an_empty_batch_and_one_too_large_are_refused(
        self, method: str, shared: Fabric
    ) -> None:
        web, one = shared.holder(), getattr(admission_pb2, f"{method}Request")()
        make = getattr(admission_pb2, f"{method}ManyRequest")
        assert web.refused(f"{method}Many", make()).code in ("EMPTY", "MISSING_FIELD")
        assert web.refused(f"{method}Many", make(requests=[one] * 65)).code == "RANGE"

    def test_another_tenants_lease_is_neither_renewed_nor_released(self, shared: Fabric) -> None:
        lease = shared.holder(tenant="mine").acquire().lease
        theirs = shared.holder(tenant="theirs")
        renew = admission_pb2.RenewManyRequest(
            requests=[of_lease(admission_pb2.RenewRequest, lease)]
        )
        end = admission_pb2.ReleaseManyRequest(
            requests=[of_lease(admission_pb2.ReleaseRequest, lease)]
        )
        for method, request in (("RenewMany", renew), ("ReleaseMany", end)):
            (answer,) = theirs(method, request).answers
            refusal: FabricError = failure_of(answer.failure)
            assert refusal.code == "NOT_FOUND"
        assert shared.holder(tenant="mine").release(lease).lease_id == lease.lease_id
