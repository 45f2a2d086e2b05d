"""Calls over a local socket: the services, answers and failures of gRPC, and their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from grafos_core import failure, spiffe
from grafos_core.failure import FabricError
from grafos_core.spiffe import Role
from grafos_proto.v1 import node_pb2, node_pb2_grpc
from grafos_proto.wire.credentials import IdentityFiles, PeerChannel
from services.runtime.logs import Log
from services.runtime.methods import Method
from services.runtime.server import Listener, Service, deadline_left_ms, peer, serve
from tests.services.runtime.local_world import LocalWorld, RawClient, refusal
from tests.services.runtime.test_catalogue_transport import wait_until
from tests.services.runtime.world import HOLDER, NODE, OPERATOR, TRUST_DOMAIN

REQUEST = node_pb2.ReadRequest(lease_id="a" * 32, epoch=7, length=1)
READ = REQUEST.SerializeToString()
WRITING = node_pb2.WriteRequest(lease_id="a" * 32, epoch=7, data=b"x", length=1)
ROOT = Path(__file__).resolve().parents[3]
MakeLocal = Callable[..., LocalWorld]


@pytest.fixture
def world(make_local: MakeLocal) -> LocalWorld:
    return make_local()


def local_threads() -> int:
    return sum(each.name == "local-call" for each in threading.enumerate())


def wait_for(entered: threading.Event, release: threading.Event) -> None:
    entered.set()
    release.wait(5)


# Calls --------------------------------------------------------------------------------------


def test_a_call_has_one_answer_and_its_handler_knows_who_calls(world: LocalWorld) -> None:
    seen: list[Any] = []
    world.node.behaviour = lambda request, context: seen.append(peer())
    credentials = world.keyring.credentials(HOLDER)
    assert world.local(credentials=credentials).Read(REQUEST, timeout=5).data == b"read"
    assert (seen[0].identity, seen[0].key_thumbprint) == (HOLDER, credentials.thumbprint)


def test_answers_and_requests_stream(world: LocalWorld) -> None:
    stub = world.local()
    assert [each.data for each in stub.ReadStream(REQUEST, timeout=5)] == [b"read"] * 3
    assert stub.WriteStream(iter([WRITING] * 40), timeout=5).written == 40
    assert stub.Read(REQUEST, timeout=5).data == b"read"
    assert local_threads() <= 2  # one connection was enough for all of it


def test_both_sides_of_a_call_stream_at_once(world: LocalWorld, tmp_path: Path) -> None:
    name, coder = "grafos.test.Echo", node_pb2.WriteRequest
    handler = grpc.stream_stream_rpc_method_handler(
        lambda requests, context: (each for each in requests),
        request_deserializer=coder.FromString, response_serializer=coder.SerializeToString,
    )  # fmt: skip

    def register(_: Any, server: Any) -> None:
        server.add_generic_rpc_handlers(())
        server.add_registered_method_handlers(name, {"Both": handler})

    shown, holder = world.keyring.credentials(NODE), world.keyring.credentials(HOLDER)
    methods = {f"/{name}/Both": Method(frozenset({Role.HOLDER}), mutates=False)}
    endpoint = f"unix:{tmp_path}/e/n"
    server = serve(
        [Listener(endpoint, [Service(name, register, None)], methods)],
        provider=lambda: shown, trust_domain=TRUST_DOMAIN, log=Log("test"),
    )  # fmt: skip
    channel = PeerChannel(endpoint, lambda: holder, NODE)
    both: Any = channel.get().stream_stream(
        f"/{name}/Both",
        request_serializer=coder.SerializeToString, response_deserializer=coder.FromString,
    )  # fmt: skip
    turn = threading.Semaphore(1)

    def requests() -> Iterator[Any]:
        for length in range(1, 21):
            assert turn.acquire(timeout=5)  # the next one only after the answer to this one
            yield coder(length=length)

    lengths = []
    for each in both(requests(), timeout=10):
        lengths.append(each.length)
        turn.release()
    assert lengths == list(range(1, 21))
    many = (coder(length=1, data=bytes(100_000)) for _ in range(60))
    assert len(list(both(many, timeout=20))) == 60  # more than both sockets hold
    channel.close()
    server.stop(0)


FULL = failure.of(
    "QUARANTINED", "the fourth step", lease_id="b" * 32, epoch=9, retry_after_ms=70,
    cause="operator", details={"step": "erase", "ü": "ß"},
)  # fmt: skip
REFUSED: dict[str, Callable[[Any], Any]] = {
    "by the handler": lambda stub: stub.Read(REQUEST, timeout=5),
    "in the first answer of a stream": lambda stub: list(stub.ReadStream(REQUEST, timeout=5)),
    "in a stream of requests": lambda stub: stub.WriteStream(iter([WRITING] * 99), timeout=5),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_a_failure_is_the_same_as_over_grpc_in_every_field(
    world: LocalWorld, call: Callable[[Any], Any]
) -> None:
    for raised in (FULL, failure.of("RATE", retry_after_ms=5), failure.of("EPOCH_STALE")):

        def fails(request: Any, context: Any, raised: FabricError = raised) -> None:
            raise failure.from_fields(type(raised).__name__, raised.fields())

        world.node.behaviour = fails
        stub = world.local()
        over_grpc, here = refusal(lambda: call(world.stub())), refusal(lambda: call(stub))  # noqa: B023
        assert here == over_grpc == raised
        world.node.behaviour = lambda request, context: None
        assert stub.Read(REQUEST, timeout=5).data == b"read"


def too_long(stub: Any) -> Any:
    return stub.Read(REQUEST, timeout=5, metadata=(("x-large", "y" * 20_000),))


GATED: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "DEADLINE_REQUIRED": (HOLDER, lambda stub: stub.Write(WRITING)),
    "ROLE": (OPERATOR, lambda stub: stub.Read(REQUEST, timeout=5)),
    "EMPTY": (HOLDER, lambda stub: stub.Read(node_pb2.ReadRequest(), timeout=5)),
    "DEADLINE": (HOLDER, lambda stub: stub.Write(WRITING, timeout=0)),
    "MESSAGE_SIZE": (HOLDER, too_long),
}


@pytest.mark.parametrize("code", GATED)
def test_the_gate_refuses_as_over_grpc(world: LocalWorld, code: str) -> None:
    identity, call = GATED[code]
    assert refusal(lambda: call(world.local(identity))).code == code
    assert refusal(lambda: call(world.stub(identity))).code == code
    assert world.node.calls == []


def test_a_bug_of_ours_goes_out_as_an_incident_and_nothing_else(world: LocalWorld) -> None:
    def buggy(request: Any, context: Any) -> None:
        raise KeyError("hunter2")

    world.node.behaviour = buggy
    error = refusal(lambda: world.local().Read(REQUEST, timeout=5))
    assert (error.code, len(error.incident_id)) == ("INTERNAL", 16)
    assert "hunter2" not in str(error.fields())
    assert error.incident_id in world.logged.getvalue()


def test_an_unknown_method_and_a_too_large_answer_are_told_as_over_grpc(world: LocalWorld) -> None:
    for channel in (world.channel(), world.peer().get()):
        nothing: Any = channel.unary_unary("/grafos.v1.NodeService/Nothing")
        assert refusal(lambda: nothing(b"x", timeout=5)).code == "VERSION"  # noqa: B023
    world.node.behaviour = lambda request, context: node_pb2.ReadResponse(data=bytes(1 << 20))
    for stub in (world.stub(), world.local()):
        assert refusal(lambda: stub.Read(REQUEST, timeout=5)).code == "MESSAGE_SIZE"  # noqa: B023


def test_thirty_threads_call_at_once(make_local: MakeLocal) -> None:
    world = make_local(calls_per_second_max=100_000)
    world.node.behaviour = lambda request, context: node_pb2.ReadResponse(offset=request.offset)
    stub = world.local()

    def calls(first: int) -> bool:
        numbers = range(first * 1000, first * 1000 + 20)
        asked = (node_pb2.ReadRequest(lease_id="a" * 32, epoch=7, offset=at) for at in numbers)
        return [stub.Read(each, timeout=20).offset for each in asked] == list(numbers)

    with ThreadPoolExecutor(30) as pool:
        assert all(pool.map(calls, range(30)))


# Deadlines and cancellation ------------------------------------------------------------------


def test_a_deadline_that_passes_ends_the_handler_and_the_connection(world: LocalWorld) -> None:
    left: list[Any] = []
    ended = threading.Event()

    def waits(request: Any, context: Any) -> None:
        left.append(deadline_left_ms())
        context.add_callback(ended.set)
        ended.wait(5)

    world.node.behaviour = waits
    stub = world.local()
    started = time.monotonic()
    assert refusal(lambda: stub.Write(WRITING, timeout=0.3)).code == "DEADLINE"
    assert 0.25 < time.monotonic() - started < 1
    assert ended.wait(1)
    assert 0 < left[0] <= 300
    wait_until(lambda: local_threads() == 0)


@pytest.mark.parametrize("timeout_nano", [-1, -(2**63), 1, 2**63 - 1])
def test_deadlines_out_of_all_bounds_are_deadlines(world: LocalWorld, timeout_nano: int) -> None:
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        raw.request(5, "Write", WRITING.SerializeToString(), timeout_nano=timeout_nano)
        assert raw.code() == ("" if timeout_nano > 1 else "DEADLINE")
    for timeout in (0, -1, -1e30, 1e-9):
        assert refusal(lambda: world.local().Write(WRITING, timeout=timeout)).code == "DEADLINE"  # noqa: B023
    assert world.local().Write(WRITING, timeout=1e30).written == 1


def test_cancelling_a_stream_wakes_its_reader_and_ends_its_handler(world: LocalWorld) -> None:
    ended = threading.Event()

    def waits(request: Any, context: Any) -> None:
        if not context.add_callback(ended.set):
            ended.set()  # given up before it was begun
        ended.wait(5)

    world.node.behaviour = waits
    stub = world.local()
    answers = stub.ReadStream(REQUEST, timeout=10)
    threading.Timer(0.2, answers.cancel).start()
    assert refusal(lambda: next(answers)).code == "UNREACHABLE"
    assert ended.wait(2)
    ended.clear()
    left_lying = stub.ReadStream(REQUEST, timeout=10)
    del left_lying
    assert ended.wait(2)


def test_closing_a_channel_ends_the_calls_of_other_threads(world: LocalWorld) -> None:
    entered = threading.Event()
    channel = world.peer()
    made: Any = node_pb2_grpc.NodeServiceStub(channel.get())
    ended = threading.Event()
    world.node.behaviour = lambda request, context: wait_for(entered, ended)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(refusal, lambda: made.Read(REQUEST, timeout=10))
        assert entered.wait(3)
        channel.close()
        assert call.result(2).code == "UNREACHABLE"
        ended.set()
    assert refusal(lambda: made.Read(REQUEST, timeout=1)).code == "CLOSED"


def client_process(world: LocalWorld, folder: Path, what: str) -> subprocess.Popen[bytes]:
    IdentityFiles(folder).save(world.keyring.credentials(HOLDER))
    script = "tests.services.runtime.local_client"
    said = [str(folder), world.endpoint, spiffe.format_id(NODE), what]
    paths = os.pathsep.join(str(ROOT / each) for each in (".", "core", "protos", "sdk"))
    return subprocess.Popen(
        [sys.executable, "-m", script, *said], cwd=ROOT, env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("what", ["stay", "fork"])
def test_the_server_hears_that_its_client_was_killed(
    world: LocalWorld, tmp_path: Path, what: str
) -> None:
    ended, go_on = threading.Event(), threading.Event()

    def second_answer_waits(request: Any, context: Any) -> None:
        context.add_callback(ended.set)
        if len(world.node.calls) == 2:
            go_on.wait(10)
        if len(world.node.calls) == 3:
            ended.wait(10)

    world.node.behaviour = second_answer_waits
    process = client_process(world, tmp_path / "client", what)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"begun\n"
        assert not ended.wait(0.2)
        if what == "fork":
            go_on.set()
            assert process.stdout.readline() == b"more\n"  # the child has not hung up for him
        process.send_signal(signal.SIGKILL)
        assert ended.wait(3)  # also where a child of his lives on
    finally:
        go_on.set()
        ended.set()
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait(5)
