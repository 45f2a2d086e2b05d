"""What the rows on the data port have in common: a lease that is reached by it, and where both
sides run.

Ours and Redis are asked from the same Python process, over the same kind of connection, with client
and server on the same processors. All threads of a server are moved, not only its first one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grafos import FabricMem, MemBuilder, MemLease
from grafos._connection import to_cluster
from grafos._dataport import DataPort
from grafos._local import LocalFabric
from tests.bench.harness import Party, pinned

SIZE_BYTES: Final = 4 << 20
Measure = Callable[[int], Mapping[str, Sequence[float]]]


@dataclass(frozen=True, slots=True)
class Served:
    """A lease that is used over one kind of connection."""

    lease: MemLease
    port: DataPort
    pid: int

    @property
    def memory(self) -> FabricMem:
        return self.lease.mem()


def over(local: LocalFabric, ends: ExitStack, *, tls: bool) -> Served:
    """A lease without its descriptor, at a node with both kinds of port, over a connection of its
    own."""
    fabric = ends.enter_context(to_cluster(local.description))
    made = MemBuilder().min_bytes(SIZE_BYTES).lease_secs(600).fabric(fabric).acquire()
    lease = ends.enter_context(made)
    lease._let_go()
    node = lease._grip.node
    port = DataPort(node._ways[-1 if tls else 0])
    ends.callback(port.close)
    node._port = port
    if len(node._ways) != 2 or lease.mem().path != "port":
        raise AssertionError("the bytes would go another way")
    lease.mem().write(0, bytes(64))
    return Served(lease, port, local.pids()["node-n1/front"])


def processors() -> dict[str, tuple[int, int]]:
    """Client's and server's, by what it is called."""
    cpus = sorted(os.sched_getaffinity(0))
    return {"one core": (cpus[0], cpus[0])} | (
        {"two cores": (cpus[0], cpus[1])} if len(cpus) > 1 else {}
    )


def parties(name: str, work: Callable[[], object], pid: int) -> list[Party]:
    """The same work with both sides on one processor, and on two."""
    return [
        Party(f"{name}, {where}", timed(work, client, pid, server))
        for where, (client, server) in processors().items()
    ]


def timed(work: Callable[[], object], cpu: int, server_pid: int, server_cpu: int) -> Measure:
    """Each call by itself, in microseconds."""

    def measure(count: int) -> Mapping[str, Sequence[float]]:
        clock, values = time.perf_counter_ns, []
        for task in Path(f"/proc/{server_pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {server_cpu})
        with pinned(cpu):
            for _ in range(count):
                started_ns = clock()
                work()
                values.append((clock() - started_ns) / 1000)
        return {"total": values}

    return measure
