"""Handles, leases and connections are shared by threads; nothing is lost and nothing mixes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grafos import BlockBuilder, FabricError, LeaseExpired, MemBuilder
from grafos._connection import Fabric
from grafos_core.lease import RETURN_MS
from services.runtime.clock import SYSTEM
from services.runtime.server import Limits
from tests.sdk.world import World

THREADS = 8


def together(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """Run `work(i)` in so many threads that all start at once; whatever one raises is raised."""
    start = threading.Barrier(threads)

    def run(index: int) -> Any:
        start.wait(10)
        return work(index)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


@pytest.mark.parametrize("descriptor", [True, False])
def test_threads_share_one_handle(world: World, fabric: Fabric, descriptor: bool) -> None:
    world.control.descriptor = descriptor
    rounds = 300 if descriptor else 20
    with MemBuilder().fabric(fabric).min_bytes(4096 * THREADS).acquire() as lease:
        memory = lease.mem()

        def work(index: int) -> None:
            for count in range(rounds):
                data = bytes([index, count % 256]) * 512
                memory.write(index * 4096, data)
                assert memory.read(index * 4096, 1024) == data

        together(work)


def test_threads_share_a_block_handle(fabric: Fabric) -> None:
    with BlockBuilder().fabric(fabric).min_blocks(THREADS).acquire() as lease:
        block = lease.block()

        def work(index: int) -> None:
            for count in range(10):
                data = bytes([index, count]) * 2048
                block.write_block(index, data)
                assert block.read_block(index) == data

        together(work)


def test_threads_acquire_and_release_from_one_connection(world: World, fabric: Fabric) -> None:
    def work(index: int) -> str:
        with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as lease:
            lease.mem().write(0, bytes([index]) * 64)
            assert lease.mem().read(0, 64) == bytes([index]) * 64
            return lease.lease_id

    ids = [each for _ in range(4) for each in together(work)]
    assert len(set(ids)) == 4 * THREADS
    assert world.control.asked.count("release") == 4 * THREADS
    assert all(each.cause is not None for each in world.book.grants.values())


def test_one_session_serves_all_leases_of_a_process(world: World, fabric: Fabric) -> None:
    leases = together(
        lambda _: MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(30).acquire()
    )
    assert world.control.asked.count("session_back") == 1
    together(lambda index: leases[index].release())


def test_threads_renew_one_lease(world: World, fabric: Fabric) -> None:
    with MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(5).acquire() as lease:
        left = together(lambda _: lease.renew(30))
        assert all(each > 25_000 for each in left)
        assert lease.generation == world.book.grants[lease.lease_id].lease.generation


def test_operations_beside_a_release_end_with_its_failure_and_no_other(
    world: World, fabric: Fabric
) -> None:
    lease = MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(30).acquire()
    memory = lease.mem()
    memory.write(0, b"x" * 64)
    seen: list[str] = []

    def work(index: int) -> None:
        if index == 0:
            threading.Event().wait(0.05)
            lease.release()
            return
        try:
            while True:
                assert memory.read(0, 64) == b"x" * 64
        except FabricError as ended:
            assert isinstance(ended, LeaseExpired)
            seen.append(ended.code)

    together(work)
    assert seen == ["LEASE_RELEASED"] * (THREADS - 1)


def test_auto_renewed_leases_of_many_threads_share_one_thread(fabric: Fabric) -> None:
    builder = MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(2).auto_renew()
    leases = together(lambda _: builder.acquire())
    names = [each.name for each in threading.enumerate()]
    assert names.count("grafos") == 1
    together(lambda index: leases[index].release())


def test_a_remote_holders_session_is_a_stream(world: World, fabric: Fabric) -> None:
    """Where there is no hand-over socket: notices come by gRPC, bytes too."""
    world.handover_path.unlink()
    with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as lease:
        heard: list[Any] = []
        lease.on_notice(heard.append)
        assert lease.mem().path == "rpc"
        lease.mem().write(0, b"far away")
        assert lease.mem().read(0, 8) == b"far away"
        end = threading.Event()
        for _ in range(200):
            if "session_back" in world.control.asked:
                break
            end.wait(0.01)
        world.control.tell(lease.lease_id, "revoke_warning")
        for _ in range(200):
            fabric.poll()
            if heard:
                break
            end.wait(0.01)
        assert [each.kind for each in heard] == ["revoke_warning"]


def test_who_moves_from_the_stream_to_the_socket_is_there_all_the_time(
    world: World, fabric: Fabric
) -> None:
    away = world.handover_path.with_name("away")
    world.handover_path.rename(away)
    page = MemBuilder().fabric(fabric).min_bytes(4096)
    with page.acquire() as far:
        until(lambda: "session_back" in world.control.asked)
        away.rename(world.handover_path)
        with page.acquire() as near:
            assert (far.mem().path, near.mem().path) == ("rpc", "shared")
        threading.Event().wait(0.1)
        sessions = [each for each in world.control.asked if each.startswith("session")]
        assert sessions == ["session_back"]


def test_a_connection_that_the_node_renews_is_not_lost_for_long(tmp_path: Path) -> None:
    """No connection grows older than a minute; a lease that ends with its connection lives on."""
    world = World(tmp_path, replace(Limits(), connection_age_ms_max=700))
    world.handover_path.unlink()
    page = MemBuilder().fabric(world.fabric()).min_bytes(4096)
    with page.acquire():
        until(lambda: "session_lost" in world.control.asked)
        lost_ms = SYSTEM.boot_ms()
        until(lambda: world.control.asked.count("session_back") == 2)
        assert SYSTEM.boot_ms() - lost_ms < RETURN_MS // 2
    world.close()


def until(so: Callable[[], bool]) -> None:
    for _ in range(500):
        if so():
            return
        threading.Event().wait(0.01)
    pytest.fail("it did not come to that")


def test_a_session_that_breaks_is_opened_anew_and_ends_no_lease(
    world: World, fabric: Fabric
) -> None:
    with MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(30).acquire() as lease:
        heard: list[Any] = []
        lease.on_notice(heard.append)
        lease._grip.node._session._socket.shutdown(2)  # type: ignore[union-attr]
        for _ in range(500):
            fabric.poll()
            if world.control.asked.count("session_back") == 2:
                break
            threading.Event().wait(0.01)
        assert world.control.asked.count("session_back") == 2
        assert lease.mem().read(0, 1) == b"\0"
        world.control.tell(lease.lease_id, "revoke_warning")
        for _ in range(200):
            fabric.poll()
            if heard:
                break
            threading.Event().wait(0.01)
        assert [each.kind for each in heard] == ["revoke_warning"]
