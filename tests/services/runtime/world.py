"""A throwaway authority and a loopback server with handlers that do what a test tells them to."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from grafos._authority import Authority
from grafos_core import spiffe
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import node_pb2, node_pb2_grpc
from grafos_proto.wire import certificates
from grafos_proto.wire.credentials import Credentials, channel_credentials, server_name_option
from services.runtime.clock import SYSTEM
from services.runtime.limits import Limits
from services.runtime.logs import Log
from services.runtime.methods import Method
from services.runtime.server import Listener, Server, Service, serve
from services.runtime.telemetry import Metrics

TRUST_DOMAIN = "test.local"
NODE = Identity(TRUST_DOMAIN, Role.NODE, None, "n1")
HOLDER = Identity(TRUST_DOMAIN, Role.HOLDER, "acme", "worker")
SERVICE = Identity(TRUST_DOMAIN, Role.SERVICE, None, "ledger")
OPERATOR = Identity(TRUST_DOMAIN, Role.OPERATOR, None, "ann")


class Keyring:
    """An authority of its own, and credentials for whoever a test wants to be."""

    def __init__(self, directory: Path, *, now_ms: int | None = None) -> None:
        self.now_ms = SYSTEM.wall_ms() if now_ms is None else now_ms
        self.authority = Authority.init(
            directory / "authority", trust_domain=TRUST_DOMAIN, now_ms=self.now_ms
        )

    def credentials(self, identity: Identity, *, ttl_ms: int = 3_600_000) -> Credentials:
        key = certificates.new_tls_key()
        chain = self.authority.issue(key.public_key(), identity, ttl_ms=ttl_ms, now_ms=self.now_ms)
        return Credentials(certificates.key_pem(key), chain, self.authority.bundle_pem)


class Node(node_pb2_grpc.NodeServiceServicer):
    """Every method does what `behaviour` does, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.behaviour: Callable[[Any, grpc.ServicerContext], Any] = lambda request, context: None

    def _do(self, name: str, request: Any, context: grpc.ServicerContext, answer: Any) -> Any:
        self.calls.append(name)
        return self.behaviour(request, context) or answer

    def Release(self, request: Any, context: Any) -> Any:
        return self._do("Release", request, context, node_pb2.NodeReleaseResponse())

    def Bind(self, request: Any, context: Any) -> Any:
        return self._do("Bind", request, context, node_pb2.BindResponse(lease_id="bound"))

    def Attach(self, request: Any, context: Any) -> Any:
        return self._do("Attach", request, context, node_pb2.BindResponse())

    def Extend(self, request: Any, context: Any) -> Any:
        return self._do("Extend", request, context, node_pb2.ExtendResponse())

    def Detach(self, request: Any, context: Any) -> Any:
        return self._do("Detach", request, context, node_pb2.DetachResponse())

    def Notices(self, request: Any, context: Any) -> Iterator[Any]:
        yield self._do("Notices", request, context, node_pb2.Notice())

    def OpenShare(self, request: Any, context: Any) -> Any:
        return self._do("OpenShare", request, context, node_pb2.OpenShareResponse())

    def EndShare(self, request: Any, context: Any) -> Any:
        return self._do("EndShare", request, context, node_pb2.EndShareResponse())

    def ListShares(self, request: Any, context: Any) -> Any:
        return self._do("ListShares", request, context, node_pb2.ListSharesResponse())

    def Read(self, request: Any, context: Any) -> Any:
        return self._do("Read", request, context, node_pb2.ReadResponse(data=b"read"))

    def Write(self, request: Any, context: Any) -> Any:
        return self._do("Write", request, context, node_pb2.WriteResponse(written=1))

    def ReadStream(self, request: Any, context: Any) -> Iterator[Any]:
        for _ in range(3):
            yield self._do("ReadStream", request, context, node_pb2.ReadResponse(data=b"read"))

    def WriteStream(self, request_iterator: Any, context: Any) -> Any:
        written = 0
        for request in request_iterator:
            self._do("WriteStream", request, context, None)
            written += len(request.data)
        return node_pb2.WriteResponse(written=written)


class World:
    """A node's service behind the real server, and callers with certificates."""

    def __init__(
        self,
        directory: Path,
        *,
        endpoint: str = "127.0.0.1:0",
        limits: Limits | None = None,
        methods: dict[str, Method] | None = None,
        control: bool = False,
    ) -> None:
        self.keyring = Keyring(directory)
        self.node, self.logged = Node(), io.StringIO()
        self.halted: list[bool] = []
        self.metrics = Metrics()
        self._channels: list[grpc.Channel] = []
        shown = self.keyring.credentials(NODE)
        service = Service(
            "grafos.v1.NodeService", node_pb2_grpc.add_NodeServiceServicer_to_server, self.node
        )
        self.server: Server = serve(
            [Listener(endpoint, [service], methods or {}, limits or Limits(), control)],
            provider=lambda: shown,
            trust_domain=TRUST_DOMAIN,
            log=Log("node", stream=self.logged),
            metrics=self.metrics,
            halt=lambda: self.halted.append(True),
        )
        self.server.set_serving(True)

    @property
    def endpoint(self) -> str:
        return self.server.endpoints[0]

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def channel(
        self,
        identity: Identity = HOLDER,
        *,
        ttl_ms: int = 3_600_000,
        credentials: Credentials | None = None,
        options: tuple[tuple[str, Any], ...] = (),
    ) -> grpc.Channel:
        shown = credentials or self.keyring.credentials(identity, ttl_ms=ttl_ms)
        own = ("grpc.use_local_subchannel_pool", 1)  # or two callers share one connection
        channel = grpc.secure_channel(
            self.endpoint, channel_credentials(shown), [server_name_option(NODE), own, *options]
        )
        self._channels.append(channel)
        return channel

    def stub(self, identity: Identity = HOLDER, **how: Any) -> Any:
        return node_pb2_grpc.NodeServiceStub(self.channel(identity, **how))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self.server.stop(0)


def node_name() -> str:
    return spiffe.server_name(NODE)
