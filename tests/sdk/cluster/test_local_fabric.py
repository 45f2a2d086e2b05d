"""Fabrics of a program's own: side by side, one inside the other, with the real services."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grafos import Fenced, MemBuilder, local_fabric
from grafos._local import LocalFabric
from grafos_core import failure
from tests.sdk.cluster.stand import eventually

MIB = 1 << 20


@pytest.fixture(scope="module")
def fabric() -> Iterator[LocalFabric]:
    with local_fabric(2, memory_bytes=32 * MIB, block_bytes=16 * MIB) as started:
        yield started


def test_builders_ask_the_innermost_fabric_or_the_one_they_are_told(fabric: LocalFabric) -> None:
    with local_fabric(memory_bytes=16 * MIB, block_bytes=4 * MIB, tcp=True) as inner:
        with MemBuilder().min_bytes(4096).acquire() as lease:
            lease.mem().write(0, b"inside")
            assert [each.lease_id for each in inner.connection.leases()] == [lease.lease_id]
        with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as lease:
            assert [each.lease_id for each in fabric.connection.leases()] == [lease.lease_id]
            assert not list(inner.connection.leases())
    with MemBuilder().min_bytes(4096).acquire() as lease:
        assert lease.mem().read(0, 1) == b"\0"


def test_every_process_of_an_agent_has_a_name(fabric: LocalFabric) -> None:
    assert {name for name in fabric.pids() if "/" in name} == {
        "node-n1/front", "node-n1/warden", "node-n2/front", "node-n2/warden",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["node-n1/front", "node-n1/warden"])
def test_an_agent_replaces_its_own_processes_when_they_die(fabric: LocalFabric, name: str) -> None:
    fabric.wait_replaced(name, fabric.kill(name))
    fabric.wait_ready()
    with MemBuilder().min_bytes(4096).where(node="n1").wait(10).acquire() as lease:
        lease.mem().write(0, b"on")


def test_a_killed_agent_comes_back_as_the_same_node_and_its_leases_are_over(
    fabric: LocalFabric,
) -> None:
    lease = MemBuilder().min_bytes(MIB).where(node="n2").acquire()
    fabric.kill("node-n2")
    with pytest.raises(Fenced):
        eventually(lambda: lease.mem().read(0, 1) and False)
    fabric.wait_ready()
    again = MemBuilder().min_bytes(MIB).where(node="n2").wait(10).acquire()
    assert again.epoch > lease.epoch
    again.release()


@pytest.mark.parametrize("name", ["ledger", "admission", "audit"])
def test_a_killed_service_comes_back_and_a_lease_outlives_that(
    fabric: LocalFabric, name: str
) -> None:
    with MemBuilder().min_bytes(4096).where(node="n1").acquire() as lease:
        lease.mem().write(0, b"still here")
        fabric.kill(name)
        assert lease.mem().read(0, 10) == b"still here"
        fabric.wait_ready()
        lease.renew()
        assert lease.mem().read(0, 10) == b"still here"


def test_what_is_not_there_cannot_be_killed(fabric: LocalFabric) -> None:
    with pytest.raises(failure.Denied, match="no process is called"):
        fabric.kill("node-n9")
    with pytest.raises(failure.Denied):
        fabric.set_fault("node-n9", "")


def test_a_fault_that_does_not_exist_is_refused_at_the_start() -> None:
    with pytest.raises(failure.Incompatible, match=r"no fault point of this name"):
        local_fabric(faults={"ledger": "ledger.nothing:EIO"}).start()
