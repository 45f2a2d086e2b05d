"""How many leases per second, with 64 requests in flight, in threads of one process.

Ours is the grant and the token to bind with; etcd's is LeaseGrant, and LeaseGrant with the
transaction that makes the lease mean something. What it costs to bind what was granted is a row of
its own. Giving back is not timed. etcd is asked by mutual TLS, and so is one of our two fabrics,
the other by unix sockets. All come from this process, by the same number of threads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from grafos import Fabric, MemBuilder, MemLease
from grafos._calls import new_request_id
from grafos_proto.v1 import admission_pb2
from tests.bench import peers
from tests.bench.harness import Bench, Party, Result

NAME = "acquire_rate"
BY_TLS = "grafos, grant + mint, gRPC with mutual TLS"
OURS, BIND, WHOLE = "grafos, grant + mint", "grafos, bind", "grafos, acquire + bind"
GRANT, GRANT_TXN = "etcd LeaseGrant", "etcd LeaseGrant + Txn"
IN_FLIGHT = 64
WHAT = f"leases per second, {IN_FLIGHT} in flight, release not timed"
COUNT = 1_024
PEER_SHARE_MAX = 0.5
"""etcd's rate at the most half of ours."""
VALUE = b"v" * 64
RELEASE_MS = 10_000
T = TypeVar("T")


def run(bench: Bench, result: Result) -> None:
    with ExitStack() as ends:
        _, fabric = ends.enter_context(bench.fabric())
        _, far = ends.enter_context(bench.fabric(tcp=True))
        pool = ends.enter_context(ThreadPoolExecutor(IN_FLIGHT))
        parties = [
            Party(OURS, lambda count: granted(fabric, pool, count), "1/s"),
            Party(BY_TLS, lambda count: granted(far, pool, count), "1/s"),
            Party(BIND, lambda count: bound(fabric, pool, count // 8), "1/s"),
            Party(WHOLE, lambda count: ours(fabric, pool, count // 8), "1/s"),
        ]
        member = bench.with_peer(result, GRANT, lambda: peers.etcd(bench.place), ends)
        if member is not None:
            parties += [
                Party(GRANT, lambda count: grants(member, pool, count), "1/s"),
                Party(GRANT_TXN, grants_with_keys(member, pool), "1/s"),
            ]
        bench.take_turns(result, parties, max(8 * IN_FLIGHT, bench.count(COUNT)))
    mine, theirs = result.p50(BY_TLS), result.p50(GRANT)
    share = theirs / mine if mine and theirs else None
    result.judge(
        "etcd's LeaseGrant/s as a share of our grants/s, both with mutual TLS",
        PEER_SHARE_MAX,
        share,
        "x",
    )
    result.notes.append("one rate per round; more is better")


def granted(fabric: Fabric, pool: ThreadPoolExecutor, count: int) -> Mapping[str, Sequence[float]]:
    """The grant and the token, as `acquire` asks for them."""
    request = MemBuilder().min_bytes(4096)._request
    answers, rate = rated(pool, count, lambda: fabric._granted(request))
    list(pool.map(lambda answer: given_back(fabric, answer), answers))
    return {"total": [rate]}


def given_back(fabric: Fabric, answer: Any) -> None:
    request = admission_pb2.ReleaseRequest(
        request_id=new_request_id(), lease_id=answer.lease.lease_id
    )
    fabric._asked("Release", request, RELEASE_MS)


def bound(fabric: Fabric, pool: ThreadPoolExecutor, count: int) -> Mapping[str, Sequence[float]]:
    """What was granted before is bound now."""
    request = MemBuilder().min_bytes(4096)._request
    waiting = iter(list(pool.map(lambda _: fabric._granted(request), range(count))))
    leases, rate = rated(
        pool, count, lambda: fabric._bind("Bind", next(waiting), request, MemLease)
    )
    list(pool.map(MemLease.release, leases))
    return {"total": [rate]}


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
