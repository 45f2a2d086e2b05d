"""How long leased memory outlives its lease: 64 MiB each, timed by a process that takes no part.

    deadline        the agent lives; deadlines spread over the second
    agent killed    SIGKILL to the agent's control process; the warden takes everything back
    holder killed   SIGKILL to the holder of leases that end with it

The holder fills all pages and passes a duplicate descriptor to the observer, which polls the file's
size and pages. A lease counts as gone when its last page is gone. After a kill the clock starts
before the signal is sent. After every other kill four leases are taken back at once; those that
were held alone are also shown by themselves.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from grafos._local import LocalFabric
from tests.bench.child import Child, ChildError
from tests.bench.harness import Bench, Measured, Result
from tests.bench.statistic import quantile

NAME = "reclaim_64MiB"
WHAT = "64 MiB leases, all pages filled: from the end of the lease to gone"
SIZE_BYTES: Final = 64 << 20
FABRIC_BYTES: Final = 1 << 30
WAVE: Final = 8
"""Leases that live at a time before their deadlines."""
WAVES, WAVES_QUICK = 5, 1
EPISODES, EPISODES_QUICK = 11, 3
TTL_MS_FIRST, TTL_MS_STEP = 1_800, 137
TTL_MS_LONG: Final = 120_000
GONE_S_MAX: Final = 15.0
READY_S_MAX: Final = 40.0
LIMITS_MS: Final = {"deadline": 50.0, "agent killed": 100.0, "holder killed": 100.0}


@dataclass(slots=True)
class Stand:
    """The fabric, the observer and the socket between holders and observer."""

    local: LocalFabric
    observer: Child
    to_observer: socket.socket
    gaps_us: list[float] = field(default_factory=list)
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the observer has said so far of leases that are gone."""

    @contextmanager
    def holder(self) -> Generator[Child]:
        fd = self.to_observer.fileno()
        arguments = (str(self.local.layout.description), str(fd))
        with Child("tests.bench.holder", *arguments, pass_fds=[fd]) as child:
            child.hear()
            yield child

    def take(self, holder: Child, ttl_ms: int) -> tuple[str, int]:
        """One filled lease that the observer watches; its id and its deadline."""
        said = holder.ask({"size_bytes": SIZE_BYTES, "ttl_ms": ttl_ms})
        while True:
            watching = self.observer.hear()
            if watching.get("watching") == said["lease"]:
                return said["lease"], said["end_ns"]
            self.seen[watching["gone"]] = watching  # an earlier one, while this one was filled

    def gone(self, since_ns: dict[str, int]) -> dict[str, list[float]]:
        """Milliseconds from each lease's own instant until its file was cut, and until gone."""
        until_s = time.monotonic() + GONE_S_MAX
        while not self.seen.keys() >= since_ns.keys():
            said = self.observer.hear(max(0.01, until_s - time.monotonic()))
            self.seen[said["gone"]] = said
        found = {lease: self.seen.pop(lease) for lease in since_ns}
        self.gaps_us += [each["gap_us"] for each in found.values()]
        values = {
            name: [(each[f"{name}_ns"] - since_ns[lease]) / 1e6 for lease, each in found.items()]
            for name in ("gone", "cut")
        }
        if len(found) == 1:
            values["gone, held alone"] = values["gone"]
        return values


def run(bench: Bench, result: Result) -> None:
    with ExitStack() as ends:
        local, _ = ends.enter_context(bench.fabric(memory_bytes=FABRIC_BYTES))
        stand = open_stand(local, ends)
        for name, measure in CASES.items():
            measured = Measured(name)
            result.parties.append(measured)
            measure(bench, stand, measured)
            p99_ms = quantile(measured.series["gone"].values, 0.99)
            result.judge(f"{name}: p99", LIMITS_MS[name], p99_ms, "ms")
    gaps = stand.gaps_us
    result.notes.append(
        f"the observer had not looked for {quantile(gaps, 0.5):.0f} us (p50) and "
        f"{max(gaps):.0f} us (most) before it saw a lease gone; p99 of few is nearly the most"
    )


def open_stand(local: LocalFabric, ends: ExitStack) -> Stand:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends.enter_context(ours)
    with theirs:
        fd = theirs.fileno()
        observer = ends.enter_context(Child("tests.bench.observer", str(fd), pass_fds=[fd]))
    return Stand(local, observer, ours)


def deadlines(bench: Bench, stand: Stand, measured: Measured) -> None:
    with stand.holder() as holder:
        for _ in range(WAVES_QUICK if bench.quick else WAVES):
            bench.noise.mark()
            ttls_ms = [TTL_MS_FIRST + TTL_MS_STEP * number for number in range(WAVE)]
            ends_ns = dict(stand.take(holder, ttl_ms) for ttl_ms in ttls_ms)
            measured.add("ms", stand.gone(ends_ns))


def killed_agents(bench: Bench, stand: Stand, measured: Measured) -> None:
    for count in episodes(bench):
        bench.noise.mark()
        with stand.holder() as holder:
            leases = [stand.take(holder, TTL_MS_LONG)[0] for _ in range(count)]
            pid = stand.local.pids()["node-n1"]
            pidfd = os.pidfd_open(pid)
            try:
                killed_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)
            measured.add("ms", stand.gone(dict.fromkeys(leases, killed_ns)))
        await_successor(stand.local, pid)


def killed_holders(bench: Bench, stand: Stand, measured: Measured) -> None:
    for count in episodes(bench):
        bench.noise.mark()
        with stand.holder() as holder:
            leases = [stand.take(holder, TTL_MS_LONG)[0] for _ in range(count)]
            killed_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            holder.process.kill()
            measured.add("ms", stand.gone(dict.fromkeys(leases, killed_ns)))


def episodes(bench: Bench) -> Sequence[int]:
    """How many leases are held in each: one and four in turn, so that the first is as the last."""
    return [4 if number % 2 else 1 for number in range(EPISODES_QUICK if bench.quick else EPISODES)]


def await_successor(local: LocalFabric, pid: int) -> None:
    """Until the agent was started again and everything is ready."""
    until_s = time.monotonic() + READY_S_MAX
    while local.pids().get("node-n1") in (None, pid):
        if time.monotonic() >= until_s:
            raise ChildError("the agent was not started again")
        time.sleep(0.02)
    local.wait_ready(int(READY_S_MAX * 1000))


CASES: Final = {
    "deadline": deadlines,
    "holder killed": killed_holders,
    "agent killed": killed_agents,
}
