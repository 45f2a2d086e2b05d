"""Control's side of the front: starts it, opens everything to it, hears holders through it.

Rules. A front is started whenever there is none, and a fresh one first gets every live lease and
the causes of those that ended, and only then lets holders in. What arrives from a front that has
been replaced is not heard. All of this happens in the owner's thread, but for the reading of the
link, where tokens are verified.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from grafos_core.failure import FabricError
from services.nodeagent import children
from services.nodeagent.children import ANSWER_MS_MAX, BackOff, Child, Line, Owed
from services.nodeagent.frontdesk import failure_message
from services.nodeagent.ipc import Message, close_all
from services.nodeagent.pidwatch import ProcessWatch

MODULE: Final = "services.nodeagent.front"
STOP_S: Final = 1.5

Reply = Callable[[Mapping[str, Any]], None]


class Desk(Protocol):
    """What control does for holders. Called in the link's thread."""

    def asked(self, message: Message, fds: list[int], reply: Reply) -> None: ...


@dataclass(frozen=True, slots=True)
class FrontFlags:
    """How a front is started."""

    gate_fd: int
    listen: str
    identity_dir: str
    handover: str
    block_file: str
    block_bytes: int
    log_level: str
    development: bool
    """Whether fault points may be armed."""

    def arguments(self, listen: str, data_port: int) -> list[str]:
        return [
            *("--parent", str(os.getpid())),
            *("--gate", str(self.gate_fd)),
            *("--listen", listen),
            *("--data-port", str(data_port)),
            *("--identity-dir", self.identity_dir),
            *("--handover", self.handover),
            *("--block-file", self.block_file),
            *("--block-bytes", str(self.block_bytes)),
            *("--log-level", self.log_level),
            *(["--development"] if self.development else []),
        ]


class FrontLine:
    """The front of this moment, if there is one. For the owner's thread."""

    def __init__(
        self,
        flags: FrontFlags,
        desk: Desk,
        watch: ProcessWatch,
        in_owner: Callable[[Callable[[], None]], None],
        lost: Callable[[], None],
        clock_ms: Callable[[], int],
    ) -> None:
        self._flags, self._desk, self._watch = flags, desk, watch
        self._in_owner, self._lost, self._clock_ms = in_owner, lost, clock_ms
        self._child: Child | None = None
        self._line: Line | None = None
        self._back_off = BackOff()
        self._wanted = False
        self._owed = Owed(clock_ms())
        self.endpoint = ""
        """Where holders connect; the same after every restart."""
        self.data_port = 0
        """As `endpoint`; 0: none yet, or no network."""
        self.restarts = 0

    @property
    def pid(self) -> int:
        return self._child.pid if self._child else 0

    @property
    def pidfd(self) -> int | None:
        return self._child.pidfd if self._child else None

    def start(self) -> None:
        self._wanted = True
        self._back_off.due_ms = self._clock_ms()
        self.tick()

    def tick(self) -> int | None:
        """Start what is due; how long until that may be, None: nothing is."""
        now_ms = self._clock_ms()
        if self._owed.waited_ms(now_ms) > ANSWER_MS_MAX:
            self.kill()
        if self._wanted and self._child is None and self._back_off.take(now_ms):
            self._spawn(now_ms)
        due_ms = self._back_off.due_ms
        return None if due_ms is None else max(0, due_ms - now_ms)

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
        else:
            self._line.ask(message, fds, answered)

    def expect(self, message: Mapping[str, Any]) -> None:
        """Something that it has to do, though nobody waits. One that does not
        answer in time is no use to anybody: it is killed at a tick, and the next one started."""
        number = self._owed.begin(self._clock_ms())
        self.ask(message, [], lambda answer: self._owed.settle(number))

    def kill(self) -> None:
        """End it, and have nothing of it left when this returns."""
        child, self._child, self._line = self._child, None, None
        if child is None:
            return
        child.kill()
        child.close()
        self._owed.clear()
        self.restarts += 1
        self._back_off.died(started_ms=child.started_ms, now_ms=self._clock_ms())
        self._lost()

    def stop(self) -> None:
        """For good."""
        self._wanted = False
        self.kill()

    def _spawn(self, now_ms: int) -> None:
        listen = self.endpoint or self._flags.listen
        child = children.spawn(
            MODULE, self._flags.arguments(listen, self.data_port), [self._flags.gate_fd], now_ms
        )
        self._child = child

        def gone() -> None:
            self._in_owner(lambda: self._gone(child))

        def heard(message: Message, fds: list[int]) -> None:
            self._heard(child, message, fds)

        self._line = Line(child.link, heard, gone)
        self._line.start("front")
        self._watch.add(children.exited_pidfd(child), gone)

    def _gone(self, child: Child) -> None:
        if self._child is child:
            self.kill()

    def _heard(self, child: Child, message: Message, fds: list[int]) -> None:
        line = self._line
        if self._child is not child or line is None:
            close_all(fds)
            return
        if message["op"] == "ready":
            self.endpoint, self.data_port = message["endpoint"], message["data_port"]

        def reply(answer: Mapping[str, Any]) -> None:
            line.reply(message, answer)

        try:
            self._desk.asked(message, fds, reply)
        except FabricError as refusal:
            reply({"failure": failure_message(refusal)})
