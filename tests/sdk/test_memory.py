"""Leased memory, on each of its paths: what is written is read, and nothing after the end."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grafos import FabricMem, Incompatible, LeaseExpired, MemBuilder, MemLease
from grafos._connection import Fabric
from grafos_core import failure
from tests.sdk.world import World

SIZE = 512 * 1024


@pytest.fixture(params=["shared", "port", "tls", "rpc"])
def lease(request: pytest.FixtureRequest, world: World, fabric: Fabric) -> Iterator[MemLease]:
    world.control.descriptor = request.param == "shared"
    if request.param in ("port", "tls"):
        world.offer_port(tls=request.param == "tls")
    with MemBuilder().fabric(fabric).min_bytes(SIZE).lease_secs(30).acquire() as made:
        assert made.mem().path == ("port" if request.param == "tls" else request.param)
        yield made


@pytest.fixture
def memory(lease: MemLease) -> FabricMem:
    return lease.mem()


class TestBytes:
    def test_fresh_memory_reads_as_zeros(self, memory: FabricMem) -> None:
        assert memory.read(0, 4096) == bytes(4096)

    def test_what_is_written_is_read(self, memory: FabricMem) -> None:
        memory.write(4090, b"hello fabric")
        assert memory.read(4090, 12) == b"hello fabric"
        assert memory.read(4089, 14) == b"\0hello fabric\0"

    @pytest.mark.parametrize("length", [0, 1, 196_608, 196_609, SIZE])
    def test_any_length_within_the_lease(self, memory: FabricMem, length: int) -> None:
        data = os.urandom(length)
        memory.write(SIZE - length, data)
        assert memory.read(SIZE - length, length) == data

    def test_any_buffer_is_written_and_filled(self, memory: FabricMem) -> None:
        for data in (bytearray(b"abcd"), memoryview(b"abcd"), array("H", [0x6261, 0x6463])):
            memory.write(0, data)
            assert memory.read(0, 4) == b"abcd"
        numbers = array("I", [0, 0])
        memory.write(8, (7).to_bytes(4, "little") + (9).to_bytes(4, "little"))
        assert memory.readinto(8, numbers) == 8
        assert list(numbers) == [7, 9]

    def test_the_size_is_whole_pages(self, fabric: Fabric) -> None:
        with MemBuilder().fabric(fabric).min_bytes(4097).acquire() as lease:
            assert lease.mem().arena_size == 8192

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (0, SIZE + 1), (2**64 - 1, 1), (0, -1), (2**63, 2**63)],
    )
    def test_outside_the_lease_is_refused(
        self, memory: FabricMem, offset: int, length: int
    ) -> None:
        with pytest.raises(Incompatible) as refused:
            memory.read(offset, length)
        assert refused.value.code == "EXTENT"
        assert memory._lease.lease_id == refused.value.lease_id
        if length > 0:
            with pytest.raises(Incompatible):
                memory.write(offset, bytes(min(length, SIZE + 1)))
            with pytest.raises(Incompatible):
                memory.readinto(offset, bytearray(min(length, SIZE + 1)))
        assert memory.read(0, 1) == b"\0", "the lease goes on"

    def test_what_is_no_number_is_a_type_error(self, memory: FabricMem) -> None:
        with pytest.raises(TypeError):
            memory.read("0", 1)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            memory.write(0, "text")  # type: ignore[arg-type]


class TestNothingAfterTheEnd:
    @pytest.mark.parametrize("use", ["read", "readinto", "write"])
    def test_every_operation_says_why(
        self, world: World, lease: MemLease, memory: FabricMem, use: str
    ) -> None:
        memory.write(0, b"secret")
        buffer = bytearray(b"??????")
        world.control.end(lease.lease_id, failure.of("LEASE_EXPIRED"))
        operation: dict[str, Callable[[], Any]] = {
            "read": lambda: memory.read(0, 6),
            "readinto": lambda: memory.readinto(0, buffer),
            "write": lambda: memory.write(0, b"too late"),
        }
        with pytest.raises(LeaseExpired):
            operation[use]()
        assert b"secret" not in buffer

    def test_bytes_that_came_after_the_stop_are_given_to_nobody(
        self, lease: MemLease, memory: FabricMem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The holder is stopped between the look before and the bytes: P2 of the neighbours."""
        memory.write(0, b"secret")

        def late(*_: Any, **__: Any) -> Any:
            data = bytes(6)
            lease._until_ns = 1
            with lease._lock:
                lease._holder._stop_ms = 1
            return data

        monkeypatch.setattr("grafos._memory._pread", late)
        monkeypatch.setattr(lease._grip.node, "read", late)
        with pytest.raises(LeaseExpired):
            memory.read(0, 6)

    def test_a_buffer_filled_after_the_stop_is_emptied_again(
        self, world: World, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lease = MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(30).acquire()
        lease.mem().write(0, b"secret")
        real, buffer = os.preadv, bytearray(6)

        def late(fd: int, views: list[Any], offset: int) -> int:
            count = real(fd, views, offset)
            assert buffer == b"secret"
            lease._until_ns = 1
            lease._holder._stop_ms = 1
            return count

        monkeypatch.setattr("os.preadv", late)
        with pytest.raises(LeaseExpired):
            lease.mem().readinto(0, buffer)
        assert buffer == bytes(6)

    def test_a_read_that_the_fence_cut_is_not_zeros(self, world: World, fabric: Fabric) -> None:
        """The memory goes while bytes are copied: the size is looked at after them."""
        with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as lease:
            memory = lease.mem()
            memory.write(0, b"secret")
            real = os.pread

            def cut(fd: int, length: int, offset: int) -> bytes:
                world.control.end(lease.lease_id, failure.of("REVOKED"))
                assert real(fd, length, offset) == b""
                return bytes(length)

            import grafos._memory as module

            module._pread = cut
            try:
                with pytest.raises(Exception, match="REVOKED"):
                    memory.read(0, 6)
            finally:
                module._pread = real

    def test_a_late_reader_gets_no_byte_in_a_thousand_expiries(
        self, world: World, fabric: Fabric
    ) -> None:
        """Readers hammer leases across their deadlines; whatever is returned is the real data."""
        wrong: list[bytes] = []
        returned = [0]

        def hammer(memory: FabricMem, pattern: bytes) -> None:
            while True:
                try:
                    data = memory.read(0, 64)
                except LeaseExpired:
                    return
                returned[0] += 1
                if data != pattern:
                    wrong.append(data)

        for _ in range(3):
            leases = [
                MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(1).acquire()
                for _ in range(4)
            ]
            threads = []
            for index, lease in enumerate(leases):
                pattern = bytes([index + 1]) * 64
                lease.mem().write(0, pattern)
                threads.append(threading.Thread(target=hammer, args=(lease.mem(), pattern)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive()
        assert returned[0] > 1000
        assert not wrong


HOLDER = """
import sys, time
from pathlib import Path
from grafos import MemBuilder, FabricError, connect
endpoint, folder = sys.argv[1:]
fabric = connect(endpoint, identity=Path(folder))
lease = MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(1).acquire()
memory = lease.mem()
memory.write(0, b"mine")
print(lease.lease_id, flush=True)
sys.stdin.readline()          # stopped here, past the deadline
for use in (lambda: memory.read(0, 4), lambda: memory.write(0, b"late"), lease.renew):
    try:
        print("OK", use(), flush=True)
    except FabricError as failed:
        print(type(failed).__name__, failed.code, flush=True)
receipt = lease.release()
print(receipt.credited, flush=True)
"""


def start_holder(world: World, script: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(each for each in sys.path if each)
    return subprocess.Popen(
        [sys.executable, "-c", script, world.endpoint, str(world.identity_folder())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_a_process_stopped_past_its_deadline_learns_it_at_the_next_use(world: World) -> None:
    import signal

    with start_holder(world, HOLDER) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        lease_id = holder.stdout.readline().strip()
        holder.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 10
        while world.book.grants[lease_id].cause is None:
            assert time.monotonic() < end
            threading.Event().wait(0.01)
        holder.stdin.write("\n")
        holder.stdin.flush()
        holder.send_signal(signal.SIGCONT)
        said = holder.stdout.read().splitlines()
    assert said == ["LeaseExpired LEASE_EXPIRED"] * 3 + ["True"]
    assert holder.returncode == 0


def test_release_beside_reads_never_reads_another_file(
    world: World, fabric: Fabric, tmp_path: Path
) -> None:
    """A descriptor's number is used again at once; an operation in flight must not meet it."""
    wrong: list[Any] = []

    def hammer(memory: FabricMem) -> None:
        while True:
            try:
                data = memory.read(0, 8)
                memory.write(8, b"12345678")
            except LeaseExpired:
                return
            if data != b"mine" + bytes(4):
                wrong.append(data)

    other = tmp_path / "other"
    for _ in range(20):
        lease = MemBuilder().fabric(fabric).min_bytes(4096).acquire()
        lease.mem().write(0, b"mine")
        threads = [threading.Thread(target=hammer, args=(lease.mem(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        lease.release()
        files = [other.open("w+b") for _ in range(8)]
        for thread in threads:
            thread.join(10)
        for file in files:
            file.close()
        assert other.stat().st_size == 0
    assert not wrong


def test_reads_of_64_bytes_take_two_microseconds_at_most(fabric: Fabric) -> None:
    """The promise is ≤ 2 µs p50 on an idle machine; ten times that is a fault on any."""
    with MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(60).acquire() as lease:
        read, took = lease.mem().read, []
        for _ in range(200):
            began = time.perf_counter_ns()
            for _ in range(50):
                read(0, 64)
            took.append((time.perf_counter_ns() - began) / 50)
    assert sorted(took)[100] < 20_000, f"{sorted(took)[100]:.0f} ns"
