"""Somebody who keeps a chain and brings it to the collector."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from grafos_core import chain
from grafos_core.chain import Chain, Record
from grafos_core.failure import FabricError
from grafos_proto.v1 import audit_pb2, audit_pb2_grpc
from grafos_proto.wire import failures
from services.runtime.signing import key_id_of
from tests.services.ledger.house import House

CALL_S = 10


class Writer:
    def __init__(self, house: House, endpoint: str, path: str, origin: str = "") -> None:
        self.origin = origin or path.rpartition("/")[2]
        self.key = Ed25519PrivateKey.generate()
        self.format()
        self.channel = house.channel(endpoint, path, "service/audit")
        self.stub = audit_pb2_grpc.AuditServiceStub(self.channel)

    def format(self) -> None:
        """As a node whose disk was wiped."""
        self.incarnation = secrets.token_hex(16)
        self.chain = Chain(self.origin, self.incarnation, 1)

    def moved(self, endpoint: str, house: House, path: str) -> None:
        """Talk to a collector that was started again."""
        self.channel.close()
        self.channel = house.channel(endpoint, path, "service/audit")
        self.stub = audit_pb2_grpc.AuditServiceStub(self.channel)

    @property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    def write(self, count: int, **body: Any) -> list[Record]:
        return [
            self.chain.append("agent.clock", wall_ms=1_700, boottime_ns=9, body=body)
            for _ in range(count)
        ]

    def seal(self, record: Record, **changes: Any) -> audit_pb2.Seal:
        message = chain.seal_bytes(self.incarnation, record.number, record.hash)
        fields: dict[str, Any] = {
            "number": record.number, "hash": record.hash, "key_id": key_id_of(self.public_key),
            "signature": self.key.sign(message),
        } | changes  # fmt: skip
        return audit_pb2.Seal(**fields)

    def request(self, records: Sequence[Record], **changes: Any) -> audit_pb2.AppendRequest:
        fields: dict[str, Any] = {
            "origin": self.origin, "incarnation": self.incarnation,
            "records": changes.pop("sent", [record.data for record in records]),
            "seals": [self.seal(records[-1])] if records else [],
            "public_key": self.public_key, "key_id": key_id_of(self.public_key),
        } | changes  # fmt: skip
        return audit_pb2.AppendRequest(**fields)

    def append(self, records: Sequence[Record], **changes: Any) -> Any:
        with failures.status_to_failures():
            return self.stub.Append(
                self.request(records, **changes), timeout=CALL_S, wait_for_ready=True
            )

    def refusal(self, records: Sequence[Record], **changes: Any) -> FabricError:
        try:
            answer = self.append(records, **changes)
        except FabricError as refused:
            return refused
        raise AssertionError(f"acknowledged up to {answer.number}")

    def announce(self, record: Record) -> Any:
        return self.append([], seals=[self.seal(record)])

    def head(self) -> Any:
        """The head of this chain as the collector has it; None: it has none."""
        with failures.status_to_failures():
            ask = audit_pb2.HeadRequest(origin=self.origin, incarnation=self.incarnation)
            heads = self.stub.Head(ask, timeout=CALL_S, wait_for_ready=True).heads
        return heads[0] if heads else None

    def close(self) -> None:
        self.channel.close()
