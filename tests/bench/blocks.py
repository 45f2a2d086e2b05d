"""Reading and writing one block of 4 KiB: encrypted under its lease's key, through the node.

Beside it a plain file on the same disk, written and synced: what the disk itself costs. It has no
key, no lease and no other process in the way, so it is a floor and no rival.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from grafos import BlockBuilder
from grafos._block import FabricBlock
from tests.bench.harness import Bench, Party, Result

NAME = "block_4k"
WHAT = "one block of 4 KiB: write, write + flush, read"
OURS, FLOOR = "grafos", "a plain file"
COUNT, BLOCKS, BLOCK_BYTES = 100, 64, 4096


def run(bench: Bench, result: Result) -> None:
    with ExitStack() as ends:
        _, fabric = ends.enter_context(bench.fabric())
        builder = BlockBuilder().min_blocks(BLOCKS).lease_secs(600).fabric(fabric)
        lease = ends.enter_context(builder.acquire())
        path = bench.place.make("file") / "plain"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        ends.callback(os.close, fd)
        os.write(fd, bytes(BLOCKS * BLOCK_BYTES))
        os.fsync(fd)
        parties = [Party(OURS, ours(lease.block())), Party(FLOOR, plain(fd))]
        bench.take_turns(result, parties, bench.count(COUNT))
    result.notes.append("the plain file is read from the page cache; the node's blocks are not")


def ours(block: FabricBlock) -> Callable[[int], Mapping[str, Sequence[float]]]:
    data = os.urandom(BLOCK_BYTES)

    def write_and_flush(index: int) -> None:
        block.write_block(index, data)
        block.flush()

    return each_verb(
        {
            "read": block.read_block,
            "write": lambda index: block.write_block(index, data),
            "write + flush": write_and_flush,
        }
    )


def plain(fd: int) -> Callable[[int], Mapping[str, Sequence[float]]]:
    data = os.urandom(BLOCK_BYTES)

    def write_and_flush(index: int) -> None:
        os.pwrite(fd, data, index * BLOCK_BYTES)
        os.fdatasync(fd)

    return each_verb(
        {
            "read": lambda index: os.pread(fd, BLOCK_BYTES, index * BLOCK_BYTES),
            "write": lambda index: os.pwrite(fd, data, index * BLOCK_BYTES),
            "write + flush": write_and_flush,
        }
    )


def each_verb(
    verbs: Mapping[str, Callable[[int], object]],
) -> Callable[[int], Mapping[str, Sequence[float]]]:
    """Each call by itself, in microseconds, over all blocks in turn."""

    def measure(count: int) -> Mapping[str, Sequence[float]]:
        values: dict[str, list[float]] = {name: [] for name in verbs}
        for name, work in verbs.items():
            for number in range(count):
                started_ns = time.perf_counter_ns()
                work(number % BLOCKS)
                values[name].append((time.perf_counter_ns() - started_ns) / 1000)
        return values

    return measure
