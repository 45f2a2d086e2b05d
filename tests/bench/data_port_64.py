"""Reading and writing 64 bytes over the data port, one at a time, beside redis-py."""

from __future__ import annotations

from contextlib import ExitStack

from tests.bench import data_port, peers
from tests.bench.harness import Bench, Result

NAME = "data_port_64"
WHAT = "64 B over the data port, one at a time"
COUNT, VALUE = 1_500, b"r" * 64
LIMITS_US = {"unix, one core": 20.0, "unix, two cores": 60.0, "TLS, one core": 120.0}


def run(bench: Bench, result: Result) -> None:
    with ExitStack() as ends:
        local, _ = ends.enter_context(bench.fabric(tcp=True))
        found = []
        for kind, start in (("unix", peers.redis_server), ("TLS", peers.redis_over_tls)):
            served = data_port.over(local, ends, tls=kind == "TLS")
            memory = served.memory
            for verb, work in (
                ("read", lambda memory=memory: memory.read(0, 64)),
                ("write", lambda memory=memory: memory.write(0, VALUE)),
            ):
                found += data_port.parties(f"grafos {verb}, {kind}", work, served.pid)
            name = f"redis-py, {kind}"
            peer = bench.with_peer(result, name, lambda start=start: start(bench.place), ends)  # type: ignore[misc]
            if peer is not None:
                peer.client.set("k", VALUE)
                client = peer.client
                for verb, work in (
                    ("GET", lambda client=client: client.get("k")),
                    ("SET", lambda client=client: client.set("k", VALUE)),
                ):
                    found += data_port.parties(f"redis-py {verb}, {kind}", work, peer.pid)
        bench.take_turns(result, found, bench.count(COUNT))
    for where, limit in LIMITS_US.items():
        result.judge(f"read, {where}", limit, result.p50(f"grafos read, {where}"), "us")
    for where in (*LIMITS_US, "TLS, two cores"):
        for ours, theirs in (("read", "GET"), ("write", "SET")):
            result.judge_ratio(
                f"grafos {ours}, {where}", f"redis-py {theirs}, {where}", 1.0,
                f"{ours} against redis-py, {where}",
            )  # fmt: skip
