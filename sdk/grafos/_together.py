"""What the threads of one connection ask of admission at the same time goes together.

    alone      Acquire                      at once, as if there were nobody else
    beside     AcquireMany, RenewMany, …    what came while the calls before were under way

Rules. Each ask succeeds or fails alone, as if it had been sent alone. An ask that has to wait for
room, and one that was not sent within a quarter of a second because the calls before it hang, goes
its own way: nobody waits for somebody else's wait. What a shared message broke on is asked again
alone, with the same request id, so that its effect is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grafos import _clock
from grafos._lease import RENEW_MS_MAX, Lease
from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import admission_pb2
from grafos_proto.wire import failures
from grafos_proto.wire.coalescing import Coalescer

BATCH_MAX: Final = 64
"""What admission takes in one message."""
WAYS: Final = 2
"""One message is on its way while the answers of the other are read."""
PATIENCE_MS: Final = 250
SHARED_MS_MAX: Final = 5_000
_WAITS: Final = frozenset({"NODE_NOT_READY", "LEDGER_BEHIND", "PRECONDITION"})
_WAITS_IF_ASKED: Final = frozenset({"NO_CAPACITY", "QUOTA"})
_REQUESTS: Final[dict[str, Callable[..., Any]]] = {
    "Acquire": admission_pb2.AcquireManyRequest,
    "Renew": admission_pb2.RenewManyRequest,
    "Release": admission_pb2.ReleaseManyRequest,
}

Ask = Callable[[str, Any, float], Any]
"""(method, request, timeout in ms) to the answer, asked as often as needed."""


@dataclass(frozen=True, slots=True)
class _Asked:
    message: Any
    end_ms: float
    """By boottime: how long its caller waits."""

    @property
    def left_ms(self) -> float:
        return self.end_ms - _clock.boot_ms()


class Together:
    """Thread-safe. Starts a thread only when more is asked than there are ways."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lines = {method: self._line(method) for method in _REQUESTS}

    def __call__(self, method: str, message: Any, timeout_ms: float) -> Any:
        """The answer to one request; `method` is Acquire, Renew or Release."""
        asked = _Asked(message, _clock.boot_ms() + timeout_ms)
        found: Any = None
        if not message_waits(message):
            found = self._lines[method].offer(asked, timeout_ms, PATIENCE_MS)
        if found is None or (isinstance(found, FabricError) and _goes_alone(found, message)):
            return self._ask(method, message, asked.left_ms)
        if isinstance(found, FabricError):
            raise found
        return found

    def many(self, method: str, messages: Sequence[Any], timeout_ms: float) -> list[Any]:
        """The answer or the failure of each, in one message."""
        answer = self._ask(f"{method}Many", _REQUESTS[method](requests=messages), timeout_ms)
        failure.invariant(len(answer.answers) == len(messages), "an answer for each request")
        return [
            failures.failure_of(each.failure) if each.HasField("failure") else each.response
            for each in answer.answers
        ]

    def _line(self, method: str) -> Coalescer[_Asked, Any]:
        def send(batch: Sequence[_Asked]) -> Sequence[Any]:
            if len(batch) == 1:
                return [self._ask(method, batch[0].message, batch[0].left_ms)]
            timeout_ms = min(SHARED_MS_MAX, max(each.left_ms for each in batch))
            try:
                return self.many(method, [each.message for each in batch], max(1, timeout_ms))
            except FabricError as broken:
                return [_Broken.of(broken)] * len(batch)

        return Coalescer(send, BATCH_MAX, WAYS)


class _Broken(FabricError):
    """A shared message that came to nothing."""

    @staticmethod
    def of(cause: FabricError) -> _Broken:
        broken = _Broken(code=cause.code, detail=cause.detail)
        broken.__cause__ = cause
        return broken


def message_waits(message: Any) -> bool:
    """Whether it asks to wait for room: then it is the call of one alone."""
    return bool(getattr(message, "has_wait", False) and message.wait_ms)


def _goes_alone(refused: FabricError, message: Any) -> bool:
    if isinstance(refused, _Broken):
        return True
    waits = isinstance(message, admission_pb2.AcquireRequest) and not message.has_wait
    return waits and refused.code in _WAITS


def renew_together(leases: Sequence[Lease], ttl_ms: int = 0) -> list[FabricError | None]:
    """Renew all of them: one call to admission for each connection, then each at its node. What
    each failed with, in order."""
    found: dict[int, FabricError | None] = {}
    groups: dict[int, list[int]] = {}
    for index, lease in enumerate(leases):
        groups.setdefault(id(lease._fabric), []).append(index)
    for indices in groups.values():
        for start in range(0, len(indices), BATCH_MAX):
            chunk = indices[start : start + BATCH_MAX]
            failed = _renew_chunk([leases[index] for index in chunk], ttl_ms)
            found.update(zip(chunk, failed, strict=True))
    return [found[index] for index in range(len(leases))]


def _renew_chunk(leases: Sequence[Lease], ttl_ms: int) -> list[FabricError | None]:
    live = [lease for lease in leases if lease._end is None and not lease._fabric.is_forked]
    answers: dict[str, Any] = {}
    if len(live) > 1:
        # Half of what the first has left, but a second at least: a lease that is nearly over is
        # not what the others' renewal fails of.
        left_ms = min(lease.remaining_ms() for lease in live) // 2
        timeout_ms = min(RENEW_MS_MAX, max(1_000, left_ms))
        got = live[0]._fabric._renew_many([x.lease_id for x in live], ttl_ms, timeout_ms)
        answers = {lease.lease_id: one for lease, one in zip(live, got, strict=True)}
    failed: list[FabricError | None] = []
    for lease in leases:
        try:
            lease._renew(ttl_ms, RENEW_MS_MAX, answers.get(lease.lease_id))
            failed.append(None)
        except FabricError as refused:
            failed.append(refused)
    return failed
