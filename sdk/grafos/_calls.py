"""Calls over the wire: each with a deadline, each failing with a typed failure.

Rules. A call that could not reach its service is made again, with the same message and so with the
same request id, after a pause that grows and is never the same for two callers; but never past the
deadline of the whole. A call whose answer was lost may have taken effect: asking again with the
same request id is safe, asking with another is not.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

import grpc

from grafos import _clock, observe
from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.wire import failures
from grafos_proto.wire.credentials import PeerChannel, Provider

PAUSE_MS_MIN, PAUSE_MS_MAX = 20, 500
ATTEMPTS_MAX: Final = 32
_AGAIN: Final = frozenset({"UNREACHABLE", "RETRY_LATER", "STREAMS"})
CHANNEL_OPTIONS: Final[tuple[tuple[str, str | int], ...]] = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
)
_T = TypeVar("_T")


def new_request_id() -> str:
    return secrets.token_hex(16)


class Peer:
    """One service or node and the stub to call it with. Thread-safe."""

    def __init__(
        self, target: str, provider: Provider, who: Any, stub: Callable[[grpc.Channel], Any]
    ) -> None:
        self._channel = PeerChannel(target, provider, who, CHANNEL_OPTIONS)
        self._make_stub = stub
        self._for: grpc.Channel | None = None
        self._stub: Any = None
        self._lock = threading.Lock()

    @property
    def stub(self) -> Any:
        """The stub on the channel of our present certificate."""
        with self._lock:
            channel = self._channel.get()
            if channel is not self._for:
                self._stub, self._for = self._make_stub(channel), channel
            return self._stub

    def call(self, method: str, request: Any, timeout_ms: float) -> Any:
        """One attempt."""
        if timeout_ms <= 0:
            raise failure.of("DEADLINE", method)
        with failures.status_to_failures():
            return getattr(self.stub, method)(
                request, timeout=timeout_ms / 1000, metadata=observe.outgoing_metadata()
            )

    def ask(self, method: str, request: Any, timeout_ms: float) -> Any:
        """As often as needed and possible within `timeout_ms`. `request` carries its own id."""
        return persist(lambda left_ms: self.call(method, request, left_ms), timeout_ms)

    def stream(self, method: str, request: Any) -> Any:
        """An open stream; its end is the caller's to see."""
        return getattr(self.stub, method)(request, metadata=observe.outgoing_metadata())

    def close(self) -> None:
        self._channel.close()


def persist(
    attempt: Callable[[float], _T], timeout_ms: float, draw: Callable[[], float] = random.random
) -> _T:
    """The first answer of `attempt(left_ms)` that is not "cannot be reached just now".

    `draw` gives from 0 to 1, and makes no two pauses alike.
    """
    end_ms = _clock.boot_ms() + timeout_ms
    pause_ms = float(PAUSE_MS_MIN)
    for _ in range(ATTEMPTS_MAX):
        try:
            return attempt(end_ms - _clock.boot_ms())
        except FabricError as refused:
            pause_ms = _pause_ms(refused, pause_ms, draw)
            if refused.code not in _AGAIN or _clock.boot_ms() + pause_ms >= end_ms:
                raise
        _clock.sleep_ms(pause_ms)
        pause_ms = min(pause_ms * 2, PAUSE_MS_MAX)
    return attempt(end_ms - _clock.boot_ms())


def _pause_ms(refused: FabricError, pause_ms: float, draw: Callable[[], float]) -> float:
    told_ms = refused.retry_after_ms or 0
    jittered_ms = pause_ms * (0.5 + draw())
    return max(jittered_ms, min(told_ms, PAUSE_MS_MAX))
