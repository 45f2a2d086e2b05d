"""The data port whole: who may come, what he may touch, and what he gets when a lease ends."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grafos._authority import Authority
from grafos_core import failure
from grafos_core.failure import Denied, FabricError
from grafos_core.spiffe import Identity, Role
from grafos_proto.wire import certificates
from grafos_proto.wire import dataframes as frames
from grafos_proto.wire.credentials import Credentials
from grafos_proto.wire.dataframes import DATA, NOTICE, READ, REFUSAL, WRITE
from services.nodeagent import dataport, dataport_line
from services.nodeagent.datapath import OpenLease
from services.nodeagent.sessions import News, session_key
from tests.services.nodeagent.dataport_rig import DOMAIN, EPOCH, SIZE, Caller, Rig, Shelf

SECRET = b"a dead lease's bytes"


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


@pytest.fixture
def alice(rig: Rig) -> Credentials:
    return rig.holder()


@pytest.fixture
def lease(rig: Rig, alice: Credentials) -> OpenLease:
    return rig.lease(alice)


@pytest.fixture
def caller(rig: Rig, alice: Credentials, lease: OpenLease) -> Iterator[Caller]:
    made = rig.connect(alice).hello().open(lease)
    yield made
    made.close()


def shelf(lease: OpenLease) -> Shelf:
    assert isinstance(lease.storage, Shelf)
    return lease.storage


class TestOperations:
    def test_many_requests_are_sent_at_once_and_answered_in_their_order(
        self, caller: Caller
    ) -> None:
        caller.send(
            frames.request(WRITE, 0, 7, offset=8, count=5, payload=b"hello"),
            frames.request(READ, 0, 8, offset=6, count=8),
            frames.request(frames.ADD, 0, 9, offset=64, payload=frames.WORD.pack(5)),
            frames.request(frames.ADD, 0, 9, offset=64, payload=frames.WORD.pack(2**64 - 1)),
            frames.request(frames.SWAP, 0, 1, offset=64, payload=frames.WORDS.pack(4, 99)),
            frames.request(frames.SWAP, 0, 2, offset=64, payload=frames.WORDS.pack(4, 77)),
            frames.request(READ, 0, 3, offset=64, count=8),
            frames.request(frames.FLUSH, 0, 4),
        )
        word = frames.WORD.pack
        assert [caller.hear() for _ in range(8)] == [
            (DATA, 7, b""),
            (DATA, 8, b"\0\0hello\0"),
            (DATA, 9, word(0)),
            (DATA, 9, word(5)),
            (DATA, 1, word(4)),
            (DATA, 2, word(99)),
            (DATA, 3, word(99)),
            (DATA, 4, b""),
        ]

    def test_many_parts_travel_in_one_frame(self, caller: Caller) -> None:
        table = frames.PART.pack(0, 3) + frames.PART.pack(4096, 2)
        answer = caller.ask(frames.WRITE_MANY, 0, 1, count=2, payload=table + b"abcde")
        assert answer == (DATA, 1, b"")
        backwards = frames.PART.pack(4096, 2) + frames.PART.pack(0, 4)
        assert caller.ask(frames.READ_MANY, 0, 2, payload=backwards) == (DATA, 2, b"deabc\0")

    @pytest.mark.parametrize("length", [0, 65_535, 65_536, 131_073, 1 << 20, 4 << 20])
    def test_any_length_up_to_four_mebibytes(self, caller: Caller, length: int) -> None:
        data = os.urandom(length)
        request = frames.request(WRITE, 0, 1, offset=SIZE - length, count=length, payload=data)
        sender = threading.Thread(target=caller.send, args=[request])
        sender.start()
        assert caller.hear() == (DATA, 1, b"")
        sender.join()
        assert caller.ask(READ, 0, 2, offset=SIZE - length, count=length) == (DATA, 2, data)

    @pytest.mark.parametrize(
        ("request_", "code"),
        [
            (frames.request(READ, 0, 1, offset=SIZE, count=1), "EXTENT"),
            (frames.request(READ, 0, 1, offset=2**64 - 1, count=1), "EXTENT"),
            (frames.request(READ, 0, 1, offset=SIZE, count=1 << 20), "EXTENT"),
            (frames.request(READ, 0, 1, count=(4 << 20) + 1), "CHUNK"),
            (frames.request(READ, 0, 1, count=2**32 - 1), "CHUNK"),
            (frames.request(WRITE, 0, 1, offset=SIZE - 1, count=2, payload=b"ab"), "EXTENT"),
            (frames.request(WRITE, 0, 1, count=3, payload=b"ab"), "LENGTH"),
            (frames.request(WRITE, 0, 1, count=1 << 20, payload=b"ab"), "LENGTH"),
            (frames.request(READ, 0, 1, count=1, payload=b"x"), "LENGTH"),
            (frames.request(READ, 5, 1, count=1), "INVALID"),
            (frames.request(99, 0, 1), "INVALID"),
            (frames.request(frames.ADD, 0, 1, offset=4, payload=bytes(8)), "EXTENT"),
            (frames.request(frames.ADD, 0, 1, offset=SIZE, payload=bytes(8)), "EXTENT"),
            (frames.request(frames.SWAP, 0, 1, payload=bytes(8)), "LENGTH"),
            (frames.request(frames.READ_MANY, 0, 1, payload=bytes(13)), "LENGTH"),
            (frames.request(frames.READ_MANY, 0, 1, payload=bytes(12 * 4097)), "CHUNK"),
            (frames.request(frames.READ_MANY, 0, 1, payload=frames.PART.pack(SIZE, 1)), "EXTENT"),
            (frames.request(frames.WRITE_MANY, 0, 1, count=2, payload=bytes(12)), "LENGTH"),
            (frames.request(frames.WRITE_MANY, 0, 1, count=1, payload=bytes(13)), "LENGTH"),
            (frames.request(frames.OPEN, 0, 1, offset=EPOCH, payload=bytes(16)), "INVALID"),
            (frames.request(frames.OPEN, 1, 1, offset=EPOCH, payload=bytes(15)), "LENGTH"),
            (frames.request(frames.OPEN, 1, 1, offset=EPOCH, payload=bytes(16)), "NOT_FOUND"),
        ],
    )
    def test_d1_d2_what_does_not_fit_is_refused_and_the_connection_goes_on(
        self, caller: Caller, request_: bytes, code: str
    ) -> None:
        caller.send(request_, frames.request(READ, 0, 2, count=4))
        kind, tag, refused = caller.hear()
        assert (kind, tag, refused.code) == (REFUSAL, 1, code)
        assert caller.hear() == (DATA, 2, bytes(4))

    def test_a_part_outside_the_lease_is_refused_before_the_first_is_written(
        self, caller: Caller
    ) -> None:
        table = frames.PART.pack(0, 2) + frames.PART.pack(SIZE, 2)
        kind, _, refused = caller.ask(frames.WRITE_MANY, 0, 1, count=2, payload=table + b"abcd")
        assert (kind, refused.code) == (REFUSAL, "EXTENT")
        assert caller.ask(READ, 0, 2, count=2) == (DATA, 2, b"\0\0")

    def test_a_closed_handle_is_none_and_its_number_is_free(
        self, caller: Caller, lease: OpenLease
    ) -> None:
        assert caller.ask(frames.CLOSE, 0, 1) == (DATA, 1, b"")
        assert caller.ask(READ, 0, 2, count=1)[2].code == "INVALID"
        caller.open(lease)
        assert caller.ask(READ, 0, 3, count=1) == (DATA, 3, b"\0")


class TestRights:
    def test_anothers_lease_is_like_one_that_never_was(
        self, rig: Rig, caller: Caller, lease: OpenLease
    ) -> None:
        eve = rig.connect(rig.holder("eve")).hello()
        payload = bytes.fromhex(lease.lease_id)
        refused = eve.ask(frames.OPEN, 0, 1, offset=EPOCH, payload=payload)[2]
        unknown = eve.ask(frames.OPEN, 0, 1, offset=EPOCH, payload=bytes(16))[2]
        eve.close()
        assert refused == unknown
        assert refused.code == "NOT_FOUND"

    @pytest.mark.parametrize(("epoch", "code"), [(0, "EPOCH_RANGE"), (EPOCH + 1, "EPOCH_STALE")])
    def test_k16_k17_another_epoch_opens_nothing(
        self, caller: Caller, lease: OpenLease, epoch: int, code: str
    ) -> None:
        payload = bytes.fromhex(lease.lease_id)
        assert caller.ask(frames.OPEN, 1, 1, offset=epoch, payload=payload)[2].code == code

    def test_k19_what_the_token_does_not_allow_is_refused(
        self, rig: Rig, alice: Credentials, caller: Caller
    ) -> None:
        only_read = rig.lease(alice, 4096, ("read",))
        caller.open(only_read, 1)
        assert caller.ask(READ, 1, 1, count=1) == (DATA, 1, b"\0")
        word = frames.WORD.pack(1)
        for request in (
            frames.request(WRITE, 1, 2, count=1, payload=b"x"),
            frames.request(frames.ADD, 1, 2, payload=word),
            frames.request(frames.WRITE_MANY, 1, 2),
        ):
            caller.send(request)
            assert caller.hear()[2].code == "SCOPE"
        only_write = rig.lease(alice, 1 << 20, ("write",))
        caller.open(only_write, 2)
        for count in (1, 1 << 20):
            assert caller.ask(READ, 2, 3, count=count)[2].code == "SCOPE"

    def test_a_lease_that_another_holder_took_up_is_shut_for_the_former_one(
        self, rig: Rig, caller: Caller, lease: OpenLease
    ) -> None:
        import dataclasses

        bob = rig.holder("bob")
        rig.table.open(dataclasses.replace(lease, holder_key=bob.thumbprint, generation=2))
        assert caller.ask(READ, 0, 1, count=4)[2].code == "NOT_FOUND"

    def test_t1_a_stranger_to_the_fabric_is_not_greeted(self, rig: Rig, tmp_path: Path) -> None:
        other = Authority.init(tmp_path / "other", trust_domain=DOMAIN, now_ms=rig.clock.wall_ms())
        key = certificates.new_tls_key()
        who = Identity(DOMAIN, Role.HOLDER, "acme", "alice")
        chain = other.issue(key.public_key(), who, now_ms=rig.clock.wall_ms())
        with pytest.raises(Denied) as refused:
            rig.connect(Credentials(certificates.key_pem(key), chain, rig.authority.bundle_pem))
        assert refused.value.code == "IDENTITY"

    @pytest.mark.parametrize(
        ("who", "code"),
        [
            (Identity(DOMAIN, Role.SERVICE, None, "ledger"), "ROLE"),
            (Identity(DOMAIN, Role.HOLDER, "default", "uid-4294/7-1"), "HOLDER_MISMATCH"),
        ],
    )
    def test_only_holders_come_in_and_only_as_the_user_of_their_name(
        self, rig: Rig, who: Identity, code: str
    ) -> None:
        with pytest.raises(FabricError) as refused:
            rig.connect(rig.credentials(who))
        assert refused.value.code == code

    def test_t2_a_certificate_that_runs_out_is_noticed_at_the_next_request(
        self, rig: Rig, caller: Caller
    ) -> None:
        rig.clock.wall_skew_ms = 10 * 86_400_000
        rig.clock.boot_skew_ms = dataport_line.FRESH_MS + 1
        assert caller.ask(READ, 0, 5, count=4)[1:] == (5, failure.of("CERT_EXPIRED"))
        assert caller.is_over()

    def test_without_hello_nothing_is_done(self, rig: Rig, alice: Credentials) -> None:
        for request in (frames.request(READ, 0, 1), frames.request(frames.HELLO, 0, 1, count=9)):
            caller = rig.connect(alice)
            caller.send(request)
            assert caller.is_over()
            caller.close()


class TestTheEndOfALease:
    """P1 and P2 of what others suffer from: no byte of a dead lease, no effect after its end."""

    @pytest.mark.parametrize("count", [64, 1 << 20])
    def test_bytes_that_were_read_before_the_end_are_not_given_out_after_it(
        self, rig: Rig, caller: Caller, lease: OpenLease, count: int
    ) -> None:
        caller.ask(WRITE, 0, 1, count=len(SECRET), payload=SECRET)
        shelf(lease).meanwhile = lambda: rig.end(lease, failure.of("REVOKED", cause="preempted"))
        caller.send(*(frames.request(READ, 0, tag, count=count) for tag in range(3)))
        for tag in range(3):
            kind, got, refused = caller.hear()
            assert (kind, got, refused.code) == (REFUSAL, tag, "REVOKED")
        assert refused.cause == "preempted"

    def test_a_deadline_that_passes_in_the_middle_of_a_run_counts_for_all_of_it(
        self, rig: Rig, caller: Caller, lease: OpenLease
    ) -> None:
        def late() -> None:
            rig.clock.boot_skew_ms = 2 * (1 << 40)

        shelf(lease).meanwhile = late
        caller.send(
            frames.request(READ, 0, 1, count=16), frames.request(WRITE, 0, 2, count=1, payload=b"x")
        )
        assert [caller.hear()[2].code for _ in range(2)] == ["LEASE_EXPIRED"] * 2

    def test_a_large_read_whose_lease_ends_half_way_is_void(
        self, rig: Rig, caller: Caller, lease: OpenLease
    ) -> None:
        """The announced length is filled with zeros, and the verdict says what it is worth."""
        caller.ask(WRITE, 0, 1, offset=(4 << 20) - 20, count=20, payload=SECRET)
        pieces = iter(range(16))

        def meanwhile() -> None:
            if next(pieces) == 1:
                rig.end(lease, failure.of("LEASE_EXPIRED"))

        shelf(lease).meanwhile = meanwhile
        caller.send(frames.request(READ, 0, 2, count=4 << 20))
        assert caller.hear() == (DATA, 2, None)
        kind, tag, refused = caller.hear()
        assert (kind, tag, refused.code) == (REFUSAL, 2, "LEASE_EXPIRED")

    def test_the_end_of_one_lease_is_none_of_anothers(
        self, rig: Rig, alice: Credentials, caller: Caller, lease: OpenLease
    ) -> None:
        caller.open(rig.lease(alice, 4096), 1)
        rig.end(lease, failure.of("LEASE_RELEASED"))
        caller.send(
            frames.request(READ, 1, 1, count=2), frames.request(READ, 0, 2, count=2),
            frames.request(READ, 1, 3, count=2),
        )  # fmt: skip
        assert caller.hear() == (DATA, 1, b"\0\0")
        assert caller.hear()[2].code == "LEASE_RELEASED"
        assert caller.hear() == (DATA, 3, b"\0\0")

    def test_a_holder_who_does_not_read_holds_up_no_teardown(
        self, rig: Rig, caller: Caller, lease: OpenLease
    ) -> None:
        caller.send(*(frames.request(READ, 0, tag, count=4 << 20) for tag in range(8)))
        time_ms = rig.clock.boot_ms()
        while rig.data.in_flight(lease.slot) and rig.clock.boot_ms() < time_ms + 2_000:
            pass
        assert rig.data.wait_quiet(lease.slot) == 0

    def test_a_broken_device_is_reported_and_what_it_gave_is_refused(
        self, rig: Rig, caller: Caller, lease: OpenLease
    ) -> None:
        def fail() -> None:
            raise OSError(5, "as ordered")

        shelf(lease).meanwhile = fail
        caller.send(frames.request(READ, 0, 1, count=2), frames.request(READ, 0, 2, count=1 << 20))
        assert [caller.hear()[2].code for _ in range(2)] == ["IO", "IO"]
        assert rig.broken == ["EIO", "EIO"]
        assert rig.data.in_flight(lease.slot) == 0


class TestNews:
    def test_news_of_a_session_comes_unasked(self, rig: Rig, alice: Credentials) -> None:
        session = secrets.token_hex(16)
        caller = rig.connect(alice).hello(session)
        rig.sessions.tell(
            session_key(alice.thumbprint, session),
            News("ab" * 16, "revoked", "", 0, failure.of("REVOKED")),
        )
        kind, _, fields = caller.hear()
        caller.close()
        assert (kind, fields["kind"], fields["lease_id"]) == (NOTICE, "revoked", "ab" * 16)
        assert frames.failure_of(fields["failure"]).code == "REVOKED"

    def test_news_never_comes_inside_an_answer(
        self, rig: Rig, alice: Credentials, lease: OpenLease
    ) -> None:
        session = secrets.token_hex(16)
        caller = rig.connect(alice).hello(session).open(lease)
        name = session_key(alice.thumbprint, session)
        shelf(lease).meanwhile = lambda: rig.sessions.tell(name, News(lease.lease_id, "degraded"))
        caller.send(*(frames.request(READ, 0, tag, count=2 << 20) for tag in range(4)))
        heard = [caller.hear() for _ in range(4 + 4 * 8)]
        caller.close()
        assert [tag for kind, tag, _ in heard if kind == DATA] == [0, 1, 2, 3]
        assert sum(kind == NOTICE for kind, _, _ in heard) == 32


class TestLimits:
    @pytest.mark.parametrize(
        "garbage",
        [
            b"\xff" * 64,
            frames.REQUEST.pack(frames.PAYLOAD_BYTES_MAX + 1, READ, 0, 0, 1, 0, 0),
            frames.REQUEST.pack(0, READ, 1, 0, 1, 0, 0),
            b"GET / HTTP/1.1\r\nHost: fabric\r\n\r\n",
        ],
    )
    def test_what_is_no_frame_ends_this_connection_and_no_other(
        self, rig: Rig, alice: Credentials, caller: Caller, garbage: bytes
    ) -> None:
        other = rig.connect(alice).hello()
        other.send(garbage)
        assert other.is_over()
        other.close()
        assert caller.ask(READ, 0, 1, count=1) == (DATA, 1, b"\0")

    def test_connections_of_one_key_are_counted(self, rig: Rig, alice: Credentials) -> None:
        callers = [rig.connect(alice).hello() for _ in range(dataport.CONNECTIONS_PER_HOLDER_MAX)]
        surplus = rig.connect(alice)
        assert surplus.is_over()
        rig.connect(rig.holder("bob")).hello().close()
        for each in (surplus, *callers):
            each.close()

    def test_strangers_of_one_user_are_counted(self, rig: Rig) -> None:
        strangers = []
        for _ in range(dataport.STRANGERS_PER_USER_MAX + 1):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(1)
            sock.connect(os.fspath(rig.path))
            strangers.append(sock)
        assert strangers[-1].recv(1) == b""
        strangers[0].settimeout(0.05)
        with pytest.raises(TimeoutError):
            strangers[0].recv(1)
        for sock in strangers:
            sock.close()

    def test_large_frames_that_nobody_has_room_for_are_refused_and_taken_off_the_wire(
        self, rig: Rig, caller: Caller
    ) -> None:
        assert rig.port._room.borrow(dataport.BORROWED_BYTES_MAX - 1000)
        data = bytes(1 << 20)
        caller.send(frames.request(WRITE, 0, 1, count=len(data), payload=data))
        assert caller.hear()[2].code == "RATE"
        rig.port._room.give_back(dataport.BORROWED_BYTES_MAX - 1000)
        caller.send(frames.request(WRITE, 0, 2, count=len(data), payload=data))
        assert caller.hear() == (DATA, 2, b"")

    def test_a_frame_that_does_not_become_whole_ends_the_connection(
        self, rig: Rig, caller: Caller
    ) -> None:
        caller.send(frames.request(READ, 0, 1)[:5])
        end = time.monotonic() + 1
        while not any(line._begun_ms for line in rig.port._lines) and time.monotonic() < end:
            pass
        rig.clock.boot_skew_ms = dataport_line.FRAME_MS_MAX + 1
        assert caller.is_over()

    def test_a_holder_who_takes_no_answers_is_cut_off(
        self, rig: Rig, caller: Caller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dataport_line, "SEND_MS_MAX", 100)
        caller.send(*(frames.request(READ, 0, tag, count=4 << 20) for tag in range(4)))
        end = time.monotonic() + 5
        while rig.port.connections() and time.monotonic() < end:
            threading.Event().wait(0.02)
        assert rig.port.connections() == 0

    def test_nothing_is_left_of_a_port_that_has_stopped(
        self, tmp_path: Path, rig: Rig, alice: Credentials
    ) -> None:
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        (tmp_path / "more").mkdir()
        more = Rig(tmp_path / "more")
        holder = more.holder()
        lease = more.lease(holder)
        callers = [more.connect(holder).hello().open(lease) for _ in range(4)]
        callers[0].send(*(frames.request(READ, 0, tag, count=4 << 20) for tag in range(4)))
        more.close()
        for caller in callers:
            assert caller.is_over()
            caller.close()
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) == files


class TestOverTls:
    def test_a_holder_elsewhere_does_the_same(self, rig: Rig, alice: Credentials) -> None:
        lease = rig.lease(alice)
        caller = rig.connect_tls(alice).hello().open(lease)
        data = os.urandom(3 << 20)
        answer = caller.ask(WRITE, 0, 1, offset=1, count=len(data), payload=data)
        assert answer == (DATA, 1, b"")
        assert caller.ask(READ, 0, 2, offset=1, count=len(data)) == (DATA, 2, data)
        shelf(lease).meanwhile = lambda: rig.end(lease, failure.of("REVOKED"))
        caller.send(frames.request(READ, 0, 3, count=64))
        assert caller.hear()[2].code == "REVOKED"
        caller.close()

    def test_news_reach_a_holder_who_waits(self, rig: Rig, alice: Credentials) -> None:
        session = secrets.token_hex(16)
        caller = rig.connect_tls(alice).hello(session)
        began = time.monotonic()
        for kind in ("revoke_warning", "revoked"):
            rig.sessions.tell(session_key(alice.thumbprint, session), News("ab" * 16, kind))
        assert [caller.hear()[2]["kind"] for _ in range(2)] == ["revoke_warning", "revoked"]
        assert time.monotonic() - began < 0.5
        caller.close()

    @pytest.mark.parametrize("stranger", ["nobody", "another fabric", "a service"])
    def test_t1_t3_whoever_is_no_holder_of_this_fabric_is_shown_out(
        self, rig: Rig, alice: Credentials, tmp_path: Path, stranger: str
    ) -> None:
        rig.connect_tls(alice).hello().close()
        if stranger == "nobody":
            with socket.create_connection(("127.0.0.1", rig.tls_port), 5) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                assert Caller(sock).is_over()
            return
        if stranger == "a service":
            who = rig.credentials(Identity(DOMAIN, Role.SERVICE, None, "ledger"))
        else:
            now_ms = rig.clock.wall_ms()
            other = Authority.init(tmp_path / "other", trust_domain=DOMAIN, now_ms=now_ms)
            key = certificates.new_tls_key()
            name = Identity(DOMAIN, Role.HOLDER, "acme", "alice")
            chain = other.issue(key.public_key(), name, now_ms=now_ms)
            who = Credentials(certificates.key_pem(key), chain, rig.authority.bundle_pem)
        caller = rig.connect_tls(who)  # its own half of the handshake is over before ours
        with pytest.raises((OSError, AssertionError)):
            caller.hello()
        caller.close()
