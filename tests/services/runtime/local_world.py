"""Local sockets under test: a world that listens on one, and a client made of bytes alone."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity
from grafos_proto.v1 import lease_pb2, node_pb2_grpc, ttrpc_pb2
from grafos_proto.wire import certificates, failures
from grafos_proto.wire.credentials import Credentials, PeerChannel
from services.runtime.limits import Limits
from services.runtime.logs import Log
from services.runtime.server import Listener, Service, serve
from tests.services.runtime.world import HOLDER, NODE, TRUST_DOMAIN, World

HEADER = struct.Struct(">IIBB")
NODE_SERVICE, LOCAL_SERVICE = "grafos.v1.NodeService", "grafos.v1.LocalService"


class LocalWorld(World):
    """A node's service behind a unix socket."""

    def __init__(self, directory: Path, *, limits: Limits | None = None) -> None:
        self.folder = directory / "s"
        self._peers: list[PeerChannel] = []
        self.limits = limits or Limits()
        super().__init__(directory, endpoint=f"unix:{self.folder}/n", limits=self.limits)

    @property
    def socket_path(self) -> str:
        return f"{self.folder}/n.t"

    def peer(
        self, identity: Identity = HOLDER, *, credentials: Credentials | None = None,
        expected: Identity = NODE, ttl_ms: int = 3_600_000,
    ) -> PeerChannel:  # fmt: skip
        shown = credentials or self.keyring.credentials(identity, ttl_ms=ttl_ms)
        made = PeerChannel(self.endpoint, lambda: shown, expected)
        self._peers.append(made)
        return made

    def local(self, identity: Identity = HOLDER, **how: Any) -> Any:
        """A stub that speaks ttRPC."""
        return node_pb2_grpc.NodeServiceStub(self.peer(identity, **how).get())

    def restart(self) -> None:
        """The same service anew, at the same place."""
        self.server.stop(0)
        shown = self.keyring.credentials(NODE)
        register = node_pb2_grpc.add_NodeServiceServicer_to_server
        self.server = serve(
            [Listener(self.endpoint, [Service(NODE_SERVICE, register, self.node)])],
            provider=lambda: shown, trust_domain=TRUST_DOMAIN, log=Log("node", stream=self.logged),
        )  # fmt: skip

    def close(self) -> None:
        for each in self._peers:
            each.close()
        super().close()


class RawClient:
    """Speaks the protocol as PROTOCOLS.md has it, with none of the client's code."""

    def __init__(self, path: str, credentials: Credentials | None = None) -> None:
        """With `credentials` it greets at once."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setblocking(False)
        for _ in range(200):  # a socket with a time-out does not wait where the backlog is full
            with contextlib.suppress(BlockingIOError):
                self.sock.connect(path)
                break
            threading.Event().wait(0.01)
        self.sock.settimeout(5)
        self.said: list[bytes] = []
        self._buffer = b""
        if credentials is not None:
            self.greet(credentials)

    def send(self, stream: int, kind: int, data: bytes, flags: int = 0) -> None:
        self.said.append(HEADER.pack(len(data), stream, kind, flags) + data)
        self.sock.sendall(self.said[-1])

    def request(
        self, stream: int, method: str, payload: bytes, *, service: str = NODE_SERVICE,
        timeout_nano: int = 5 * 10**9, flags: int = 0,
    ) -> None:  # fmt: skip
        envelope = ttrpc_pb2.TtrpcRequest(
            service=service, method=method, payload=payload, timeout_nano=timeout_nano
        )
        self.send(stream, 1, envelope.SerializeToString(), flags)

    def receive(self) -> tuple[int, int, int, bytes]:
        """(stream, kind, flags, data); EOFError at the end."""
        length, stream, kind, flags = HEADER.unpack(self._exactly(HEADER.size))
        return stream, kind, flags, self._exactly(length)

    def answer(self) -> tuple[int, bytes | FabricError]:
        """(stream, what came of its call)."""
        stream, kind, _, data = self.receive()
        assert kind == 2
        response = ttrpc_pb2.TtrpcResponse.FromString(data)
        if not response.status.code:
            return stream, response.payload
        detail = lease_pb2.FailureDetail()
        for each in response.status.details:
            if each.Unpack(detail):
                return stream, failures.failure_of(detail)
        return stream, failure.of("INTERNAL", str(response.status.code))

    def code(self) -> str:
        """The code of the next answer; empty where it is no refusal."""
        answer = self.answer()[1]
        return answer.code if isinstance(answer, FabricError) else ""

    def greet(self, credentials: Credentials, *, nonce: bytes = b"n" * 32) -> None:
        digest = self.hello(credentials, nonce=nonce)
        assert isinstance(digest, bytes), digest
        self.prove(credentials.key, digest)
        assert self.code() == ""

    def hello(self, credentials: Credentials, *, nonce: bytes = b"n" * 32) -> bytes | FabricError:
        """The digest of the transcript, once the server is known to have signed it."""
        said = ttrpc_pb2.LocalHelloRequest(version=1, nonce=nonce, chain_pem=credentials.chain_pem)
        self.request(1, "Hello", said.SerializeToString(), service=LOCAL_SERVICE, timeout_nano=0)
        heard = self.answer()[1]
        if isinstance(heard, FabricError):
            return heard
        answer = ttrpc_pb2.LocalHelloResponse.FromString(heard)
        parts = (nonce, answer.nonce, credentials.chain_pem, answer.chain_pem)
        framed = b"".join(struct.pack(">I", len(part)) + part for part in parts)
        digest = hashlib.sha256(struct.pack(">I", 1) + framed).digest()
        leaf = certificates.load_certificates(answer.chain_pem)[0]
        certificates.check_proof(leaf, "grafos-local-server", digest, answer.proof)
        return digest

    def prove(self, key: Any, digest: bytes, *, stream: int = 3) -> None:
        proof = certificates.prove(key, "grafos-local-client", digest)
        said = ttrpc_pb2.LocalProveRequest(proof=proof).SerializeToString()
        self.request(stream, "Prove", said, service=LOCAL_SERVICE, timeout_nano=0)

    def ends_within(self, seconds: float) -> bool:
        """Whether the server closes; answers that come before are thrown away."""
        self.sock.settimeout(seconds)
        try:
            while self.sock.recv(65_536):
                pass
        except TimeoutError:
            return False
        except OSError:  # reset, since it had not read all of what we sent
            return True
        return True

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            piece = self.sock.recv(65_536)
            if not piece:
                raise EOFError
            self._buffer += piece
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data


def refusal(call: Callable[[], Any]) -> FabricError:
    """The failure that `call` must end in, over whichever protocol."""
    try:
        with failures.status_to_failures():
            call()
    except FabricError as error:
        return error
    raise AssertionError("it was not refused")
