"""The processes that control starts: how they are started, spoken to, missed and started again.

Rules. A child is executed anew, never forked off with our memory: it inherits the descriptors that
it is given and nothing else. It is started by control's main thread, since the kernel ties its life
to that thread. Whoever dies is started again, the first time at once, then after longer and longer
pauses; one that lives for ten seconds has earned a fresh start. A child is killed by its pidfd.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from services.nodeagent.ipc import Link, LinkClosed, Message, close_all, pair

BACK_OFF_MS_MIN, BACK_OFF_MS_MAX = 50, 5_000
FRESH_MS: Final = 10_000
REAP_S: Final = 5.0
AWAY_MS_MAX: Final = 1_000
"""We look several times a second; who did not for longer was suspended or stopped himself, and has
not yet read what was answered meanwhile."""
ANSWER_MS_MAX: Final = 2_500
"""A start of the interpreter on a busy machine, and twice that."""

Answered = Callable[[Message | None], None]
"""Called once: with the answer, or with None when there will be none."""


class Line:
    """A link whose answers arrive as calls, so that whoever asks never waits.

    `heard` and all answers are called from the line's one thread, `closed` too, once, at the end.
    """

    def __init__(
        self,
        link: Link,
        heard: Callable[[Message, list[int]], None],
        closed: Callable[[], None],
    ) -> None:
        self._link, self._heard, self._closed = link, heard, closed
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._asked: dict[int, Answered] = {}
        self._is_closed = False

    def start(self, name: str) -> None:
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> bool:
        """Whether it was handed over; otherwise the other side is gone, and `closed` follows."""
        try:
            self._link.send(message, fds)
        except LinkClosed:
            return False
        return True

    def ask(self, message: Mapping[str, Any], fds: Sequence[int], answered: Answered) -> None:
        number = next(self._ids)
        with self._lock:
            gone = self._is_closed
            if not gone:
                self._asked[number] = answered
        if gone:
            answered(None)
        elif not self.send({**message, "id": number}, fds):
            self._answer(number, None)

    def reply(self, question: Message, answer: Mapping[str, Any]) -> None:
        if "id" in question:
            self.send({**answer, "re": question["id"]})

    def close(self) -> None:
        self._link.close()

    def _run(self) -> None:
        try:
            while True:
                received = self._link.receive()
                if received is None:
                    continue
                message, fds = received
                if "re" in message:
                    close_all(fds)
                    self._answer(message["re"], message)
                else:
                    self._heard(message, fds)
        except LinkClosed:
            self._end()

    def _answer(self, number: int, message: Message | None) -> None:
        with self._lock:
            answered = self._asked.pop(number, None)
        if answered is not None:
            answered(message)

    def _end(self) -> None:
        with self._lock:
            self._is_closed = True
            left, self._asked = self._asked, {}
        for answered in left.values():
            answered(None)
        self._closed()


@dataclass(slots=True)
class Child:
    """One running process and our end of its link."""

    process: subprocess.Popen[bytes]
    pidfd: int
    link: Link
    started_ms: int

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """And wait for its end, which SIGKILL makes short. Idempotent."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was faster
        self.process.wait(REAP_S)

    def ended_within(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """After its end: our end of the link, and the pidfd."""
        self.link.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def spawn(module: str, arguments: Sequence[str], fds: Sequence[int], now_ms: int) -> Child:
    """Start `python -m <module>`; `--link` names its end of the link, beside `arguments`."""
    ours, theirs = pair()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--link", str(theirs.fileno()), *arguments],
            pass_fds=[theirs.fileno(), *fds],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        theirs.close()
    return Child(process, os.pidfd_open(process.pid), Link(ours), now_ms)


def exited_pidfd(child: Child) -> int:
    """A duplicate for whoever watches: it is closed there."""
    return os.dup(child.pidfd)


@dataclass(slots=True)
class BackOff:
    """When a child that died may be started again."""

    deaths: int = 0
    due_ms: int | None = field(default=None)

    def died(self, *, started_ms: int, now_ms: int) -> None:
        self.deaths = 1 if now_ms - started_ms >= FRESH_MS else self.deaths + 1
        pause_ms = 0 if self.deaths == 1 else BACK_OFF_MS_MIN << min(self.deaths - 2, 10)
        self.due_ms = now_ms + min(pause_ms, BACK_OFF_MS_MAX)

    def take(self, now_ms: int) -> bool:
        """Whether it is to be started now; asked again, no."""
        if self.due_ms is None or now_ms < self.due_ms:
            return False
        self.due_ms = None
        return True


class Owed:
    """Answers that a child owes us, and since when. Begun and settled in any thread.

    Time in which we were not looking ourselves, stopped or asleep with the machine, counts for
    nobody: its answers may lie unread.
    """

    def __init__(self, now_ms: int) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._since_ms: dict[int, int] = {}
        """By number, oldest first."""
        self._looked_ms = now_ms

    def begin(self, now_ms: int) -> int:
        number = next(self._numbers)
        with self._lock:
            self._since_ms[number] = now_ms
        return number

    def settle(self, number: int) -> None:
        with self._lock:
            self._since_ms.pop(number, None)

    def clear(self) -> None:
        with self._lock:
            self._since_ms.clear()

    def waited_ms(self, now_ms: int) -> int:
        """For the oldest of them. Called at each tick."""
        with self._lock:
            away_ms, self._looked_ms = now_ms - self._looked_ms, now_ms
            if away_ms > AWAY_MS_MAX:
                self._since_ms = {
                    number: since_ms + away_ms for number, since_ms in self._since_ms.items()
                }
            return now_ms - next(iter(self._since_ms.values()), now_ms)
