"""The front as holders meet it: a real process, over TLS and over the hand-over socket.

The test is its control: it opens and shuts leases over the link and answers what is passed on.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grafos_core import failure
from grafos_core.failure import Denied, FabricError, Fenced, Incompatible, LeaseExpired, Revoked
from grafos_core.spiffe import holder_of_process
from grafos_proto.v1 import node_pb2
from grafos_proto.wire import failures
from grafos_proto.wire.credentials import Credentials
from services.nodeagent.children import Child, spawn
from services.nodeagent.devices.block import BlockDevice
from services.nodeagent.devices.blocklease import BlockIdentity, create_tags, new_key
from services.nodeagent.devices.memory import MemoryDevice
from services.nodeagent.frontdesk import failure_message
from services.nodeagent.gatepage import CellState, GatePage
from services.nodeagent.ipc import Message
from services.runtime.clock import SYSTEM
from tests.services.nodeagent.fabric import (
    CALL_S,
    NODE,
    TRUST_DOMAIN,
    HolderSide,
    People,
    eventually,
    write_request,
)

CHUNK = 192 * 1024
INCARNATION = "ab" * 16
DEVICE_BLOCKS = 64
SLOW_MS = 200
"""Less than a shut waits for what is in flight."""
Answer = Callable[[Message], dict[str, Any]]


class Lease:
    """A slip with what `HolderSide` needs of a token."""

    def __init__(self, slot: int, epoch: int = 7) -> None:
        self.lease_id, self.epoch, self.slot = secrets.token_hex(16), epoch, slot


class FrontUnderTest:
    """The process, its gate page, and the test in the place of control."""

    def __init__(self, folder: Path, people: People, *flags: str) -> None:
        self.people, self.folder, self.flags = people, folder, flags
        self.gate = GatePage.create(16)
        self.memory = MemoryDevice(1 << 26, headroom_bytes=0)
        self.heard: list[Message] = []
        self.answers: dict[str, Answer] = {}
        self.endpoint = ""
        people.save(NODE, folder / "identity")
        self.child = self._spawn()
        threading.Thread(target=self.child.link.serve, args=[self._hear], daemon=True).start()
        self.child.link.send({"op": "serve"})
        eventually(lambda: self.endpoint)

    def close(self) -> None:
        self.child.kill()
        self.child.close()
        self.gate.close()

    def _spawn(self) -> Child:
        arguments = [
            "--parent", str(os.getpid()), "--gate", str(self.gate.fd), "--listen", "127.0.0.1:0",
            "--identity-dir", str(self.folder / "identity"),
            "--handover", str(self.folder / "f" / "h.sock"),
            "--block-file", str(self.folder / "blocks"),
            "--block-bytes", str(DEVICE_BLOCKS * 4096), "--log-level", "error", *self.flags,
        ]  # fmt: skip
        module = "services.nodeagent.front"
        return spawn(module, arguments, [self.gate.fd], SYSTEM.boot_ms())

    def _hear(self, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        self.heard.append(message)
        if message["op"] == "ready":
            self.endpoint = message["endpoint"]
        elif "id" in message:
            self.child.link.reply(message, self.answers[message["op"]](message))

    def open(
        self, holder: Credentials, *, slot: int = 1, size_bytes: int = 65_536, **changes: Any
    ) -> Lease:
        """A memory lease, open for a minute."""
        lease = Lease(slot)
        fd = self.memory.create(lease.lease_id, INCARNATION, size_bytes)
        self.put(lease, holder, [fd], size_bytes=size_bytes, **changes)
        self.fd = fd
        return lease

    def open_block(self, holder: Credentials, *, slot: int = 2, blocks: int = 8) -> Lease:
        lease = Lease(slot)
        identity = BlockIdentity(INCARNATION, lease.lease_id, lease.epoch, 1, 4, blocks)
        fields = {"extent_offset": 4, "extent_blocks": blocks, "key": bytes(new_key())}
        fields |= {"key_number": 1, "incarnation": INCARNATION, "kind": "block"}
        tags = create_tags(identity)
        self.put(lease, holder, [tags], size_bytes=blocks * 4096, descriptor=False, **fields)
        return lease

    def put(self, lease: Lease, holder: Credentials, fds: list[int], **changes: Any) -> None:
        deadline_ms = changes.get("deadline_ms", SYSTEM.boot_ms() + 60_000)
        self.write_cells(lease, CellState.OPEN, deadline_ms)
        plain = {
            "op": "open", "lease": lease.lease_id, "slot": lease.slot, "epoch": lease.epoch,
            "generation": 1, "kind": "mem", "holder_key": holder.thumbprint,
            "deadline_ms": deadline_ms, "descriptor": True, "session": "", "ops": ["read", "write"],
            "handed": False,
        }  # fmt: skip
        answer, _ = self.child.link.request({**plain, **changes}, fds, 5_000)
        assert answer["op"] == "opened"

    def write_cells(self, lease: Lease, state: CellState, deadline_ms: int) -> None:
        cell = (lease.slot, state, lease.epoch, deadline_ms * 1_000_000)
        self.gate.write_control(*cell, bytes.fromhex(lease.lease_id))
        self.gate.write_warden(*cell, bytes.fromhex(lease.lease_id))

    def shut(self, lease: Lease, holder: Credentials, cause: FabricError | None) -> Message:
        told = {"failure": failure_message(cause)} if cause else {}
        fields = {"op": "shut", "lease": lease.lease_id, "holder_key": holder.thumbprint}
        return self.child.link.request({**fields, **told}, timeout_ms=5_000)[0]

    def ops(self, op: str) -> list[Message]:
        return [message for message in self.heard if message["op"] == op]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontUnderTest]:
    folder = tmp_path_factory.mktemp("f")
    BlockDevice(folder / "blocks", DEVICE_BLOCKS * 4096).close()
    running = FrontUnderTest(folder, People(folder))
    yield running
    running.close()


@pytest.fixture
def front(started: FrontUnderTest) -> FrontUnderTest:
    """The one front of all these tests, which has heard nothing yet."""
    started.heard = []
    started.answers = {}
    return started


@pytest.fixture
def alice(front: FrontUnderTest) -> Iterator[HolderSide]:
    holder = HolderSide(front.endpoint, front.people.holder())
    yield holder
    holder.close()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontUnderTest]:
    """A front that waits a little between an operation's bytes and its answer."""
    folder = tmp_path_factory.mktemp("s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFOS_FAULT", f"front.read:hang={SLOW_MS},front.write:hang={SLOW_MS}")
        running = FrontUnderTest(folder, People(folder), "--development")
    yield running
    running.close()


def refused(code: str, kind: type[FabricError] = FabricError) -> Any:
    return pytest.raises(kind, match=code_pattern(code))


def code_pattern(code: str) -> str:
    import re

    return re.escape(failure.CODES[code].message)


class TestBytes:
    def test_what_is_written_is_read_with_its_checksum(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials)
        written = alice.write(lease, 100, b"hello")
        answer = alice.read(lease, 98, 9)
        assert (written.written, answer.data) == (5, b"\0\0hello\0\0")
        assert answer.checksum == zlib.crc32(answer.data)
        assert 59_000 < answer.remaining_ms <= 60_000

    def test_blocks_are_written_and_read_in_whole_blocks(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open_block(alice.credentials)
        data = secrets.token_bytes(8192)
        alice.write(lease, 4096, data, flush=True)
        assert alice.read(lease, 0, 12_288).data == bytes(4096) + data
        on_disk = (front.folder / "blocks").read_bytes()
        assert data[:4096] not in on_disk, "only ciphertext reaches the disk"
        with refused("EXTENT", Incompatible):
            alice.read(lease, 100, 4096)
        with refused("EXTENT", Incompatible):
            alice.write(lease, 0, b"x" * 100)

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(65_536, 1), (65_535, 2), (2**64 - 1, 1), (0, 65_537), (2**64 - 1, 2**17)],
    )
    def test_d1_an_operation_outside_the_lease_is_out_of_range(
        self, front: FrontUnderTest, alice: HolderSide, offset: int, length: int
    ) -> None:
        lease: Any = front.open(alice.credentials)
        with refused("EXTENT", Incompatible):
            alice.read(lease, offset, length)
        with refused("EXTENT", Incompatible):
            alice.write(lease, offset, bytes(min(length, CHUNK)))

    def test_the_last_byte_and_an_empty_read_at_the_end_are_inside(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials)
        assert alice.read(lease, 65_535, 1).data == b"\0"
        assert alice.read(lease, 65_536, 0).data == b""

    def test_d1_lengths_beyond_a_chunk_are_refused_before_anything_is_read(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials, size_bytes=1 << 20)
        with refused("CHUNK", Incompatible):
            alice.read(lease, 0, 2**63)
        assert len(alice.read(lease, 0, CHUNK).data) == CHUNK

    def test_d2_a_payload_that_is_not_as_announced_changes_nothing(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials, size_bytes=1 << 20)
        with refused("LENGTH", Incompatible):
            alice.write(lease, 0, b"abc", length=4)
        with refused("CHECKSUM", Incompatible):
            alice.write(lease, 0, b"abc", has_checksum=True, checksum=1)
        with refused("CHUNK", Incompatible):
            alice.write(lease, 0, bytes(CHUNK + 1))
        assert alice.read(lease, 0, 8).data == bytes(8)
        alice.write(lease, 0, b"abc", has_checksum=True, checksum=zlib.crc32(b"abc"))
        assert alice.read(lease, 0, 3).data == b"abc"

    def test_a_token_that_allows_reading_alone_does_not_write(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials, ops=["read"])
        assert alice.read(lease).data == bytes(16)
        with refused("SCOPE", Denied):
            alice.write(lease, 0, b"x")

    def test_streams_carry_more_than_a_chunk(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials, size_bytes=1 << 20)
        data = secrets.token_bytes(1 << 20)
        starts = [*range(0, 1 << 20, CHUNK), 1 << 20]
        parts = (write_request(lease, at, data[at : at + CHUNK]) for at in starts)
        assert alice.call("WriteStream", parts).written == 1 << 20
        request = node_pb2.ReadRequest(
            lease_id=lease.lease_id, epoch=lease.epoch, offset=0, length=1 << 20
        )
        answers = list(alice.stub.ReadStream(request, timeout=CALL_S))
        assert b"".join(answer.data for answer in answers) == data

    @pytest.mark.parametrize(
        ("parts", "code"),
        [
            ([], "EMPTY"),
            ([(0, b"x")], "INVALID"),
            ([(0, b"x"), (1, b""), (1, b"y")], "INVALID"),
            ([(0, b"x"), (1, b""), (1, b"")], "INVALID"),
            ([(0, b"x"), (2, b"y"), (3, b"")], "EXTENT"),
        ],
    )
    def test_t28_a_stream_without_its_last_message_has_written_nothing(
        self, front: FrontUnderTest, alice: HolderSide, parts: list[tuple[int, bytes]], code: str
    ) -> None:
        lease: Any = front.open(alice.credentials)
        with refused(code, Incompatible):
            alice.call("WriteStream", iter([write_request(lease, *part) for part in parts]))
        assert alice.read(lease, 0, 8).data == bytes(8)

    def test_t28_a_write_stream_that_breaks_off_has_written_nothing(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials, size_bytes=1 << 20)
        go_on = threading.Event()

        def parts() -> Iterator[node_pb2.WriteRequest]:
            yield write_request(lease, 0, b"x" * CHUNK)
            yield write_request(lease, CHUNK, b"x" * CHUNK)
            go_on.wait(CALL_S)

        call = alice.stub.WriteStream.future(parts(), timeout=CALL_S)
        eventually(lambda: call.running())
        call.cancel()
        go_on.set()
        assert alice.read(lease, 0, CHUNK).data == bytes(CHUNK)
        assert alice.write(lease, 0, b"still mine").written == 10


class TestTheGate:
    def test_nobody_elses_lease_is_as_one_that_never_was(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials)
        mallory = HolderSide(front.endpoint, front.people.holder("mallory"))
        unknown: Any = Lease(1)
        for target in (lease, unknown):
            with refused("NOT_FOUND", Denied) as refusal:
                mallory.read(target)
            assert refusal.value.fields()["detail"] == ""
        mallory.close()

    def test_another_epoch_is_stale_and_none_is_out_of_range(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials)
        lease.epoch = 6
        with refused("EPOCH_STALE", Fenced):
            alice.read(lease)
        lease.epoch = 0
        with refused("EPOCH_RANGE", Incompatible):
            alice.read(lease)

    def test_one_closed_cell_of_two_ends_all_access(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials)
        front.gate.close_warden(lease.slot)
        with pytest.raises(Fenced):
            alice.read(lease)
        assert os.pread(front.fd, 1, 0) == b"\0"
        with pytest.raises(Fenced):
            alice.write(lease, 0, b"x")
        assert os.pread(front.fd, 1, 0) == b"\0", "the write has not taken effect"

    def test_the_deadline_in_the_page_counts_whatever_control_does(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials, deadline_ms=SYSTEM.boot_ms() + 300)
        assert alice.read(lease).data == bytes(16)
        eventually(lambda: SYSTEM.boot_ms() > 0 and expired(alice, lease), 2)

    @pytest.mark.parametrize(
        "cause",
        [
            failure.of("REVOKED", cause="preempted"),
            failure.of("LEASE_EXPIRED"),
            failure.of("LEASE_RELEASED"),
            failure.of("AGENT_LOST"),
        ],
        ids=lambda cause: str(cause.code),
    )
    def test_whoever_comes_after_the_end_is_told_its_cause(
        self, front: FrontUnderTest, alice: HolderSide, cause: FabricError
    ) -> None:
        lease: Any = front.open(alice.credentials)
        front.gate.close_control(lease.slot)
        assert front.shut(lease, alice.credentials, cause)["in_flight"] == 0
        with pytest.raises(type(cause)) as told:
            alice.read(lease)
        assert (told.value.code, told.value.cause) == (cause.code, cause.cause)
        mallory = HolderSide(front.endpoint, front.people.holder("mallory"))
        with refused("NOT_FOUND", Denied):
            mallory.read(lease)
        mallory.close()

    def test_an_operation_that_meets_the_closed_gate_first_waits_for_the_cause(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease: Any = front.open(alice.credentials)
        front.gate.close_control(lease.slot)
        timer = threading.Timer(0.05, front.shut, [lease, alice.credentials, failure.of("REVOKED")])
        timer.start()
        with pytest.raises(Revoked):
            alice.read(lease)
        timer.join()

    @pytest.mark.parametrize("operation", ["read", "write"])
    def test_a_lease_that_ends_between_the_bytes_and_the_answer_gives_none_and_confirms_none(
        self, slow: FrontUnderTest, operation: str
    ) -> None:
        holder = HolderSide(slow.endpoint, slow.people.holder())
        lease: Any = slow.open(holder.credentials)
        os.pwrite(slow.fd, b"secret", 0)

        def end() -> None:
            eventually(lambda: slow.gate.in_flight(lease.slot) == 1)
            if operation == "write":
                eventually(lambda: os.pread(slow.fd, 6, 0) == b"stolen")
            else:
                threading.Event().wait(SLOW_MS / 4000)
            slow.gate.close_control(lease.slot)
            slow.shut(lease, holder.credentials, failure.of("REVOKED", cause="preempted"))

        ending = threading.Thread(target=end)
        ending.start()
        call = (lambda: holder.read(lease)) if operation == "read" else (
            lambda: holder.write(lease, 0, b"stolen")
        )  # fmt: skip
        with pytest.raises(Revoked):
            call()
        ending.join()
        holder.close()

    def test_a_lease_that_was_shut_frees_its_descriptors(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        before = open_files(front)
        lease: Any = front.open(alice.credentials)
        assert open_files(front) == before + 1
        front.gate.close_control(lease.slot)
        front.shut(lease, alice.credentials, failure.of("LEASE_RELEASED"))
        assert open_files(front) == before


class TestPassedOn:
    def test_a_bind_goes_to_control_with_the_callers_own_name_and_key(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        front.answers["bind"] = lambda message: {
            "lease_id": "ab" * 16, "epoch": 3, "generation": 1, "remaining_ms": 5_000,
            "size_bytes": 4096, "block_bytes": 0, "descriptor": True, "direct_io": "",
        }  # fmt: skip
        answer = alice.bind("a.b.c")
        (question,) = front.ops("bind")
        assert question["peer"] == str(alice.credentials.identity)
        assert question["peer_key"] == alice.credentials.thumbprint
        assert question["session"] == f"{alice.credentials.thumbprint}:{alice.session}"
        assert (answer.remaining_ms, len(answer.handover_secret)) == (5_000, 16)

    def test_controls_refusal_arrives_as_it_was_made(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        refusal = failure.of("SLOT_BUSY", lease_id="ab" * 16, epoch=4)
        front.answers["bind"] = lambda message: {"failure": failure_message(refusal)}
        with pytest.raises(Fenced) as told:
            alice.bind("a.b.c")
        assert told.value == refusal

    def test_a_mutating_call_without_a_deadline_is_refused(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        with refused("DEADLINE_REQUIRED", Incompatible), failures.status_to_failures():
            alice.stub.Bind(node_pb2.BindRequest(token="a.b.c", session=alice.session))


class TestIdentity:
    def test_a_renewed_certificate_is_shown_without_a_restart(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        before = shown_by(front.endpoint)
        front.people.save(NODE, front.folder / "identity")
        assert shown_by(front.endpoint) != before
        assert front.child.process.poll() is None


class TestSessions:
    def test_notices_reach_the_session_and_its_end_is_told(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        name = f"{alice.credentials.thumbprint}:{alice.session}"
        stream = alice.notices()
        eventually(lambda: name in [each["session"] for each in front.ops("session_back")])
        cause = failure_message(failure.of("REVOKED", cause="operator"))
        front.child.link.send(
            {"op": "notice", "session": name, "lease": "ab" * 16, "kind": "revoked",
             "reason": "maintenance", "grace_ms": 0, "failure": cause}
        )  # fmt: skip
        notice = next(each for each in stream if each.lease_id)
        assert (notice.kind, notice.reason, notice.failure.failure) == (
            "revoked", "maintenance", "Revoked",
        )  # fmt: skip
        stream.cancel()  # type: ignore[attr-defined]
        eventually(lambda: name in [each["session"] for each in front.ops("session_lost")])

    def test_a_session_is_another_one_under_another_key(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        stream = alice.notices()
        mallory = HolderSide(front.endpoint, front.people.holder("mallory"))
        mallory.session = alice.session
        other = mallory.notices()
        names = {f"{each.credentials.thumbprint}:{alice.session}" for each in (alice, mallory)}
        eventually(lambda: names <= {each["session"] for each in front.ops("session_back")})
        for each in (stream, other):
            each.cancel()  # type: ignore[attr-defined]
        mallory.close()


class TestHandover:
    def bound(self, front: FrontUnderTest, holder: HolderSide, **changes: Any) -> tuple[Any, bytes]:
        lease: Any = front.open(holder.credentials, **changes)
        front.answers["bind"] = lambda message: {
            "lease_id": lease.lease_id, "epoch": lease.epoch, "generation": 1,
            "remaining_ms": 5_000, "size_bytes": 65_536, "block_bytes": 0, "descriptor": True,
            "direct_io": "",
        }  # fmt: skip
        front.answers["holder"] = lambda message: {}
        return lease, holder.bind("a.b.c").handover_secret

    def test_who_has_come_before_is_sent_the_descriptor_before_the_answer(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        _, secret = self.bound(front, alice)
        with arrived(front) as sock:
            os.close(present(sock, secret, alice.session)[1][0])
            lease, _ = self.bound(front, alice, handed=True)
            answer = alice.bind("a.b.c", push=True)
            assert (answer.pushed, answer.handover_secret) == (True, b"")
            packet, fds, _, _ = socket.recv_fds(sock, 4_096, 4, socket.MSG_DONTWAIT)
            pushed = {"v": 1, "lease_id": lease.lease_id, "descriptor": True}
            assert json.loads(packet) == pushed
            os.pwrite(fds[0], b"sent", 0)
            assert alice.read(lease, 0, 4).data == b"sent"
            assert len(front.ops("holder")) == 1, "control counted it when it opened the lease"
            os.close(fds[0])

    @pytest.mark.parametrize("why", ["he did not ask", "control does not know him", "he is gone"])
    def test_otherwise_he_gets_a_secret(
        self, front: FrontUnderTest, alice: HolderSide, why: str
    ) -> None:
        _, secret = self.bound(front, alice)
        with arrived(front) as sock:
            os.close(present(sock, secret, alice.session)[1][0])
            if why == "he is gone":
                sock.close()
                eventually(lambda: front.ops("session_lost"))
            lease, _ = self.bound(front, alice, handed=why != "control does not know him")
            answer = alice.bind("a.b.c", push=why != "he did not ask")
            assert (answer.pushed, len(answer.handover_secret)) == (False, 16)
            if why != "he is gone":
                told, fds = present(sock, answer.handover_secret, alice.session)
                assert told["lease_id"] == lease.lease_id
                os.close(fds[0])

    def test_who_takes_nothing_in_is_not_waited_for(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        _, secret = self.bound(front, alice)
        with arrived(front) as sock:
            os.close(present(sock, secret, alice.session)[1][0])
            self.bound(front, alice, handed=True)
            answers = [alice.bind("a.b.c", push=True).pushed for _ in range(1_000)]
            assert answers[0]
            assert not answers[-1]
            assert not any(answers[answers.index(False) :])

    def test_the_secret_yields_the_memory_itself(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease, secret = self.bound(front, alice)
        with arrived(front) as sock:
            answer, fds = present(sock, secret, alice.session)
            assert answer == {"v": 1, "lease_id": lease.lease_id, "descriptor": True}
            os.pwrite(fds[0], b"by hand", 0)
            assert alice.read(lease, 0, 7).data == b"by hand"
            (told,) = front.ops("holder")
            assert (told["lease"], told["exported"]) == (lease.lease_id, True)
            assert os.stat(f"/proc/self/fd/{fds[0]}").st_ino == os.fstat(front.fd).st_ino
            os.close(fds[0])
        eventually(lambda: front.ops("session_lost"))

    def test_k15b_a_secret_is_good_once(self, front: FrontUnderTest, alice: HolderSide) -> None:
        _, secret = self.bound(front, alice)
        with arrived(front) as sock, arrived(front) as second:
            os.close(present(sock, secret, alice.session)[1][0])
            answer, fds = present(second, secret, alice.session)
            assert (answer["failure"]["code"], fds) == ("HOLDER_MISMATCH", [])
            assert second.recv(100) == b"", "and the connection is closed"

    def test_k15b_a_fresh_secret_for_a_lease_makes_the_one_before_it_void(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        lease, lost = self.bound(front, alice)
        secret = alice.bind("a.b.c").handover_secret
        assert secret != lost
        with arrived(front) as sock, arrived(front) as second:
            answer, fds = present(sock, lost, alice.session)
            assert (answer["failure"]["code"], fds) == ("HOLDER_MISMATCH", [])
            answer, fds = present(second, secret, alice.session)
            assert answer["lease_id"] == lease.lease_id
            os.close(fds[0])

    def test_k15b_another_users_secret_is_refused(self, front: FrontUnderTest) -> None:
        named = holder_of_process(TRUST_DOMAIN, uid=os.getuid() + 1, pid=1, start_ticks=1)
        other = HolderSide(front.endpoint, front.people.make(named))
        _, secret = self.bound(front, other)
        with arrived(front) as sock:
            answer, fds = present(sock, secret, other.session)
            assert (answer["failure"]["class"], fds) == ("Denied", [])
        assert not front.ops("holder")
        other.close()

    def test_a_secret_is_for_the_session_that_bound(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        _, secret = self.bound(front, alice)
        with arrived(front) as sock:
            assert "failure" in present(sock, secret, secrets.token_hex(16))[0]

    def test_an_isolated_lease_is_never_handed_out(
        self, front: FrontUnderTest, alice: HolderSide
    ) -> None:
        _, secret = self.bound(front, alice, descriptor=False)
        with arrived(front) as sock:
            answer, fds = present(sock, secret, alice.session)
            assert (answer["descriptor"], fds) == (False, [])
        assert front.ops("holder")[0]["exported"] is False

    @pytest.mark.parametrize("packet", [b"{}", b"[]", b"x" * 2_000, b'{"v":1}', b"\xff\xfe"])
    def test_words_that_mean_nothing_end_the_connection(
        self, front: FrontUnderTest, packet: bytes
    ) -> None:
        with arrived(front) as sock:
            sock.send(packet)
            assert json.loads(sock.recv(4_096))["failure"]["code"] == "INVALID"
            assert sock.recv(100) == b""


def shown_by(endpoint: str) -> str:
    """The certificate that a listener shows to whoever comes."""
    host, _, port = endpoint.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=CALL_S)


def arrived(front: FrontUnderTest) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(CALL_S)
    sock.connect(str(front.folder / "f" / "h.sock"))
    return sock


def present(sock: socket.socket, secret: bytes, session: str) -> tuple[dict[str, Any], list[int]]:
    sock.send(json.dumps({"v": 1, "secret": secret.hex(), "session": session}).encode())
    packet, fds, _, _ = socket.recv_fds(sock, 4_096, 4)
    return json.loads(packet), fds


def expired(holder: HolderSide, lease: Any) -> bool:
    try:
        holder.read(lease)
    except LeaseExpired:
        return True
    return False


def open_files(front: FrontUnderTest) -> int:
    """Memory of leases in the front's hands."""
    folder = Path(f"/proc/{front.child.pid}/fd")
    links = [os.readlink(each) for each in folder.iterdir() if each.is_symlink()]
    return sum("grafos:" in link for link in links)
