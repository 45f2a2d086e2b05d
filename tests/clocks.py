"""Clocks that a test can step, slew and put to sleep, in real processes of ours.

Each party has a page of its own: whoever is started with `environment()` looks at it whenever he
reads the time. Waiting is not shifted, nor is the monotonic clock: a step of boottime alone is what
a suspended machine looks like to those who wake up on it.

Libraries keep the right time: TLS reads the kernel's clock, and gRPC reckons deadlines by
`time.time()`, which stays as it is, since its other half reads the kernel's clock too.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

MODULES = {
    "ledger": "services.ledger",
    "admission": "services.admission",
    "audit": "services.audit",
    "agent": "services.nodeagent",
    "front": "services.nodeagent.front",
    "warden": "services.nodeagent.warden",
    "holder": "tests.integration.visitor",
}
NODE = ("agent", "front", "warden")
"""One machine, as far as its clocks go."""
WALL, BOOT, RATE, SINCE = range(4)
SHIM = """
import mmap, os, struct, time
folder = os.environ.get("SHIFTED_CLOCKS", "")
words = open("/proc/self/cmdline", "rb").read().split(b"\\0")
module = words[words.index(b"-m") + 1].decode() if b"-m" in words else ""
path = os.path.join(folder, module)
if folder and module and os.path.exists(path):
    with open(path, "rb") as file:
        page = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    right_wall_ns, right_ns, boot = time.time_ns, time.clock_gettime_ns, time.CLOCK_BOOTTIME
    def wall_ns():
        return right_wall_ns() + struct.unpack_from("q", page, 0)[0]
    def clock_ns(clock):
        now_ns = right_ns(clock)
        if clock != boot:
            return now_ns
        _, shift_ns, rate_ppm, since_ns = struct.unpack_from("4q", page, 0)
        return now_ns + shift_ns + (now_ns - since_ns) * rate_ppm // 1_000_000
    time.time_ns, time.clock_gettime_ns = wall_ns, clock_ns
"""


class Clocks:
    """The hand on everybody's clocks. Parties are named as in `MODULES`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(SHIM)
        self._pages: dict[str, mmap.mmap] = {}
        for party, module in MODULES.items():
            path = folder / module
            path.write_bytes(bytes(mmap.PAGESIZE))
            with path.open("r+b") as file:
                self._pages[party] = mmap.mmap(file.fileno(), 0)

    def environment(self) -> dict[str, str]:
        """For whoever is to live by these clocks."""
        known = os.environ.get("PYTHONPATH", "")
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self._folder), known])),
            "SHIFTED_CLOCKS": str(self._folder),
        }

    def step_wall(self, by_ms: int, *parties: str) -> None:
        for page in self._of(parties):
            self._put(page, WALL, self._get(page, WALL) + by_ms * 1_000_000)

    def sleep(self, for_ms: int, *parties: str) -> None:
        """As if the machine had been suspended: boottime and wall time have gone on."""
        for page in self._of(parties):
            self._put(page, BOOT, self._get(page, BOOT) + for_ms * 1_000_000)
        self.step_wall(for_ms, *parties)

    def slew_boot(self, rate_ppm: int, *parties: str) -> None:
        """From now on boottime runs this much too fast, once for each party."""
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        for page in self._of(parties):
            self._put(page, SINCE, now_ns)
            self._put(page, RATE, rate_ppm)

    def right_wall(self) -> None:
        for page in self._pages.values():
            self._put(page, WALL, 0)

    def _of(self, parties: tuple[str, ...]) -> Iterator[mmap.mmap]:
        return (self._pages[party] for party in parties)

    def _get(self, page: mmap.mmap, at: int) -> int:
        found: int = struct.unpack_from("q", page, 8 * at)[0]
        return found

    def _put(self, page: mmap.mmap, at: int, value: int) -> None:
        struct.pack_into("q", page, 8 * at, value)
