"""A whole lease, one after the other: asked for, written to, given back and credited.

Ours: acquire and bind, write 64 bytes, release until the ledger has credited; everything durable.
etcd: LeaseGrant, a transaction that puts 64 bytes under the lease, LeaseRevoke; everything durable.
Both clients are in this process, from Python, and prove a P-256 key; files on one disk. Ours is
measured as it runs on one machine, by ttRPC on unix sockets, and as it runs between machines, by
gRPC under mutual TLS on loopback TCP, which is what etcd has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from grafos import Fabric, MemBuilder
from tests.bench import peers
from tests.bench.harness import Bench, Party, Result

NAME = "lease_cycle"
WHAT = "acquire + bind + write 64 B + release until credited, one at a time"
OURS, OURS_FAR, PEER = "grafos", "grafos, TCP and TLS", "etcd"
LEASE_BYTES, VALUE = 4096, b"v" * 64
COUNT = 40
FACTOR_MAX = 3.0


def run(bench: Bench, result: Result) -> None:
    with ExitStack() as ends:
        _, fabric = ends.enter_context(bench.fabric())
        _, far = ends.enter_context(bench.fabric(tcp=True))
        parties = [
            Party(OURS, lambda count: ours(fabric, count)),
            Party(OURS_FAR, lambda count: ours(far, count)),
        ]
        member = bench.with_peer(result, PEER, lambda: peers.etcd(bench.place), ends)
        if member is not None:
            parties.append(Party(PEER, etcd_round(member)))
        bench.take_turns(result, parties, bench.count(COUNT))
    result.judge_ratio(OURS, PEER, FACTOR_MAX, "p50, times etcd's Grant + Txn + Revoke")
    result.notes.append("nobody is pinned; ours over unix sockets, etcd under mutual TLS over TCP")


def ours(fabric: Fabric, count: int) -> Mapping[str, Sequence[float]]:
    """Microseconds of the whole and of its parts."""
    builder = MemBuilder().min_bytes(LEASE_BYTES).fabric(fabric)
    values: dict[str, list[float]] = {
        "total": [], "acquire + bind": [], "first write": [], "release": []
    }  # fmt: skip
    for _ in range(count):
        started_ns = time.perf_counter_ns()
        lease = builder.acquire()
        acquired_ns = time.perf_counter_ns()
        lease.mem().write(0, VALUE)
        written_ns = time.perf_counter_ns()
        receipt = lease.release()
        released_ns = time.perf_counter_ns()
        if not receipt.credited:
            raise AssertionError(f"lease {lease.lease_id} was not credited within a second")
        values["total"].append((released_ns - started_ns) / 1000)
        values["acquire + bind"].append((acquired_ns - started_ns) / 1000)
        values["first write"].append((written_ns - acquired_ns) / 1000)
        values["release"].append((released_ns - written_ns) / 1000)
    return values


def etcd_round(member: peers.Etcd) -> Callable[[int], Mapping[str, Sequence[float]]]:
    done = 0

    def measure(count: int) -> Mapping[str, Sequence[float]]:
        nonlocal done
        values: dict[str, list[float]] = {"total": [], "grant": [], "txn": [], "revoke": []}
        for _ in range(count):
            done += 1
            started_ns = time.perf_counter_ns()
            lease_id = member.grant()
            granted_ns = time.perf_counter_ns()
            member.put_first(b"lease/%d" % done, VALUE, lease_id)
            put_ns = time.perf_counter_ns()
            member.revoke(lease_id)
            revoked_ns = time.perf_counter_ns()
            values["total"].append((revoked_ns - started_ns) / 1000)
            values["grant"].append((granted_ns - started_ns) / 1000)
            values["txn"].append((put_ns - granted_ns) / 1000)
            values["revoke"].append((revoked_ns - put_ns) / 1000)
        return values

    return measure
