"""Sixty-four reads of 64 bytes that do not wait for each other, beside redis-py's pipeline."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tests.bench import data_port, peers
from tests.bench.harness import Bench, Result

NAME = "data_port_pipeline"
WHAT = "64 reads of 64 B at a time, by data port on a unix socket; time for all 64"
DEPTH, COUNT = 64, 400
LIMIT_US = DEPTH / 0.4
"""400,000 reads in a second."""


def run(bench: Bench, result: Result) -> None:
    parts = [(i * 64, 64) for i in range(DEPTH)]
    with ExitStack() as ends:
        local, _ = ends.enter_context(bench.fabric(tcp=True))
        served = data_port.over(local, ends, tls=False)
        lease, port = served.lease, served.port

        def requests() -> Any:
            return port.pipelined(lease.lease_id, lease.epoch, parts, timeout_ms=5_000)

        found = data_port.parties("grafos, 64 requests", requests, served.pid)
        found += data_port.parties(
            "grafos, read_many", lambda: served.memory.read_many(parts), served.pid
        )
        peer = bench.with_peer(result, "redis-py", lambda: peers.redis_server(bench.place), ends)
        if peer is not None:
            for i in range(DEPTH):
                peer.client.set(f"k{i}", bytes(64))

            def pipeline() -> Any:
                batch = peer.client.pipeline(transaction=False)
                for i in range(DEPTH):
                    batch.get(f"k{i}")
                return batch.execute()

            found += data_port.parties("redis-py pipeline", pipeline, peer.pid)
        bench.take_turns(result, found, bench.count(COUNT))
    for where in data_port.processors():
        ours = f"grafos, 64 requests, {where}"
        result.judge(f"64 requests, {where}", LIMIT_US, result.p50(ours), "us")
        result.judge_ratio(ours, f"redis-py pipeline, {where}", 1 / 3, f"against redis-py, {where}")
