"""Many requests at a time, few messages.

Whoever finds a way free sends at once, alone; what arrives while all ways are busy goes together in
the next message, from a thread of its own. So one request waits for nothing, and a hundred cost a
few messages. Admission asks the ledger in this way, and the SDK admission.

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
    """`send` takes a batch and gives an answer for each, in order, or raises for all of them.

    `batch_max` bounds a batch, `ways` how many of them are under way at a time.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Ask]], Sequence[Answer]],
        batch_max: int = BATCH_MAX,
        ways: int = 1,
    ) -> None:
        self._send, self._batch_max, self._ways = send, batch_max, ways
        self._lock = threading.Lock()
        self._queue: deque[_Waiting[Ask, Answer]] = deque()
        self._sending = 0

    def __call__(self, ask: Ask, timeout_ms: float) -> Answer:
        """The answer to `ask`. DEADLINE says in `detail` whether it may have taken effect."""
        found = self.offer(ask, timeout_ms, timeout_ms)
        if found is None:
            raise failure.of("DEADLINE", "nothing was asked yet")
        return found

    def offer(self, ask: Ask, timeout_ms: float, patience_ms: float) -> Answer | None:
        """The same; None: it was not sent within `patience_ms`, and will not be."""
        mine: _Waiting[Ask, Answer] = _Waiting(ask)
        if not self._joins_queue(mine):
            self._send_alone(mine)
        elif not mine.done.wait(max(0.0, min(patience_ms, timeout_ms)) / 1000):
            if self._withdraw(mine):
                return None
            if not mine.done.wait(max(0.0, timeout_ms - patience_ms) / 1000):
                raise failure.of("DEADLINE", "whether it took effect is not known")
        if mine.error is not None:
            raise mine.error
        assert mine.answer is not None
        return mine.answer

    def _joins_queue(self, mine: _Waiting[Ask, Answer]) -> bool:
        """Whether all ways are taken; if not, the caller takes one from now on."""
        with self._lock:
            if self._sending < self._ways:
                self._sending += 1
                return False
            if len(self._queue) >= WAITING_MAX:
                raise failure.of("RATE", retry_after_ms=100)
            self._queue.append(mine)
            return True

    def _withdraw(self, mine: _Waiting[Ask, Answer]) -> bool:
        """Take back what was not sent; whether that could be done."""
        with self._lock:
            if mine in self._queue:
                self._queue.remove(mine)
                return True
        return False

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
                self._sending -= 1
                return
        threading.Thread(target=self._send_gathered, name="coalesced", daemon=True).start()

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
        """What has gathered; where nothing has, the way is free again."""
        with self._lock:
            count = min(self._batch_max, len(self._queue))
            if not count:
                self._sending -= 1
            return [self._queue.popleft() for _ in range(count)]

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
