"""What a closed fabric must not leave behind on the machine: processes, memories."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Final

from grafos._cluster.description import start_ticks

GONE_S_MAX: Final = 5.0
LOOK_S: Final = 0.02


def alive_of(pids: Mapping[str, int]) -> list[str]:
    return [f"{name} ({pid})" for name, pid in pids.items() if start_ticks(pid) is not None]


def left_behind(pids: Mapping[str, int], seconds: float = GONE_S_MAX) -> list[str]:
    """Processes of a fabric that was closed and that still run when the time is up."""
    until = time.monotonic() + seconds
    while (left := alive_of(pids)) and time.monotonic() < until:
        time.sleep(LOOK_S)
    return [f"a process is left: {each}" for each in left]


def processes_naming(text: str) -> list[int]:
    """Processes with this text in their command line, other than our own."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if text.encode() in file.read():
                    found.append(int(name))
        except OSError:
            continue
    return found
