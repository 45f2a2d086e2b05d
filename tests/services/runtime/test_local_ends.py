"""How local connections end: restarts, silence, age, limits, a stop, clients that do not read."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import node_pb2
from grafos_proto.wire import ttrpc_connection
from grafos_proto.wire.ttrpc_connection import Connection
from grafos_proto.wire.ttrpc_frames import NEVER, Frames
from services.runtime import local_connection
from tests.services.runtime.local_world import LocalWorld, RawClient, refusal
from tests.services.runtime.test_catalogue_transport import wait_until
from tests.services.runtime.world import HOLDER, SERVICE

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


# Restarts, silence and age -------------------------------------------------------------------


def test_a_restarted_server_is_called_without_a_failure_though_connections_were_kept(
    world: LocalWorld,
) -> None:
    stub, together = world.local(), threading.Barrier(4)
    world.node.behaviour = lambda request, context: together.wait(5) and None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: stub.Read(REQUEST, timeout=5), range(4)))
    world.node.behaviour = lambda request, context: None
    world.restart()
    assert stub.Read(REQUEST, timeout=5).data == b"read"
    assert stub.WriteStream(iter([WRITING]), timeout=5).written == 1


def test_nobody_there_is_told_at_once_and_silence_at_the_deadline(
    world: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.server.stop(0)
    stub = world.local()
    assert refusal(lambda: stub.Read(REQUEST, timeout=5)).code == "UNREACHABLE"
    os.unlink(world.socket_path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(world.socket_path)
        silent.listen(0)
        assert refusal(lambda: stub.Read(REQUEST, timeout=0.2)).code == "DEADLINE"
        assert refusal(lambda: stub.Read(REQUEST, timeout=0.2)).code == "DEADLINE"  # full
        assert refusal(lambda: stub.Read(REQUEST, timeout=0.2)).code == "DEADLINE"
        monkeypatch.setattr(ttrpc_connection, "HANDSHAKE_S", 0.2)
        assert refusal(lambda: stub.Read(REQUEST, timeout=9)).code == "UNREACHABLE"


def test_no_call_outlives_the_age_of_a_connection_whose_server_has_stopped() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(Frames(ours))
    connection._end_at = time.monotonic() + 0.2
    with theirs:
        connection.begin(b"x", 0, NEVER)
        assert refusal(lambda: connection.answer(NEVER)).code == "UNREACHABLE"
        connection.close()


def test_no_call_fails_while_connections_grow_old(make_local: MakeLocal) -> None:
    world = make_local(
        connection_age_ms_max=300, connection_age_grace_ms=200, calls_per_second_max=100_000
    )
    stub, end = world.local(), time.monotonic() + 1.5
    served = 0
    while time.monotonic() < end:
        assert stub.Read(REQUEST, timeout=5).data == b"read"
        served += 1
    assert served > 20


def test_the_server_ends_a_connection_at_its_age_and_its_calls_after_a_grace(
    make_local: MakeLocal,
) -> None:
    world = make_local(connection_age_ms_max=500, connection_age_grace_ms=400)
    took, ended = [0.7], threading.Event()

    def waits(request: Any, context: Any) -> None:
        context.add_callback(ended.set)
        threading.Event().wait(took[0])

    world.node.behaviour = waits
    credentials = world.keyring.credentials(HOLDER)
    with RawClient(world.socket_path, credentials) as idle:
        assert not idle.ends_within(0.3)
        assert idle.ends_within(0.5)
    with RawClient(world.socket_path, credentials) as in_time:
        in_time.request(5, "Read", READ)
        assert in_time.code() == ""
        assert in_time.ends_within(0.6)
    took[0] = 2.0
    ended.clear()
    with RawClient(world.socket_path, credentials) as too_long_a_call:
        too_long_a_call.request(5, "Read", READ)
        assert too_long_a_call.ends_within(1.3)
        assert ended.wait(1)


def test_a_certificate_that_runs_out_on_an_open_connection_is_refused(world: LocalWorld) -> None:
    stub = world.local(ttl_ms=1_500)
    assert stub.Read(REQUEST, timeout=5).data == b"read"
    codes: set[str] = set()
    end = time.monotonic() + 4
    while not codes and time.monotonic() < end:
        try:
            stub.Read(REQUEST, timeout=5)
        except FabricError as error:
            codes.add(error.code)
        threading.Event().wait(0.05)
    assert codes == {"CERT_EXPIRED"}


# Limits and the end --------------------------------------------------------------------------


def test_calls_over_an_identitys_limit_are_refused(make_local: MakeLocal) -> None:
    world = make_local(calls_per_identity_max=8)
    together = threading.Event()
    world.node.behaviour = lambda request, context: together.wait(5) and None
    stub = world.local()

    def code(_: int) -> str:
        try:
            stub.Read(REQUEST, timeout=10)
        except FabricError as error:
            assert error.retry_after_ms
            return error.code
        return ""

    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(code, at) for at in range(20)]
        wait_until(lambda: sum(each.done() for each in calls) == 12, 10)
        together.set()
        assert sorted(each.result() for each in calls) == [""] * 8 + ["STREAMS"] * 12


def test_the_calls_of_one_connection_are_answered_beside_each_other_up_to_its_limit(
    make_local: MakeLocal,
) -> None:
    world = make_local(streams_per_connection_max=4)
    together = threading.Barrier(4)
    world.node.behaviour = lambda request, context: together.wait(5) and None
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        for stream in (5, 7, 9):
            raw.request(stream, "Read", READ)
            threading.Event().wait(0.05)  # not all at once: nobody knows that more will come
        wait_until(lambda: together.n_waiting == 3)
        for stream in (11, 13):
            raw.request(stream, "Read", READ)
        answers = dict(raw.answer() for _ in range(5))
        assert set(answers) == {5, 7, 9, 11, 13}
        refused = answers.pop(13)
        assert isinstance(refused, FabricError) or isinstance(answers[11], FabricError)
        world.node.behaviour = lambda request, context: None
        raw.request(15, "Read", READ)
        assert raw.code() == ""


def test_streams_of_requests_never_keep_their_connection_from_being_read(
    make_local: MakeLocal,
) -> None:
    world = make_local(streams_per_connection_max=3)
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        for stream in (5, 7, 9):
            raw.request(stream, "WriteStream", b"", flags=2)
        for stream in (5, 7, 9):
            raw.send(stream, 3, WRITING.SerializeToString())
            raw.send(stream, 3, b"", flags=5)
        assert {raw.answer()[0] for _ in range(3)} == {5, 7, 9}


def test_a_newcomer_takes_the_place_of_who_was_idle_for_longest_and_of_no_call(
    make_local: MakeLocal,
) -> None:
    world = make_local(streams_per_connection_max=1, connections_max=1, reserve_calls=2)
    credentials = world.keyring.credentials(HOLDER)
    together = threading.Event()
    raws = [RawClient(world.socket_path, credentials) for _ in range(3)]
    raws[0].request(5, "Read", READ)
    assert raws[0].code() == ""
    assert world.local().Read(REQUEST, timeout=5).data == b"read"
    assert raws[1].ends_within(1)
    assert not raws[0].ends_within(0.1)
    world.node.behaviour = lambda request, context: together.wait(5) and None
    raws.append(RawClient(world.socket_path, credentials))
    for raw in (raws[0], raws[3]):
        raw.request(7, "Read", READ)
    wait_until(lambda: world.server.in_flight() == 2)
    raws.append(RawClient(world.socket_path, credentials))
    raws[4].request(7, "Read", READ)
    wait_until(lambda: world.server.in_flight() == 3)
    assert refusal(lambda: world.local().Read(REQUEST, timeout=2)).code == "UNREACHABLE"
    together.set()
    for raw in (raws[0], raws[3], raws[4]):
        raw.sock.settimeout(5)
        assert raw.code() == ""
    for raw in raws:
        raw.close()


def test_stopping_lets_calls_end_takes_no_more_and_then_ends(world: LocalWorld) -> None:
    entered, release = threading.Event(), threading.Event()
    world.node.behaviour = lambda request, context: wait_for(entered, release)
    credentials = world.keyring.credentials(HOLDER)
    idle = RawClient(world.socket_path, credentials)
    with ThreadPoolExecutor(1) as pool, RawClient(world.socket_path, credentials) as raw:
        raw.request(5, "Read", READ)
        assert entered.wait(3)
        threading.Event().wait(0.1)
        stopping = pool.submit(world.server.stop, 3_000)
        assert idle.ends_within(1)
        raw.request(7, "Read", READ)
        assert raw.answer()[0] == 7
        assert refusal(lambda: world.local().Read(REQUEST, timeout=2)).code == "UNREACHABLE"
        release.set()
        assert raw.answer()[0] == 5
        stopping.result(2)
        assert raw.ends_within(1)
    idle.close()
    wait_until(lambda: local_threads() == 0)


def test_stopping_ends_what_does_not_end_within_the_grace(world: LocalWorld) -> None:
    ended = threading.Event()

    def waits(request: Any, context: Any) -> None:
        context.add_callback(ended.set)
        ended.wait(5)

    world.node.behaviour = waits
    answers = world.local().ReadStream(REQUEST, timeout=20)
    wait_until(lambda: world.node.calls == ["ReadStream"])
    started = time.monotonic()
    world.server.stop(200)
    assert time.monotonic() - started < 2
    assert refusal(lambda: next(answers)).code == "UNREACHABLE"
    assert ended.wait(1)


def test_nothing_is_left_of_fifty_connections(world: LocalWorld) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    credentials = world.keyring.credentials(HOLDER)
    world.local(credentials=credentials).Read(REQUEST, timeout=5)
    world._peers.pop().close()
    wait_until(lambda: local_threads() == 0)
    before = open_files()
    raws = [RawClient(world.socket_path, credentials) for _ in range(50)]
    for raw in raws:
        raw.request(5, "ReadStream", READ)
    for at, raw in enumerate(raws):
        if at % 2:
            raw.receive()
        raw.close()
    wait_until(lambda: local_threads() == 0, 10)
    wait_until(lambda: open_files() <= before)


def test_who_does_not_read_his_answers_loses_his_connection_and_harms_nobody(
    world: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_connection, "SEND_S", 0.3)
    large = node_pb2.ReadResponse(data=bytes(900_000))
    world.node.behaviour = lambda request, context: large
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        raw.request(5, "ReadStream", READ)
        wait_until(lambda: world.node.calls == ["ReadStream"])
        raw.request(7, "Read", READ)
        world.node.behaviour = lambda request, context: None
        assert world.local().Read(REQUEST, timeout=5).data == b"read"
        wait_until(lambda: world.server.in_flight() == 0)
        assert raw.ends_within(2)


def test_a_refused_stream_takes_no_more_and_its_connection_goes_on(world: LocalWorld) -> None:
    def refuses(request: Any, context: Any) -> None:
        raise failure.of("EPOCH_STALE")

    world.node.behaviour = refuses
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        raw.request(5, "WriteStream", b"", flags=2)
        for _ in range(100):
            raw.send(5, 3, WRITING.SerializeToString())
        raw.request(7, "Read", READ)
        assert [raw.answer()[0], raw.answer()[0]] == [5, 7]


def test_a_stream_that_breaks_off_does_not_look_whole(world: LocalWorld) -> None:
    raised: list[type[BaseException]] = []
    taken = world.node.WriteStream

    def watched(requests: Any, context: Any) -> Any:
        try:
            return taken(requests, context)
        except BaseException as error:
            raised.append(type(error))
            raise

    world.node.WriteStream = watched  # type: ignore[assignment,method-assign]
    world.restart()
    raw = RawClient(world.socket_path, world.keyring.credentials(HOLDER))
    raw.request(5, "WriteStream", b"", flags=2)
    raw.send(5, 3, WRITING.SerializeToString())
    wait_until(lambda: world.node.calls == ["WriteStream"])
    raw.close()
    wait_until(lambda: raised == [grpc.RpcError])


def test_two_services_of_one_user_are_not_taken_for_each_other(world: LocalWorld) -> None:
    stub = world.local(expected=SERVICE)
    started = time.monotonic()
    error = refusal(lambda: stub.Read(REQUEST, timeout=5))
    assert (type(error), error.code) == (failure.Denied, "IDENTITY")
    assert time.monotonic() - started < 1
    assert world.node.calls == []
