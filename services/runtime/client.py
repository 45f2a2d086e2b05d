"""How one service calls another: a proved channel, a deadline on every call, and retries that end.

Rules. Only what cannot have been decided is tried again: UNAVAILABLE, ABORTED, and
RESOURCE_EXHAUSTED where the other side says when. The request is the same one each time, request id
included, so that its effect is one. Waits grow from 20 ms to 1 s and are jittered by the dice that
the caller brings. All tries together keep to one deadline, which is never longer than what is left
of the call being served; what is raised at the end is the last failure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

import grpc

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity
from grafos_proto.wire import failures
from grafos_proto.wire.credentials import PeerChannel, Provider
from services.runtime import calls, telemetry
from services.runtime.clock import SYSTEM, Clock

TRIES_MAX: Final = 8
WAIT_MS_MIN: Final = 20
WAIT_MS_MAX: Final = 1_000
RETURN_MS: Final = 5
"""Kept back of a deadline at each hop, so that the inner timeout is the one that is reported."""
OPTIONS: Final[tuple[tuple[str, str | int], ...]] = (
    ("grpc.max_send_message_length", 256 * 1024),
    ("grpc.max_receive_message_length", 1024 * 1024),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)
"""Reconnects are quick, since services restart; pings are slower than listeners put up with."""

_Stub = TypeVar("_Stub")
Dice = Callable[[], float]
"""0 up to, not including, 1."""


def channel(endpoint: str, provider: Provider, peer: Identity) -> PeerChannel:
    """A channel to `peer` and nobody else; opens nothing until it is used."""
    return PeerChannel(endpoint, provider, peer, OPTIONS)


def may_retry(error: FabricError) -> bool:
    """Whether the same request may be sent again."""
    if error.status == "RESOURCE_EXHAUSTED":
        return error.retryable and error.retry_after_ms is not None
    return error.status in {"UNAVAILABLE", "ABORTED"}


def wait_ms(error: FabricError, tries: int, dice: Dice) -> int:
    """How long to wait after the failure of the try with this number, from 1."""
    grown = min(WAIT_MS_MAX, WAIT_MS_MIN * 2 ** (tries - 1))
    backoff_ms = grown * (0.5 + 0.5 * dice())
    if error.retry_after_ms is not None:
        backoff_ms = error.retry_after_ms * (1 + 0.1 * dice()) + 1
    return max(1, int(backoff_ms))


class Remote(Generic[_Stub]):
    """Another service, as seen from here. Safe from any thread; starts nothing."""

    def __init__(
        self,
        endpoint: str,
        peer: Identity,
        provider: Provider,
        stub: Callable[[grpc.Channel], _Stub],
        *,
        dice: Dice,
        clock: Clock = SYSTEM,
    ) -> None:
        """`stub` is what protoc made, for instance `LedgerServiceStub`."""
        self.endpoint, self.peer = endpoint, peer
        self._channel = channel(endpoint, provider, peer)
        self._stub, self._dice, self._clock = stub, dice, clock
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._made: tuple[grpc.Channel, _Stub] | None = None

    def call(
        self, method: str, request: Any, *, timeout_ms: int, tries_max: int = TRIES_MAX
    ) -> Any:
        """The answer of the method with this name; every failure is typed."""
        end_ms = self._clock.boot_ms() + _own_timeout_ms(timeout_ms)
        tries = 0
        while True:
            tries += 1
            left_ms = end_ms - self._clock.boot_ms()
            try:
                return self._once(method, request, left_ms)
            except FabricError as error:
                pause_ms = wait_ms(error, tries, self._dice)
                is_last = tries >= tries_max or end_ms - self._clock.boot_ms() <= pause_ms
                if is_last or not may_retry(error):
                    raise
            if self._closed.wait(pause_ms / 1000):
                raise failure.of("CLOSED")

    def stream(
        self, method: str, request: Any, *, timeout_ms: int | None = None
    ) -> tuple[Iterator[Any], Callable[[], Any]]:
        """(answers, cancel) of a streaming method. A stream is not tried again: its caller knows
        from where it must go on."""
        with failures.status_to_failures():
            rpc = getattr(self._get(), method)(
                request,
                timeout=None if timeout_ms is None else timeout_ms / 1000,
                metadata=_metadata(),
            )
        return failures.each_to_failures(rpc), rpc.cancel

    def close(self) -> None:
        """End every call and wait; idempotent."""
        self._closed.set()
        with self._lock:
            self._made = None
            self._channel.close()

    def _once(self, method: str, request: Any, left_ms: int) -> Any:
        if left_ms <= 0:
            raise failure.of("DEADLINE")
        with failures.status_to_failures():
            return getattr(self._get(), method)(
                request, timeout=left_ms / 1000, metadata=_metadata()
            )

    def _get(self) -> _Stub:
        with self._lock:
            if self._closed.is_set():
                raise failure.of("CLOSED")
            now = self._channel.get()
            if self._made is None or self._made[0] is not now:
                self._made = (now, self._stub(now))
            return self._made[1]


def _own_timeout_ms(timeout_ms: int) -> int:
    """No longer than whoever waits for us."""
    call = calls.serving()
    if call is None:
        return timeout_ms
    return min(timeout_ms, calls.deadline_left_ms() - RETURN_MS)


def _metadata() -> tuple[tuple[str, str], ...]:
    header = telemetry.traceparent()
    return ((telemetry.TRACEPARENT, header),) if header else ()
