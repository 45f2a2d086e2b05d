"""Control's side of the warden: starts it, keeps it informed, replaces it when it dies or hangs.

Rules. The warden must hear from us often enough to know that we live, and answer what it is asked
soon enough that we know the same of it: one that owes an answer for too long is killed, like one
that died. What an old one still says is not heard. For the owner's thread, but for the reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from services.nodeagent import children
from services.nodeagent.children import ANSWER_MS_MAX, BackOff, Child, Line, Owed
from services.nodeagent.ipc import Message, close_all
from services.nodeagent.pidwatch import ProcessWatch

MODULE: Final = "services.nodeagent.warden"
PING_MS: Final = 1_000
BYE_S: Final = 2.0


class WardenEvents(Protocol):
    """What control does about its warden; `taken` comes from the link's thread."""

    def started(self) -> None: ...

    def lost(self) -> None: ...

    def broken(self) -> None: ...

    def taken(self, message: Message) -> None: ...


class WardenLine:
    """The warden of this moment, if there is one."""

    def __init__(
        self,
        state_dir: Path,
        gate_fd: int,
        boot_epoch: int,
        watch: ProcessWatch,
        in_owner: Callable[[Callable[[], None]], None],
        events: WardenEvents,
        clock_ms: Callable[[], int],
        *,
        development: bool,
    ) -> None:
        self._state_dir, self._gate_fd, self._boot_epoch = state_dir, gate_fd, boot_epoch
        self._development = development
        self._watch, self._in_owner, self._events = watch, in_owner, events
        self._clock_ms = clock_ms
        self._child: Child | None = None
        self._line: Line | None = None
        self._back_off = BackOff()
        self._owed = Owed(clock_ms())
        self._ping_ms = 0
        self._front: tuple[int, int] | None = None
        self._wanted = False
        self.restarts = 0

    @property
    def pid(self) -> int:
        return self._child.pid if self._child else 0

    def start(self) -> None:
        self._wanted = True
        self._back_off.due_ms = self._clock_ms()
        self.tick()

    def tick(self) -> int | None:
        now_ms = self._clock_ms()
        if self._wanted and self._child is None and self._back_off.take(now_ms):
            self._spawn(now_ms)
        if self._owed.waited_ms(now_ms) > ANSWER_MS_MAX:
            self.kill()
        if self._child is None:
            due_ms = self._back_off.due_ms
            return None if due_ms is None else max(0, due_ms - now_ms)
        if now_ms >= self._ping_ms:
            self._ping_ms = now_ms + PING_MS
            self.ask({"op": "ping"}, [], lambda answer: None)
        return max(0, self._ping_ms - now_ms)

    def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> bool:
        return self._line is not None and self._line.send(message, fds)

    def ask(
        self,
        message: Mapping[str, Any],
        fds: Sequence[int],
        answered: Callable[[Message | None], None],
    ) -> None:
        if self._line is None:
            answered(None)
            return
        number = self._owed.begin(self._clock_ms())

        def settled(answer: Message | None) -> None:
            self._owed.settle(number)
            answered(answer)

        self._line.ask(message, fds, settled)

    def tell_front(self, pid: int, pidfd: int | None) -> None:
        """Which front it has to end if we die."""
        if pidfd is not None:
            self._front = (pid, pidfd)
            self.send({"op": "front", "pid": pid}, [pidfd])

    def kill(self) -> None:
        child, self._child, self._line = self._child, None, None
        if child is None:
            return
        child.kill()
        child.close()
        self._owed.clear()
        self.restarts += 1
        self._back_off.died(started_ms=child.started_ms, now_ms=self._clock_ms())
        self._events.lost()

    def say_bye(self) -> None:
        """Nothing is held any more: it may go, and is waited for."""
        self._wanted = False
        child, line = self._child, self._line
        self._child, self._line = None, None
        if child is None or line is None:
            return
        line.send({"op": "bye"})
        if child.ended_within(BYE_S):
            child.close()  # otherwise it holds something: it stays, and the next agent asks it

    def _spawn(self, now_ms: int) -> None:
        arguments = [
            *("--gate", str(self._gate_fd)),
            *("--state", str(self._state_dir)),
            *("--boot-epoch", str(self._boot_epoch)),
        ]
        if self._development:
            arguments.append("--development")
        child = children.spawn(MODULE, arguments, [self._gate_fd], now_ms)
        self._child = child

        def gone() -> None:
            self._in_owner(lambda: self._gone(child))

        def heard(message: Message, fds: list[int]) -> None:
            close_all(fds)
            if self._child is child and message.get("op") == "taken":
                self._events.taken(message)

        self._line = Line(child.link, heard, gone)
        self._line.start("warden")
        self._watch.add(children.exited_pidfd(child), gone)
        self._ping_ms = 0
        if self._front is not None:
            self.tell_front(*self._front)
        self._events.started()

    def _gone(self, child: Child) -> None:
        """One that was killed is replaced. One that ended by itself has closed the gate page for
        good and taken everything back: with that page nothing can be served any more."""
        if self._child is not child:
            return
        if child.ended_within(BYE_S) and child.process.returncode >= 0:
            self._events.broken()
        self.kill()
