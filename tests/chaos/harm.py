"""An episode in which the disk below one process fails, or is slow, or a process stands still.

    disk-<who>   one of its durable calls is killed before or after, fails, finds no room, is short
    slow-disk    every sync of everybody takes 50 to 500 ms longer, for a while
    stop-<who>   SIGSTOP, and after a while SIGCONT

Rules. The seed draws the moment, the call, the fault and how long. Nothing is killed beside what
the fault itself kills, but for the agent whose leases the warden has to take back, since only then
it writes; every law of an episode is judged as after a kill.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Final

import pytest

from grafos._local import LocalFabric
from tests.chaos.episode import Episode, Report, kill_together, new_fabric
from tests.chaos.machine import left_behind
from tests.disk.board import Disk, Fault

DISKS: Final[Mapping[str, str]] = {
    "disk-ledger": "/ledger/events/",
    "disk-audit": "/audit/chains/",
    "disk-agent": "/node-n1/surface/",
    "disk-warden": "/node-n1/warden/",
}
"""By harm: what the paths hold that it strikes."""
STOPPED: Final[Mapping[str, str]] = {
    "stop-ledger": "ledger",
    "stop-admission": "admission",
    "stop-audit": "audit",
    "stop-agent": "node-n1",
    "stop-front": "node-n1/front",
    "stop-warden": "node-n1/warden",
}
HARMS: Final = (*DISKS, "slow-disk", *STOPPED)
FIRED_S_MAX: Final = 20.0
CALLS_MAX: Final = 12
"""The fault strikes one of the next so many durable calls."""
STOP_S: Final = (0.3, 3.0)
SLOW_MS: Final = (50, 500)
SLOW_S: Final = 2.0


@contextlib.contextmanager
def on_a_bad_disk() -> Generator[tuple[LocalFabric, Disk], None, None]:
    """A fabric, every file of which lies on a disk that can be made to fail."""
    with tempfile.TemporaryDirectory(prefix="disk-") as name, pytest.MonkeyPatch.context() as patch:
        disk = Disk(Path(name), Path("/nowhere"))
        for key, value in disk.environment.items():
            patch.setenv(key, value)
        fabric = new_fabric().start()
        disk.watch(fabric.layout.state)
        try:
            yield fabric, disk
        finally:
            disk.disarm()
            fabric.close()
            disk.close()


class HarmedEpisode(Episode):
    def __init__(
        self, fabric: LocalFabric, disk: Disk, seed: int, harm: str, fault: Fault | None = None
    ) -> None:
        super().__init__(fabric, seed, harm)
        self._disk, self._harm = disk, harm
        self._fault = fault or self._dice.choice(list(Fault))
        self.struck = ""

    def _kill_in_the_middle(self) -> None:
        self._wait_operations(self._dice.randint(40, 120))
        self.report.at_kill = self.report.operations
        if self._harm in DISKS:
            self._strike()
        elif self._harm in STOPPED:
            self._stand_still(STOPPED[self._harm])
        else:
            self._disk.slow("", self._dice.randint(*SLOW_MS))
            time.sleep(SLOW_S)
            self._disk.slow("", 0)

    def _strike(self) -> None:
        nth = 1 if self._harm == "disk-warden" else self._dice.randint(1, CALLS_MAX)
        self._disk.arm(DISKS[self._harm], self._fault, nth)
        if self._harm == "disk-warden":
            self._holders[1].wait_busy()
            self._holders[1].pause()
            kill_together([self._fabric.pids()["node-n1"]])
        if self._disk.wait_fired(FIRED_S_MAX):
            self.struck = self._disk.struck()
        else:
            self.report.wrong.append(f"no durable call of {self._harm} within {FIRED_S_MAX} s")
        self._disk.disarm()

    def _stand_still(self, name: str) -> None:
        pid = self._fabric.pids()[name]
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
            time.sleep(self._dice.uniform(*STOP_S))
            with contextlib.suppress(ProcessLookupError):  # it was held for dead and replaced
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
        finally:
            os.close(descriptor)


def harmed_alone(seed: int, harm: str | None) -> Report:
    """One such episode in a fabric of its own, and nothing left of it."""
    harm = harm or random.Random(f"harm {seed}").choice(HARMS)
    with on_a_bad_disk() as (fabric, disk):
        episode = HarmedEpisode(fabric, disk, seed, harm)
        report = episode.run()
        pids = fabric.pids()
    if episode.struck:
        print(episode.struck, flush=True)
    report.wrong += left_behind(pids)
    return report
