"""What a node may claim when it registers, and what would once have stopped the ledger."""

import dataclasses

import pytest

from grafos_core import commands as c
from grafos_core.books import CapacityBook
from grafos_core.failure import FabricError
from grafos_core.lease import EndCause, Kind, LeaseId, NodeId, TenantId
from grafos_core.lessor import Lessor
from grafos_core.receipt import Assurance, Outcome, TeardownReceipt
from tests.core import lessor_script


def test_extents_can_shrink_to_the_last_block_in_use_and_no_further() -> None:
    book = CapacityBook(100, extents=True)
    book.take(0, 10)
    book.take(10, 10)
    assert book.least_total() == 20
    assert not book.resize(19)
    assert book.resize(20)
    book.check()


def test_amounts_can_shrink_to_what_is_in_use() -> None:
    book = CapacityBook(100, extents=False)
    book.take(0, 30)
    assert book.least_total() == 30


def registration(node_id: str) -> c.Register:
    return lessor_script.register(node_id, {"mem": 4096})


def test_a_node_cannot_register_with_the_key_of_another() -> None:
    lessor = Lessor()
    victim = registration("n1")
    assert lessor.handle(victim, 1000).failure is None
    stolen = dataclasses.replace(victim.receipt_key, owner="spiffe://grafos.local/node/n2")
    thief = dataclasses.replace(victim, node_id=NodeId("n2"), receipt_key=stolen)
    refused = lessor.handle(thief, 1000).failure
    assert isinstance(refused, FabricError)
    assert refused.code == "DENIED"
    assert lessor.state.keys[stolen.key_id] == victim.receipt_key


@pytest.mark.parametrize("field", ["owner", "public_key", "use"])
def test_a_published_key_keeps_its_owner_its_bytes_and_its_use(field: str) -> None:
    lessor = Lessor()
    key = c.PublishedKey("0" * 16, "spiffe://grafos.local/service/admission", "lease", b"k" * 32)
    assert lessor.handle(c.PublishKey(key), 1).failure is None
    changed = {"owner": "spiffe://grafos.local/service/x", "public_key": b"j" * 32, "use": "clear"}
    other = dataclasses.replace(key, **{field: changed[field]})  # type: ignore[arg-type]
    refused = lessor.handle(c.PublishKey(other), 2).failure
    assert refused is not None
    assert refused.code == "DENIED"


def test_what_was_forgotten_with_its_node_is_beyond_every_command() -> None:
    lessor = Lessor()
    node = dataclasses.replace(registration("n1"), live=())
    assert lessor.handle(node, 1000).failure is None
    lease = lessor.handle(asked(node), 1000).lease
    assert lease is not None
    failed = TeardownReceipt(
        lease.lease_id, "n1", node.incarnation, 1, Kind.MEM, lease.epoch, 4096, 0,
        EndCause.RELEASE, Outcome.FENCED, Assurance.NONE,
    )  # fmt: skip
    assert lessor.handle(c.Credit(failed, NodeId("n1")), 1001).failure is None
    assert (
        lessor.handle(c.ForgetNode(NodeId("n1"), True, "burnt down", "op"), 90_000).failure is None
    )
    later: list[tuple[c.Command, str]] = [
        (c.ClearFence("q", lease.lease_id, "why", False, "op", "0" * 32), "CLEAR"),
        (c.Renew("r", lease.lease_id, None, lease.tenant, lease.holder), "QUARANTINED"),
        (c.Credit(failed, NodeId("n1")), ""),
        (c.Burn(lease.lease_id, ""), ""),
        (c.End("e", lease.lease_id, EndCause.REVOKED, "op"), ""),
        (c.ReportBound(NodeId("n1"), node.incarnation, lease.lease_id, lease.epoch, 1), ""),
    ]
    for command, code in later:
        step = lessor.handle(command, 90_001)
        assert (step.failure.code if step.failure else "") == code, command
        assert step.events == ()
    lessor.check()


def asked(node: c.Register) -> c.Grant:
    return c.Grant(
        "ask-1", LeaseId("a" * 32), TenantId("acme"), "spiffe://grafos.local/tenant/acme/holder/x",
        "h" * 43, Kind.MEM, node.node_id, node.incarnation, 4096, 60_000, None, 30_000,
    )  # fmt: skip
