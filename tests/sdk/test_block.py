"""Leased blocks: whole blocks, by number, at the node."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grafos import BlockBuilder, BlockLease, FabricBlock, Fenced, Incompatible, LeaseExpired
from grafos._connection import Fabric
from grafos_core import failure
from tests.sdk.world import World

BLOCKS = 128


@pytest.fixture
def lease(fabric: Fabric) -> Iterator[BlockLease]:
    builder = BlockBuilder().fabric(fabric).min_blocks(BLOCKS).lease_secs(30)
    with builder.acquire() as made:
        yield made


@pytest.fixture
def block(lease: BlockLease) -> FabricBlock:
    return lease.block()


def test_a_block_has_4096_bytes(lease: BlockLease, block: FabricBlock) -> None:
    assert (block.block_size, block.num_blocks) == (4096, BLOCKS)
    assert lease.kind == "block"


def test_a_block_that_was_never_written_reads_as_zeros(block: FabricBlock) -> None:
    assert block.read_block(BLOCKS - 1) == bytes(4096)


def test_what_is_written_is_read(block: FabricBlock) -> None:
    sector = os.urandom(4096)
    block.write_block(0, sector)
    block.write_block(BLOCKS - 1, bytearray(sector))
    block.flush()
    assert block.read_block(0) == sector
    assert block.read_block(BLOCKS - 1) == sector
    assert block.read_block(1) == bytes(4096)


def test_many_blocks_at_a_time(block: FabricBlock) -> None:
    data = os.urandom(100 * 4096)
    block.write_blocks(7, data)
    assert block.read_blocks(7, 100) == data
    assert block.read_blocks(7, 0) == b""


@pytest.mark.parametrize(
    "use",
    [
        lambda block: block.read_block(BLOCKS),
        lambda block: block.read_block(-1),
        lambda block: block.read_blocks(BLOCKS - 1, 2),
        lambda block: block.read_blocks(0, -1),
        lambda block: block.read_block(2**52),
        lambda block: block.write_block(BLOCKS, bytes(4096)),
        lambda block: block.write_blocks(BLOCKS - 1, bytes(8192)),
    ],
)
def test_outside_the_lease_is_refused(
    block: FabricBlock, use: Callable[[FabricBlock], Any]
) -> None:
    with pytest.raises(Incompatible) as refused:
        use(block)
    assert refused.value.code == "EXTENT"


@pytest.mark.parametrize("length", [0, 1, 4095, 4097, 8192])
def test_a_block_is_written_whole_or_not_at_all(block: FabricBlock, length: int) -> None:
    with pytest.raises(Incompatible) as refused:
        block.write_block(0, bytes(length))
    assert refused.value.code == "LENGTH"


def test_part_of_a_block_is_refused_among_many(block: FabricBlock) -> None:
    with pytest.raises(Incompatible):
        block.write_blocks(0, bytes(4096 + 1))


def test_nothing_after_the_end(world: World, lease: BlockLease, block: FabricBlock) -> None:
    block.write_block(0, b"s" * 4096)
    world.control.end(lease.lease_id, failure.of("LEASE_EXPIRED"))
    for use in (
        lambda: block.read_block(0),
        lambda: block.write_block(0, bytes(4096)),
        block.flush,
    ):
        with pytest.raises(LeaseExpired):
            use()


def test_a_broken_block_fences_the_lease_for_its_holder(
    world: World, lease: BlockLease, block: FabricBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = world.table.opened(lease.lease_id)
    assert opened is not None

    def torn(offset: int, length: int) -> bytes:
        raise failure.of("TORN", f"block {offset // 4096}")

    monkeypatch.setattr(opened.storage, "read", torn)
    with pytest.raises(Fenced) as fenced:
        block.read_block(3)
    assert fenced.value.code == "TORN"
    assert not lease.valid


def test_bytes_that_were_changed_on_the_way_are_refused(
    lease: BlockLease, block: FabricBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = lease._grip.node._peer
    ask = peer.ask

    def flip(method: str, request: Any, timeout_ms: float) -> Any:
        answer = ask(method, request, timeout_ms)
        answer.data = b"\1" + answer.data[1:]
        return answer

    monkeypatch.setattr(peer, "ask", flip)
    with pytest.raises(Incompatible) as refused:
        block.read_block(0)
    assert refused.value.code == "CHECKSUM"
    assert lease.valid
