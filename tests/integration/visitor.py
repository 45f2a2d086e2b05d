"""Does what it is told, one JSON object per line: a holder or an operator at some place of a town.

It is an ordinary program of the SDK's; who it is and whom it asks stands in its environment. A
typed failure is an answer like any other: `{"refused": "LeaseExpired", "code": "LEASE_EXPIRED"}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grafos
from grafos import BlockBuilder, MemBuilder
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

    def do_acquire(self, kind: str, node: str, ttl: float, wait: float = 0) -> dict[str, Any]:
        if self._fabric is None:
            self._fabric = grafos.connect()
        builder: Any = MemBuilder() if kind == "mem" else BlockBuilder()
        builder = builder.min_bytes(65_536) if kind == "mem" else builder.min_blocks(8)
        made = builder.where(node=node).lease_secs(ttl).fabric(self._fabric)
        lease = (made.wait(wait) if wait else made).acquire()
        self._leases[lease.lease_id] = lease
        path = lease.mem().path if kind == "mem" else "rpc"
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
            answer = {"refused": type(refused).__name__, "code": refused.code}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
