"""A small fabric in one process for the SDK's tests: real wire, real certificates, real memory.

Admission is a notebook behind a real gRPC listener. The node has the agent's own desks, the RPCs
for holders and the hand-over socket, over a control that does in a few lines what a node agent
must: bind, extend, end at the deadline, cut the memory, sign the receipt. A test can make each of
them slow, silent or refusing.
"""

from __future__ import annotations

import fcntl
import io
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from grafos import _identity
from grafos._authority import Authority
from grafos._connection import Fabric
from grafos_core import failure, jws, receipt
from grafos_core.failure import FabricError
from grafos_core.lease import EndCause, Kind
from grafos_core.receipt import Assurance, Outcome, TeardownReceipt
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    lease_pb2,
    node_pb2_grpc,
)
from grafos_proto.wire import certificates, failures
from grafos_proto.wire.credentials import Credentials, IdentityFiles
from services.nodeagent.datapath import DataPath, Ended, LeaseTable, MemoryStorage, OpenLease
from services.nodeagent.dataport import DataPort, Terms
from services.nodeagent.gatepage import CellState, GatePage
from services.nodeagent.handover import HandoverServer, Offer, Offers, own_description
from services.nodeagent.holders import NodeServicer, Places
from services.nodeagent.sessions import News, Sessions, session_key
from services.nodeagent.sharedesk import ShareDesk
from services.nodeagent.shares import Shares
from services.runtime import calls
from services.runtime.clock import SYSTEM
from services.runtime.logs import Log
from services.runtime.server import Limits, Listener, Service, serve

TRUST_DOMAIN = "test.local"
INCARNATION = "ab" * 16
NODE_ID = "n1"
TICK_S = 0.005
SLOTS = 256
_SEALS = 1033, 4 | 1


@dataclass
class Granted:
    """One lease, as admission and node know it here."""

    lease: lease_pb2.Lease
    tokens: dict[str, int] = field(default_factory=dict)
    """Token to the generation that it is for."""
    ttl_ms: int = 60_000
    slot: int = 0
    fd: int = -1
    deadline_ms: int = 0
    holder_key: str = ""
    session: str = ""
    bound: bool = False
    cause: FabricError | None = None
    receipt: str = ""


class Book:
    """What is leased; shared by admission and node."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.grants: dict[str, Granted] = {}
        self.slots = iter(range(1, SLOTS))
        self.epochs = iter(range(7, 10**6))

    def by_token(self, token: str) -> Granted:
        for each in self.grants.values():
            if token in each.tokens:
                return each
        raise failure.of("TOKEN_SIGNATURE")

    def find(self, lease_id: str) -> Granted:
        found = self.grants.get(lease_id)
        if found is None:
            raise failure.of("NOT_FOUND")
        return found


class Admission(admission_pb2_grpc.AdmissionServiceServicer):
    """Says yes, and remembers. `before` may delay or refuse a method."""

    def __init__(self, book: Book) -> None:
        self.book, self.endpoint, self.descriptor = book, "", True
        self.before: Callable[[str], None] = lambda method: None
        self.calls: list[tuple[str, Any]] = []
        self.keys: list[lease_pb2.VerificationKey] = []
        self.on_revoke: Callable[[str, str], None] = lambda lease_id, reason: None

    def _heard(self, method: str, request: Any) -> None:
        self.calls.append((method, request))
        self.before(method)

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.calls if name == method]

    def Acquire(self, request: Any, context: Any) -> Any:
        self._heard("Acquire", request)
        with self.book.lock:
            amount = request.amount
            if request.kind == lease_pb2.KIND_MEM:
                amount = -(-amount // 4096) * 4096
            ttl_ms = request.ttl_ms or 60_000
            lease = lease_pb2.Lease(
                lease_id=secrets.token_hex(16), tenant="acme", kind=request.kind,
                node_id=NODE_ID, incarnation=INCARNATION, amount=amount,
                epoch=next(self.book.epochs), generation=1, ttl_ms=ttl_ms,
                granted_at_ms=SYSTEM.wall_ms(), end_ms=SYSTEM.wall_ms() + ttl_ms,
                state=lease_pb2.LEASE_STATE_PENDING, policy=request.policy,
                request_id=request.request_id, holder=str(calls.peer().identity),
                holder_key=calls.peer().key_thumbprint,
                lifetime_end_ms=SYSTEM.wall_ms() + 86_400_000,
            )  # fmt: skip
            grant = Granted(lease, ttl_ms=ttl_ms, slot=next(self.book.slots))
            self.book.grants[lease.lease_id] = grant
            return self._answer(grant)

    def AcquireBundle(self, request: Any, context: Any) -> Any:
        self._heard("AcquireBundle", request)
        return admission_pb2.AcquireBundleResponse(
            members=[self.Acquire(member, context) for member in request.members]
        )

    def AcquireMany(self, request: Any, context: Any) -> Any:
        self._heard("AcquireMany", request)
        return self._each(admission_pb2.AcquireManyResponse(), request, self.Acquire, context)

    def RenewMany(self, request: Any, context: Any) -> Any:
        self._heard("RenewMany", request)
        return self._each(admission_pb2.RenewManyResponse(), request, self.Renew, context)

    def ReleaseMany(self, request: Any, context: Any) -> Any:
        self._heard("ReleaseMany", request)
        return self._each(admission_pb2.ReleaseManyResponse(), request, self.Release, context)

    def _each(self, response: Any, request: Any, one: Any, context: Any) -> Any:
        for each in request.requests:
            try:
                response.answers.add(response=one(each, context))
            except FabricError as refused:
                response.answers.add(failure=failures.detail_of(refused))
        return response

    def Attach(self, request: Any, context: Any) -> Any:
        self._heard("Attach", request)
        with self.book.lock:
            grant = self.book.find(request.lease_id)
            if grant.cause is not None:
                raise grant.cause
            grant.lease.generation += 1
            grant.lease.holder_key = calls.peer().key_thumbprint
            return self._answer(grant)

    def Renew(self, request: Any, context: Any) -> Any:
        self._heard("Renew", request)
        with self.book.lock:
            grant = self.book.find(request.lease_id)
            grant.lease.generation += 1
            grant.ttl_ms = grant.lease.ttl_ms = request.ttl_ms or grant.lease.ttl_ms
            grant.lease.end_ms = SYSTEM.wall_ms() + grant.ttl_ms
            answer = self._answer(grant)
            return admission_pb2.RenewResponse(lease=answer.lease, token=answer.token)

    def Release(self, request: Any, context: Any) -> Any:
        self._heard("Release", request)
        with self.book.lock:
            grant = self.book.find(request.lease_id)
            if not grant.bound and grant.lease.state == lease_pb2.LEASE_STATE_PENDING:
                grant.lease.state = lease_pb2.LEASE_STATE_RELEASED
            return admission_pb2.ReleaseResponse(lease=grant.lease)

    def Get(self, request: Any, context: Any) -> Any:
        self._heard("Get", request)
        return self.book.find(request.lease_id).lease

    def List(self, request: Any, context: Any) -> Any:
        self._heard("List", request)
        with self.book.lock:
            leases = [each.lease for each in self.book.grants.values()]
        found = [
            each for each in leases
            if request.kind in (0, each.kind) and each.lease_id.startswith(request.prefix)
        ]  # fmt: skip
        return admission_pb2.ListLeasesResponse(leases=found)

    def Revoke(self, request: Any, context: Any) -> Any:
        self._heard("Revoke", request)
        leases = [self.book.find(each).lease for each in request.lease_ids]
        for each in leases:
            self.on_revoke(each.lease_id, request.reason)
        return admission_pb2.RevokeResponse(leases=leases)

    def Keys(self, request: Any, context: Any) -> Any:
        self._heard("Keys", request)
        return admission_pb2.KeysResponse(keys=self.keys)

    def Explain(self, request: Any, context: Any) -> Any:
        raise failure.of("VERSION", "not in this notebook")

    def Watch(self, request: Any, context: Any) -> Any:
        raise failure.of("VERSION", "not in this notebook")

    def _answer(self, grant: Granted) -> Any:
        token = secrets.token_hex(16)
        grant.tokens[token] = grant.lease.generation
        return admission_pb2.AcquireResponse(
            lease=grant.lease, token=token, node_endpoint=self.endpoint
        )


class Control:
    """The part of a node agent that decides, as small as the SDK's tests allow."""

    def __init__(self, book: Book, table: LeaseTable, gate: GatePage) -> None:
        self.book, self.table, self.gate = book, table, gate
        self.sessions: Sessions
        self.before: Callable[[str], None] = lambda op: None
        self.asked: list[str] = []
        self.exported: list[str] = []
        self.known: set[str] = set()
        """Sessions whose process has come for a lease: they are sent the next ones."""
        self.descriptor = True
        self.credits = True
        self.silent_end = False
        """End leases at their deadline without a word, as a warden does."""
        self.key = ed25519.Ed25519PrivateKey.generate()
        self.key_id = "ab" * 8
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def keys(self) -> list[lease_pb2.VerificationKey]:
        public = self.key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        owner = f"{NODE_ID}/{INCARNATION}"
        return [
            lease_pb2.VerificationKey(
                key_id=self.key_id, owner=owner, use="receipt", public_key=public
            )
        ]

    def ask(self, op: str, timeout_ms: int, **fields: Any) -> dict[str, Any]:
        self.asked.append(op)
        self.before(op)
        with self.book.lock:
            answer: dict[str, Any] = getattr(self, f"_{op}")(**fields)
            return answer

    def hand_over(self, offer: Offer, pidfd: int) -> int | None:
        self.before("hand_over")
        lease = self.table.find(offer.lease_id, offer.holder_key)
        self.known.add(session_key(offer.holder_key, offer.session))
        return self._give_out(lease)

    def descriptor_for(self, lease_id: str, holder_key: str) -> int | None:
        lease = self.table.find(lease_id, holder_key)
        return self._give_out(lease) if lease.session in self.known else None

    def _give_out(self, lease: OpenLease) -> int | None:
        if not lease.descriptor:
            return None
        self.exported.append(lease.lease_id)
        assert isinstance(lease.storage, MemoryStorage)
        return own_description(lease.storage.descriptor)

    def session_back(self, session: str) -> None:
        self.asked.append("session_back")

    def session_lost(self, session: str) -> None:
        self.asked.append("session_lost")

    def end(self, lease_id: str, cause: FabricError, kind: str = "", grace_ms: int = 0) -> None:
        """End a lease for this reason; `kind` is the notice, none without."""
        with self.book.lock:
            grant = self.book.find(lease_id)
            if grant.cause is None:
                self._take_back(grant, cause)
        if kind:
            self.sessions.tell(grant.session, News(lease_id, kind, "", grace_ms, cause))

    def tell(self, lease_id: str, kind: str, reason: str = "", grace_ms: int = 0) -> None:
        self.sessions.tell(
            self.book.find(lease_id).session, News(lease_id, kind, reason, grace_ms, None)
        )

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(TICK_S):
            now_ms = SYSTEM.boot_ms()
            with self.book.lock:
                over = [
                    each.lease.lease_id for each in self.book.grants.values()
                    if each.bound and each.cause is None and now_ms >= each.deadline_ms
                ]  # fmt: skip
            for lease_id in over:
                kind = "" if self.silent_end else "expired"
                self.end(lease_id, failure.of("LEASE_EXPIRED"), kind)

    def _bind(self, *, token: str, session: str, peer_key: str, **_: Any) -> dict[str, Any]:
        grant = self.book.by_token(token)
        if grant.bound and session == grant.session:  # its answer was lost
            return self._attach(token=token, session=session, peer_key=peer_key)
        if grant.bound:
            raise failure.of("LEASE_BOUND")
        size_bytes = grant.lease.amount
        if grant.lease.kind == lease_pb2.KIND_BLOCK:
            size_bytes *= 4096
        grant.fd = os.memfd_create("lease", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(grant.fd, size_bytes)
        fcntl.fcntl(grant.fd, *_SEALS)
        grant.bound = True
        grant.lease.state = lease_pb2.LEASE_STATE_ACTIVE
        return self._opened(grant, token, session, peer_key, MemoryStorage(grant.fd), size_bytes)

    def _attach(self, *, token: str, session: str, peer_key: str, **_: Any) -> dict[str, Any]:
        grant = self.book.by_token(token)
        before = self.table.opened(grant.lease.lease_id)
        if before is None or grant.cause is not None:
            raise grant.cause or failure.of("EPOCH_BURNT")
        if session != grant.session:
            lease_id = grant.lease.lease_id
            self.sessions.tell(grant.session, News(lease_id, "fenced", "another holder attached"))
        return self._opened(grant, token, session, peer_key, before.storage, before.size_bytes)

    def _opened(
        self, grant: Granted, token: str, session: str, peer_key: str, storage: Any, size: int
    ) -> dict[str, Any]:
        grant.holder_key, grant.session = peer_key, session
        grant.deadline_ms = SYSTEM.boot_ms() + grant.ttl_ms
        kind = Kind.MEM if grant.lease.kind == lease_pb2.KIND_MEM else Kind.BLOCK
        self._cells(grant, CellState.OPEN)
        generation = grant.tokens[token]
        descriptor = kind is Kind.MEM and self.descriptor
        self.table.open(
            OpenLease(
                grant.lease.lease_id, grant.slot, grant.lease.epoch, generation, kind, size,
                peer_key, grant.deadline_ms, session, descriptor, frozenset({"read", "write"}),
                storage,
            )
        )  # fmt: skip
        return {
            "lease_id": grant.lease.lease_id, "epoch": grant.lease.epoch,
            "generation": generation, "remaining_ms": grant.ttl_ms, "size_bytes": size,
            "block_bytes": 0 if kind is Kind.MEM else 4096, "descriptor": descriptor,
            "direct_io": "" if kind is Kind.MEM else "buffered",
        }  # fmt: skip

    def _extend(self, *, token: str, **_: Any) -> dict[str, Any]:
        grant = self.book.by_token(token)
        if grant.cause is not None:
            raise grant.cause
        grant.deadline_ms = max(grant.deadline_ms, SYSTEM.boot_ms() + grant.ttl_ms)
        opened = self.table.opened(grant.lease.lease_id)
        assert opened is not None
        opened.deadline_ms = grant.deadline_ms
        self._cells(grant, CellState.OPEN)
        return {"remaining_ms": grant.ttl_ms, "generation": grant.tokens[token]}

    def _release(self, *, lease: str, peer_key: str, **_: Any) -> dict[str, Any]:
        grant = self.book.find(lease)
        if grant.holder_key != peer_key:
            raise failure.of("NOT_FOUND")
        if grant.cause is None:
            self._take_back(grant, failure.of("LEASE_RELEASED"))
        return {"receipt": grant.receipt, "credited": self.credits}

    def _detach(self, *, lease: str, **_: Any) -> dict[str, Any]:
        grant = self.book.find(lease)
        grant.lease.policy.on_holder_exit = "keep"
        return {"remaining_ms": max(0, grant.deadline_ms - SYSTEM.boot_ms())}

    def _cells(self, grant: Granted, state: CellState) -> None:
        lease_id, deadline_ns = bytes.fromhex(grant.lease.lease_id), grant.deadline_ms * 1_000_000
        self.gate.write_control(grant.slot, state, grant.lease.epoch, deadline_ns, lease_id)
        self.gate.write_warden(grant.slot, state, grant.lease.epoch, deadline_ns, lease_id)

    def _take_back(self, grant: Granted, cause: FabricError) -> None:
        begin_ms = SYSTEM.wall_ms()
        grant.cause = cause
        self._cells(grant, CellState.CLOSED)
        os.ftruncate(grant.fd, 0)
        self.table.remember(grant.lease.lease_id, Ended(grant.holder_key, cause))
        self.table.shut(grant.lease.lease_id)
        grant.lease.state = lease_pb2.LEASE_STATE_RELEASED
        grant.receipt = self._signed(grant, begin_ms)

    def fenced(self, grant: Granted) -> str:
        """The receipt of a teardown that failed."""
        return self._signed(grant, SYSTEM.wall_ms(), Outcome.FENCED)

    def _signed(self, grant: Granted, begin_ms: int, outcome: Outcome = Outcome.TORNDOWN) -> str:
        assurance = (
            Assurance.NONE if outcome is Outcome.FENCED
            else Assurance.DETACHED if grant.lease.lease_id in self.exported
            else Assurance.FREED
        )  # fmt: skip
        slip = TeardownReceipt(
            lease_id=grant.lease.lease_id, node_id=NODE_ID, incarnation=INCARNATION, boot_epoch=1,
            kind=Kind.MEM if grant.lease.kind == lease_pb2.KIND_MEM else Kind.BLOCK,
            epoch=grant.lease.epoch, amount=grant.lease.amount, extent_offset=0,
            cause=EndCause.RELEASE, outcome=outcome, assurance=assurance,
            measured={"size_bytes": os.fstat(grant.fd).st_size}, begin_ms=begin_ms,
            end_ms=SYSTEM.wall_ms(), duration_us=5, record_number=1, record_hash="0" * 64,
        )  # fmt: skip
        return receipt.mint(slip, self.key_id, self.key.sign)


class World:
    """Authority, admission and one node; `fabric()` connects to them."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder, self._limits = folder, limits or Limits()
        self.authority = Authority.init(
            folder / "ca", trust_domain=TRUST_DOMAIN, now_ms=SYSTEM.wall_ms()
        )
        self.book = Book()
        self.table = LeaseTable()
        self.gate = GatePage.create(SLOTS)
        self.control = Control(self.book, self.table, self.gate)
        self.sessions = Sessions(self.control)
        self.control.sessions = self.sessions
        self.admission = Admission(self.book)
        self.admission.on_revoke = lambda lease_id, reason: self.control.end(
            lease_id, failure.of("REVOKED", reason), "revoked"
        )
        self.handover_path = folder / "h" / "h.sock"
        self.places = Places(str(self.handover_path), 8)
        self.servicer: NodeServicer
        self.servers = [self._serve_node(), self._serve_admission()]
        self.admission.endpoint = self.servers[0].endpoints[0]
        self._fabrics: list[Fabric] = []

    @property
    def endpoint(self) -> str:
        return str(self.servers[1].endpoints[0])

    def credentials(self, identity: Identity) -> Credentials:
        key = certificates.new_tls_key()
        chain = self.authority.issue(key.public_key(), identity, now_ms=SYSTEM.wall_ms())
        return Credentials(certificates.key_pem(key), chain, self.authority.bundle_pem)

    def holder(self, name: str = "alice") -> Credentials:
        return self.credentials(Identity(TRUST_DOMAIN, Role.HOLDER, "acme", name))

    def identity_folder(self, name: str = "alice") -> Path:
        """For another process."""
        folder = self.folder / f"identity-{name}"
        IdentityFiles(folder).save(self.holder(name))
        return folder

    def fabric(self, name: str = "alice") -> Fabric:
        made = Fabric(self.endpoint, _identity.fixed(self.holder(name)))
        self._fabrics.append(made)
        return made

    def offer_port(self, *, tls: bool = False) -> None:
        """From now on whoever binds hears of the data port, on the network or on this machine."""
        if tls:
            number = self.port.listen_tls("127.0.0.1", 0)
            self.places = replace(self.places, data_port=number)
        else:
            path = str(self.handover_path.with_name("d.sock"))
            self.places = replace(self.places, data_path=path)
        self.servicer._places = self.places

    def stop_node(self) -> None:
        self.servers[0].stop(0)

    def stop_admission(self) -> None:
        self.servers[1].stop(0)

    def close(self) -> None:
        for each in self._fabrics:
            each.close()
        for server in self.servers:
            server.stop(0)
        self.handover.stop()
        self.port.stop()
        self.control.close()
        self.gate.close()
        for grant in self.book.grants.values():
            if grant.fd >= 0:
                os.close(grant.fd)

    def _serve_node(self) -> Any:
        self.shares = Shares(self.table, lambda token: None, SYSTEM)
        data = DataPath(
            self.gate, self.table, SYSTEM.boot_ns, lambda lease_id, why: None, self.shares
        )
        offers = Offers()
        self.handover = HandoverServer(offers, self.sessions, self.control, SYSTEM.boot_ms)
        self.handover.start(self.handover_path)
        node = self.credentials(Identity(TRUST_DOMAIN, Role.NODE, None, NODE_ID))
        terms = Terms(TRUST_DOMAIN, SYSTEM)
        self.port = DataPort(data, self.sessions, lambda: node, terms, self.shares)
        self.port.listen_unix(self.handover_path.with_name("d.sock"))
        self.servicer = NodeServicer(
            self.control, data, self.sessions, offers, self.places, SYSTEM.boot_ms,
            ShareDesk(self.shares, data, lambda *ended: None),
        )  # fmt: skip
        return self._serve(
            Identity(TRUST_DOMAIN, Role.NODE, None, NODE_ID), "NodeService",
            node_pb2_grpc.add_NodeServiceServicer_to_server, self.servicer,
        )  # fmt: skip

    def _serve_admission(self) -> Any:
        return self._serve(
            Identity(TRUST_DOMAIN, Role.SERVICE, None, "admission"), "AdmissionService",
            admission_pb2_grpc.add_AdmissionServiceServicer_to_server, self.admission,
        )  # fmt: skip

    def _serve(self, who: Identity, name: str, register: Any, servicer: Any) -> Any:
        shown = self.credentials(who)
        service = Service(f"grafos.v1.{name}", register, servicer)
        return serve(
            [Listener("127.0.0.1:0", [service], limits=self._limits)],
            provider=lambda: shown,
            trust_domain=TRUST_DOMAIN,
            log=Log("test", stream=io.StringIO()),
        )


def keys_of(world: World) -> jws.Keys:
    keys = jws.Keys()
    public = world.control.key.public_key()

    def verify(message: bytes, signature: bytes) -> bool:
        try:
            public.verify(signature, message)
        except Exception:
            return False
        return True

    keys.add(jws.RECEIPT, world.control.key_id, verify, owner=f"{NODE_ID}/{INCARNATION}")
    return keys
