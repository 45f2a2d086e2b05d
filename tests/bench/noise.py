"""How far a run can be believed: what else this machine did meanwhile.

Rules. The same small work is done again between all rounds: if it takes longer now than before, so
did everything else. Time that the hypervisor took away and time that other programs used is read
from the kernel's own books. The verdict is in words, its numbers beside it.
"""

from __future__ import annotations

import hashlib
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench.statistic import quantile, summarize

LOOPS: Final = 5
LOOP_BYTES: Final = 1 << 20
SYNC_BYTES: Final = 4096
STEAL_QUIET, STEAL_NOISY = 0.01, 0.10
OTHERS_QUIET, OTHERS_NOISY = 0.05, 0.35
SPREAD_QUIET, SPREAD_NOISY = 1.10, 1.50
_FIELDS: Final = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


@dataclass(frozen=True, slots=True)
class Books:
    """What the kernel has counted since the start of the machine, in seconds."""

    cpu: dict[str, float]
    own: float
    """By this process and by those of its children that have ended."""

    @property
    def busy(self) -> float:
        return sum(self.cpu[name] for name in ("user", "nice", "system", "irq", "softirq"))


def read_books() -> Books:
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    numbers = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    cpu = {name: int(number) * tick_s for name, number in zip(_FIELDS, numbers, strict=False)}
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Books(cpu, sum(each.ru_utime + each.ru_stime for each in used))


def load_average() -> float:
    return os.getloadavg()[0]


class Noise:
    """Collected over one run; `report` at its end, when all that it started has ended."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "noise"
        self._block = os.urandom(LOOP_BYTES)
        self._started_ns = time.monotonic_ns()
        self._before = read_books()
        self._load_before = load_average()
        self.loops_us: list[float] = []
        self.syncs_us: list[float] = []

    def mark(self) -> None:
        """The same small work again: hash a MiB, and sync a block to the disk."""
        for _ in range(LOOPS):
            started_ns = time.perf_counter_ns()
            hashlib.sha256(self._block).digest()
            self.loops_us.append((time.perf_counter_ns() - started_ns) / 1000)
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            for _ in range(LOOPS):
                started_ns = time.perf_counter_ns()
                os.write(fd, self._block[:SYNC_BYTES])
                os.fdatasync(fd)
                self.syncs_us.append((time.perf_counter_ns() - started_ns) / 1000)
        finally:
            os.close(fd)

    def report(self) -> dict[str, Any]:
        if not self.loops_us:
            self.mark()
        after = read_books()
        wall_s = (time.monotonic_ns() - self._started_ns) / 1e9
        whole_s = max(1e-9, wall_s * (os.cpu_count() or 1))
        steal = (after.cpu["steal"] - self._before.cpu["steal"]) / whole_s
        own_s = after.own - self._before.own
        others = max(0.0, (after.busy - self._before.busy - own_s) / whole_s)
        loops = summarize(self.loops_us)
        spread = loops.p90 / loops.p50
        return {
            "verdict": verdict(spread=spread, steal=steal, others=others),
            "wall_s": wall_s,
            "load_before": self._load_before,
            "load_after": load_average(),
            "steal_share": steal,
            "others_share": others,
            "own_share": own_s / whole_s,
            "loop_us": {"p50": loops.p50, "p90": loops.p90, "p99": loops.p99},
            "loop_spread": spread,
            "loop_drift": _drift(self.loops_us),
            "sync_us": {
                "p50": quantile(self.syncs_us, 0.5),
                "p90": quantile(self.syncs_us, 0.9),
                "p99": quantile(self.syncs_us, 0.99),
            },
            "sync_drift": _drift(self.syncs_us),
        }


def _drift(values: list[float]) -> float:
    """By which share the last quarter's median differs from the first quarter's."""
    part = max(1, len(values) // 4)
    return quantile(values[-part:], 0.5) / quantile(values[:part], 0.5) - 1


def verdict(*, spread: float, steal: float, others: float) -> str:
    """`quiet`, `noisy` or `very noisy`. Shares are of all processors' time."""
    if spread > SPREAD_NOISY or steal > STEAL_NOISY or others > OTHERS_NOISY:
        return "very noisy"
    if spread > SPREAD_QUIET or steal > STEAL_QUIET or others > OTHERS_QUIET:
        return "noisy"
    return "quiet"
