"""The life of a service's process: start, announce, serve, drain, end.

    start ──► gates open ──► serving ──► SIGTERM, SIGINT or the parent's end ──► drain ──► exit 0
      │ refused: exit 1, with the reason in the log
      └ flags that do not fit: exit 2

Rules. Draining means: health says NOT_SERVING, no new call is taken, what is in flight has its
grace; then what was started is stopped, last started first. A second signal ends the process at
once, and so does a drain that takes longer than it may. A process that was started with
`--exit-with-parent-fd` ends when that pipe does: whoever holds the other end takes us along however
it dies.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.wire import identity as wire
from grafos_proto.wire.credentials import Credentials, IdentityFiles, make_private_directory
from services.runtime import telemetry
from services.runtime.clock import SYSTEM, Clock
from services.runtime.faults import fault
from services.runtime.flags import Values
from services.runtime.health import DRAINING, HttpListener, Readiness
from services.runtime.identity import first_identity
from services.runtime.logs import Log
from services.runtime.server import Listener, Server, halt_process, serve

GRACE_MS_DEFAULT: Final = 2_000
OVERDUE_MS: Final = 5_000
"""Beyond the grace; then the drain is given up."""
IDENTITY_TICK_MS: Final = 1_000
RELOAD_MS: Final = 30_000
"""Where somebody else renews our files: how often they are read again."""
REFUSED_STATUS: Final = 1
KILLED_STATUS: Final = 130

SERVING_GATE: Final = "serving"


class Process:
    """What every service has. Services fill it in their `start`, `run_service` runs it."""

    def __init__(
        self,
        service: str,
        values: Values,
        *,
        gates: Sequence[str] = (),
        kinds: Sequence[str] = (),
        clock: Clock = SYSTEM,
    ) -> None:
        self.service, self.values, self.clock = service, values, clock
        self.log = Log(service, level=values.log_level, clock=clock)
        self.metrics = telemetry.Metrics()
        self.readiness = Readiness([SERVING_GATE, *gates], kinds)
        self.dice = random.Random(os.urandom(16)).random
        self.grace_ms = GRACE_MS_DEFAULT
        self.server: Server | None = None
        self.http: HttpListener | None = None
        self._stops: list[Callable[[], Any]] = []
        self._ending = threading.Event()
        self._rung, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._why = ""

    @property
    def state_dir(self) -> Path:
        """This service's own folder, 0700."""
        path: Path = self.values.state_dir
        make_private_directory(path)
        return path

    def on_stop(self, stop: Callable[[], Any]) -> None:
        """Call `stop()` after the drain; what was added last is stopped first."""
        self._stops.append(stop)

    def end(self, why: str) -> None:
        """Begin to drain. From any thread or signal handler; a second time ends at once."""
        if self._ending.is_set():
            os._exit(KILLED_STATUS)
        self._why = why
        self._ending.set()
        with suppress(BlockingIOError):  # it has been rung often enough
            self._bell.send(b"!")

    def identity(self) -> IdentityFiles:
        """Our own certificate: asked for if there is none, and renewed in time from now on."""
        directory = self.values.identity_dir or self.state_dir / "identity"
        files, socket_path = IdentityFiles(directory), self.values.identity_socket
        now_ms = self.clock.wall_ms()
        if socket_path and not _is_in_force(files, now_ms):
            if self.values.secret_fd is not None:
                first_identity(files, socket_path, self.values.secret_fd, now_ms=now_ms)
            else:
                files.save(wire.request_identity(socket_path, files.key(), now_ms=now_ms))
        files.load().check(now_ms)
        self._keep_fresh(files, socket_path)
        return files

    def serve(self, listeners: Sequence[Listener], files: IdentityFiles) -> Server:
        """Open all listeners; health follows the gates."""
        server = serve(
            listeners,
            provider=files,
            trust_domain=self.values.trust_domain,
            log=self.log,
            metrics=self.metrics,
            clock=self.clock,
            halt=self.halt,
        )
        names = ["", *(service.name for each in listeners for service in each.services)]

        def follow(is_ready: bool) -> None:
            for name in names:
                server.set_serving(is_ready, name)

        self.server = server
        self.metrics.watch("grafos_readiness_state", self._gate_numbers)
        self.http = HttpListener(self.values.http_listen, self.readiness, self.metrics, self.log)
        self.http.start()
        self.readiness.on_change(follow)
        self.readiness.open(SERVING_GATE)
        return server

    def announce(self, **more: Any) -> None:
        """One JSON line on `--ready-fd`: where we can be reached."""
        line = {
            "service": self.service, "pid": os.getpid(),
            "endpoints": self.server.endpoints if self.server else [],
            "http": self.http.endpoint if self.http else "", **more,
        }  # fmt: skip
        self.log.info("service.started", **line)
        descriptor = self.values.ready_fd
        if descriptor is None:
            return
        try:
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.close(descriptor)
        except OSError:
            pass  # whoever wanted to know is gone, which the parent's pipe tells in its own way
        self.values.ready_fd = None

    def wait(self) -> str:
        """Until somebody wants us to end; why. For the main thread.

        It waits on a socket, into which the kernel's own signal handler writes too: a signal may
        reach any thread, and only the main one's Python handler runs. Had it waited for a lock, it
        would not wake up, or the handler would want the lock that it holds.
        """
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        while not self._ending.is_set():
            self._rung.recv(64)
        return self._why

    def drain(self) -> None:
        """Take no more calls, let those in flight end, stop everything."""
        overdue = threading.Timer((self.grace_ms + OVERDUE_MS) / 1000, self._overdue)
        overdue.daemon = True
        overdue.start()
        self.log.info("service.draining", why=self._why)
        self.readiness.close(SERVING_GATE, DRAINING)
        if self.server is not None:
            self.server.stop(self.grace_ms)
        while self._stops:
            stop = self._stops.pop()
            try:
                stop()
            except Exception as error:
                self.log.error("service.stop_failed", error)
        if self.http is not None:
            self.http.stop()
        overdue.cancel()
        self.log.info("service.stopped", why=self._why)

    def halt(self) -> None:
        """For a core whose law does not hold: end at once."""
        self.log.error("service.halted")
        halt_process()

    def _overdue(self) -> None:
        self.log.error("service.drain_overdue")
        os._exit(REFUSED_STATUS)

    def _gate_numbers(self) -> list[tuple[tuple[str, ...], float]]:
        return [
            ((f"{each.kind}/{each.name}" if each.kind else each.name,), float(each.is_open))
            for each in self.readiness.gates()
        ]

    def _keep_fresh(self, files: IdentityFiles, socket_path: str | None) -> None:
        def renew(credentials: Credentials, now_ms: int) -> Credentials:
            fault("identity.renew")
            assert socket_path is not None
            return wire.renew_identity(socket_path, credentials, now_ms=now_ms)

        renewal = wire.Renewal(
            files, renew, now_ms=self.clock.wall_ms(), jitter=lambda: 0.2 * self.dice() - 0.1
        )
        every_ms = IDENTITY_TICK_MS if socket_path else RELOAD_MS

        def watch() -> None:
            while not self._ending.wait(every_ms / 1000):
                self._refresh(files, renewal if socket_path else None)

        threading.Thread(target=watch, name="identity", daemon=True).start()

    def _refresh(self, files: IdentityFiles, renewal: wire.Renewal | None) -> None:
        try:
            if renewal is None:
                files.load()
            elif renewal.tick(self.clock.wall_ms()):
                self.log.info("identity.renewed")
        except Exception as error:
            self.log.error("identity.renewal_failed", error)


def run_service(process: Process, start: Callable[[Process], Any]) -> int:
    """Start, serve until told to end, drain; the exit status. `start(process)` opens what the
    service needs, calls `process.serve` and opens the service's gates."""
    process.log.take_over()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda given, _: process.end(signal.Signals(given).name))
    _watch_parent(process)
    process.on_stop(telemetry.set_up(process.service, process.values.otlp_endpoint))
    try:
        start(process)
    except (FabricError, OSError) as refusal:
        process.log.error("service.refused", refusal)
        return REFUSED_STATUS
    gc.collect()
    gc.freeze()  # what the start has made stays: no later collection looks at it again
    process.announce()
    process.wait()
    process.drain()
    if process.server is not None and process.server.in_flight():
        os._exit(0)  # a handler that outlived its grace must not keep the interpreter waiting
    return 0


def _watch_parent(process: Process) -> None:
    descriptor = process.values.exit_with_parent_fd
    if descriptor is None:
        return

    def watch() -> None:
        try:
            while os.read(descriptor, 1):
                pass
        except OSError:
            pass  # broken is as good as ended
        process.end("parent ended")

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _is_in_force(files: IdentityFiles, now_ms: int) -> bool:
    try:
        files.load().check(now_ms)
    except failure.Denied:
        return False
    return True
