"""Who this process is to the fabric: its key and certificate, kept fresh.

Rules. On the fabric's own machine the key is made here and never leaves the process; the identity
socket certifies it. Elsewhere key and certificate lie in a folder (`GRAFOS_IDENTITY_DIR`) that
somebody else keeps fresh; it is read again now and then. The certificate is renewed over the same
key at about half of its life, at the next call that is made after that: no thread, no timer. A
renewal that fails changes nothing and is tried again a little later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from grafos import _clock
from grafos_core.failure import FabricError
from grafos_proto.wire import certificates
from grafos_proto.wire import identity as wire
from grafos_proto.wire.credentials import Credentials, IdentityFiles

RETRY_MS: Final = 5_000
RELOAD_MS: Final = 60_000


class Identity:
    """The credentials in force; calling it makes it a `Provider`. Thread-safe."""

    def __init__(
        self, first: Credentials, renew: Callable[[Credentials], Credentials], due_ms: int
    ) -> None:
        self._current, self._renew, self._due_ms = first, renew, due_ms
        self._lock = threading.Lock()

    def __call__(self) -> Credentials:
        if _clock.wall_ms() >= self._due_ms and self._lock.acquire(blocking=False):
            try:
                self._refresh(_clock.wall_ms())
            finally:
                self._lock.release()
        return self._current

    def _refresh(self, now_ms: int) -> None:
        try:
            self._current = self._renew(self._current)
        except FabricError:  # the old certificate is still good; calls say when it is not
            self._due_ms = now_ms + RETRY_MS
            return
        self._due_ms = _half_life_ms(self._current, now_ms)


def from_socket(path: str) -> Identity:
    """This process, as the kernel names it to the fabric's own machine."""

    def renew(old: Credentials) -> Credentials:
        return wire.renew_identity(path, old, now_ms=_clock.wall_ms())

    now_ms = _clock.wall_ms()
    first = wire.request_identity(path, certificates.new_tls_key(), now_ms=now_ms)
    return Identity(first, renew, _half_life_ms(first, now_ms))


def from_folder(folder: Path) -> Identity:
    """The identity in a folder: `tls.key`, `tls.crt` and `ca.crt`."""
    files = IdentityFiles(folder)

    def reload(_old: Credentials) -> Credentials:
        return files.load().check(_clock.wall_ms())

    now_ms = _clock.wall_ms()
    return Identity(files.load().check(now_ms), reload, now_ms + RELOAD_MS)


def fixed(credentials: Credentials) -> Identity:
    """Credentials that somebody else answers for."""
    return Identity(credentials, lambda old: old, 2**62)


def _half_life_ms(credentials: Credentials, now_ms: int) -> int:
    return now_ms + max(0, (credentials.certificate.not_after_ms - now_ms) // 2)
