"""A server's listeners: sockets, health, reflection, certificates that change, and the end."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import node_pb2, node_pb2_grpc
from grafos_proto.wire import failures
from services.runtime import logs, telemetry
from services.runtime.client import Remote, channel, may_retry, wait_ms
from services.runtime.clock import SYSTEM
from services.runtime.logs import Log
from services.runtime.server import Listener, Service, serve
from tests.services.runtime.world import HOLDER, NODE, OPERATOR, SERVICE, TRUST_DOMAIN, World

REQUEST = node_pb2.ReadRequest(lease_id="a" * 32, epoch=7, length=1)
MakeWorld = Callable[..., World]


def test_a_unix_socket_lies_in_a_folder_of_its_own_and_asks_for_certificates_too(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "sockets"
    world = make_world(endpoint=f"unix:{folder}/node.sock")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert world.stub().Read(REQUEST, timeout=5).data == b"read"
    with grpc.insecure_channel(world.endpoint) as plain, pytest.raises(grpc.RpcError):
        node_pb2_grpc.NodeServiceStub(plain).Read(REQUEST, timeout=2)
    assert world.node.calls == ["Read"]


def test_a_folder_that_others_may_enter_is_no_place_for_a_socket(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    for endpoint in (f"unix:{tmp_path}/open/s", "unix:relative/s", f"unix:/{'x' * 107}"):
        with pytest.raises(FabricError):
            make_world(endpoint=endpoint)


def test_an_address_in_use_is_refused(world: World, make_world: MakeWorld) -> None:
    with pytest.raises(failure.Disconnected):
        make_world(endpoint=world.endpoint)


def check(world: World, service: str = "") -> Any:
    stub: Any = health_pb2_grpc.HealthStub(world.channel(OPERATOR))
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


def test_health_answers_everybody_what_the_gates_say(world: World) -> None:
    states = health_pb2.HealthCheckResponse
    assert check(world) == states.SERVING
    world.server.set_serving(False)
    assert check(world) == states.NOT_SERVING
    health: Any = health_pb2_grpc.HealthStub(world.channel())
    watching = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watching).status == states.NOT_SERVING
    world.server.set_serving(True)
    assert next(watching).status == states.SERVING
    watching.cancel()


def reflected(world: World, identity: Any) -> list[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(world.channel(identity))
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = stub.ServerReflectionInfo(iter([asked]), timeout=5)
    return [each.name for each in next(answers).list_services_response.service]


def test_only_a_control_listener_tells_what_it_serves_and_not_to_holders(
    make_world: MakeWorld,
) -> None:
    control, tenants = make_world(control=True), make_world()
    assert "grafos.v1.NodeService" in reflected(control, OPERATOR)
    for world, identity in ((control, HOLDER), (tenants, OPERATOR)):
        with pytest.raises(grpc.RpcError) as caught:
            reflected(world, identity)
        error: Any = caught.value
        assert error.code().name in {"PERMISSION_DENIED", "UNIMPLEMENTED"}


def test_a_renewed_certificate_is_shown_to_the_next_caller(tmp_path: Path) -> None:
    world = World(tmp_path)
    shown = [world.keyring.credentials(NODE, ttl_ms=1_500)]
    service = Service(
        "grafos.v1.NodeService", node_pb2_grpc.add_NodeServiceServicer_to_server, world.node
    )
    server = serve(
        [Listener("127.0.0.1:0", [service])],
        provider=lambda: shown[0], trust_domain=TRUST_DOMAIN, log=Log("test"),
    )  # fmt: skip
    holder = world.keyring.credentials(HOLDER)
    try:
        shown[0] = world.keyring.credentials(NODE)
        threading.Event().wait(1.6)  # until nobody would believe the first one
        remote = channel(server.endpoints[0], lambda: holder, NODE)
        stub = node_pb2_grpc.NodeServiceStub(remote.get())
        assert stub.Read(REQUEST, timeout=5).data == b"read"
        remote.close()
    finally:
        server.stop(0)
        world.close()


def test_stopping_lets_calls_in_flight_end_and_takes_no_more(world: World) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(request: Any, context: grpc.ServicerContext) -> None:
        entered.set()
        release.wait(5)

    world.node.behaviour = slow
    stub = world.stub()
    with ThreadPoolExecutor(2) as pool:
        in_flight = pool.submit(stub.Read, REQUEST, timeout=10)
        assert entered.wait(3)
        stopping = pool.submit(world.server.stop, 3_000)
        threading.Event().wait(0.2)
        with pytest.raises(failure.Disconnected), failures.status_to_failures():
            world.stub().Read(REQUEST, timeout=2)
        release.set()
        assert in_flight.result(5).data == b"read"
        stopping.result(5)
    assert world.server.in_flight() == 0


def test_the_callers_trace_goes_through_the_handler_into_its_own_calls(world: World) -> None:
    header = f"00-{'4b' * 16}-{'00f1' * 4}-01"
    seen: list[str] = []
    world.node.behaviour = lambda request, context: seen.append(telemetry.traceparent())
    world.stub().Read(REQUEST, timeout=5, metadata=(("traceparent", header),))
    world.stub().Read(REQUEST, timeout=5, metadata=(("traceparent", "00-zz-01"),))
    world.stub().Read(REQUEST, timeout=5)
    assert seen == [header, "", ""]
    assert logs.trace_ids.get() == ("", "")


def remote_of(world: World, **how: Any) -> Remote[Any]:
    credentials = world.keyring.credentials(HOLDER)
    return Remote(
        world.endpoint, NODE, lambda: credentials, node_pb2_grpc.NodeServiceStub,
        dice=lambda: 0.5, **how,
    )  # fmt: skip


@pytest.mark.parametrize("code", ["UNREACHABLE", "RETRY_LATER", "PRECONDITION", "NOT_READY"])
def test_what_cannot_have_been_decided_is_tried_again_with_the_same_request(
    world: World, code: str
) -> None:
    seen: list[str] = []

    def fails_twice(request: Any, context: grpc.ServicerContext) -> None:
        seen.append(request.lease_id)
        if len(seen) < 3:
            raise failure.of(code)

    world.node.behaviour = fails_twice
    remote = remote_of(world)
    assert remote.call("Read", REQUEST, timeout_ms=5_000).data == b"read"
    assert seen == ["a" * 32] * 3
    remote.close()


@pytest.mark.parametrize("code", ["DEADLINE", "EPOCH_STALE", "DENIED", "QUOTA", "INTERNAL", "IO"])
def test_what_was_decided_is_not_tried_again(world: World, code: str) -> None:
    def fails(request: Any, context: grpc.ServicerContext) -> None:
        raise failure.of(code)

    world.node.behaviour = fails
    remote = remote_of(world)
    with pytest.raises(FabricError) as caught:
        remote.call("Read", REQUEST, timeout_ms=5_000)
    assert caught.value.code == code
    assert world.node.calls == ["Read"]
    remote.close()


def test_a_busy_service_is_tried_again_when_it_says_so() -> None:
    assert may_retry(failure.of("RATE", retry_after_ms=70))
    assert not may_retry(failure.of("RATE"))
    assert not may_retry(failure.of("DISK", retry_after_ms=70))
    assert 70 < wait_ms(failure.of("RATE", retry_after_ms=70), 1, lambda: 0.99) <= 78
    waits = [wait_ms(failure.of("UNREACHABLE"), tries, lambda: 0.0) for tries in range(1, 9)]
    assert waits == [10, 20, 40, 80, 160, 320, 500, 500]
    assert wait_ms(failure.of("UNREACHABLE"), 1, lambda: 0.99) == 19


def test_tries_end_with_the_deadline_and_the_last_failure(world: World) -> None:
    world.server.stop(0)
    remote = remote_of(world)
    started = SYSTEM.boot_ms()
    with pytest.raises(failure.Disconnected):
        remote.call("Read", REQUEST, timeout_ms=400)
    assert SYSTEM.boot_ms() - started < 1_500
    remote.close()
    with pytest.raises(failure.Disconnected) as caught:
        remote.call("Read", REQUEST, timeout_ms=400)
    assert caught.value.code == "CLOSED"


def test_a_call_on_behalf_of_a_caller_waits_no_longer_than_he_does(
    world: World, make_world: MakeWorld
) -> None:
    behind = make_world()
    remote, left = remote_of(behind), []
    behind.node.behaviour = lambda request, context: left.append(context.time_remaining())
    world.node.behaviour = lambda request, context: remote.call("Read", REQUEST, timeout_ms=9_000)
    world.stub().Read(REQUEST, timeout=1)
    assert 0 < left[0] < 1
    remote.close()


def test_a_stream_gives_answers_and_typed_failures(world: World) -> None:
    remote = remote_of(world)
    answers, _ = remote.stream("ReadStream", REQUEST, timeout_ms=5_000)
    assert [each.data for each in answers] == [b"read"] * 3

    def fails(request: Any, context: grpc.ServicerContext) -> None:
        raise failure.of("REVOKED", cause="operator")

    world.node.behaviour = fails
    answers, _ = remote.stream("ReadStream", REQUEST, timeout_ms=5_000)
    with pytest.raises(failure.Revoked) as caught:
        next(answers)
    assert caught.value.cause == "operator"
    remote.close()


def test_a_channel_believes_nobody_but_the_peer_it_was_made_for(world: World) -> None:
    holder = world.keyring.credentials(HOLDER)
    wrong = channel(world.endpoint, lambda: holder, SERVICE)
    with pytest.raises(failure.Disconnected), failures.status_to_failures():
        node_pb2_grpc.NodeServiceStub(wrong.get()).Read(REQUEST, timeout=2)
    wrong.close()
    assert world.node.calls == []
