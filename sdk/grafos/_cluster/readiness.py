"""Asking a service on this machine whether it is ready, by its plain HTTP listener.

Rules. One look has 300 ms. A service that does not answer in that time is not ready, and that is
all that is said: whether it is dead, hung or busy is for its log to tell.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

LOOK_S: Final = 0.3
EAGER_S: Final = 0.05
CALM_S: Final = 1.0
ANSWER_BYTES_MAX: Final = 65_536
_REQUEST: Final = b"GET /api/v1/readiness HTTP/1.0\r\nHost: localhost\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Readiness:
    """What one service last said of itself."""

    ready: bool
    gates: dict[str, str] = field(default_factory=dict)
    """Closed gates, each with its reason."""
    kinds: tuple[str, ...] = ()
    """Kinds that are ready to be leased."""
    policies: tuple[str, ...] = ()
    """What it was told to do that others of its kind do not, in words."""

    def shown(self) -> dict[str, Any]:
        return {
            "ready": self.ready, "closed_gates": self.gates, "ready_kinds": list(self.kinds),
            "policies": list(self.policies),
        }  # fmt: skip


STARTING: Final = Readiness(False, {"process": "starting"})
SILENT: Final = Readiness(False, {"http": "no answer"})


def look(endpoint: str) -> Readiness:
    """Ask now."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), LOOK_S) as connection:
            connection.settimeout(LOOK_S)
            connection.sendall(_REQUEST)
            return parse(_receive(connection))
    except (OSError, ValueError):
        return SILENT


def _receive(connection: socket.socket) -> bytes:
    data = bytearray()
    while part := connection.recv(ANSWER_BYTES_MAX - len(data)):
        data += part
    return bytes(data)


def parse(answer: bytes) -> Readiness:
    """From the whole HTTP answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    report = json.loads(body)
    closed: dict[str, str] = {}
    for name, gate in report.get("gates", {}).items():
        if not gate.get("open"):
            closed[name] = str(gate.get("why", ""))
    kinds = report.get("kinds", {})
    for kind, state in kinds.items():
        for name, gate in state.get("gates", {}).items():
            if not gate.get("open"):
                closed[f"{kind}/{name}"] = str(gate.get("why", ""))
    ready_kinds = tuple(sorted(kind for kind, state in kinds.items() if state.get("ready")))
    is_ready = head.split(b" ", 2)[1:2] == [b"200"] and len(ready_kinds) == len(kinds)
    policies = tuple(str(each) for each in report.get("policies", ()))
    return Readiness(is_ready, closed, ready_kinds, policies)


class Watch:
    """Keeps looking: often while somebody is not ready, else once a second.

    `endpoints()` says whom to ask; `changed()` is called when an answer differs from the last one.
    """

    def __init__(
        self, endpoints: Callable[[], Mapping[str, str]], changed: Callable[[], None]
    ) -> None:
        self._endpoints, self._changed = endpoints, changed
        self._lock = threading.Lock()
        self._latest: dict[str, tuple[str, Readiness]] = {}
        """Name to where it was asked and what it said; a new address voids the answer."""
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="readiness", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def hurry(self) -> None:
        """Somebody has announced himself."""
        self._wake.set()

    def of(self, name: str, endpoint: str) -> Readiness:
        """What it last said."""
        with self._lock:
            asked, said = self._latest.get(name, ("", STARTING))
        return said if endpoint and asked == endpoint else STARTING

    def look_now(self) -> bool:
        """Ask everybody; whether all are ready."""
        answers = {name: (where, look(where)) for name, where in self._endpoints().items()}
        with self._lock:
            differs = answers != self._latest
            self._latest = answers
        if differs:
            self._changed()
        return all(said.ready for _, said in answers.values())

    def _run(self) -> None:
        while not self._stopped:
            all_ready = self.look_now()
            self._wake.wait(CALM_S if all_ready else EAGER_S)
            self._wake.clear()
