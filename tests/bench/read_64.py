"""Reading 64 bytes on one machine: a leased file in memory, and Redis over a unix socket.

Every read is timed by itself. The client is pinned to one processor; Redis to the same one, where
a round trip needs no wake-up across processors, and once more to another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from grafos import MemBuilder
from tests.bench import peers
from tests.bench.harness import Bench, Party, Result, pinned

NAME = "read_64"
WHAT = "read 64 B on the same machine, one at a time"
OURS = "grafos, shared memory"
ONE_CORE, TWO_CORES = "redis-py GET, one core", "redis-py GET, two cores"
CLOCK = "the clock alone"
COUNT, VALUE = 4_000, b"r" * 64
LIMIT_US = 2.0


def run(bench: Bench, result: Result) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with ExitStack() as ends:
        _, fabric = ends.enter_context(bench.fabric())
        lease = ends.enter_context(
            MemBuilder().min_bytes(4096).lease_secs(600).fabric(fabric).acquire()
        )
        memory = lease.mem()
        memory.write(0, VALUE)
        if memory.path != "shared":
            raise AssertionError("the lease's memory was not handed over")
        parties = [
            Party(OURS, timed(lambda: memory.read(0, 64), cpus[0])),
            Party(CLOCK, timed(lambda: None, cpus[0])),
        ]
        server = bench.with_peer(result, ONE_CORE, lambda: peers.redis_server(bench.place), ends)
        if server is not None:
            server.client.set("k", VALUE)
            get = server.client.get
            parties.append(Party(ONE_CORE, timed(lambda: get("k"), cpus[0], server.pid)))
            if len(cpus) > 1:
                parties.append(
                    Party(TWO_CORES, timed(lambda: get("k"), cpus[0], server.pid, cpus[1]))
                )
        bench.take_turns(result, parties, bench.count(COUNT))
    result.judge("p50 on the shared-memory path", LIMIT_US, result.p50(OURS), "us")
    result.notes.append("client pinned to one processor; Redis pinned as said; no clock subtracted")


def timed(
    work: Callable[[], object],
    cpu: int,
    server_pid: int | None = None,
    server_cpu: int | None = None,
) -> Callable[[int], Mapping[str, Sequence[float]]]:
    """Each call of `work` by itself, in microseconds, with both sides pinned."""

    def measure(count: int) -> Mapping[str, Sequence[float]]:
        clock, values = time.perf_counter_ns, []
        with ExitStack() as pins:
            pins.enter_context(pinned(cpu))
            if server_pid is not None:
                os.sched_setaffinity(server_pid, {cpu if server_cpu is None else server_cpu})
            for _ in range(count):
                started_ns = clock()
                work()
                values.append((clock() - started_ns) / 1000)
        return {"total": values}

    return measure
