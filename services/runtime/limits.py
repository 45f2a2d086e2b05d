"""How much one listener takes: of each message, of each connection, and of each caller.

Rules. Every limit is a number in `Limits`; what a limit protects stands below it. Counting is per
identity and not per connection, so that opening more connections gains nothing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

from grafos_core import failure
from grafos_core.spiffe import Identity, Role

CALLERS_MAX: Final = 4_096
"""Identities whose budget is remembered; idle ones are forgotten first."""
BUSY_RETRY_MS: Final = 100


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one listener; the defaults are those for tenants."""

    receive_bytes_max: int = 256 * 1024
    """A chunk of 192 KiB fits with room to spare."""
    send_bytes_max: int = 1024 * 1024
    metadata_bytes_max: int = 8 * 1024
    metadata_bytes_hard_max: int = 16 * 1024
    """Between the two the library may let metadata pass; our own check does not."""
    streams_per_connection_max: int = 16
    connections_max: int = 8
    """Of one busy identity; with the streams it gives the calls that may be in flight."""
    reserve_calls: int = 32
    handshake_ms_max: int = 2_000
    """An open port that says nothing is closed after this."""
    connection_age_ms_max: int = 60_000
    """A tenth of the shortest certificate's life at most: what is checked at the handshake only,
    such as the certificate authority, is checked again after this."""
    connection_age_grace_ms: int = 1_000
    connection_idle_ms_max: int = 60_000
    silence_ms_max: int = 3_000
    """A peer that takes nothing of what is sent to it for so long is gone: its host, or the way."""
    ping_ms: int = 5_000
    """A connection with calls on which nothing comes is asked whether it stands, this often."""
    ping_interval_ms_min: int = 10_000
    ping_strikes_max: int = 2
    first_message_ms_max: int = 2_000
    """A call whose request does not arrive is ended: it occupies a thread."""
    calls_per_identity_max: int = 64
    calls_per_second_max: int = 2_000
    """Of one holder or operator; nodes and services have no rate."""

    @property
    def calls_max(self) -> int:
        """Calls in flight, and threads: nothing that was accepted waits for a thread."""
        return self.streams_per_connection_max * self.connections_max + self.reserve_calls

    def options(self) -> list[tuple[str, int]]:
        """As gRPC's server options."""
        return [
            ("grpc.max_receive_message_length", self.receive_bytes_max),
            ("grpc.max_send_message_length", self.send_bytes_max),
            ("grpc.max_metadata_size", self.metadata_bytes_max),
            ("grpc.absolute_max_metadata_size", self.metadata_bytes_hard_max),
            ("grpc.max_concurrent_streams", self.streams_per_connection_max),
            ("grpc.server_handshake_timeout_ms", self.handshake_ms_max),
            ("grpc.max_connection_age_ms", self.connection_age_ms_max),
            ("grpc.max_connection_age_grace_ms", self.connection_age_grace_ms),
            ("grpc.max_connection_idle_ms", self.connection_idle_ms_max),
            ("grpc.keepalive_time_ms", self.ping_ms),
            ("grpc.keepalive_timeout_ms", self.silence_ms_max),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", self.ping_interval_ms_min),
            ("grpc.http2.max_ping_strikes", self.ping_strikes_max),
            ("grpc.so_reuseport", 0),
            ("grpc.default_compression_algorithm", 0),
        ]


SERVICE_LIMITS: Final = Limits(
    streams_per_connection_max=64,
    connections_max=4,
    calls_per_identity_max=256,
    connection_age_ms_max=300_000,
)
"""For listeners that tenants do not reach: few callers, each with much to say."""


@dataclass(slots=True)
class _Budget:
    in_flight: int = 0
    tokens_micro: int = 0
    """Calls that may start now, in millionths."""
    filled_ms: int = 0


@dataclass(slots=True)
class Callers:
    """Counts what each identity has in flight and how fast it calls. Safe from any thread."""

    limits: Limits
    _budgets: dict[Identity, _Budget] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, identity: Identity, now_ms: int) -> None:
        """Count a call that starts, or refuse it. What was entered must be left."""
        with self._lock:
            budget = self._budget(identity, now_ms)
            if budget.in_flight >= self.limits.calls_per_identity_max:
                raise failure.of("STREAMS", retry_after_ms=BUSY_RETRY_MS)
            if identity.role in (Role.HOLDER, Role.OPERATOR):
                self._spend(budget, now_ms)
            budget.in_flight += 1

    def leave(self, identity: Identity) -> None:
        with self._lock:
            budget = self._budgets.get(identity)
            if budget is not None:
                budget.in_flight -= 1

    def in_flight(self) -> int:
        with self._lock:
            return sum(budget.in_flight for budget in self._budgets.values())

    def _budget(self, identity: Identity, now_ms: int) -> _Budget:
        budget = self._budgets.get(identity)
        if budget is None:
            if len(self._budgets) >= CALLERS_MAX:
                self._forget_idle()
            full = self.limits.calls_per_second_max * 1_000_000
            budget = self._budgets[identity] = _Budget(0, full, now_ms)
        return budget

    def _spend(self, budget: _Budget, now_ms: int) -> None:
        """A bucket of one second's calls, filled evenly."""
        rate = self.limits.calls_per_second_max
        gained = (now_ms - budget.filled_ms) * rate * 1_000
        budget.tokens_micro = min(rate * 1_000_000, budget.tokens_micro + gained)
        budget.filled_ms = now_ms
        if budget.tokens_micro < 1_000_000:
            missing = 1_000_000 - budget.tokens_micro
            raise failure.of("RATE", retry_after_ms=-(-missing // (rate * 1_000)))
        budget.tokens_micro -= 1_000_000

    def _forget_idle(self) -> None:
        """An identity without calls loses at most one second's worth of memory of its rate."""
        for identity, budget in list(self._budgets.items()):
            if budget.in_flight == 0:
                del self._budgets[identity]
        if len(self._budgets) >= CALLERS_MAX:
            raise failure.of("STREAMS", retry_after_ms=BUSY_RETRY_MS)
