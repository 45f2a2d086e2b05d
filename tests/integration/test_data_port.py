"""The data port of real processes: its front is killed under load, again and again."""

from __future__ import annotations

import os
import signal
import threading
import time

from grafos import Disconnected, MemBuilder
from grafos._local import LocalFabric
from grafos_core.failure import FabricError

KILLS = 3
WORKERS = 3
BACK_S_MAX = 10.0
SPARE_FILES = 4
"""Calls that went round the port keep a connection each."""


def test_a_front_that_is_killed_under_load_costs_holders_time_and_no_bytes() -> None:
    """Whoever was cut off in an operation does it again; what is read is what was written last."""
    with LocalFabric(memory_bytes=8 << 20) as fabric:
        with MemBuilder().min_bytes(1 << 20).lease_secs(60).acquire() as lease:
            lease._let_go()
            memory = lease.mem()
            memory.read(0, 1)
            files = len(os.listdir("/proc/self/fd"))
            assert memory.path == "port"
            stopped, done = threading.Event(), [0] * WORKERS
            wrong: list[str] = []

            def work(index: int) -> None:
                number = 0
                while not stopped.is_set():
                    mine = number.to_bytes(8, "little") * 8192
                    try:
                        memory.write(index * 65_536, mine)
                        found = memory.read(index * 65_536, 65_536)
                    except Disconnected:  # the front took longer to come back than one operation
                        continue
                    except FabricError as failed:
                        wrong.append(repr(failed))
                        return
                    if found != mine:
                        wrong.append(f"{index}: {found[:8]!r} for {mine[:8]!r}")
                    number += 1
                    done[index] = number

            threads = [threading.Thread(target=work, args=(index,)) for index in range(WORKERS)]
            for thread in threads:
                thread.start()
            for _ in range(KILLS):
                before = list(done)
                front = fabric.pids()["node-n1/front"]
                os.kill(front, signal.SIGKILL)
                until = time.monotonic() + BACK_S_MAX
                while any(now < then + 20 for now, then in zip(done, before, strict=True)):
                    assert time.monotonic() < until, (done, before, wrong)
                    time.sleep(0.02)
            stopped.set()
            for thread in threads:
                thread.join(BACK_S_MAX)
                assert not thread.is_alive()
            assert not wrong
            assert lease.valid
            until = time.monotonic() + BACK_S_MAX
            while memory.path != "port":
                assert time.monotonic() < until
                time.sleep(0.02)
        assert len(os.listdir("/proc/self/fd")) <= files + SPARE_FILES
