"""Leases by way of the data port: words that many change, many parts at once, and what it costs
when the port goes away."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from grafos import BlockBuilder, Degraded, Incompatible, MemBuilder, MemLease, Revoked
from grafos._connection import Fabric
from grafos._dataport import DataPort, PortDown
from grafos._dataport_ways import connect_unix
from grafos._node import NodeLine
from grafos_core import failure
from grafos_core.failure import Disconnected, LeaseExpired
from grafos_core.spiffe import Identity, Role
from grafos_proto.wire import word
from services.nodeagent.datapath import MemoryStorage
from services.nodeagent.dataport import DataPort as NodePort
from services.nodeagent.dataport import Terms
from services.runtime.clock import SYSTEM
from tests.sdk.test_fork import run
from tests.sdk.world import NODE_ID, TRUST_DOMAIN, World

SIZE = 1 << 20


@pytest.fixture(params=["shared", "port", "rpc"])
def lease(request: pytest.FixtureRequest, world: World, fabric: Fabric) -> Iterator[MemLease]:
    world.control.descriptor = request.param == "shared"
    if request.param != "rpc":
        world.offer_port()
    with MemBuilder().fabric(fabric).min_bytes(SIZE).lease_secs(30).acquire() as made:
        assert made.mem().path == request.param
        yield made


@pytest.fixture
def far(world: World, fabric: Fabric) -> Iterator[MemLease]:
    """On the port."""
    world.control.descriptor = False
    world.offer_port()
    with MemBuilder().fabric(fabric).min_bytes(SIZE).lease_secs(30).acquire() as made:
        yield made


def port_of(lease: Any) -> DataPort:
    port = lease._grip.node.port
    assert port is not None
    return port  # type: ignore[no-any-return]


class TestManyParts:
    def test_parts_are_written_and_read_in_their_order(self, lease: MemLease) -> None:
        memory = lease.mem()
        memory.write_many([(0, b"abc"), (4096, bytearray(b"de")), (1, b"X")])
        assert memory.read_many([(4096, 3), (0, 4), (9, 0)]) == [b"de\0", b"aXc\0", b""]
        assert memory.read_many([]) == []

    def test_more_than_fits_one_frame_goes_in_several(self, lease: MemLease) -> None:
        memory = lease.mem()
        count = 40 if memory.path == "rpc" else 5000
        parts = [(i * 128, bytes([i % 251]) * 100) for i in range(count)]
        parts.append((700_000, b"L" * 300_000))
        memory.write_many(parts)
        asked = [(offset, len(data)) for offset, data in parts]
        assert memory.read_many(asked) == [data for _, data in parts]

    def test_a_part_outside_is_refused(self, lease: MemLease) -> None:
        with pytest.raises(Incompatible) as refused:
            lease.mem().read_many([(0, 1), (SIZE, 1)])
        assert refused.value.code == "EXTENT"
        with pytest.raises(Incompatible):
            lease.mem().write_many([(8, b"a"), (SIZE - 1, b"bc")])


class TestAPipeline:
    @pytest.mark.parametrize(
        "parts",
        [
            [(i * 64, 64) for i in range(64)],
            [(i * 64 % 320, 64) for i in range(200)],
            [(i * 9000, 64) for i in range(70)],
            [(i * 7, i % 5) for i in range(100)],
            [(0, 3), (3, 3), (6, 4), (10, 3)],
            [(5, 0)] * 6,
            [],
        ],
    )
    def test_each_read_gets_its_own_bytes(
        self, far: MemLease, parts: list[tuple[int, int]]
    ) -> None:
        data = os.urandom(SIZE)
        far.mem().write(0, data)
        found = port_of(far).pipelined(far.lease_id, far.epoch, parts, timeout_ms=15_000)
        assert found == [data[offset : offset + length] for offset, length in parts]

    def test_one_read_outside_is_refused_and_the_next_pipeline_is_not(self, far: MemLease) -> None:
        parts = [(0, 8)] * 30 + [(SIZE - 4, 8)] + [(0, 8)] * 30
        with pytest.raises(Incompatible) as refused:
            port_of(far).pipelined(far.lease_id, far.epoch, parts, timeout_ms=15_000)
        assert refused.value.code == "EXTENT"
        assert far.mem().read_many([(0, 8)] * 4) == [bytes(8)] * 4


class TestWords:
    def test_a_word_is_swapped_if_it_is_what_was_expected(self, lease: MemLease) -> None:
        memory = lease.mem()
        if memory.path == "rpc":
            with pytest.raises(Incompatible) as refused:
                memory.fetch_add(0, 1)
            assert refused.value.code == "OPTION"
            return
        assert memory.compare_and_swap(8, 0, 2**64 - 1) == 0
        assert memory.compare_and_swap(8, 0, 5) == 2**64 - 1
        assert memory.read(0, 24) == bytes(8) + b"\xff" * 8 + bytes(8)
        assert memory.fetch_add(8, 2) == 2**64 - 1
        assert memory.fetch_add(8, -1) == 1
        assert memory.read(8, 8) == bytes(8)

    @pytest.mark.parametrize("offset", [-8, 4, SIZE, SIZE - 4, 2**64])
    def test_a_word_lies_within_the_lease_at_a_multiple_of_eight(
        self, lease: MemLease, offset: int
    ) -> None:
        with pytest.raises(Incompatible) as refused:
            lease.mem().fetch_add(offset, 1)
        assert refused.value.code in ("EXTENT", "OPTION")
        with pytest.raises(Incompatible):
            lease.mem().compare_and_swap(0, -1, 0)

    def test_after_the_end_no_word_is_changed(self, world: World, lease: MemLease) -> None:
        if lease.mem().path == "rpc":
            return
        world.control.end(lease.lease_id, failure.of("REVOKED"))
        with pytest.raises(Revoked):
            lease.mem().fetch_add(0, 1)


def test_threads_of_all_paths_count_together_and_lose_nothing(world: World, fabric: Fabric) -> None:
    """Two on the shared memory and two at the node: one arbiter."""
    world.offer_port()
    count = 1500
    with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as lease:
        memory, port = lease.mem(), port_of(lease)

        def near() -> None:
            for _ in range(count):
                memory.fetch_add(16, 1)

        def far() -> None:
            for _ in range(count):
                port.add(lease.lease_id, lease.epoch, offset=16, n=1, timeout_ms=5_000)

        threads = [threading.Thread(target=each) for each in (near, far, near, far)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert int.from_bytes(memory.read(16, 8), "little") == 4 * count


def test_whoever_stops_with_a_word_in_his_hands_is_told_of_and_not_waited_for(
    world: World, fabric: Fabric
) -> None:
    world.offer_port()
    with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as lease:
        opened = world.table.opened(lease.lease_id)
        assert opened is not None
        path = f"/proc/self/fd/{opened.storage.descriptor}"  # type: ignore[attr-defined]
        other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 8, 8, 0))
        began = time.monotonic()
        with pytest.raises(Degraded) as near:
            lease.mem().fetch_add(8, 1)
        with pytest.raises(Degraded):
            port_of(lease).add(lease.lease_id, lease.epoch, offset=8, n=1, timeout_ms=5_000)
        assert time.monotonic() - began < 2
        assert near.value.code == "CONTENDED"
        assert lease.mem().fetch_add(0, 1) == 0, "the words beside it are free"
        os.close(other)
        assert lease.mem().fetch_add(8, 1) == 0
        assert word.read(opened.storage.descriptor, 8) == 1  # type: ignore[attr-defined]


class TestTheEnd:
    def test_no_read_of_a_pipeline_is_given_out_when_its_lease_ends(
        self, world: World, far: MemLease, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        far.mem().write(0, b"secret")
        opened = world.table.opened(far.lease_id)
        assert opened is not None
        assert isinstance(opened.storage, MemoryStorage)
        reads = [0]

        class Ending(MemoryStorage):
            def read(self, offset: int, length: int) -> bytes:
                reads[0] += 1
                if reads[0] == 40:
                    world.control.end(far.lease_id, failure.of("REVOKED"))
                    return b"secret"[:length]
                return super().read(offset, length)

        monkeypatch.setattr(opened, "storage", Ending(opened.storage.descriptor))
        with pytest.raises(Revoked):
            port_of(far).pipelined(far.lease_id, far.epoch, [(0, 6)] * 64, timeout_ms=5_000)
        with pytest.raises(Revoked):
            far.mem().read(0, 6)

    def test_a_buffer_that_was_half_filled_is_emptied(
        self, world: World, far: MemLease, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        far.mem().write(0, b"secret" * 100_000)
        opened = world.table.opened(far.lease_id)
        assert opened is not None
        real, reads = opened.storage.read_into, [0]  # type: ignore[attr-defined]

        def read_into(offset: int, view: memoryview) -> None:
            real(offset, view)
            reads[0] += 1
            if reads[0] == 2:
                world.control.end(far.lease_id, failure.of("LEASE_EXPIRED"))

        monkeypatch.setattr(opened.storage, "read_into", read_into)
        buffer = bytearray(b"?" * 600_000)
        with pytest.raises(LeaseExpired):
            far.mem().readinto(0, buffer)
        assert buffer == bytes(600_000)


class TestWithoutThePort:
    def test_a_port_that_goes_is_gone_round_and_comes_back(
        self, world: World, far: MemLease
    ) -> None:
        memory = far.mem()
        memory.write(0, b"by the port")
        world.port.stop()
        assert memory.read(0, 11) == b"by the port"
        assert memory.path == "rpc"
        memory.write(0, b"by calls...")
        with pytest.raises(Disconnected):
            memory.fetch_add(64, 1)
        node = world.credentials(Identity(TRUST_DOMAIN, Role.NODE, None, NODE_ID))
        world.port = NodePort(
            world.port._data, world.sessions, lambda: node, Terms(TRUST_DOMAIN, SYSTEM)
        )
        world.port.listen_unix(world.handover_path.with_name("d.sock"))
        end = time.monotonic() + 5
        while memory.path != "port":
            assert time.monotonic() < end
            threading.Event().wait(0.01)
        assert memory.read(0, 11) == b"by calls..."
        assert world.port.connections() == 1

    def test_a_connection_that_died_unnoticed_costs_a_reader_nothing(
        self, world: World, far: MemLease
    ) -> None:
        far.mem().write(0, b"still here")
        for line in list(world.port._lines):
            line.shut()
        assert far.mem().read(0, 10) == b"still here"
        assert far.mem().path == "port"

    def test_a_word_whose_answer_was_lost_is_not_changed_twice(
        self, world: World, far: MemLease, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = far.mem()
        memory.fetch_add(0, 1)
        opened = world.table.opened(far.lease_id)
        assert opened is not None
        real = opened.storage.add  # type: ignore[attr-defined]

        def add(offset: int, amount: int) -> int:
            for line in list(world.port._lines):
                line.shut()
            return int(real(offset, amount))

        monkeypatch.setattr(opened.storage, "add", add)
        with pytest.raises(Disconnected) as lost:
            memory.fetch_add(0, 1)
        assert lost.value.code == "UNREACHABLE"
        assert memory.read(0, 8) == (2).to_bytes(8, "little")

    def test_another_node_at_the_socket_is_not_believed(self, world: World) -> None:
        who = Identity(TRUST_DOMAIN, Role.NODE, None, "n2")
        holder = world.holder()
        path = str(world.handover_path.with_name("d.sock"))
        port = DataPort(connect_unix(path, lambda: holder, who))
        with pytest.raises(PortDown):
            port.read("ab" * 16, 1, 0, 1, 2_000)
        assert not port.is_up
        port.close()


def test_blocks_travel_by_the_port(world: World, fabric: Fabric) -> None:
    world.offer_port()
    with BlockBuilder().fabric(fabric).min_blocks(64).acquire() as lease:
        block, data = lease.block(), os.urandom(64 * 4096)
        block.write_blocks(0, data)
        block.flush()
        assert block.read_blocks(1, 3) == data[4096 : 4 * 4096]
        assert block.read_blocks(0, 64) == data
        assert world.port.connections() == 1


def test_threads_share_one_connection_and_get_their_own_answers(
    world: World, far: MemLease
) -> None:
    wrong: list[Any] = []

    def work(index: int) -> None:
        mine = bytes([index]) * 100
        far.mem().write(index * 100, mine)
        for _ in range(200):
            if far.mem().read(index * 100, 100) != mine:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert world.port.connections() == 1


def test_a_released_lease_leaves_no_handle_behind(world: World, fabric: Fabric) -> None:
    world.control.descriptor = False
    world.offer_port()
    for _ in range(5):
        with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as lease:
            lease.mem().write(0, b"x")
            node: NodeLine = lease._grip.node
    port = node.port
    assert port is not None
    assert port._line is not None
    assert len(port._line.handles) <= 1
    assert port._line._next_handle <= 2


def test_a_forked_child_says_nothing_on_its_parents_connection(world: World) -> None:
    world.control.descriptor = False
    world.offer_port()
    said = run(
        world,
        """
assert memory.path == "port"
pid = os.fork()
if pid == 0:
    print(refused(lambda: memory.read(0, 8)), refused(lambda: memory.fetch_add(0, 1)), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(memory.read(0, 8), memory.path)
lease.release()
""",
    )
    assert said.splitlines() == ["FORKED_CHILD FORKED_CHILD", """b"parent's" port"""]
