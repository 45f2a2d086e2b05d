"""Reading 64 bytes by a call, which works from everywhere: ours beside etcd's.

Each is one unary call from the same Python client: ours by ttRPC on a unix socket and by gRPC under
mutual TLS on loopback TCP, etcd's by gRPC under mutual TLS on loopback TCP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from grafos import Fabric, MemBuilder
from tests.bench import peers
from tests.bench.harness import Bench, Party, Result

NAME = "read_64_call"
WHAT = "read 64 B by a call, one at a time"
NEAR, FAR = "grafos, unix socket", "grafos, TCP and TLS"
PEER = "etcd Range, serializable"
COUNT, VALUE = 200, b"r" * 64


def run(bench: Bench, result: Result) -> None:
    with ExitStack() as ends:
        parties = [
            Party(name, reads(ends, ends.enter_context(bench.fabric(tcp=tcp))[1]))
            for name, tcp in ((NEAR, False), (FAR, True))
        ]
        member = bench.with_peer(result, PEER, lambda: peers.etcd(bench.place), ends)
        if member is not None:
            member.put_first(b"k", VALUE, 0)
            parties.append(Party(PEER, each_timed(lambda: member.get(b"k"))))
        bench.take_turns(result, parties, bench.count(COUNT))


def reads(ends: ExitStack, fabric: Fabric) -> Callable[[int], Mapping[str, Sequence[float]]]:
    """Of a lease of its own, without descriptor and data port: so the handle calls the node."""
    lease = ends.enter_context(
        MemBuilder().min_bytes(4096).lease_secs(600).fabric(fabric).acquire()
    )
    memory = lease.mem()
    memory.write(0, VALUE)
    lease._let_go()
    lease._grip.node._port = None
    if memory.path != "rpc":
        raise AssertionError("the reads would not cross the wire")
    return each_timed(lambda: memory.read(0, 64))


def each_timed(work: Callable[[], object]) -> Callable[[int], Mapping[str, Sequence[float]]]:
    """Each call of `work` by itself, in microseconds."""

    def measure(count: int) -> Mapping[str, Sequence[float]]:
        values = []
        for _ in range(count):
            started_ns = time.perf_counter_ns()
            work()
            values.append((time.perf_counter_ns() - started_ns) / 1000)
        return {"total": values}

    return measure
