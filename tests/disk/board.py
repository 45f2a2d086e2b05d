"""A disk that writes down, delays, fails or kills, put between real processes and their files.

`shim.c` is loaded into every process that is started while `Disk.environment` is in force; the
board is a small file that they all have mapped, so a fault is armed while they work.

Rules. Only calls on paths below `under` are touched, and of these only those that hold `match` are
counted. One armed fault strikes once, in whichever process makes the n-th such call; a `lasting`
one strikes every call from the n-th on, until it is disarmed. A sync is never failed twice by
accident: the count is shared by all processes.
"""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Final

from tests.requirements import require

SOURCE: Final = Path(__file__).with_name("shim.c")
LOOK_S: Final = 0.005
_FIELDS: Final = (
    "countdown",
    "fault",
    "fired",
    "calls",
    "delay_ms",
    "lasting",
    "pid",
    "op",
    "only",
)
_TEXTS: Final = {"match": (72, 184), "under": (256, 256), "log": (512, 256), "path": (768, 256)}
_BYTES: Final = 1024


class Fault(IntEnum):
    KILL_BEFORE = 1
    KILL_AFTER = 2
    IO = 3
    FULL = 4
    SHORT = 5
    """Half of what was to be written, and no error."""


class Op(IntEnum):
    WRITE = 1
    SYNC = 2
    TRUNCATE = 3
    ALLOCATE = 4
    RENAME = 5
    UNLINK = 6
    CREATE = 7


@cache
def library(folder: Path) -> Path:
    """The shim, compiled once for each run of the tests."""
    require("cc")
    made = folder / "shim.so"
    words = ["cc", "-O1", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-lpthread"]
    subprocess.run(words, check=True, timeout=60)
    return made


class Disk:
    """The test's side of the board."""

    def __init__(self, folder: Path, under: Path, *, log: Path | None = None) -> None:
        self._library = library(folder)
        self._path = folder / "board"
        self._path.write_bytes(bytes(_BYTES))
        with self._path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _BYTES)
        if log is not None:
            log.touch(mode=0o600)
            self._put("log", str(log))
        self.watch(under)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process must inherit for its files to lie on this disk."""
        return {"LD_PRELOAD": str(self._library), "DISK_BOARD": str(self._path)}

    def watch(self, under: Path) -> None:
        self._put("under", str(under.resolve()))

    def arm(
        self, match: str, fault: Fault, nth: int, *, only: Op | None = None, lasting: bool = False
    ) -> None:
        """The n-th call on a path with this text; of one sort only, where it is named."""
        self.disarm()
        self._put("match", match)
        self._set("only", only or 0)
        for name, value in (("calls", 0), ("fired", 0), ("fault", fault), ("lasting", lasting)):
            self._set(name, value)
        self._set("countdown", nth)

    def disarm(self) -> None:
        self._set("countdown", 0)
        self._set("lasting", 0)

    def slow(self, match: str, delay_ms: int) -> None:
        """Every sync takes so much longer; 0: as fast as it is."""
        self._put("match", match)
        self._set("delay_ms", delay_ms)

    @property
    def has_fired(self) -> bool:
        return bool(self._get("fired"))

    @property
    def calls(self) -> int:
        """Since it was armed, of those that match."""
        return self._get("calls")

    def struck(self) -> str:
        """Which call of which process the last fault has hit."""
        at, size = _TEXTS["path"]
        path = self._memory[at : at + size].split(b"\0")[0].decode()
        fault, op = Fault(self._get("fault")), Op(self._get("op"))
        return f"{fault.name} at {op.name} of {path} by {self._get('pid')}"

    def wait_fired(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.has_fired and time.monotonic() < until:
            threading.Event().wait(LOOK_S)
        return self.has_fired

    def close(self) -> None:
        self.disarm()
        self._put("under", "")
        self._memory.close()
        os.unlink(self._path)

    def _set(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._memory, 8 * _FIELDS.index(name), value)

    def _get(self, name: str) -> int:
        return int(struct.unpack_from("<q", self._memory, 8 * _FIELDS.index(name))[0])

    def _put(self, name: str, text: str) -> None:
        at, size = _TEXTS[name]
        data = text.encode()
        assert len(data) < size, f"{name} is too long: {text}"
        self._memory[at : at + size] = data.ljust(size, b"\0")
