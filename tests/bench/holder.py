"""A program that holds leases of memory and does nothing more, so that it can be killed.

Rules. It fills every page, so that there is something to take back. It passes a duplicate of each
descriptor to the observer, then says when the lease ends by this machine's boot-time clock. It
gives nothing back: it ends when its input ends, without a word.

    python -m tests.bench.holder <description of the fabric> <descriptor of a SEQPACKET socket>
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

from grafos import Fabric, MemBuilder, MemLease
from grafos._cluster import description
from grafos._connection import to_cluster

CHUNK: Final = b"\xa5" * (1 << 20)
NS_PER_MS: Final = 1_000_000


def take(fabric: Fabric, observer: socket.socket, size_bytes: int, ttl_ms: int) -> MemLease:
    """A lease, its pages filled, its descriptor shown to the observer."""
    lease = MemBuilder().min_bytes(size_bytes).lease_secs(ttl_ms / 1000).fabric(fabric).acquire()
    memory = lease.mem()
    for offset in range(0, size_bytes, len(CHUNK)):
        memory.write(offset, CHUNK)
    if lease._memory is None:
        raise AssertionError("the lease's memory was not handed over")
    message = json.dumps({"watch": lease.lease_id}).encode()
    socket.send_fds(observer, [message], [lease._memory.fd])
    return lease


def end_ns(fabric: Fabric, lease_id: str) -> int:
    """The deadline that the ledger granted, by the boot-time clock of this machine."""
    end_ms = fabric.describe(lease_id).end_ms
    before_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    wall_ns = time.time_ns()
    return before_ns + end_ms * NS_PER_MS - wall_ns


def main() -> None:
    cluster = description.load(Path(sys.argv[1]))
    assert cluster is not None, "the fabric has no description"
    held: list[MemLease] = []
    with socket.socket(fileno=int(sys.argv[2])) as observer:
        fabric = to_cluster(cluster)
        say({"up": os.getpid()})
        for line in sys.stdin:
            order = json.loads(line)
            lease = take(fabric, observer, order["size_bytes"], order["ttl_ms"])
            held.append(lease)
            say({"lease": lease.lease_id, "end_ns": end_ns(fabric, lease.lease_id)})
        os._exit(0)


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
