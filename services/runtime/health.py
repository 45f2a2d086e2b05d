"""How a service says how it is, to machines that watch it and to people.

    GET /livez               200 while the process answers at all
    GET /api/v1/readiness    200 when every gate is open, else 503; JSON: each gate, and why
    GET /metrics             the numbers, as Prometheus reads them

Rules. A gate is a named condition for serving, with a reason while it is closed; a gate of one kind
(`mem`, `block`, …) holds up that kind alone. The service is ready when every gate that is not of a
kind is open. Health checks by gRPC say SERVING exactly then. This listener is plain HTTP and
read-only, on the loopback unless a flag says otherwise, and never shares a port with calls.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from grafos_core import failure
from services.runtime.logs import Log, clean
from services.runtime.telemetry import Metrics

REQUEST_S_MAX: Final = 5
"""For a request's lines to come; then its connection is closed."""
CONNECTIONS_MAX: Final = 32
POLL_S: Final = 0.2
"""How soon a stop is noticed."""
STARTING: Final = "starting"
DRAINING: Final = "draining"


@dataclass(frozen=True, slots=True)
class GateState:
    """One condition, as it is shown."""

    name: str
    kind: str
    """Empty: it concerns the whole service."""
    is_open: bool
    why: str


class Readiness:
    """The gates of one service. All are closed until somebody opens them. Safe from any thread."""

    def __init__(self, gates: Iterable[str], kinds: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._gates: dict[tuple[str, str], str] = {}
        """(kind, name) to why it is closed; an empty text: open."""
        for name in gates:
            self._gates["", name] = STARTING
        for kind in kinds:
            self._gates[kind, "device"] = STARTING
        self._listeners: list[Callable[[bool], None]] = []
        self.policies: list[str] = []
        """What this service was told to do that others of its kind do not, in words. Filled before
        it listens."""

    def open(self, gate: str, *, kind: str = "") -> None:
        self._set(kind, gate, "")

    def close(self, gate: str, why: str, *, kind: str = "") -> None:
        self._set(kind, gate, why or "closed")

    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Tell `listener` now, and whenever the service turns ready or ceases to be."""
        with self._lock:
            self._listeners.append(listener)
        listener(self.is_ready())

    def is_ready(self, kind: str = "") -> bool:
        """Whether the service as a whole is ready and, where asked, this kind of it too."""
        with self._lock:
            return self._is_ready(kind)

    def closed(self) -> dict[str, str]:
        """Why each closed gate is closed; those of a kind as `kind/gate`."""
        return {
            f"{each.kind}/{each.name}" if each.kind else each.name: each.why
            for each in self.gates()
            if not each.is_open
        }

    def gates(self) -> list[GateState]:
        with self._lock:
            return [
                GateState(name, kind, not why, why) for (kind, name), why in self._gates.items()
            ]

    def kinds(self) -> list[str]:
        with self._lock:
            return sorted({kind for kind, _ in self._gates if kind})

    def report(self) -> dict[str, Any]:
        """What the readiness address answers."""
        gates = self.gates()
        return {
            "state": "ready" if self.is_ready() else "not_ready",
            "gates": {each.name: _shown(each) for each in gates if not each.kind},
            "kinds": {
                kind: {
                    "ready": self.is_ready(kind),
                    "gates": {each.name: _shown(each) for each in gates if each.kind == kind},
                }
                for kind in self.kinds()
            },
            "policies": list(self.policies),
        }

    def _set(self, kind: str, name: str, why: str) -> None:
        with self._lock:
            before = self._is_ready("")
            self._gates[kind, name] = why
            after = self._is_ready("")
            listeners = list(self._listeners) if before != after else []
        for listener in listeners:
            listener(after)

    def _is_ready(self, kind: str) -> bool:
        return not any(why for (owner, _), why in self._gates.items() if owner in ("", kind))


def _shown(gate: GateState) -> dict[str, Any]:
    return {"open": True} if gate.is_open else {"open": False, "why": clean(gate.why)}


class HttpListener:
    """The plain listener. Answers from `start` to `stop`."""

    def __init__(self, endpoint: str, readiness: Readiness, metrics: Metrics, log: Log) -> None:
        host, _, port = endpoint.rpartition(":")
        if not host or not port.isascii() or not port.isdigit():
            raise failure.of("OPTION", "http listener: <host>:<port>")
        handler = _handler(readiness, metrics, log)
        try:
            self._server = _Server((host.strip("[]"), int(port)), handler)
        except (OSError, OverflowError) as error:
            raise failure.of("UNREACHABLE", f"cannot listen on {endpoint}: {error}") from None
        self.endpoint = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.2},
            name="http",
            daemon=True,
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A watcher that hangs up in the middle is no event."""


def _handler(readiness: Readiness, metrics: Metrics, log: Log) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers one request per connection."""

        timeout = REQUEST_S_MAX
        server_version, sys_version = "grafos", ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            try:
                self._answer(*_page(path, readiness, metrics))
            except Exception as error:
                if not isinstance(error, OSError):
                    log.error("http.failed", error, path=path)
                    self._answer(500, "text/plain", b"internal fault\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Who looks is not worth a line."""

    return Handler


def _page(path: str, readiness: Readiness, metrics: Metrics) -> tuple[int, str, bytes]:
    """(status, content type, body)."""
    if path == "/metrics":
        return 200, CONTENT_TYPE_LATEST, generate_latest(metrics.registry)
    if path == "/livez":
        return 200, "text/plain", b"alive\n"
    if path == "/api/v1/readiness":
        report = readiness.report()
        body = json.dumps(report, sort_keys=True).encode() + b"\n"
        return (200 if report["state"] == "ready" else 503), "application/json", body
    return 404, "text/plain", b"not here: /livez, /api/v1/readiness, /metrics\n"
