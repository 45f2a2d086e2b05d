"""A data port on a real socket, with leases in real memory, and a holder who speaks raw frames."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grafos._authority import Authority
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.spiffe import Identity, Role
from grafos_proto.wire import certificates, tls, ttrpc
from grafos_proto.wire import dataframes as frames
from grafos_proto.wire.credentials import Credentials
from services.nodeagent.datapath import DataPath, Ended, LeaseTable, MemoryStorage, OpenLease
from services.nodeagent.dataport import DataPort, Terms
from services.nodeagent.gatepage import CellState, GatePage
from services.nodeagent.sessions import Sessions
from services.nodeagent.shares import Shares

DOMAIN, NODE = "test.local", Identity("test.local", Role.NODE, None, "n1")
DEADLINE_MS = 1 << 40
SIZE = 8 << 20
EPOCH = 9


class Watchman:
    def session_back(self, session: str) -> None: ...

    def session_lost(self, session: str) -> None: ...


class SteppedClock:
    """This machine's clocks, pushed forward by hand."""

    def __init__(self) -> None:
        self.wall_skew_ms = self.boot_skew_ms = 0

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.wall_skew_ms

    def boot_ns(self) -> int:
        return time.monotonic_ns() + self.boot_skew_ms * 1_000_000

    def boot_ms(self) -> int:
        return self.boot_ns() // 1_000_000

    def instant(self) -> Any:
        from services.runtime.clock import Instant

        return Instant(self.boot_ms(), self.wall_ms())


class Shelf(MemoryStorage):
    """Memory, and something that happens right after its bytes were read or written."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor)
        self.meanwhile: Callable[[], None] = lambda: None

    def read(self, offset: int, length: int) -> bytes:
        data = super().read(offset, length)
        self.meanwhile()
        return data

    def read_into(self, offset: int, view: memoryview) -> None:
        super().read_into(offset, view)
        self.meanwhile()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        super().write(offset, data)
        self.meanwhile()


class Rig:
    """The node's side."""

    def __init__(self, folder: Path) -> None:
        self.clock = SteppedClock()
        self.authority = Authority.init(
            folder / "ca", trust_domain=DOMAIN, now_ms=self.clock.wall_ms()
        )
        self.node = self.credentials(NODE)
        self.gate, self.table = GatePage.create(16), LeaseTable()
        self.broken: list[str] = []
        self.proved_roots: list[str] = []
        self.shares = Shares(self.table, self.proved_roots.append, self.clock)
        self.data = DataPath(
            self.gate,
            self.table,
            self.clock.boot_ns,
            lambda lease, why: self.broken.append(why),
            self.shares,
        )
        self.sessions = Sessions(Watchman())
        self.path = folder / "p" / "d.sock"
        self.tls_port = 0
        terms = Terms(DOMAIN, self.clock)
        self.port = DataPort(self.data, self.sessions, lambda: self.node, terms, self.shares)
        self.port.listen_unix(self.path)
        self._slots = iter(range(16))

    def credentials(self, who: Identity) -> Credentials:
        key = certificates.new_tls_key()
        chain = self.authority.issue(key.public_key(), who, now_ms=self.clock.wall_ms())
        return Credentials(certificates.key_pem(key), chain, self.authority.bundle_pem)

    def holder(self, name: str = "alice") -> Credentials:
        return self.credentials(Identity(DOMAIN, Role.HOLDER, "acme", name))

    def lease(
        self, holder: Credentials, size: int = SIZE, ops: tuple[str, ...] = ("read", "write")
    ) -> OpenLease:
        """A lease on fresh memory, open."""
        fd = os.memfd_create("lease", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, 1033, 4 | 1)
        lease = OpenLease(
            secrets.token_hex(16), next(self._slots), EPOCH, 1, Kind.MEM, size, holder.thumbprint,
            DEADLINE_MS, "", False, frozenset(ops), Shelf(fd),
        )  # fmt: skip
        cell = (CellState.OPEN, EPOCH, DEADLINE_MS * 1_000_000, bytes.fromhex(lease.lease_id))
        self.gate.write_control(lease.slot, *cell)
        self.gate.write_warden(lease.slot, *cell)
        self.table.open(lease)
        return lease

    def end(self, lease: OpenLease, cause: FabricError) -> None:
        """As control does: first the gate, then the cause."""
        self.gate.close_control(lease.slot)
        self.table.remember(lease.lease_id, Ended(lease.holder_key, cause))
        self.table.shut(lease.lease_id)

    def connect(self, who: Credentials) -> Caller:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(os.fspath(self.path))
        try:
            ttrpc.greet(sock, who, NODE, 5)
        except BaseException:
            sock.close()
            raise
        return Caller(sock)

    def connect_tls(self, who: Credentials) -> Caller:
        if not self.tls_port:
            self.tls_port = self.port.listen_tls("127.0.0.1", 0)
        raw = socket.create_connection(("127.0.0.1", self.tls_port), 5)
        name = tls.server_name(NODE)
        return Caller(tls.client_context(who).wrap_socket(raw, server_hostname=name))

    def close(self) -> None:
        self.port.stop()
        for lease in self.table.open_leases():
            lease.storage.close()
        self.gate.close()


class Caller:
    """The holder's side."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._stream = sock.makefile("rb")

    def hello(self, session: str = "") -> Caller:
        kind, _, data = self.ask(frames.HELLO, 0, 0, count=1, payload=session.encode())
        assert kind == frames.DATA
        assert frames.HELLO_ANSWER.unpack(data)[:2] == (1, frames.HANDLES_MAX)
        return self

    def open(self, lease: OpenLease, handle: int = 0) -> Caller:
        payload = bytes.fromhex(lease.lease_id)
        kind, _, data = self.ask(frames.OPEN, handle, 0, offset=lease.epoch, payload=payload)
        assert kind == frames.DATA, data
        return self

    def send(self, *requests: bytes) -> None:
        self.sock.sendall(b"".join(requests))

    def ask(self, op: int, handle: int, tag: int, **fields: Any) -> tuple[int, int, Any]:
        self.send(frames.request(op, handle, tag, **fields))
        return self.hear()

    def hear(self) -> tuple[int, int, Any]:
        """Kind, tag, and data or failure of the next frame. Void data is None."""
        length, kind, _, _, tag = frames.ANSWER.unpack(self._exactly(frames.ANSWER.size))
        data = self._exactly(length)
        if kind == frames.DATA:
            return kind, tag, data[:-1] if data[-1] == frames.GOOD else None
        fields = frames.fields_of(data)
        return kind, tag, frames.failure_of(fields) if kind == frames.REFUSAL else fields

    def is_over(self) -> bool:
        """Whether the node ends the connection; what it says before that is not looked at."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self._stream.close()
        self.sock.close()

    def _exactly(self, count: int) -> bytes:
        data = self._stream.read(count)
        assert len(data) == count, "the node ended the connection"
        return data
