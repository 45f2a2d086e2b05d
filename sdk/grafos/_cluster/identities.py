"""The authority of a fabric on this machine, at work: certificates for whoever may have them.

Rules. One thread answers the identity socket; the supervisor asks it for secrets under a lock. This
module is the one that takes long to load (cryptography), so the supervisor loads it when the
services are on their way, and delivers the secrets that they wait for as soon as there are any.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from grafos._authority import Authority
from grafos._clock import boot_ms, wall_ms
from grafos._identity_issuer import IdentityIssuer, LocalPeer
from grafos._identity_socket import IdentityServer, add_identity_socket, add_join_listener
from grafos_core import failure
from grafos_core.spiffe import Role
from grafos_proto.wire.identity import Message

POLL_MS: Final = 100


class LockedIssuer(IdentityIssuer):
    """The issuer, asked by the thread of the socket and by the supervisor's."""

    def __init__(self, authority: Authority, *, operator_uid: int) -> None:
        super().__init__(authority, operator_uid=operator_uid)
        self._lock = threading.Lock()

    def expect(self, role: Role, name: str, *, elapsed_ms: int) -> str:
        with self._lock:
            return super().expect(role, name, elapsed_ms=elapsed_ms)

    def answer_local(
        self, peer: LocalPeer, request: Message, *, now_ms: int, elapsed_ms: int
    ) -> Message:
        with self._lock:
            return super().answer_local(peer, request, now_ms=now_ms, elapsed_ms=elapsed_ms)

    def answer_remote(
        self, address: str, request: Message, *, now_ms: int, elapsed_ms: int
    ) -> Message:
        with self._lock:
            return super().answer_remote(address, request, now_ms=now_ms, elapsed_ms=elapsed_ms)


class Identities:
    """The running authority. `start` begins to answer, `stop` ends that."""

    def __init__(
        self, folder: Path, socket_path: Path, *, trust_domain: str, operator_uid: int
    ) -> None:
        authority = _open(folder, trust_domain)
        self.trust_domain, self.ca_file = authority.trust_domain, folder / "root.crt"
        self.join = ""
        """Where machines join, with the real port."""
        self._issuer = LockedIssuer(authority, operator_uid=operator_uid)
        self._server = IdentityServer()
        add_identity_socket(self._server, socket_path, self._issuer)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="identities", daemon=True)

    def listen_for_machines(self, address: str) -> None:
        """Let other machines join at `host:port`, with a token; port 0: any."""
        host, _, port = address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
            raise failure.of("INVALID", "join listener: host:port is needed")
        found = add_join_listener(
            self._server, host.strip("[]"), int(port), self._issuer, now_ms=wall_ms()
        )
        self.join = f"{host}:{found}"

    def start(self) -> None:
        self._thread.start()

    def secret_for(self, role: Role, name: str) -> str:
        """By which a process that is being started becomes this service or node, once."""
        return self._issuer.expect(role, name, elapsed_ms=boot_ms())

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._server.close()

    def _serve(self) -> None:
        while not self._stopped.is_set():
            self._server.poll(wall_ms(), boot_ms(), wait_ms=POLL_MS)


def _open(folder: Path, trust_domain: str) -> Authority:
    if (folder / "authority.json").exists():
        authority = Authority.open(folder, now_ms=wall_ms())
    else:
        authority = Authority.init(folder, now_ms=wall_ms(), trust_domain=trust_domain)
    if authority.trust_domain != trust_domain:
        raise failure.of("INVALID", "the state belongs to another trust domain")
    return authority
