"""How much memory a fabric may lease out on this machine, unless somebody says a number.

Rules. A quarter of what could be had now: of what the kernel says is available and of what the
control group still allows, whichever is less. Leased memory is resident memory, and the rest of the
machine did not ask for a fabric.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SHARE: Final = 4
"""One part of so many."""
GRANULE: Final = 1 << 20
NODE_BYTES_MIN: Final = 16 << 20
UNLIMITED: Final = 1 << 60
"""Control groups write "no limit" as a huge number; this is more than any machine has."""


def memory_for_each(nodes: int, root: Path = Path("/")) -> int:
    """Bytes that each of so many nodes leases out by default."""
    available = min(memory_available(root), group_headroom(root))
    each = available // SHARE // nodes // GRANULE * GRANULE
    return max(NODE_BYTES_MIN, each)


def memory_available(root: Path = Path("/")) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return 0


def group_headroom(root: Path = Path("/")) -> int:
    """What the tightest control group above this process still allows; both versions."""
    headroom = UNLIMITED
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = ("sys/fs/cgroup", "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            files = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        headroom = min(headroom, _tightest(root / files[0], path, files[1], files[2]))
    return headroom


def _tightest(top: Path, path: str, limit_name: str, usage_name: str) -> int:
    headroom = UNLIMITED
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts) + 1):
        folder = top.joinpath(*parts[:depth])
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and limit < UNLIMITED:
            headroom = min(headroom, max(0, limit - (usage or 0)))
    return headroom


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
