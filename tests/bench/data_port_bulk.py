"""Reading and writing a mebibyte over the data port, beside redis-py."""

from __future__ import annotations

import os
from contextlib import ExitStack

from tests.bench import data_port, peers
from tests.bench.harness import Bench, Result

NAME = "data_port_bulk"
WHAT = "1 MiB over the data port, one at a time"
COUNT, SIZE = 60, 1 << 20
GB_PER_S = {"unix": 3.0, "TLS": 1.0}
OF_REDIS = 1 / 1.5


def run(bench: Bench, result: Result) -> None:
    data = os.urandom(SIZE)
    with ExitStack() as ends:
        local, _ = ends.enter_context(bench.fabric(tcp=True))
        found = []
        for kind, start in (("unix", peers.redis_server), ("TLS", peers.redis_over_tls)):
            served = data_port.over(local, ends, tls=kind == "TLS")
            memory = served.memory
            for verb, work in (
                ("read", lambda memory=memory: memory.read(0, SIZE)),
                ("write", lambda memory=memory: memory.write(0, data)),
            ):
                found += data_port.parties(f"grafos {verb}, {kind}", work, served.pid)
            name = f"redis-py, {kind}"
            peer = bench.with_peer(result, name, lambda start=start: start(bench.place), ends)  # type: ignore[misc]
            if peer is not None:
                client = peer.client
                for verb, work in (
                    ("SET", lambda client=client: client.set("k", data)),
                    ("GET", lambda client=client: client.get("k")),
                ):
                    found += data_port.parties(f"redis-py {verb}, {kind}", work, peer.pid)
        bench.take_turns(result, found, bench.count(COUNT))
    for kind, rate in GB_PER_S.items():
        for ours, theirs in (("read", "GET"), ("write", "SET")):
            mine, limit_us = f"grafos {ours}, {kind}, two cores", SIZE / rate / 1000
            what = f"{ours}, {kind}: {rate:.0f} GB/s"
            result.judge(what, limit_us, result.p50(mine), "us")
            result.judge_ratio(
                mine, f"redis-py {theirs}, {kind}, two cores", OF_REDIS,
                f"{ours} against redis-py, {kind}",
            )  # fmt: skip
