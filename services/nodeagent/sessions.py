"""Who is still there: every holder process keeps a connection open, and hears of its leases on it.

Rules. A session belongs to one holder's key, so that nobody can listen in on another's by knowing
its number. It may have several connections (a stream, a local socket); it is there while one of
them is, lost when the last has ended, and back when a new one comes. A connection that does not
take its notices in time loses them, never the sender's time: the next operation says the same by
its failure.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Final, Protocol

from grafos_core import failure
from grafos_core.failure import FabricError

SESSIONS_MAX: Final = 4_096
CONNECTIONS_MAX: Final = 4
"""Of one session: a stream and a local socket, and their successors while the old ones die."""
_SESSION = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class News:
    """What happened to a lease, as its holder is told."""

    lease_id: str
    kind: str
    reason: str = ""
    grace_ms: int = 0
    cause: FabricError | None = None


class Connection(Protocol):
    def tell(self, news: News) -> None:
        """Pass it on without waiting; drop it where that is not possible."""

    def push(self, lease_id: str, descriptor: int) -> bool:
        """Send a lease's descriptor without waiting; whether that was possible."""


class Watcher(Protocol):
    def session_back(self, session: str) -> None: ...

    def session_lost(self, session: str) -> None: ...


def session_key(holder_key: str, session: str) -> str:
    """The name of a session inside the agent: the number that its holder chose, under his key."""
    if not _SESSION.fullmatch(session):
        raise failure.of("IDENTIFIER", "session: 32 hexadecimal digits")
    return f"{holder_key}:{session}"


@dataclass(slots=True)
class Sessions:
    """Which connections each session has. Thread-safe; the watcher is told outside the lock."""

    watcher: Watcher
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _connections: dict[str, list[Connection]] = field(default_factory=dict)

    def join(self, session: str, connection: Connection) -> None:
        with self._lock:
            known = self._connections.get(session, [])
            if len(known) >= CONNECTIONS_MAX or (not known and self._full()):
                raise failure.of("STREAMS", "too many connections")
            self._connections[session] = [*known, connection]
        if not known:
            self.watcher.session_back(session)

    def leave(self, session: str, connection: Connection) -> None:
        """Idempotent."""
        with self._lock:
            known = self._connections.get(session, [])
            left = [each for each in known if each is not connection]
            if left:
                self._connections[session] = left
            else:
                self._connections.pop(session, None)
        if known and not left:
            self.watcher.session_lost(session)

    def tell(self, session: str, news: News) -> None:
        with self._lock:
            known = list(self._connections.get(session, []))
        for each in known:
            each.tell(news)

    def push(self, session: str, lease_id: str, descriptor: int) -> bool:
        """Whether one of its connections took the descriptor."""
        with self._lock:
            known = list(self._connections.get(session, []))
        return any(each.push(lease_id, descriptor) for each in known)

    def _full(self) -> bool:
        return len(self._connections) >= SESSIONS_MAX
