"""The collector's calls: whose chain may come from whom, and what is told of them.

Rules. A node brings the chain of its own id, the ledger brings `ledger`, nobody anything else; a
node that bears the name of a service brings nothing. Nodes see their own head; services and
operators see all, and everything can be exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import grpc

from grafos_core import failure
from grafos_core.chain import Seal
from grafos_core.collector import Collector, Position
from grafos_core.spiffe import Role
from grafos_proto.v1 import audit_pb2, audit_pb2_grpc
from services.audit.desk import Desk, Offer
from services.audit.store import Name, Store
from services.runtime.calls import check_deadline, deadline_left_ms, peer

RECORDS_MAX: Final = 256
BYTES_MAX: Final = 192 * 1024
SERVICE_ORIGINS: Final = frozenset({"ledger"})
RESERVED: Final = frozenset({"ledger", "audit", "admission", "identity"})


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    def __init__(self, desk: Desk, public_key: bytes, key_id: str) -> None:
        self._desk, self._public_key, self._key_id = desk, public_key, key_id

    def Append(self, request: Any, context: grpc.ServicerContext) -> audit_pb2.AppendResponse:
        if request.origin != _own_origin():
            raise failure.of("DENIED", "a chain comes from its writer")
        size = sum(len(data) for data in request.records)
        if len(request.records) > RECORDS_MAX or size > BYTES_MAX:
            raise failure.of("RANGE", f"at most {RECORDS_MAX} records and {BYTES_MAX} bytes")
        seals = [Seal(s.number, s.hash, s.key_id, s.signature) for s in request.seals]
        offer = Offer(
            request.origin, _incarnation(request.incarnation), list(request.records), seals,
            request.key_id, request.public_key,
        )  # fmt: skip
        done = self._desk.submit(offer, deadline_left_ms())
        return audit_pb2.AppendResponse(
            number=done.number, head=done.head, countersignature=done.countersignature,
            key_id=self._key_id,
        )  # fmt: skip

    def Head(self, request: Any, context: grpc.ServicerContext) -> audit_pb2.HeadResponse:
        wanted = _own_origin() if peer().identity.role is Role.NODE else request.origin
        if request.origin not in ("", wanted):
            raise failure.of("DENIED", "a node sees its own chain")

        def look(collector: Collector, store: Store) -> list[tuple[Name, Position, str, str]]:
            evidence = {(f.origin, f.incarnation): f.number for f in collector.forks()}
            found = []
            for name in store.names():
                own = name == store.own_name
                position = collector.head if own else collector.position(*name)
                forked = f"two records {evidence[name]}" if name in evidence else ""
                found.append((name, position, collector.quarantine(*name), forked))
            return found

        heads = [
            self._chain_head(*each)
            for each in self._desk.read(look, deadline_left_ms())
            if wanted in ("", each[0][0]) and request.incarnation in ("", each[0][1])
        ]
        return audit_pb2.HeadResponse(heads=heads, public_key=self._public_key, key_id=self._key_id)

    def _chain_head(
        self, name: Name, position: Position, quarantine: str, evidence: str
    ) -> audit_pb2.ChainHead:
        return audit_pb2.ChainHead(
            origin=name[0], incarnation=name[1], number=position.number, head=position.head,
            quarantined=bool(quarantine), evidence=": ".join(filter(None, (quarantine, evidence))),
            countersignature=self._desk.countersign(name, position) if position.number else b"",
        )  # fmt: skip

    def Export(
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[audit_pb2.ExportResponse]:
        names = [
            name
            for name in self._desk.read(lambda collector, store: store.names())
            if request.origin in ("", name[0]) and request.incarnation in ("", name[1])
        ]
        if not names and request.origin:
            raise failure.of("NOT_FOUND", "no such chain")
        for name in names:
            yield from self._exported(name, max(1, request.from_number))

    def _exported(self, name: Name, first: int) -> Iterator[audit_pb2.ExportResponse]:
        """One chain, page by page; what comes in meanwhile is not waited for."""
        keys = self._desk.read(lambda collector, store: store.keys(name))
        key_id, public_key = next(iter(keys.items()))
        while True:
            check_deadline()
            records, seals = self._page(name, first)
            if not records:
                return
            yield audit_pb2.ExportResponse(
                origin=name[0], incarnation=name[1], records=records,
                seals=[
                    audit_pb2.Seal(
                        number=s.number, hash=s.hash, key_id=s.key_id, signature=s.signature
                    )
                    for s in seals
                ],
                public_key=public_key, key_id=key_id,
            )  # fmt: skip
            first += len(records)

    def _page(self, name: Name, first: int) -> tuple[list[bytes], list[Seal]]:
        return self._desk.read(lambda collector, store: store.page(name, first))


def _own_origin() -> str:
    """The one origin that the caller may write; empty: none."""
    who = peer().identity
    if who.role is Role.NODE:
        if who.name in RESERVED:
            raise failure.of("DENIED", "a node cannot bear the name of a service")
        return who.name
    is_writer = who.role is Role.SERVICE and who.name in SERVICE_ORIGINS
    return who.name if is_writer else ""


def _incarnation(text: str) -> str:
    if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
        raise failure.of("IDENTIFIER", "incarnation: 32 hexadecimal digits")
    return text
