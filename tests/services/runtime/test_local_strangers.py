"""What a local socket does with clients that are not ours, or not well: lies, garbage, silence.

None of them reaches a handler, and a client of ours is served beside and after each.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grafos_proto.v1 import node_pb2, ttrpc_pb2
from grafos_proto.wire import certificates
from grafos_proto.wire.credentials import Credentials
from grafos_proto.wire.ttrpc_connection import Connection
from grafos_proto.wire.ttrpc_frames import NEVER
from tests.services.runtime.local_world import LOCAL_SERVICE, LocalWorld, RawClient, refusal
from tests.services.runtime.world import HOLDER, NODE, Keyring

REQUEST = node_pb2.ReadRequest(lease_id="a" * 32, epoch=7, length=1)
READ = REQUEST.SerializeToString()
NOBODY_UID = 65_534


@pytest.fixture
def world(make_local: Callable[..., LocalWorld]) -> LocalWorld:
    return make_local(handshake_ms_max=700, first_message_ms_max=500)


def wait_for(entered: threading.Event, release: threading.Event) -> None:
    entered.set()
    release.wait(5)


def assert_only_ours_are_served(world: LocalWorld, calls: int = 0) -> None:
    assert world.node.calls == ["Read"] * calls
    assert world.local().Read(REQUEST, timeout=5).data == b"read"
    world.node.calls.clear()


# Greetings ----------------------------------------------------------------------------------


def prove_first(raw: RawClient, ours: Credentials) -> None:
    raw.prove(ours.key, bytes(32), stream=1)


def hello_twice(raw: RawClient, ours: Credentials) -> None:
    raw.hello(ours)
    said = ttrpc_pb2.LocalHelloRequest(version=1, nonce=b"n" * 32, chain_pem=ours.chain_pem)
    raw.request(3, "Hello", said.SerializeToString(), service=LOCAL_SERVICE)


def call_between(raw: RawClient, ours: Credentials) -> None:
    raw.hello(ours)
    raw.request(3, "Read", READ)


def anothers_key(raw: RawClient, ours: Credentials) -> None:
    digest = raw.hello(ours)
    assert isinstance(digest, bytes)
    raw.prove(certificates.new_tls_key(), digest)


def as_the_server(raw: RawClient, ours: Credentials) -> None:
    digest = raw.hello(ours)
    assert isinstance(digest, bytes)
    proof = certificates.prove(ours.key, "grafos-local-server", digest)
    said = ttrpc_pb2.LocalProveRequest(proof=proof).SerializeToString()
    raw.request(3, "Prove", said, service=LOCAL_SERVICE)


def no_method(raw: RawClient, ours: Credentials) -> None:
    raw.request(1, "Enter", b"", service=LOCAL_SERVICE)


def no_message(raw: RawClient, ours: Credentials) -> None:
    raw.request(1, "Hello", b"\xff\xff", service=LOCAL_SERVICE)


def no_greeting(raw: RawClient, ours: Credentials) -> None:
    raw.request(1, "Read", READ)


GREETINGS = (
    no_greeting, prove_first, hello_twice, call_between, anothers_key, as_the_server, no_method,
    no_message,
)  # fmt: skip


@pytest.mark.parametrize("greet", GREETINGS, ids=lambda each: each.__name__)
def test_who_does_not_greet_as_he_must_is_refused_and_hung_up_on(
    world: LocalWorld, greet: Callable[[RawClient, Credentials], None]
) -> None:
    with RawClient(world.socket_path) as raw:
        greet(raw, world.keyring.credentials(HOLDER))
        assert raw.code() == "IDENTITY"
        assert raw.ends_within(1)
    assert_only_ours_are_served(world)


def test_a_greeting_is_said_once(world: LocalWorld) -> None:
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        raw.request(5, "Read", READ)
        assert raw.code() == ""
        raw.request(7, "Hello", b"", service=LOCAL_SERVICE)
        assert raw.code() == "IDENTITY"
        assert raw.ends_within(1)
    assert_only_ours_are_served(world, 1)


def test_versions_and_nonces_of_another_kind_are_refused(world: LocalWorld) -> None:
    ours = world.keyring.credentials(HOLDER)
    for version, nonce in ((0, b"n" * 32), (2, b"n" * 32), (1, b""), (1, b"n" * 31)):
        with RawClient(world.socket_path) as raw:
            said = ttrpc_pb2.LocalHelloRequest(
                version=version, nonce=nonce, chain_pem=ours.chain_pem
            )
            raw.request(1, "Hello", said.SerializeToString(), service=LOCAL_SERVICE)
            assert raw.code() == "VERSION"
            assert raw.ends_within(1)
    assert_only_ours_are_served(world)


def test_a_proof_that_was_overheard_is_worth_nothing_on_another_connection(
    world: LocalWorld,
) -> None:
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as overheard:
        with RawClient(world.socket_path) as again:
            again.sock.sendall(overheard.said[0])
            assert again.code() == ""
            again.sock.sendall(overheard.said[1])
            assert again.code() == "IDENTITY"
            assert again.ends_within(1)
    assert_only_ours_are_served(world)


def strangers(world: LocalWorld, tmp_path: Path) -> dict[str, Credentials]:
    """Certificates that must not be believed."""
    mine = certificates.new_tls_key()
    alone = Keyring(tmp_path / "other").credentials(HOLDER)
    ours = world.keyring.credentials(HOLDER)
    world.keyring.now_ms -= 86_400_000
    expired = world.keyring.credentials(HOLDER, ttl_ms=60_000)
    world.keyring.now_ms += 86_400_000
    return {
        "IDENTITY": alone,
        "CERT_EXPIRED": expired,
        "IDENTITY ": Credentials(certificates.key_pem(mine), ours.chain_pem, ours.bundle_pem),
        "IDENTITY  ": Credentials(ours.key_pem, b"not a chain", ours.bundle_pem),
        "MESSAGE_SIZE": Credentials(ours.key_pem, ours.chain_pem * 40, ours.bundle_pem),
    }


def test_certificates_of_others_and_of_yesterday_are_refused_and_not_shown_again(
    world: LocalWorld, tmp_path: Path
) -> None:
    for code, credentials in strangers(world, tmp_path).items():
        bundle = world.keyring.authority.bundle_pem
        shown = Credentials(credentials.key_pem, credentials.chain_pem, bundle)
        error = refusal(partial(Connection.open, world.socket_path, shown, NODE, NEVER))
        assert (error.code, error.retryable) == (code.strip(), False)
    assert_only_ours_are_served(world)


def test_a_client_of_another_authority_does_not_believe_the_server(
    world: LocalWorld, tmp_path: Path
) -> None:
    alone = Keyring(tmp_path / "other").credentials(HOLDER)
    ours = world.keyring.credentials(HOLDER)
    mixed = Credentials(ours.key_pem, ours.chain_pem, alone.bundle_pem)
    assert refusal(lambda: world.local(credentials=mixed).Read(REQUEST, timeout=5)).code == (
        "IDENTITY"
    )
    assert_only_ours_are_served(world)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_a_client_of_another_user_is_hung_up_on_though_the_folder_were_open(
    world: LocalWorld,
) -> None:
    world.folder.chmod(0o711)
    os.chmod(world.socket_path, 0o666)

    def heard_as(uid: int) -> int:
        """0: hung up on; 1: listened to; 2: something else went wrong."""
        child = os.fork()
        if child == 0:
            status = 2
            try:
                os.chdir(world.folder)  # while we may pass through the folders above
                os.setgroups([])
                os.setuid(uid)
                with socket.socket(socket.AF_UNIX) as line:
                    line.settimeout(0.3)
                    line.connect("n.t")
                    status = 0 if line.recv(1) == b"" else 2
            except TimeoutError:
                status = 1
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert heard_as(NOBODY_UID) == 0
    assert heard_as(0) == 1
    assert_only_ours_are_served(world)


# Frames -------------------------------------------------------------------------------------


def frame(length: int, stream: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">IIBB", length, stream, kind, 0) + data


BROKEN = {
    "a frame of more than 4 MiB": frame((4 << 20) + 1, 5, 1),
    "an even stream": frame(len(READ), 6, 1, READ),
    "a stream that was there before": frame(len(READ), 3, 1, READ),
    "the answer to nothing": frame(0, 5, 2),
    "a kind that there is not": frame(0, 5, 9),
    "an envelope that is none": frame(4, 5, 1, b"\xff\xff\xff\xff"),
    "half a header": b"\0\0\0",
    "half a frame": frame(100, 5, 1, b"half"),
    "plain text": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("is_proved", [True, False], ids=["proved", "unproved"])
def test_what_is_no_frame_ends_its_connection_in_time_and_no_other(
    world: LocalWorld, data: bytes, is_proved: bool
) -> None:
    ours = world.keyring.credentials(HOLDER) if is_proved else None
    with RawClient(world.socket_path, ours) as raw:
        raw.sock.sendall(data)
        assert_only_ours_are_served(world)
        assert raw.ends_within(1.5)
    assert_only_ours_are_served(world)


def test_who_proves_nobody_has_a_fixed_time_whatever_he_sends(world: LocalWorld) -> None:
    def hello(stream: int) -> bytes:
        return frame(100, stream, 1)

    with RawClient(world.socket_path) as silent, RawClient(world.socket_path) as trickling:
        assert_only_ours_are_served(world)
        data = hello(1)
        for at in range(len(data)):
            trickling.sock.sendall(data[at : at + 1])
            if trickling.ends_within(0.1):
                break
        assert at < len(data) - 1
        assert silent.ends_within(0.5)
    assert_only_ours_are_served(world)


def test_two_hundred_silent_clients_are_hung_up_on_and_others_served(world: LocalWorld) -> None:
    silent = [RawClient(world.socket_path) for _ in range(200)]
    assert_only_ours_are_served(world)
    for each in silent:
        assert each.ends_within(2)
        each.close()
    assert_only_ours_are_served(world)


def test_a_frame_that_trickles_in_has_a_fixed_time_too(world: LocalWorld) -> None:
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        data = frame(1_000, 5, 1, bytes(1_000))
        for at in range(20):
            raw.sock.sendall(data[at : at + 1])
            if raw.ends_within(0.1):
                break
        assert at < 15


def test_a_message_over_the_limit_is_refused_and_the_connection_goes_on(
    world: LocalWorld,
) -> None:
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        for stream, size in ((5, 256 * 1024 + 1), (7, 300_000), (9, 4_000_000)):
            raw.request(stream, "Write", bytes(size))
            assert raw.code() == "MESSAGE_SIZE"
        raw.request(11, "Read", READ)
        assert raw.code() == ""
        raw.request(13, "WriteStream", b"", flags=2)
        raw.send(13, 3, node_pb2.WriteRequest(lease_id="a" * 32, length=1).SerializeToString())
        raw.send(13, 3, bytes(300_000), flags=0)  # not the quiet end of a stream
        raw.send(13, 3, b"", flags=5)
        assert raw.code() == "MESSAGE_SIZE"
    stub = world.local()
    large = node_pb2.WriteRequest(lease_id="a" * 32, epoch=1, data=bytes(5 << 20))
    for _ in range(2):
        assert refusal(lambda: stub.Write(large, timeout=5)).code == "MESSAGE_SIZE"
    assert refusal(lambda: stub.WriteStream(iter([large]), timeout=5)).code == "MESSAGE_SIZE"
    chunk = node_pb2.WriteRequest(lease_id="a" * 32, epoch=1, data=bytes(192 * 1024), length=1)
    assert stub.Write(chunk, timeout=5).written == 1


def test_a_flood_for_one_stream_waits_outside_and_others_are_served(world: LocalWorld) -> None:
    entered, release = threading.Event(), threading.Event()
    world.node.behaviour = lambda request, context: wait_for(entered, release)
    writing = node_pb2.WriteRequest(lease_id="a" * 32, epoch=7, data=bytes(100_000), length=1)
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        raw.request(5, "WriteStream", b"", flags=2)
        raw.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while len(raw.said) < 100:
                raw.send(5, 3, writing.SerializeToString())
        assert len(raw.said) < 20
        assert entered.is_set()
        release.set()
        world.node.behaviour = lambda request, context: None
        assert world.local().Read(REQUEST, timeout=5).data == b"read"


def test_a_flood_for_streams_that_are_not_there_is_thrown_away(world: LocalWorld) -> None:
    with RawClient(world.socket_path, world.keyring.credentials(HOLDER)) as raw:
        for stream in range(1, 400, 2):
            raw.send(stream, 3, b"x" * 1_000)
        raw.request(5, "Read", READ)
        assert raw.code() == ""


ANYTHING = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ANYTHING
@given(data=st.binary(max_size=200))
def test_random_bytes_reach_nobody(world: LocalWorld, data: bytes) -> None:
    with RawClient(world.socket_path) as raw:
        raw.sock.sendall(data)
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.ends_within(2)
    assert world.node.calls == []


@ANYTHING
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.5, 0.05, 0.005]))
def test_a_conversation_with_bytes_changed_reaches_a_handler_after_its_greeting_alone(
    world: LocalWorld, seed: int, share: float
) -> None:
    dice = random.Random(seed)

    def changed(data: bytes) -> bytes:
        return bytes(dice.randrange(256) if dice.random() < share else byte for byte in data)

    ours = world.keyring.credentials(HOLDER)
    before = len(world.node.calls)
    with RawClient(world.socket_path) as raw:
        said = ttrpc_pb2.LocalHelloRequest(version=1, nonce=b"n" * 32, chain_pem=ours.chain_pem)
        envelope = ttrpc_pb2.TtrpcRequest(
            service=LOCAL_SERVICE, method="Hello", payload=said.SerializeToString()
        ).SerializeToString()
        raw.sock.sendall(changed(frame(len(envelope), 1, 1, envelope)))
        reading = ttrpc_pb2.TtrpcRequest(
            service="grafos.v1.NodeService", method="Read", payload=READ, timeout_nano=10**9
        ).SerializeToString()
        with contextlib.suppress(BrokenPipeError):  # it has hung up already
            raw.sock.sendall(frame(len(reading), 3, 1, reading))
        assert raw.ends_within(2)
    assert len(world.node.calls) == before
    with RawClient(world.socket_path, ours) as raw:
        raw.sock.sendall(changed(frame(len(reading), 5, 1, reading)))
        raw.sock.shutdown(socket.SHUT_WR)
        assert raw.ends_within(2)
    world.node.calls.clear()
    assert world.local(credentials=ours).Read(REQUEST, timeout=5).data == b"read"
    world._peers.pop().close()
    world.node.calls.clear()
