"""A fabric around one node agent: an authority, a ledger that remembers, holders with tokens.

The ledger here is a real gRPC service on a real socket, with the state of a notebook: it writes
down what it is told, and answers what the test wants it to answer. Tokens are signed as admission
would.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from grafos._authority import Authority
from grafos_core import jws, receipt, token
from grafos_core.lease import Kind, Policy
from grafos_core.receipt import TeardownReceipt
from grafos_core.spiffe import Identity, Role
from grafos_core.token import LeaseToken
from grafos_proto.v1 import (
    lease_pb2,
    ledger_pb2,
    ledger_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
)
from grafos_proto.wire import certificates, failures
from grafos_proto.wire.credentials import (
    Credentials,
    IdentityFiles,
    channel_credentials,
    server_name_option,
)
from services.runtime.logs import Log
from services.runtime.server import Listener, Server, Service, serve

TRUST_DOMAIN = "test.local"
NODE = Identity(TRUST_DOMAIN, Role.NODE, None, "n1")
LEDGER = Identity(TRUST_DOMAIN, Role.SERVICE, None, "ledger")
ADMISSION = Identity(TRUST_DOMAIN, Role.SERVICE, None, "admission")
OPERATOR = Identity(TRUST_DOMAIN, Role.OPERATOR, None, "ada")
CALL_S = 10.0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def eventually(what: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What `what` gives as soon as that is true; fails when it never is."""
    end = time.monotonic() + timeout_s
    while True:
        found = what()
        if found or time.monotonic() > end:
            assert found, "it never came true"
            return found
        threading.Event().wait(0.01)


class People:
    """The authority, and whoever it has given a certificate."""

    def __init__(self, folder: Path) -> None:
        self._authority = Authority.init(folder / "ca", now_ms=now_ms(), trust_domain=TRUST_DOMAIN)

    def make(self, identity: Identity) -> Credentials:
        key = certificates.new_tls_key()
        chain = self._authority.issue(key.public_key(), identity, now_ms=now_ms())
        return Credentials(certificates.key_pem(key), chain, self._authority.bundle_pem)

    def holder(self, name: str = "alice", tenant: str = "acme") -> Credentials:
        return self.make(Identity(TRUST_DOMAIN, Role.HOLDER, tenant, name))

    def save(self, identity: Identity, folder: Path) -> None:
        IdentityFiles(folder).save(self.make(identity))


class Signer:
    """An Ed25519 key with its id, as the ledger publishes it."""

    def __init__(self, use: str, owner: str) -> None:
        self.key = ed25519.Ed25519PrivateKey.generate()
        self.public = self.key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        self.use, self.owner = use, owner
        self.key_id = secrets.token_hex(8)

    def published(self) -> lease_pb2.VerificationKey:
        return lease_pb2.VerificationKey(
            key_id=self.key_id, owner=self.owner, use=self.use, public_key=self.public
        )


def verifier(public: bytes) -> Callable[[bytes, bytes], bool]:
    key = ed25519.Ed25519PublicKey.from_public_bytes(public)

    def verify(message: bytes, signature: bytes) -> bool:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return verify


@dataclass
class Ledger(ledger_pb2_grpc.LedgerServiceServicer):
    """Writes down what the node says. `is_away` makes it fail every call."""

    keys: list[lease_pb2.VerificationKey] = field(default_factory=list)
    obligations: list[ledger_pb2.Obligation] = field(default_factory=list)
    registrations: list[ledger_pb2.RegisterRequest] = field(default_factory=list)
    bound: list[tuple[str, int, int]] = field(default_factory=list)
    receipts: dict[str, list[TeardownReceipt]] = field(default_factory=dict)
    is_away: bool = False
    credit_is_away: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Register(
        self, request: ledger_pb2.RegisterRequest, context: grpc.ServicerContext
    ) -> ledger_pb2.RegisterResponse:
        self._check_here(context)
        with self._lock:
            self.registrations.append(request)
            return ledger_pb2.RegisterResponse(
                version=lease_pb2.Version(protocol=1),
                ttl_ms=3_000,
                now_ms=now_ms(),
                revision=1,
                obligations=self.obligations,
                keys=self.keys,
                revocation_number=1,
            )

    def ReportBound(
        self, request: ledger_pb2.ReportBoundRequest, context: grpc.ServicerContext
    ) -> ledger_pb2.ReportBoundResponse:
        self._check_here(context)
        with self._lock:
            self.bound += [(b.lease_id, b.epoch, b.generation) for b in request.bound]
        outcomes = [ledger_pb2.Outcome() for _ in request.bound]
        return ledger_pb2.ReportBoundResponse(outcomes=outcomes)

    def Credit(
        self, request: ledger_pb2.CreditRequest, context: grpc.ServicerContext
    ) -> ledger_pb2.CreditResponse:
        self._check_here(context)
        if self.credit_is_away:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        with self._lock:
            for text in request.receipts:
                read = receipt.verify(text, self._receipt_keys())
                self.receipts.setdefault(read.lease_id, []).append(read)
        outcomes = [ledger_pb2.Outcome() for _ in request.receipts]
        return ledger_pb2.CreditResponse(outcomes=outcomes)

    def receipt_of(self, lease_id: str) -> TeardownReceipt:
        """The last receipt that came for a lease, once one has come."""
        found: list[TeardownReceipt] = eventually(lambda: self.receipts.get(lease_id))
        return found[-1]

    def latest(self) -> ledger_pb2.RegisterRequest | None:
        return self.registrations[-1] if self.registrations else None

    def _receipt_keys(self) -> jws.Keys:
        keys = jws.Keys()
        for each in {r.receipt_key.key_id: r for r in self.registrations}.values():
            owner = token.audience_of(each.node_id, each.incarnation)
            key = each.receipt_key
            keys.add(jws.RECEIPT, key.key_id, verifier(key.public_key), owner=owner)
        return keys

    def _check_here(self, context: grpc.ServicerContext) -> None:
        if self.is_away:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")


@dataclass
class Fabric:
    """Everything that stands around the agent."""

    folder: Path
    people: People
    ledger: Ledger
    server: Server
    admission_key: Signer
    clear_key: Signer
    _epochs: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def ledger_endpoint(self) -> str:
        return self.server.endpoints[0]

    def token(self, holder: Credentials, **changes: Any) -> LeaseToken:
        """A grant for `holder` at the agent as it last registered: 64 KiB of memory for 60 s."""
        registered = eventually(self.ledger.latest)
        at_ms = now_ms()
        plain = LeaseToken(
            issuer=str(ADMISSION),
            subject=str(holder.identity),
            audience=token.audience_of(registered.node_id, registered.incarnation),
            jti=secrets.token_hex(16),
            iat_ms=at_ms // 1000 * 1000,
            nbf_ms=at_ms // 1000 * 1000,
            exp_ms=at_ms + 1_000,
            holder_thumbprint=holder.thumbprint,
            lease_id=secrets.token_hex(16),
            kind=Kind.MEM,
            amount=65_536,
            ops=("read", "write"),
            epoch=next(self._epochs),
            generation=1,
            ttl_ms=60_000,
            lease_end_ms=at_ms + 60_000,
            policy=Policy(),
        )
        made = replace(plain, **changes)
        if "exp_ms" not in changes:
            made = replace(made, exp_ms=min(at_ms + 30_000, made.lease_end_ms))
        return made

    def sign(self, slip: LeaseToken, *, by: Signer | None = None) -> str:
        key = by or self.admission_key
        return token.mint(token.LEASE, key.key_id, slip.to_claims(), key.key.sign)

    def clear_order(self, **fields: Any) -> str:
        order = receipt.ClearOrder(
            exp_ms=now_ms() + 60_000, reason="looked at", operator=str(OPERATOR), **fields
        )
        return receipt.mint_clear(order, self.clear_key.key_id, self.clear_key.key.sign)


@contextmanager
def fabric_in(folder: Path) -> Iterator[Fabric]:
    people = People(folder)
    admission_key = Signer("lease", str(ADMISSION))
    clear_key = Signer("clear", str(OPERATOR))
    ledger = Ledger(keys=[admission_key.published(), clear_key.published()])  # type: ignore[abstract]
    service = Service(
        "grafos.v1.LedgerService", ledger_pb2_grpc.add_LedgerServiceServicer_to_server, ledger
    )
    shown = people.make(LEDGER)
    server = serve(
        [Listener("127.0.0.1:0", [service])],
        provider=lambda: shown,
        trust_domain=TRUST_DOMAIN,
        log=Log("ledger", level="error"),
    )
    try:
        yield Fabric(folder, people, ledger, server, admission_key, clear_key)
    finally:
        server.stop(100)


class HolderSide:
    """A holder's program: one channel to the front, one session, failures as failures."""

    def __init__(self, endpoint: str, credentials: Credentials) -> None:
        self.credentials, self.session = credentials, secrets.token_hex(16)
        self.channel = grpc.secure_channel(
            endpoint, channel_credentials(credentials), [server_name_option(NODE)]
        )
        self.stub = node_pb2_grpc.NodeServiceStub(self.channel)

    def bind(self, text: str, *, push: bool = False) -> node_pb2.BindResponse:
        request = node_pb2.BindRequest(token=text, session=self.session, push=push)
        answer: node_pb2.BindResponse = self.call("Bind", request)
        return answer

    def attach(self, text: str) -> node_pb2.BindResponse:
        request = node_pb2.BindRequest(token=text, session=self.session)
        answer: node_pb2.BindResponse = self.call("Attach", request)
        return answer

    def extend(self, text: str) -> node_pb2.ExtendResponse:
        request = node_pb2.ExtendRequest(token=text, session=self.session)
        answer: node_pb2.ExtendResponse = self.call("Extend", request)
        return answer

    def read(self, at: LeaseToken, offset: int = 0, length: int = 16) -> node_pb2.ReadResponse:
        request = node_pb2.ReadRequest(
            lease_id=at.lease_id, epoch=at.epoch, offset=offset, length=length
        )
        answer: node_pb2.ReadResponse = self.call("Read", request)
        return answer

    def write(
        self, at: LeaseToken, offset: int, data: bytes, **fields: Any
    ) -> node_pb2.WriteResponse:
        request = write_request(at, offset, data, **fields)
        answer: node_pb2.WriteResponse = self.call("Write", request)
        return answer

    def release(self, at: LeaseToken, **fields: Any) -> node_pb2.NodeReleaseResponse:
        request = node_pb2.NodeReleaseRequest(
            request_id=secrets.token_hex(8), lease_id=at.lease_id, epoch=at.epoch, **fields
        )
        answer: node_pb2.NodeReleaseResponse = self.call("Release", request)
        return answer

    def notices(self) -> Iterator[node_pb2.Notice]:
        """The stream, once it stands."""
        stream = self.stub.Notices(node_pb2.NoticesRequest(session=self.session))
        next(stream)
        return stream

    def call(self, method: str, request: Any) -> Any:
        with failures.status_to_failures():
            return getattr(self.stub, method)(request, timeout=CALL_S)

    def close(self) -> None:
        self.channel.close()


def write_request(at: LeaseToken, offset: int, data: bytes, **fields: Any) -> node_pb2.WriteRequest:
    plain = {"lease_id": at.lease_id, "epoch": at.epoch, "offset": offset, "length": len(data)}
    return node_pb2.WriteRequest(**{**plain, "data": data, **fields})
