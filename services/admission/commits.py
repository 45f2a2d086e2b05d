"""Many requests at a time, one message to the ledger.

Whoever finds nobody sending sends at once, alone; what arrives meanwhile goes together in the next
message. So one request waits for nothing, and a hundred cost two messages.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from grafos_core import failure
from grafos_core.failure import FabricError

BATCH_MAX = 256
WAITING_MAX = 4096

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Waiting(Generic[Ask, Answer]):
    ask: Ask
    done: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    error: FabricError | None = None


class Coalescer(Generic[Ask, Answer]):
    """`send` takes a batch and gives an answer for each, in order, or raises for all of them."""

    def __init__(self, send: Callable[[Sequence[Ask]], Sequence[Answer]]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._queue: deque[_Waiting[Ask, Answer]] = deque()
        self._sending = False

    def __call__(self, ask: Ask, timeout_ms: int) -> Answer:
        """The answer to `ask`. A wait that ends first leaves it unknown whether it took effect."""
        mine: _Waiting[Ask, Answer] = _Waiting(ask)
        if self._join(mine):
            self._lead(mine)
        if not mine.done.wait(timeout_ms / 1000):
            raise failure.of("DEADLINE")
        if mine.error is not None:
            raise mine.error
        assert mine.answer is not None
        return mine.answer

    def _join(self, mine: _Waiting[Ask, Answer]) -> bool:
        with self._lock:
            if len(self._queue) >= WAITING_MAX:
                raise failure.of("RATE", retry_after_ms=100)
            self._queue.append(mine)
            leads, self._sending = not self._sending, True
            return leads

    def _lead(self, mine: _Waiting[Ask, Answer]) -> None:
        """Send until this thread's own is answered; then somebody who waits leads, or nobody."""
        while True:
            with self._lock:
                batch = [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]
                if not batch:
                    self._sending = False
                    return
            self._answer(batch)
            if mine.done.is_set() and self._hand_over():
                return

    def _hand_over(self) -> bool:
        """Give the lead to a thread of its own when there is more to do."""
        with self._lock:
            if not self._queue:
                self._sending = False
                return True
            first = self._queue[0]
        threading.Thread(target=self._lead, args=(first,), name="commit", daemon=True).start()
        return True

    def _answer(self, batch: list[_Waiting[Ask, Answer]]) -> None:
        try:
            answers = self._send([waiting.ask for waiting in batch])
            failure.invariant(len(answers) == len(batch), "an answer for each request")
            for waiting, answer in zip(batch, answers, strict=True):
                waiting.answer = answer
        except FabricError as error:
            for waiting in batch:
                waiting.error = error
        finally:
            for waiting in batch:
                if waiting.answer is None and waiting.error is None:
                    waiting.error = failure.of("INTERNAL")
                waiting.done.set()
