"""How many leases per second, with sixteen requests in flight.

Ours is acquire with bind: the lease can be used. etcd's is LeaseGrant alone, and LeaseGrant with
the transaction that makes the lease mean something. Giving back is not timed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from grafos import Fabric, MemBuilder, MemLease
from tests.bench import peers
from tests.bench.harness import Bench, Party, Result

NAME = "acquire_rate"
OURS, GRANT, GRANT_TXN = "grafos, acquire + bind", "etcd LeaseGrant", "etcd LeaseGrant + Txn"
IN_FLIGHT = 16
WHAT = f"leases per second, {IN_FLIGHT} in flight, release not timed"
COUNT = 128
VALUE = b"v" * 64
T = TypeVar("T")


def run(bench: Bench, result: Result) -> None:
    with ExitStack() as ends:
        _, fabric = ends.enter_context(bench.fabric())
        pool = ends.enter_context(ThreadPoolExecutor(IN_FLIGHT))
        parties = [Party(OURS, lambda count: ours(fabric, pool, count), "1/s")]
        member = bench.with_peer(result, GRANT, lambda: peers.etcd(bench.place), ends)
        if member is not None:
            parties += [
                Party(GRANT, lambda count: grants(member, pool, count), "1/s"),
                Party(GRANT_TXN, grants_with_keys(member, pool), "1/s"),
            ]
        bench.take_turns(result, parties, max(IN_FLIGHT, bench.count(COUNT)))
    result.notes.append("one rate per round; more is better")


def ours(fabric: Fabric, pool: ThreadPoolExecutor, count: int) -> Mapping[str, Sequence[float]]:
    builder = MemBuilder().min_bytes(4096).fabric(fabric)
    leases, rate = rated(pool, count, builder.acquire)
    list(pool.map(MemLease.release, leases))
    return {"total": [rate]}


def grants(
    member: peers.Etcd, pool: ThreadPoolExecutor, count: int
) -> Mapping[str, Sequence[float]]:
    leases, rate = rated(pool, count, member.grant)
    list(pool.map(member.revoke, leases))
    return {"total": [rate]}


def grants_with_keys(
    member: peers.Etcd, pool: ThreadPoolExecutor
) -> Callable[[int], Mapping[str, Sequence[float]]]:
    numbers = itertools.count()

    def take() -> int:
        lease_id = member.grant()
        member.put_first(b"rate/%d" % next(numbers), VALUE, lease_id)
        return lease_id

    def measure(count: int) -> Mapping[str, Sequence[float]]:
        leases, rate = rated(pool, count, take)
        list(pool.map(member.revoke, leases))
        return {"total": [rate]}

    return measure


def rated(pool: ThreadPoolExecutor, count: int, work: Callable[[], T]) -> tuple[list[T], float]:
    """What `count` calls gave, and how many there were per second."""
    started_ns = time.perf_counter_ns()
    made = [each.result() for each in [pool.submit(work) for _ in range(count)]]
    return made, count / ((time.perf_counter_ns() - started_ns) / 1e9)
