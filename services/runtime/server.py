"""Where a service is called: its gRPC listeners, with mutual TLS and every limit set.

A process has one listener for tenants and another for operators and services, each a server of its
own with its own threads, so that no load on the one delays the other.

Rules. Every connection proves a certificate of our authority; a unix socket lies in a folder that
only its owner may enter, and speaks TLS all the same. The certificate that a listener shows follows
its renewals. A listener accepts one message size, one stream count, one connection age: `Limits`.
Reflection is for control listeners. What a call passes through is written in calls.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from grafos_core import failure
from grafos_core.failure import invariant
from grafos_proto.wire import ttrpc_frames as ttrpc
from grafos_proto.wire.credentials import Provider, make_private_directory
from services.runtime import telemetry
from services.runtime.calls import (
    Call,
    Gate,
    Handling,
    Patience,
    Peer,
    check_deadline,
    current,
    deadline_left_ms,
    peer,
)
from services.runtime.clock import SYSTEM, Clock
from services.runtime.flags import UNIX_PATH_BYTES_MAX
from services.runtime.identity import server_credentials
from services.runtime.limits import Callers, Limits
from services.runtime.local import Handlers, LocalServer
from services.runtime.logs import Log
from services.runtime.methods import METHODS, UNLISTED, Method

__all__ = [
    "Call", "Limits", "Listener", "Method", "Peer", "Server", "Service", "check_deadline",
    "current", "deadline_left_ms", "peer", "serve",
]  # fmt: skip

PATIENCE_MS: Final = 250
HALT_STATUS: Final = 70
"""EX_SOFTWARE of sysexits.h: a law did not hold; whoever restarts us reads what is durable."""


@dataclass(frozen=True, slots=True)
class Service:
    """One gRPC service: what protoc made to register it, and our servicer."""

    name: str
    """For instance `grafos.v1.LedgerService`; also its name in health checks."""
    register: Callable[[Any, grpc.Server], None]
    servicer: Any


@dataclass(frozen=True, slots=True)
class Listener:
    """One address and what is served there."""

    endpoint: str
    """`unix:<absolute path>` or `<host>:<port>`; port 0 takes any free one."""
    services: Sequence[Service]
    methods: Mapping[str, Method] = field(default_factory=dict)
    """Departures from the table in methods.py, by full method name."""
    limits: Limits = field(default_factory=Limits)
    control: bool = False
    """For operators and services: with reflection."""


def halt_process() -> None:
    """End at once, without unwinding: what is durable is all that counts."""
    os._exit(HALT_STATUS)


class Server:
    """The listeners of one process. Made by `serve`."""

    def __init__(self, gates: Sequence[Gate], clock: Clock) -> None:
        self._gates, self._clock = gates, clock
        self._servers: list[grpc.Server] = []
        self._pools: list[ThreadPoolExecutor] = []
        self._locals: list[LocalServer] = []
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="patience", daemon=True)
        self.health = health.HealthServicer(experimental_non_blocking=False)
        self.endpoints: list[str] = []
        """Where the listeners can be reached, in their order, with real port numbers."""

    def add(self, server: grpc.Server, pool: ThreadPoolExecutor, endpoint: str) -> None:
        self._servers.append(server)
        self._pools.append(pool)
        self.endpoints.append(endpoint)

    def add_local(self, local: LocalServer) -> None:
        self._locals.append(local)

    def start(self) -> None:
        for local in self._locals:
            local.start()
        for server in self._servers:
            server.start()
        self._watcher.start()

    def set_serving(self, serving: bool, service: str = "") -> None:
        """What health checks answer; `service` empty: for the process as a whole."""
        status = health_pb2.HealthCheckResponse
        self.health.set(service, status.SERVING if serving else status.NOT_SERVING)

    def in_flight(self) -> int:
        return sum(gate.callers.in_flight() for gate in self._gates)

    def stop(self, grace_ms: int = 1_000) -> None:
        """Refuse new calls, let those in flight end within the grace, end the rest. Idempotent."""
        self._stopped.set()
        self.health.enter_graceful_shutdown()
        ends = [server.stop(grace_ms / 1000) for server in self._servers]
        for local in self._locals:
            local.drain()
        for local in self._locals:
            local.stop(grace_ms)
        for end in ends:
            end.wait(grace_ms / 1000 + 1)
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def _watch(self) -> None:
        while not self._stopped.wait(PATIENCE_MS / 1000):
            for gate in self._gates:
                gate.patience.tick(self._clock.boot_ms())


def serve(
    listeners: Sequence[Listener],
    *,
    provider: Provider,
    trust_domain: str,
    log: Log,
    metrics: telemetry.Metrics | None = None,
    clock: Clock = SYSTEM,
    halt: Callable[[], None] = halt_process,
) -> Server:
    """Open all listeners and answer calls from now on."""
    invariant(bool(listeners), "a server has a listener")
    meters = telemetry.CallMeters(metrics or telemetry.Metrics())
    gates = [
        Gate(
            trust_domain, each.limits, Callers(each.limits), clock, log, halt, meters,
            Patience(each.limits.first_message_ms_max),
        )
        for each in listeners
    ]  # fmt: skip
    server = Server(gates, clock)
    for listener, gate in zip(listeners, gates, strict=True):
        _open(server, listener, gate, provider)
    server.start()
    return server


def _open(server: Server, listener: Listener, gate: Gate, provider: Provider) -> None:
    calls_max = listener.limits.calls_max
    pool = ThreadPoolExecutor(calls_max, thread_name_prefix="call")
    listening = grpc.server(
        pool,
        interceptors=[_Wrapping(gate, {**METHODS, **listener.methods})],
        options=listener.limits.options(),
        maximum_concurrent_rpcs=calls_max,
        compression=grpc.Compression.NoCompression,
    )
    for service in listener.services:
        service.register(service.servicer, listening)
    health_pb2_grpc.add_HealthServicer_to_server(server.health, listening)
    if listener.control:
        names = [service.name for service in listener.services]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], listening)
    server.add(listening, pool, _bind(listening, listener.endpoint, provider))
    if listener.endpoint.startswith("unix:"):
        handlers = Handlers()
        for service in listener.services:
            service.register(service.servicer, cast(grpc.Server, handlers))
        path = Path(listener.endpoint.removeprefix("unix:") + ttrpc.SUFFIX)
        server.add_local(LocalServer(path, handlers, listener.methods, gate, provider))


def _bind(server: grpc.Server, endpoint: str, provider: Provider) -> str:
    if endpoint.startswith("unix:"):
        path = Path(endpoint.removeprefix("unix:"))
        if not path.is_absolute() or len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
            raise failure.of(
                "INVALID", f"socket path: absolute, at most {UNIX_PATH_BYTES_MAX} bytes"
            )
        make_private_directory(path.parent)
    try:
        port = server.add_secure_port(endpoint, server_credentials(provider))
    except RuntimeError:
        raise failure.of("UNREACHABLE", f"cannot listen on {endpoint}") from None
    if endpoint.startswith("unix:"):
        return endpoint
    return f"{endpoint.rpartition(':')[0]}:{port}"


class _Wrapping(grpc.ServerInterceptor):
    """Gives gRPC our handler in the place of each servicer's; wrapped once per method."""

    def __init__(self, gate: Gate, methods: Mapping[str, Method]) -> None:
        self._gate, self._methods = gate, methods
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        name = handler_call_details.method
        wrapped = self._wrapped.get(name)
        if wrapped is None:
            handler = continuation(handler_call_details)
            if handler is None:
                return None
            policy = self._methods.get(name, UNLISTED)
            wrapped = Handling(self._gate, name, policy, handler).wrapped()
            self._wrapped[name] = wrapped
        return wrapped
