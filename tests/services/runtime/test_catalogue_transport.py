"""What a listener does with bad input, row by row of the catalogue's part on transport and gRPC.

Each test asserts the exact status and code, that no handler ran, that nothing internal got out, and
that the next good call is served.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import (
    admission_pb2,
    audit_pb2,
    lease_pb2,
    ledger_pb2,
    node_pb2,
    ttrpc_pb2,
)
from grafos_proto.wire import failures
from grafos_proto.wire.credentials import channel_credentials, server_name_option
from services.runtime import server as runtime
from services.runtime.limits import Limits
from tests.services.runtime.http2 import RST_STREAM, Connection, frame, tls_context
from tests.services.runtime.world import (
    HOLDER,
    NODE,
    OPERATOR,
    SERVICE,
    Keyring,
    World,
    node_name,
)

READ, WRITE = "/grafos.v1.NodeService/Read", "/grafos.v1.NodeService/Write"
REQUEST = node_pb2.ReadRequest(lease_id="a" * 32, epoch=7, length=1)
WRITING = node_pb2.WriteRequest(lease_id="a" * 32, epoch=7, data=b"x", length=1)
MakeWorld = Callable[..., World]


def code_of(call: Callable[[], Any]) -> str:
    """The code of the failure that `call` ends in; empty where it does not."""
    try:
        with failures.status_to_failures():
            call()
    except FabricError as error:
        return error.code
    return ""


def status_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except grpc.RpcError as error:
        caught: Any = error
        return str(caught.code().name)
    return "OK"


def raw(channel: grpc.Channel, method: str, data: bytes, **how: Any) -> Any:
    """A call whose request is whatever bytes a test likes."""
    call: Any = channel.unary_unary(method)
    return call(data, timeout=5, **how)


def assert_serving(world: World) -> None:
    assert world.stub().Read(REQUEST, timeout=5).data == b"read"


def test_T1_who_does_not_prove_a_certificate_of_ours_is_refused_at_the_handshake(
    world: World, tmp_path: Path
) -> None:
    stranger = Keyring(tmp_path / "other").credentials(HOLDER)
    ours = world.keyring.credentials(HOLDER)
    no_certificate = grpc.ssl_channel_credentials(ours.bundle_pem)
    unknown_authority = grpc.ssl_channel_credentials(
        ours.bundle_pem, stranger.key_pem, stranger.chain_pem
    )
    world.keyring.now_ms -= 86_400_000
    expired = world.keyring.credentials(HOLDER, ttl_ms=60_000)
    world.keyring.now_ms += 2 * 86_400_000
    not_yet = world.keyring.credentials(HOLDER, ttl_ms=60_000)
    world.keyring.now_ms -= 86_400_000
    for credentials in (
        no_certificate,
        unknown_authority,
        channel_credentials(expired),
        channel_credentials(not_yet),
    ):
        target = [server_name_option(NODE), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(world.endpoint, credentials, target) as channel:
            assert status_of(lambda: raw(channel, READ, REQUEST.SerializeToString())) == (
                "UNAVAILABLE"
            )
    assert world.node.calls == []
    assert_serving(world)


def test_T2_a_certificate_that_expires_on_an_open_connection_is_refused_at_the_next_call(
    world: World,
) -> None:
    stub = world.stub(ttl_ms=1_500)
    assert stub.Read(REQUEST, timeout=5).data == b"read"
    deadline = time.monotonic() + 4
    code = ""
    while not code and time.monotonic() < deadline:
        code = code_of(lambda: stub.Read(REQUEST, timeout=5))
        threading.Event().wait(0.05)
    assert code == "CERT_EXPIRED"
    assert status_of(lambda: stub.Read(REQUEST, timeout=5)) == "UNAUTHENTICATED"
    assert_serving(world)


def test_T3_plain_text_to_the_port_is_hung_up_on(world: World) -> None:
    with socket.create_connection(("127.0.0.1", world.port), 5) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        plain.settimeout(5)
        assert b"HTTP/1.1 200" not in plain.recv(1024)
    with grpc.insecure_channel(world.endpoint) as channel:
        assert status_of(lambda: raw(channel, READ, REQUEST.SerializeToString())) == "UNAVAILABLE"
    assert world.node.calls == []
    assert_serving(world)


def test_T4_a_tls_that_is_too_old_is_refused_and_1_2_is_taken_as_the_design_says(
    world: World,
) -> None:
    """Python's gRPC gives a server no lower bound; 1.0 and 1.1 end in the library below it."""
    spoken = {}
    for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = tls_context(world.keyring.credentials(HOLDER))
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # else ours would not even offer the old ones
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", world.port), 5) as plain:
            try:
                with context.wrap_socket(plain, server_hostname=node_name()) as tls:
                    spoken[version.name] = tls.version()
            except (ssl.SSLError, OSError):
                spoken[version.name] = "refused"
    assert spoken == {"TLSv1_1": "refused", "TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}
    assert_serving(world)


def test_T6_two_hundred_silent_connections_are_closed_and_others_served(world: World) -> None:
    silent = [socket.create_connection(("127.0.0.1", world.port), 5) for _ in range(200)]
    try:
        assert_serving(world)
        started = time.monotonic()
        for each in silent:
            each.settimeout(max(0.1, 5 - (time.monotonic() - started)))
            assert each.recv(1) == b""
        assert 1 < time.monotonic() - started < 5
    finally:
        for each in silent:
            each.close()
    assert_serving(world)


def test_T8_streams_that_send_headers_alone_free_their_threads_and_hold_up_nobody(
    make_world: MakeWorld,
) -> None:
    world = make_world(
        limits=Limits(
            streams_per_connection_max=8, connections_max=2, reserve_calls=4,
            calls_per_identity_max=12, first_message_ms_max=600,
        )
    )  # fmt: skip
    attacker = world.keyring.credentials(OPERATOR)
    holder = world.keyring.credentials(HOLDER)
    connections = [Connection(world.port, holder) for _ in range(4)]
    connections += [Connection(world.port, attacker) for _ in range(2)]
    try:
        for connection in connections:
            for _ in range(8):
                connection.open_stream(READ)
        wait_until(lambda: world.server.in_flight() > 0)
        assert world.server.in_flight() <= 12  # of the holder; operators may not call this
        assert code_of(lambda: world.stub(SERVICE).Read(REQUEST, timeout=5)) == "ROLE"
        wait_until(lambda: world.server.in_flight() == 0, 5)
        assert_serving(world)
    finally:
        for connection in connections:
            connection.close()
    assert world.node.calls == ["Read"]


def test_T8_headers_without_a_deadline_to_a_method_that_writes_hold_nothing(world: World) -> None:
    with Connection(world.port, world.keyring.credentials(HOLDER)) as connection:
        for _ in range(8):
            connection.open_stream(WRITE)
        threading.Event().wait(0.3)
        assert world.server.in_flight() == 0
    assert_serving(world)


def test_T8_a_connection_ends_at_its_age_whatever_its_streams_do(make_world: MakeWorld) -> None:
    world = make_world(limits=Limits(connection_age_ms_max=1_000, connection_age_grace_ms=300))
    with Connection(world.port, world.keyring.credentials(HOLDER)) as connection:
        for _ in range(4):
            connection.open_stream(READ)
        assert connection.ends_within(4)
    assert_serving(world)


def test_T9_two_thousand_streams_that_are_reset_at_once_hold_up_nobody(world: World) -> None:
    with Connection(world.port, world.keyring.credentials(HOLDER)) as rude:
        try:
            for _ in range(2_000):
                stream = rude.open_stream(READ, ("grpc-timeout", "5S"))
                rude.send(frame(RST_STREAM, 0, stream, (8).to_bytes(4, "big")))
        except OSError:
            pass  # the library may end such a connection before its end
        assert_serving(world)
    assert "Read" in world.node.calls
    assert_serving(world)


def test_T11_a_message_over_the_limit_is_refused_unread(world: World) -> None:
    for size in (256 * 1024 + 1, 4 * 1024 * 1024):
        large = node_pb2.WriteRequest(lease_id="a" * 32, data=b"x" * size, length=size)
        stub = world.stub(options=(("grpc.max_send_message_length", -1),))
        assert status_of(lambda: stub.Write(large, timeout=5)) == "RESOURCE_EXHAUSTED"  # noqa: B023
        assert code_of(lambda: stub.Write(large, timeout=5)) == "MESSAGE_SIZE"  # noqa: B023
    assert world.node.calls == []
    assert_serving(world)


def test_T11_a_chunk_of_192_KiB_passes(world: World) -> None:
    size = 192 * 1024
    chunk = node_pb2.WriteRequest(lease_id="a" * 32, epoch=1, data=b"x" * size, length=size)
    assert world.stub().Write(chunk, timeout=5).written == 1


@pytest.mark.parametrize("size", [8 * 1024, 12 * 1024, 15 * 1024, 64 * 1024])
def test_T12_metadata_over_the_limit_is_refused_between_the_librarys_limits_too(
    world: World, size: int
) -> None:
    metadata = (("x-large", "y" * size),)
    for _ in range(5):  # between its two limits the library refuses some at random
        code = code_of(lambda: world.stub().Read(REQUEST, timeout=5, metadata=metadata))
        assert code == "MESSAGE_SIZE"
    assert world.node.calls == []
    assert_serving(world)


def test_T14_a_call_that_writes_needs_a_deadline(world: World) -> None:
    assert status_of(lambda: world.stub().Write(WRITING)) == "INVALID_ARGUMENT"
    assert code_of(lambda: world.stub().Write(WRITING)) == "DEADLINE_REQUIRED"
    assert code_of(lambda: world.stub().WriteStream(iter([WRITING]))) == "DEADLINE_REQUIRED"
    assert world.node.calls == []
    assert_serving(world)


def test_T14_a_call_that_reads_is_capped_at_thirty_seconds(world: World) -> None:
    left: list[int] = []
    world.node.behaviour = lambda request, context: left.append(runtime.deadline_left_ms())
    world.stub().Read(REQUEST)
    world.stub().Read(REQUEST, timeout=3_600)
    world.stub().Read(REQUEST, timeout=2)
    assert 29_000 < left[0] <= 30_000
    assert 29_000 < left[1] <= 30_000
    assert 1_000 < left[2] <= 2_000


def test_T15_a_deadline_that_has_passed_never_reaches_the_handler(world: World) -> None:
    stub = world.stub()
    stub.Read(REQUEST, timeout=5)
    for timeout in (0, -1, 1e-6):
        assert code_of(lambda: stub.Write(WRITING, timeout=timeout)) == "DEADLINE"  # noqa: B023
    assert world.node.calls == ["Read"]


def test_T15_a_handler_whose_caller_no_longer_waits_stops_before_the_effect(world: World) -> None:
    effects: list[str] = []
    stopped = threading.Event()

    def slow(request: Any, context: grpc.ServicerContext) -> None:
        threading.Event().wait(0.4)
        try:
            runtime.check_deadline()
        except FabricError:
            stopped.set()
            raise
        effects.append("written")

    world.node.behaviour = slow
    assert code_of(lambda: world.stub().Write(WRITING, timeout=0.2)) == "DEADLINE"
    assert stopped.wait(5)
    assert effects == []


def test_T16_an_unknown_method_or_service_is_unimplemented(world: World) -> None:
    channel = world.channel()
    for method in ("/grafos.v1.NodeService/Nothing", "/grafos.v1.Nothing/Read", "/x", "/grafos"):
        assert status_of(lambda: raw(channel, method, b"")) == "UNIMPLEMENTED"  # noqa: B023
    assert_serving(world)


def test_T17_calls_over_the_limit_are_refused_and_may_be_tried_again(
    make_world: MakeWorld,
) -> None:
    world = make_world(limits=Limits(calls_per_identity_max=8, streams_per_connection_max=64))
    together = threading.Event()
    world.node.behaviour = lambda request, context: together.wait(5) and None
    stub = world.stub()
    with ThreadPoolExecutor(30) as pool:
        calls = [pool.submit(code_of, lambda: stub.Read(REQUEST, timeout=10)) for _ in range(30)]
        wait_until(lambda: sum(call.done() for call in calls) == 22)
        together.set()
        codes = sorted(call.result() for call in calls)
    assert codes == [""] * 8 + ["STREAMS"] * 22
    assert len(world.node.calls) == 8
    assert_serving(world)


def test_T17_a_refusal_for_being_busy_says_when_to_try_again(make_world: MakeWorld) -> None:
    world = make_world(limits=Limits(calls_per_second_max=5))
    stub = world.stub()
    refused: list[FabricError] = []
    for _ in range(12):
        try:
            with failures.status_to_failures():
                stub.Read(REQUEST, timeout=5)
        except FabricError as error:
            refused.append(error)
    assert 5 <= len(refused) <= 7
    assert {each.code for each in refused} == {"RATE"}
    assert all(0 < (each.retry_after_ms or 0) <= 200 for each in refused)


MALFORMED = {
    "truncated varint": b"\x10\xff",
    "varint of eleven bytes": b"\x10" + b"\xff" * 10 + b"\x01",
    "truncated length": b"\x0a\x7fabc",
    "stray end of a group": b"\x0c",
    "field number zero": b"\x00\x01",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_T18_bytes_that_are_no_message_never_reach_the_handler(world: World, data: bytes) -> None:
    channel = world.channel()
    assert status_of(lambda: raw(channel, READ, data)) == "INTERNAL"
    stream: Any = channel.unary_stream("/grafos.v1.NodeService/ReadStream")
    assert status_of(lambda: list(stream(data, timeout=5))) == "INTERNAL"
    assert world.node.calls == []
    assert "Traceback" not in world.logged.getvalue()
    assert_serving(world)


def test_T19_a_string_that_is_not_UTF_8_never_reaches_the_handler(world: World) -> None:
    assert status_of(lambda: raw(world.channel(), READ, b"\x0a\x02\xff\xfe")) == "INTERNAL"
    assert world.node.calls == []
    assert_serving(world)


def test_T21_fields_that_are_not_known_are_refused_however_many(world: World) -> None:
    channel = world.channel()
    one = REQUEST.SerializeToString() + b"\xf8\x7f\x01"
    many = REQUEST.SerializeToString() + b"\xf8\x7f\x01" * 80_000
    started = time.monotonic()
    for data in (one, many):
        assert status_of(lambda: raw(channel, READ, data)) == "INVALID_ARGUMENT"  # noqa: B023
        assert code_of(lambda: raw(channel, READ, data)) == "UNKNOWN_FIELDS"  # noqa: B023
    assert time.monotonic() - started < 2
    writes: Any = channel.stream_unary("/grafos.v1.NodeService/WriteStream")
    later = [WRITING.SerializeToString(), WRITING.SerializeToString() + b"\xf8\x7f\x01"]
    assert code_of(lambda: writes(iter(later), timeout=5)) == "UNKNOWN_FIELDS"
    assert world.node.calls == ["WriteStream"]
    assert_serving(world)


def test_T22_a_field_of_the_wrong_wire_type_counts_as_missing(world: World) -> None:
    lease_id_as_number = b"\x08\x01" + b"\x10\x07"
    channel = world.channel()
    assert status_of(lambda: raw(channel, READ, lease_id_as_number)) == "INVALID_ARGUMENT"
    assert code_of(lambda: raw(channel, READ, lease_id_as_number)) == "MISSING_FIELD"
    assert world.node.calls == []
    assert_serving(world)


def test_T23_of_a_scalar_that_comes_twice_the_last_one_counts_everywhere(world: World) -> None:
    seen: list[int] = []

    def look(request: Any, context: Any) -> None:
        seen.append(request.epoch)

    world.node.behaviour = look
    twice = REQUEST.SerializeToString() + node_pb2.ReadRequest(epoch=9).SerializeToString()
    raw(world.channel(), READ, twice)
    assert seen == [9]


def test_T25_no_message_of_ours_has_a_floating_point_number() -> None:
    files = (lease_pb2, admission_pb2, ledger_pb2, node_pb2, audit_pb2, ttrpc_pb2)
    floats = [
        field.full_name
        for file in files
        for message in file.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT)
    ]
    assert floats == []


def test_T26_an_empty_body_is_refused(world: World) -> None:
    channel = world.channel()
    for method in (READ, WRITE):
        assert status_of(lambda: raw(channel, method, b"")) == "INVALID_ARGUMENT"  # noqa: B023
        assert code_of(lambda: raw(channel, method, b"")) == "EMPTY"  # noqa: B023
    assert world.node.calls == []
    assert_serving(world)


def test_T27_a_bug_in_a_handler_goes_out_as_an_incident_and_nothing_else(world: World) -> None:
    def buggy(request: Any, context: grpc.ServicerContext) -> None:
        raise KeyError("/var/lib/secret-path with the password hunter2")

    world.node.behaviour = buggy
    for call in (
        lambda: world.stub().Read(REQUEST, timeout=5),
        lambda: list(world.stub().ReadStream(REQUEST, timeout=5)),
        lambda: world.stub().WriteStream(iter([WRITING]), timeout=5),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        rpc: Any = caught.value
        error = failures.from_rpc_error(rpc)
        assert (rpc.code().name, error.code) == ("INTERNAL", "INTERNAL")
        assert rpc.details() == failure.CODES["INTERNAL"].message
        assert "hunter2" not in str(rpc.trailing_metadata()) + str(rpc.details())
        assert len(error.incident_id) == 16
        assert f'"incident_id":"{error.incident_id}"' in world.logged.getvalue()
    assert "KeyError" in world.logged.getvalue()
    world.node.behaviour = lambda request, context: None
    assert world.halted == []
    assert_serving(world)


def test_T27_a_broken_law_is_answered_and_then_halts_the_process(world: World) -> None:
    def broken(request: Any, context: grpc.ServicerContext) -> None:
        failure.invariant(False, "free + leased = total")

    world.node.behaviour = broken
    assert code_of(lambda: world.stub().Read(REQUEST, timeout=5)) == "INTERNAL"
    wait_until(lambda: world.halted == [True])


def test_T27_an_answer_of_the_wrong_kind_is_our_bug_too(world: World) -> None:
    world.node.behaviour = lambda request, context: "not a message"
    assert code_of(lambda: world.stub().Read(REQUEST, timeout=5)) == "INTERNAL"
    world.node.behaviour = lambda request, context: None
    assert_serving(world)


def test_T30_a_compressed_message_may_not_grow_beyond_the_limit(world: World) -> None:
    bomb = node_pb2.WriteRequest(lease_id="a" * 32, data=bytes(64 * 1024 * 1024), length=1)
    stub = world.stub(options=(("grpc.max_send_message_length", -1),))
    call = lambda: stub.Write(bomb, timeout=20, compression=grpc.Compression.Gzip)  # noqa: E731
    assert status_of(call) == "RESOURCE_EXHAUSTED"
    assert world.node.calls == []
    assert_serving(world)


def test_a_role_that_may_not_call_a_method_is_refused_before_its_message_is_read(
    world: World,
) -> None:
    for identity in (NODE, SERVICE, OPERATOR):
        stub = world.stub(identity)
        assert status_of(lambda: stub.Read(REQUEST, timeout=5)) == "PERMISSION_DENIED"  # noqa: B023
        assert code_of(lambda: stub.Read(REQUEST, timeout=5)) == "ROLE"  # noqa: B023
    assert world.node.calls == []


def test_the_handler_knows_who_calls(world: World) -> None:
    seen: list[runtime.Peer] = []
    world.node.behaviour = lambda request, context: seen.append(runtime.peer())
    credentials = world.keyring.credentials(HOLDER)
    stub = world.stub(credentials=credentials)
    stub.Read(REQUEST, timeout=5)
    list(stub.ReadStream(REQUEST, timeout=5))
    assert {each.identity for each in seen} == {HOLDER}
    assert {each.key_thumbprint for each in seen} == {credentials.thumbprint}


def wait_until(condition: Callable[[], bool], seconds: float = 3) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.01)
