"""Does what it is told, one JSON object per line: a holder or an operator at some place of a town.

It is an ordinary program of the SDK's; who it is and whom it asks stands in its environment. A
typed failure is an answer like any other: `{"refused": "LeaseExpired", "code": "LEASE_EXPIRED"}`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grafos
from grafos import BlockBuilder, MemBuilder, _clock
from grafos._calls import Peer
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import (
    admission_pb2,
    lease_pb2,
    ledger_pb2,
    ledger_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
)
from grafos_proto.wire.credentials import IdentityFiles

ANSWER_MS = 10_000
BLOCK_BYTES = 4096
OPERATIONS_MAX = 1_000_000


class Visit:
    def __init__(self) -> None:
        self._fabric: grafos.Fabric | None = None
        self._leases: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> Any:
        verb: Callable[..., Any] = getattr(self, f"do_{request.pop('do')}")
        return verb(**request)

    # as a holder

    def do_who(self) -> dict[str, Any]:
        return {"uid": os.getuid(), "net": os.readlink("/proc/self/ns/net"), "pid": os.getpid()}

    def do_acquire(
        self, kind: str, node: str, ttl: float, wait: float = 0, amount: int = 0,
        on_disconnect: str | float = "",
    ) -> dict[str, Any]:  # fmt: skip
        if self._fabric is None:
            self._fabric = grafos.connect()
        builder: Any
        if kind == "mem":
            builder = MemBuilder().min_bytes(amount or 65_536)
        else:
            builder = BlockBuilder().min_blocks(amount or 8)
        made = builder.where(node=node).lease_secs(ttl).fabric(self._fabric)
        made = made.on_disconnect(on_disconnect) if on_disconnect else made
        lease = (made.wait(wait) if wait else made).acquire()
        self._leases[lease.lease_id] = lease
        far = "rpc" if lease._grip.node.port is None else "port"
        path = lease.mem().path if kind == "mem" else far
        return {"lease_id": lease.lease_id, "epoch": lease.epoch, "path": path}

    def do_write(self, lease_id: str, text: str) -> None:
        lease = self._leases[lease_id]
        if lease.kind == "mem":
            lease.mem().write(0, text.encode())
        else:
            lease.block().write_block(0, text.encode().ljust(BLOCK_BYTES, b"\0"))

    def do_read(self, lease_id: str, length: int) -> str:
        lease = self._leases[lease_id]
        handle = lease.mem() if lease.kind == "mem" else lease.block()
        data = handle.read(0, length) if lease.kind == "mem" else handle.read_block(0)[:length]
        return bytes(data).decode()

    def do_renew(self, lease_id: str) -> int:
        return int(self._leases[lease_id].renew())

    def do_release(self, lease_id: str) -> dict[str, Any]:
        receipt = self._leases.pop(lease_id).release()
        return {"outcome": receipt.outcome, "credited": receipt.credited}

    def do_hang_up(self) -> None:
        """The connection to the node ends, as if cut; nothing is done about it before `poll`."""
        assert self._fabric is not None
        for line in self._fabric._nodes.values():
            line._session._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]

    def do_poll(self) -> None:
        assert self._fabric is not None
        self._fabric.poll()

    def do_use(self, lease_id: str, verb: str) -> dict[str, Any]:
        """One operation on all of it, over and over until it is refused.

        The instants are of boottime: when the last one that was not refused had returned, and until
        when the holder meant to use the lease at the most.
        """
        lease = self._leases[lease_id]
        until_ms = lease._until_ns // 1_000_000
        operation = _operation(lease, verb)
        count = last_ms = 0
        try:
            while count < OPERATIONS_MAX:
                given = operation()
                last_ms, count = _clock.boot_ms(), count + 1
                del given  # after the look at the clock: giving memory back takes its time
        except FabricError as refused:
            failure, code = type(refused).__name__, refused.code
        return {
            "count": count, "last_ms": last_ms, "until_ms": until_ms, "failure": failure,
            "code": code,
        }  # fmt: skip

    # as an operator

    def do_ledger(self, endpoint: str, lease_id: str) -> str:
        """The state of a lease as the ledger has it."""
        peer = _peer(endpoint, Role.SERVICE, "ledger", ledger_pb2_grpc.LedgerServiceStub)
        request = admission_pb2.GetLeaseRequest(lease_id=lease_id)
        found = peer.ask("Get", request, ANSWER_MS)
        peer.close()
        return lease_pb2.LeaseState.Name(found.state)

    def do_books(self, endpoint: str) -> list[list[Any]]:
        """Every line of the ledger's books: node, lost, kind, free, total."""
        peer = _peer(endpoint, Role.SERVICE, "ledger", ledger_pb2_grpc.LedgerServiceStub)
        found = peer.ask("Snapshot", ledger_pb2.SnapshotRequest(), ANSWER_MS)
        peer.close()
        return [
            [node.node_id, node.lost, book.kind, book.free, book.total]
            for node in found.nodes
            for book in node.books
        ]

    def do_node(self, endpoint: str, node_id: str) -> dict[str, str]:
        """Lease id to stage, as the node itself says."""
        peer = _peer(endpoint, Role.NODE, node_id, node_pb2_grpc.NodeControlStub)
        found = peer.ask("ListLeases", node_pb2.ListNodeLeasesRequest(), ANSWER_MS)
        peer.close()
        return {lease.lease_id: lease.stage for lease in found.leases}


def _operation(lease: Any, verb: str) -> Callable[[], Any]:
    """`far` ones go to the node without the SDK's own look at the deadline."""
    size = lease._size_bytes
    data = b"w" * size
    node = lease._grip.node
    if verb == "far read":
        return lambda: node.read(
            lease.lease_id, lease.epoch, offset=0, length=size, timeout_ms=ANSWER_MS
        )
    if verb == "far write":
        return lambda: node.write(
            lease.lease_id, lease.epoch, offset=0, data=data, timeout_ms=ANSWER_MS
        )
    operations: dict[str, Callable[[], Any]]
    if lease.kind == "block":
        block, blocks = lease.block(), size // BLOCK_BYTES
        operations = {
            "read": lambda: block.read_blocks(0, blocks),
            "write": lambda: block.write_blocks(0, data),
            "flush": block.flush,
        }
        return operations[verb]
    mem, buffer = lease.mem(), bytearray(size)
    operations = {
        "read": lambda: mem.read(0, size),
        "readinto": lambda: mem.readinto(0, buffer),
        "write": lambda: mem.write(0, data),
    }
    return operations[verb]


def _peer(endpoint: str, role: Role, name: str, stub: Any) -> Peer:
    files = IdentityFiles(Path(os.environ["GRAFOS_IDENTITY_DIR"]))
    who = Identity(files().identity.trust_domain, role, None, name)
    return Peer(endpoint, files, who, stub)


def main() -> int:
    visit = Visit()
    for line in sys.stdin:
        try:
            answer = {"is": visit.answer(json.loads(line))}
        except FabricError as refused:
            answer = {
                "refused": type(refused).__name__,
                "code": refused.code,
                "why": str(refused),
            }
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
