"""An audit collector with a notebook for a disk: the real rules of ingest, a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from grafos_core import chain
from grafos_core.chain import Record, Seal
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import audit_pb2, audit_pb2_grpc
from services.runtime import signing
from services.runtime.logs import Log
from services.runtime.server import Listener, Service, serve
from tests.services.nodeagent.fabric import TRUST_DOMAIN, People

AUDIT = Identity(TRUST_DOMAIN, Role.SERVICE, None, "audit")


@dataclass
class Collector(audit_pb2_grpc.AuditServiceServicer):
    """Refuses what does not link or is not sealed by the key that came first."""

    records: list[Record] = field(default_factory=list)
    public_key: bytes = b""
    is_away: bool = False
    endpoint: str = ""

    @property
    def number(self) -> int:
        return self.records[-1].number if self.records else 0

    def Head(
        self, request: audit_pb2.HeadRequest, context: grpc.ServicerContext
    ) -> audit_pb2.HeadResponse:
        self._check_here(context)
        head = audit_pb2.ChainHead(origin=request.origin, number=self.number)
        return audit_pb2.HeadResponse(heads=[head] if self.records else [])

    def Append(
        self, request: audit_pb2.AppendRequest, context: grpc.ServicerContext
    ) -> audit_pb2.AppendResponse:
        self._check_here(context)
        self.public_key = self.public_key or request.public_key
        assert request.public_key == self.public_key
        for data in request.records:
            record = chain.parse(data)
            before = self.records[-1] if self.records else None
            prev = before.hash if before else chain.GENESIS
            chain.check_link(record, prev=prev, number=self.number, before=before)
            self.records.append(record)
        for each in request.seals:
            seal = Seal(each.number, each.hash, each.key_id, each.signature)
            chain.check_seal(seal, request.incarnation, self._verify)
        assert request.seals[-1].number == self.number, "the last seal covers the last record"
        return audit_pb2.AppendResponse(number=self.number, head=self.records[-1].hash)

    def kinds_of(self, lease_id: str) -> list[str]:
        return [record.kind for record in self.records if record.lease_id == lease_id]

    def _verify(self, key_id: str, message: bytes, signature: bytes) -> bool:
        known = key_id == signing.key_id_of(self.public_key)
        return known and signing.verify(self.public_key, message, signature)

    def _check_here(self, context: grpc.ServicerContext) -> None:
        if self.is_away:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")


@contextmanager
def collector_of(people: People) -> Iterator[Collector]:
    made = Collector()  # type: ignore[abstract]  # of three methods two are called
    shown = people.make(AUDIT)
    service = Service(
        "grafos.v1.AuditService", audit_pb2_grpc.add_AuditServiceServicer_to_server, made
    )
    server = serve(
        [Listener("127.0.0.1:0", [service])],
        provider=lambda: shown,
        trust_domain=TRUST_DOMAIN,
        log=Log("audit", level="error"),
    )
    made.endpoint = server.endpoints[0]
    try:
        yield made
    finally:
        server.stop(100)
