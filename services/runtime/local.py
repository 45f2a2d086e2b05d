"""Where a service is called by processes of the same machine: ttRPC beside each gRPC socket.

A call passes the same gate as over gRPC and reaches the same handler; what is different is what it
costs: it is read, served and answered by one thread, and no other one is woken for it. Protocol and
greeting: grafos_proto.wire.ttrpc_frames; what a connection does: local_connection.py.

    accept     who may come ──► a connection with a thread of its own
    watch      a call takes long ──► another thread reads on; a connection is too old ──► end it

Rules. Only processes of our own user, or root, are listened to. There is a bound on connections and
one on calls; where there is no room for a newcomer, the connection that has been idle for longest
makes room, which its client does not notice. The watch sleeps while nobody calls.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import grpc

from grafos_core import failure
from grafos_proto.wire.credentials import Provider
from services.runtime.calls import Gate, Handling
from services.runtime.local_connection import Connection
from services.runtime.methods import METHODS, UNLISTED, Method

_PEERCRED: Final = struct.Struct("3i")
BACKLOG: Final = 128
ACCEPT_PAUSE_S: Final = 0.1
"""When there is no descriptor or thread left, which may pass."""
LOOK_S: Final = 0.01
"""How soon another thread reads a connection whose call takes long: the delay of a further call on
it, and of noticing that its client has gone."""
REST_S: Final = 0.5
QUIET_LOOKS: Final = 50
"""Looks without any call after which the watch rests."""


class Handlers:
    """Collects what protoc's `add_…Servicer_to_server` registers."""

    def __init__(self) -> None:
        self.by_name: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Of gRPC's two ways of registering, the one for handlers without names: not needed."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        for method, handler in handlers.items():
            self.by_name[f"/{service}/{method}"] = handler


class LocalServer:
    """One socket."""

    def __init__(
        self,
        path: Path,
        handlers: Handlers,
        methods: Mapping[str, Method],
        gate: Gate,
        provider: Provider,
    ) -> None:
        self.gate, self.provider = gate, provider
        self._path = path
        table = {**METHODS, **methods}
        self.handlings = {
            name: Handling(gate, name, table.get(name, UNLISTED), handler)
            for name, handler in handlers.by_name.items()
        }
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._serving = 0
        self._stopping, self._called = threading.Event(), threading.Event()
        self._rests = False

    def start(self) -> None:
        """Listen from now on; a socket that is left from before is replaced."""
        try:
            self._path.unlink(missing_ok=True)
            self._listener.bind(os.fspath(self._path))
            self._path.chmod(0o600)
            self._listener.listen(BACKLOG)
        except OSError as error:
            self._listener.close()
            raise failure.of("UNREACHABLE", f"cannot listen: {error.strerror}") from None
        threading.Thread(target=self._accept, name="local", daemon=True).start()
        threading.Thread(target=self._watch, name="local-watch", daemon=True).start()

    def drain(self) -> None:
        """Accept nobody, and no call that is not under way already."""
        self._stopping.set()
        self._called.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:  # it never listened
            pass
        self._listener.close()
        for each in self._all():
            each.drain()

    def stop(self, grace_ms: int) -> None:
        """Let calls end within the grace, end the rest. Idempotent."""
        self.drain()
        end_ms = self.gate.clock.boot_ms() + grace_ms
        for each in self._all():
            each.wait_idle(max(0, end_ms - self.gate.clock.boot_ms()) / 1000)
            each.shut()

    def enter(self) -> bool:
        """Count a call; False: there are too many. What was entered must be left."""
        with self._lock:
            if self._serving >= self.gate.limits.calls_max:
                return False
            self._serving += 1
        if self._rests:
            self._called.set()
        return True

    def leave(self) -> None:
        with self._lock:
            self._serving -= 1

    def gone(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _all(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                self._stopping.wait(ACCEPT_PAUSE_S)
                continue
            if not self._take(sock):
                sock.close()

    def _take(self, sock: socket.socket) -> bool:
        """Give a newcomer a connection, if he may come and there is room."""
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        _, uid, _ = _PEERCRED.unpack(data)
        if uid not in (os.getuid(), 0) or not self._has_room():
            return False
        connection = Connection(self, sock)
        with self._lock:
            self._connections.add(connection)
        try:
            connection.start()
        except RuntimeError:  # no thread is left
            self.gone(connection)
            return False
        if self._stopping.is_set():  # it may have come after the others were told
            connection.drain()
        return True

    def _has_room(self) -> bool:
        """Whether one more may come, perhaps in the place of another one."""
        connections = self._all()
        if len(connections) < self.gate.limits.calls_max:
            return True
        for each in sorted(connections, key=lambda each: each.used_ms):
            if each.is_idle:
                self.gone(each)
                each.drain()
                return True
        return False

    def _watch(self) -> None:
        quiet = 0
        while not self._stopping.wait(LOOK_S):
            quiet = 0 if self._look() else quiet + 1
            if quiet >= QUIET_LOOKS:
                self._rest()
                quiet = 0

    def _look(self) -> bool:
        """Look at every connection once; whether there are calls."""
        now_ms = self.gate.clock.boot_ms()
        for each in self._all():
            each.look(now_ms)
        return self._serving > 0

    def _rest(self) -> None:
        """Until somebody calls; or for a while, since connections age."""
        self._called.clear()
        self._rests = True
        if not self._serving and not self._stopping.is_set():  # after `_rests`, or one is missed
            self._called.wait(REST_S)
        self._rests = False
