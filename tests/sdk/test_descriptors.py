"""A connection that is closed leaves nothing open: no socket, no memory, no channel."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grafos import BlockBuilder, MemBuilder, local_fabric
from grafos._cluster.description import ClusterDescription
from grafos._connection import Fabric, to_cluster
from grafos._local import LocalFabric
from tests.sdk.cluster.stand import eventually
from tests.sdk.world import World

TIMES = 20


@pytest.fixture(scope="module")
def running() -> Iterator[LocalFabric]:
    with local_fabric(memory_bytes=16 << 20, block_bytes=1 << 20) as started:
        yield started


@pytest.fixture
def by_hand() -> Iterator[None]:
    """The collector must not tidy up what `close` has left."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def open_descriptors() -> list[str]:
    folder, found = Path("/proc/self/fd"), []
    for each in folder.iterdir():
        try:
            found.append(os.readlink(each).partition(":")[0])
        except FileNotFoundError:  # that of the folder itself
            continue
    return sorted(found)


def leaves_nothing_open(once: Callable[[], None], times: int = TIMES) -> None:
    once()  # what the first connection of a process makes for good
    before = open_descriptors()
    for _ in range(times):
        once()
    eventually(lambda: len(open_descriptors()) <= len(before))  # gRPC closes in its own threads


@pytest.mark.usefixtures("by_hand")
def test_connections_to_a_real_fabric(running: LocalFabric) -> None:
    where: ClusterDescription = running.description

    def once() -> None:
        connection = to_cluster(where)
        memory = MemBuilder().fabric(connection).min_bytes(4096).acquire()
        memory.mem().write(0, b"x")
        block = BlockBuilder().fabric(connection).min_blocks(1).acquire()
        block.block().write_block(0, bytes(4096))
        list(connection.leases())
        connection.close()

    leaves_nothing_open(once)


@pytest.mark.usefixtures("by_hand")
def test_connections_that_hear_notices_by_stream_and_renew_by_themselves(world: World) -> None:
    world.handover_path.unlink()
    credentials = world.holder()

    def once() -> None:
        connection = Fabric(world.endpoint, lambda: credentials)
        lease = MemBuilder().fabric(connection).min_bytes(4096).auto_renew().acquire()
        assert lease.mem().path == "rpc"
        lease.mem().write(0, b"x")
        connection.close()
        grant = world.book.grants[lease.lease_id]
        os.close(grant.fd)  # the node's, which is here, too
        grant.fd = -1

    leaves_nothing_open(once)


@pytest.mark.usefixtures("by_hand")
def test_fabrics_of_ones_own() -> None:
    def once() -> None:
        with local_fabric(memory_bytes=16 << 20, block_bytes=1 << 20):
            MemBuilder().min_bytes(4096).acquire().release()

    leaves_nothing_open(once, times=3)
