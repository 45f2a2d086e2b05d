"""Notices at once when a process dies: ours, or a holder's.

Rules. A pidfd names a process for good, so a number that is used again for another process is
never mistaken for the one that was meant. One thread waits for all of them; it calls back once per
process and closes the descriptor. Descriptors handed in belong to the watch.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

PROCESSES_MAX: Final = 8_192


@dataclass(slots=True)
class Watched:
    """One process; what `add` gives and `remove` takes."""

    pidfd: int
    died: Callable[[], None]
    is_open: bool = False


class ProcessWatch:
    """Constructed without effect; `start` makes the thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_here, self._wake_there = socket.socketpair()
        self._lock = threading.Lock()
        self._new: list[Watched] = []
        self._gone: list[Watched] = []

    def start(self) -> None:
        self._wake_here.setblocking(False)
        self._wake_there.setblocking(False)
        self._selector.register(self._wake_there, selectors.EVENT_READ, None)
        threading.Thread(target=self._run, name="pidwatch", daemon=True).start()

    def add(self, pidfd: int, died: Callable[[], None]) -> Watched:
        """`died` is called from the watch's thread, also if the process is dead already."""
        watched = Watched(pidfd, died)
        with self._lock:
            self._new.append(watched)
        self._wake()
        return watched

    def remove(self, watched: Watched) -> None:
        """Close it without a call. Nothing happens if its process has died before."""
        with self._lock:
            self._gone.append(watched)
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_here.send(b".")
        except BlockingIOError:
            pass  # it is awake as it is

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._wake_there.recv(4_096)
                else:
                    self._forget(key.data)
                    key.data.died()
            self._take_up()

    def _take_up(self) -> None:
        with self._lock:
            new, self._new = self._new, []
            gone, self._gone = self._gone, []
        for watched in new:
            if len(self._selector.get_map()) >= PROCESSES_MAX:
                os.close(watched.pidfd)  # its connection still tells of its end
                continue
            self._selector.register(watched.pidfd, selectors.EVENT_READ, watched)
            watched.is_open = True
        for watched in gone:
            if watched.is_open:
                self._forget(watched)

    def _forget(self, watched: Watched) -> None:
        watched.is_open = False
        self._selector.unregister(watched.pidfd)
        os.close(watched.pidfd)
