"""A bundle whose members lie on two nodes: what becomes of it when one of them will not."""

from __future__ import annotations

from collections.abc import Generator

import pytest

import grafos
from grafos import BlockBuilder, Bundle, FabricError, Fenced, MemBuilder
from grafos.testing import VirtualFabric, assert_no_leaks, fabric
from grafos_core import bundle


@pytest.fixture
def virtual() -> Generator[VirtualFabric, None, None]:
    with fabric(nodes=2, memory="1MiB", blocks="1MiB") as made:
        yield made
        made.check()
        assert_no_leaks(made)


def page(node: str) -> MemBuilder:
    return MemBuilder().min_bytes(4096).where(node=node)


def blocks(node: str) -> BlockBuilder:
    return BlockBuilder().min_blocks(2).where(node=node)


def is_free(virtual: VirtualFabric) -> bool:
    virtual.advance(1)
    books = [virtual.capacity(node, kind) for node in virtual.nodes for kind in ("mem", "block")]
    return all(book.free == book.total for book in books)


def test_members_lie_where_they_asked_to(virtual: VirtualFabric) -> None:
    with Bundle(page("n1"), blocks("n2"), page("n2")).acquire() as leases:
        assert [(each.node_id, each.kind) for each in leases] == [
            ("n1", "mem"), ("n2", "block"), ("n2", "mem"),
        ]  # fmt: skip
        leases[0].mem().write(0, b"one")
        leases[2].mem().write(0, b"two")
    assert is_free(virtual)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_where_one_is_not_bound_all_are_given_back(index: int, virtual: VirtualFabric) -> None:
    """Rolled back at each step: nothing bound yet, one bound, all but one."""
    builders = [page("n1"), page("n1"), page("n1")]
    builders[index] = page("n2")
    with virtual.fail_bind("n2"):
        with pytest.raises(FabricError) as raised:
            Bundle(*builders).acquire()
    assert bundle.member_of(raised.value) == index
    assert virtual.leases() == []
    assert is_free(virtual)


def test_a_node_that_cannot_be_reached_costs_the_bundle_and_no_capacity(
    virtual: VirtualFabric,
) -> None:
    with virtual.partition("holder", "n2"):
        with pytest.raises(grafos.Disconnected) as raised:
            Bundle(page("n1"), blocks("n2")).acquire()
        assert bundle.member_of(raised.value) == 1
    virtual.advance(60)
    assert is_free(virtual)


def test_a_rollback_that_fails_fences_its_own_slice_alone(virtual: VirtualFabric) -> None:
    with virtual.fail_bind("n2"), virtual.fail_teardown("n1"):
        with pytest.raises(FabricError) as raised:
            Bundle(page("n1"), page("n2"), page("n2")).acquire()
    assert bundle.member_of(raised.value) == 1
    (note,) = raised.value.__notes__
    assert "could not be given back" in note
    (fence,) = virtual.fences()
    assert fence.amount == 4096
    assert virtual.leases(state="active") == []
    virtual.clear_fence(fence.lease_id, "looked at it")


def test_a_release_that_fails_names_its_member_and_gives_the_others_back(
    virtual: VirtualFabric,
) -> None:
    leases = Bundle(page("n1"), page("n2"), blocks("n1")).acquire()
    with virtual.fail_teardown("n2"):
        with pytest.raises(Fenced) as raised:
            leases.release()
    assert bundle.member_of(raised.value) == 1
    assert leases[0].release().credited
    assert leases[2].release().credited
    virtual.clear_fence(virtual.fences()[0].lease_id, "looked at it")


def test_a_lost_answer_is_asked_for_again_and_granted_once(virtual: VirtualFabric) -> None:
    with virtual.lose_answers("AcquireBundle"):
        with Bundle(page("n1"), page("n2")).acquire():
            assert len(virtual.leases()) == 2


def test_members_of_two_fabrics_are_no_bundle(virtual: VirtualFabric) -> None:
    other = page("n1").fabric(virtual.connect())
    with pytest.raises(grafos.Incompatible) as raised:
        Bundle(page("n1"), other).fabric(virtual.connection).acquire()
    assert raised.value.code == "INVALID"


def test_a_kept_member_outlives_the_block(virtual: VirtualFabric) -> None:
    with Bundle(page("n1"), page("n2").keep()).acquire() as leases:
        leases[1].detach()
    assert [each.lease_id for each in virtual.leases()] == [leases[1].lease_id]
    leases[1].release()
