"""What a node may claim when it registers, and what would once have stopped the ledger."""

import dataclasses

import pytest

from grafos_core import commands as c
from grafos_core.books import CapacityBook
from grafos_core.failure import FabricError
from grafos_core.lease import NodeId
from grafos_core.lessor import Lessor
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
