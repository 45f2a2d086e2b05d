"""Many requests at a time, one message to the ledger.

Whoever finds nobody sending sends at once, alone; what arrives meanwhile goes together in the next
message, from a thread of its own. So one request waits for nothing, and a hundred cost two
messages.

Rules. A message that several share is sent on nobody's behalf, so no caller's short deadline cuts
the others off. Whoever waits no longer and was not sent yet is taken out of the queue: nothing is
decided for somebody who has gone. What breaks one message reaches everybody in it and nobody else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from grafos_core import failure
from grafos_core.failure import FabricError, InvariantViolation

BATCH_MAX: Final = 128
"""Half of what the ledger takes in one message: requests are about 1 KiB at most, and a message of
ours has 256 KiB."""
WAITING_MAX: Final = 4_096

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Ask, Answer]):
    ask: Ask
    done: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    error: FabricError | InvariantViolation | None = None


class Coalescer(Generic[Ask, Answer]):
    """`send` takes a batch and gives an answer for each, in order, or raises for all of them."""

    def __init__(self, send: Callable[[Sequence[Ask]], Sequence[Answer]]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._queue: deque[_Waiting[Ask, Answer]] = deque()
        self._sending = False

    def __call__(self, ask: Ask, timeout_ms: int) -> Answer:
        """The answer to `ask`. DEADLINE says in `detail` whether it may have taken effect."""
        mine: _Waiting[Ask, Answer] = _Waiting(ask)
        if self._joins_queue(mine):
            if not mine.done.wait(max(0, timeout_ms) / 1000):
                raise failure.of("DEADLINE", self._withdraw(mine))
        else:
            self._send_alone(mine)
        if mine.error is not None:
            raise mine.error
        assert mine.answer is not None
        return mine.answer

    def _joins_queue(self, mine: _Waiting[Ask, Answer]) -> bool:
        """Whether somebody is sending already; if not, the caller has to from now on."""
        with self._lock:
            if not self._sending:
                self._sending = True
                return False
            if len(self._queue) >= WAITING_MAX:
                raise failure.of("RATE", retry_after_ms=100)
            self._queue.append(mine)
            return True

    def _withdraw(self, mine: _Waiting[Ask, Answer]) -> str:
        """Take back what was not sent; what is then known."""
        with self._lock:
            if mine in self._queue:
                self._queue.remove(mine)
                return "nothing was asked of the ledger yet"
        return "whether it took effect is not known"

    def _send_alone(self, mine: _Waiting[Ask, Answer]) -> None:
        """In the caller's own thread, and within its own deadline."""
        try:
            self._answer([mine])
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        """Leave what has gathered to a thread that serves nobody in particular."""
        with self._lock:
            if not self._queue:
                self._sending = False
                return
        threading.Thread(target=self._send_gathered, name="commit", daemon=True).start()

    def _send_gathered(self) -> None:
        """Send until nobody waits; what breaks this thread is passed on like a caller's own."""
        all_sent = False
        try:
            while batch := self._next_batch():
                self._answer(batch)
            all_sent = True
        finally:
            if not all_sent:
                self._pass_on()

    def _next_batch(self) -> list[_Waiting[Ask, Answer]]:
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
            self._sending = bool(batch)
            return batch

    def _answer(self, batch: list[_Waiting[Ask, Answer]]) -> None:
        """Every one of them gets its answer or the error, whatever `send` does."""
        try:
            answers = self._send([waiting.ask for waiting in batch])
            failure.invariant(len(answers) == len(batch), "an answer for each request")
            for waiting, answer in zip(batch, answers, strict=True):
                waiting.answer = answer
        except (FabricError, InvariantViolation) as error:
            for waiting in batch:
                waiting.error = error  # raised by each caller, where its kind is dealt with
        except OSError as error:
            for waiting in batch:
                waiting.error = failure.of("INTERNAL")
                waiting.error.__cause__ = error
        finally:
            for waiting in batch:
                if waiting.answer is None and waiting.error is None:
                    waiting.error = failure.of("INTERNAL")
                waiting.done.set()
