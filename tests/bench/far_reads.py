"""Reading 64 bytes over the wire, which works from everywhere: our gRPC path beside etcd's.

Both sides are one unary gRPC call under mutual TLS from the same Python client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from grafos import MemBuilder
from tests.bench import peers
from tests.bench.harness import Bench, Party, Result

NAME = "read_64_grpc"
WHAT = "read 64 B over gRPC with mutual TLS, one at a time"
OURS, PEER = "grafos, gRPC path", "etcd Range, serializable"
COUNT, VALUE = 200, b"r" * 64


def run(bench: Bench, result: Result) -> None:
    with ExitStack() as ends:
        _, fabric = ends.enter_context(bench.fabric())
        lease = ends.enter_context(
            MemBuilder().min_bytes(4096).lease_secs(600).fabric(fabric).acquire()
        )
        memory = lease.mem()
        memory.write(0, VALUE)
        lease._let_go()  # without its descriptor the same handle asks the node
        if memory.path != "rpc":
            raise AssertionError("the reads would not cross the wire")
        parties = [Party(OURS, each_timed(lambda: memory.read(0, 64)))]
        member = bench.with_peer(result, PEER, lambda: peers.etcd(bench.place), ends)
        if member is not None:
            member.put_first(b"k", VALUE, 0)
            parties.append(Party(PEER, each_timed(lambda: member.get(b"k"))))
        bench.take_turns(result, parties, bench.count(COUNT))


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
