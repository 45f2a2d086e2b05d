"""The third process: it has descriptors of other people's leased memory and looks when it is gone.

Rules. It takes part in nothing: neither holder nor node, it only asks the kernel for the size of
files, about ten thousand times a second. It says when the file was cut to nothing, when the last of
its pages was gone, and how long it had not looked before that. It ends when its input ends, and
after ten minutes in any case.

    python -m tests.bench.observer <descriptor of a SEQPACKET socket>
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

PAUSE_S: Final = 0.0001
LIFE_S_MAX: Final = 600.0
PACKET_BYTES: Final = 4_096
SLACK_NS: Final = 1_000
"""How late the kernel may wake us up; 50 us by default, prctl(2) PR_SET_TIMERSLACK."""


@dataclass(slots=True)
class Watched:
    name: str
    fd: int
    cut_ns: int = 0
    looked_ns: int = 0


class Observer:
    """Looks at everything that it was given until it is gone."""

    def __init__(self, source: socket.socket) -> None:
        source.setblocking(False)
        self._source = source
        self._watched: list[Watched] = []

    def run(self) -> None:
        end_s = time.monotonic() + LIFE_S_MAX
        while time.monotonic() < end_s and not _has_input_ended():
            for _ in range(100):
                self._take()
                self._look()
                time.sleep(PAUSE_S)

    def _take(self) -> None:
        try:
            packet, fds, _, _ = socket.recv_fds(self._source, PACKET_BYTES, 1)
        except BlockingIOError:
            return
        if not packet:
            return
        name = json.loads(packet)["watch"]
        size = os.fstat(fds[0]).st_size
        self._watched.append(Watched(name, fds[0], looked_ns=_boot_ns()))
        _say({"watching": name, "size_bytes": size})

    def _look(self) -> None:
        for each in list(self._watched):
            found = os.fstat(each.fd)
            now_ns = _boot_ns()
            if found.st_size == 0 and not each.cut_ns:
                each.cut_ns = now_ns
            if found.st_size == 0 and found.st_blocks == 0:
                os.close(each.fd)
                self._watched.remove(each)
                gap_us = (now_ns - each.looked_ns) / 1000
                _say({
                    "gone": each.name, "cut_ns": each.cut_ns, "gone_ns": now_ns, "gap_us": gap_us,
                })  # fmt: skip
            each.looked_ns = now_ns


def _boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _has_input_ended() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def main() -> None:
    with open("/proc/self/timerslack_ns", "w", encoding="ascii") as slack:
        slack.write(str(SLACK_NS))
    with socket.socket(fileno=int(sys.argv[1])) as source:
        Observer(source).run()


if __name__ == "__main__":
    main()
