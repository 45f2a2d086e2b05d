"""A mebibyte of leased memory on the same machine: mapped, and by read and write, beside memcpy.

memcpy is Python's own copy from one buffer of this process to another, of the same size. All copy
into, or out of, the same buffer; pages are there already.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from grafos import MemBuilder
from tests.bench.harness import Bench, Party, Result
from tests.bench.read_64 import timed

NAME = "view"
WHAT = "1 MiB on the same machine, one at a time"
COUNT, SIZE = 400, 1 << 20
VIEW_READ, VIEW_WRITE = "grafos view, read", "grafos view, write"
MEMCPY = "memcpy"
OF_MEMCPY = 1 / 0.8


def run(bench: Bench, result: Result) -> None:
    cpu = min(os.sched_getaffinity(0))
    with ExitStack() as ends:
        _, fabric = ends.enter_context(bench.fabric())
        lease = ends.enter_context(
            MemBuilder().min_bytes(SIZE).lease_secs(600).fabric(fabric).acquire()
        )
        memory = lease.mem()
        view = ends.enter_context(memory.map())
        mapped, here, there = view.memory, bytearray(os.urandom(SIZE)), memoryview(bytearray(SIZE))
        ends.callback(mapped.release)

        def read_view() -> None:
            there[:] = mapped
            view.check()

        def write_view() -> None:
            mapped[:] = here
            view.check()

        def copy() -> None:
            there[:] = here

        works = {
            VIEW_READ: read_view,
            VIEW_WRITE: write_view,
            MEMCPY: copy,
            "grafos readinto": lambda: memory.readinto(0, there),
            "grafos write": lambda: memory.write(0, here),
        }
        parties = [Party(name, timed(work, cpu)) for name, work in works.items()]
        bench.take_turns(result, parties, bench.count(COUNT))
    for name in (VIEW_READ, VIEW_WRITE):
        result.judge_ratio(name, MEMCPY, OF_MEMCPY, f"{name}, at least 80 % of memcpy's rate")
    result.notes.append("pinned to one processor; each view operation with its check")
