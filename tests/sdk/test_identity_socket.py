"""The identity socket and the join listener, over real sockets and real TLS."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grafos import _authority
from grafos._authority import Authority
from grafos._identity_issuer import SPAWN_TTL_MS, IdentityIssuer, Rate, spawn_pipe
from grafos._identity_socket import (
    IdentityServer,
    add_identity_socket,
    add_join_listener,
    local_peer,
)
from grafos_core import spiffe
from grafos_core.failure import FabricError
from grafos_core.spiffe import Role
from grafos_proto.wire import certificates
from grafos_proto.wire import identity as wire
from grafos_proto.wire.credentials import Credentials, IdentityFiles

EVENT_BOUND_S = 5.0


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


def elapsed_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class House:
    """An authority that is served by a thread, as the supervisor does it."""

    def __init__(self, folder: Path, *, operator_uid: int | None = None, shared: bool = False):
        self.authority = Authority.init(folder / "ca", now_ms=wall_ms())
        uid = os.getuid() if operator_uid is None else operator_uid
        self.issuer = IdentityIssuer(self.authority, operator_uid=uid)
        self.server = IdentityServer()
        self.path = folder / "run" / "identity.sock"
        add_identity_socket(self.server, self.path, self.issuer, shared=shared)
        port = add_join_listener(self.server, "127.0.0.1", 0, self.issuer, now_ms=wall_ms())
        self.address = f"127.0.0.1:{port}"
        self.shift_ms = 0
        """Added to the wall clock that the server sees."""
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self.server.serve_until, args=(self._stop, lambda: wall_ms() + self.shift_ms)
        )
        self._thread.start()

    def ask(self, want: Any = None, secret: str | None = None) -> Credentials:
        key = certificates.new_tls_key()
        return wire.request_identity(
            str(self.path), key, want, secret=secret, now_ms=wall_ms() + self.shift_ms
        )

    def token(self, node_id: str = "n1") -> str:
        return _authority.node_token(
            self.path.parent.parent / "ca", node_id, now_ms=wall_ms() + self.shift_ms
        )

    def join(self, token: str) -> Credentials:
        return wire.join(self.address, token, certificates.new_tls_key(), now_ms=wall_ms())

    def close(self) -> None:
        self._stop.set()
        self._thread.join(EVENT_BOUND_S)
        assert not self._thread.is_alive()
        self.server.close()


@pytest.fixture
def house(tmp_path: Path) -> Generator[House, None, None]:
    with contextlib.closing(House(tmp_path)) as house:
        yield house


def start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def refused(attempt: Callable[..., object], *args: Any, **named: Any) -> FabricError:
    with pytest.raises(FabricError) as refusal:
        attempt(*args, **named)
    return refusal.value


# Local programs


def test_a_local_program_is_named_by_the_kernel(house: House) -> None:
    credentials = house.ask()
    pid = os.getpid()
    expected = f"holder/uid-{os.getuid()}/{pid}-{start_ticks(pid)}"
    assert str(credentials.identity) == f"spiffe://grafos.local/tenant/default/{expected}"
    assert 3_590_000 < credentials.certificate.not_after_ms - wall_ms() <= 3_600_000


def test_socket_and_folder_are_private_and_go_with_the_server(tmp_path: Path) -> None:
    with contextlib.closing(House(tmp_path)) as house:
        assert house.path.stat().st_mode & 0o777 == 0o600
        assert house.path.parent.stat().st_mode & 0o777 == 0o700
    assert not house.path.exists()
    assert refused(house.ask).code == "UNREACHABLE"


def test_two_programs_of_one_user_have_two_names(house: House) -> None:
    child = run_child(house, "")
    assert child.startswith(f"spiffe://grafos.local/tenant/default/holder/uid-{os.getuid()}/")
    assert child != str(house.ask().identity)


@pytest.mark.root
def test_a_program_of_another_user_is_named_after_that_user(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"grafos-identity-{os.getpid()}"
    folder.mkdir(mode=0o711)
    try:
        with contextlib.closing(House(folder, shared=True)) as house:
            named = run_child(house, "os.setgid(65534); os.setuid(65534)")
            assert named.startswith("spiffe://grafos.local/tenant/default/holder/uid-65534/")
            code = run_child(house, "os.setgid(65534); os.setuid(65534)", want="operator")
            assert code == "ROLE"
            owned = run_child(house, "os.setgid(65534); os.setuid(65534)", renews=house.ask())
            assert owned == "HOLDER_MISMATCH"
    finally:
        shutil.rmtree(folder)


@pytest.mark.root
def test_a_private_socket_lets_no_other_user_in(house: House) -> None:
    assert run_child(house, "os.setgid(65534); os.setuid(65534)") == "UNREACHABLE"


def run_child(
    house: House, before: str, want: str | None = None, renews: Credentials | None = None
) -> str:
    """Ask from a process of its own: the identity, or the code of the refusal."""
    program = f"""
import os, sys, time
from grafos_core.failure import FabricError
from grafos_proto.wire import certificates, identity
from grafos_proto.wire.credentials import Credentials
now_ms = time.time_ns() // 1_000_000
parts = [part.encode() for part in sys.stdin.read().split("|")]
{before or "pass"}
try:
    if len(parts) == 3:
        made = identity.renew_identity({str(house.path)!r}, Credentials(*parts), now_ms=now_ms)
    else:
        key = certificates.new_tls_key()
        made = identity.request_identity({str(house.path)!r}, key, {want!r}, now_ms=now_ms)
    print(made.identity)
except FabricError as refusal:
    print(refusal.code)
"""
    handed = [] if renews is None else [renews.key_pem, renews.chain_pem, renews.bundle_pem]
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="|".join(part.decode() for part in handed),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_only_the_fabrics_own_user_and_root_become_operators(tmp_path: Path) -> None:
    with contextlib.closing(House(tmp_path, operator_uid=os.getuid())) as house:
        credentials = house.ask("operator")
        assert str(credentials.identity) == f"spiffe://grafos.local/operator/uid-{os.getuid()}"
        for other in ("node", "service", "holder", "", 7):
            assert refused(house.ask, other).code == "INVALID"


def test_an_operator_of_another_fabrics_user_is_refused(tmp_path: Path) -> None:
    issuer = IdentityIssuer(Authority.init(tmp_path / "ca", now_ms=wall_ms()), operator_uid=4_000)
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = local_peer(ours)
    csr = certificates.signing_request(certificates.new_tls_key()).decode()
    question = {"v": 1, "op": "issue", "csr": csr, "want": "operator"}

    def ask(uid: int) -> object:
        asker = type(peer)(uid, peer.pid, peer.start_ticks)
        return issuer.answer_local(asker, question, now_ms=wall_ms(), elapsed_ms=0)

    assert refused(lambda: ask(4_001)).code == "ROLE"
    assert ask(4_000)
    assert ask(0)


def test_a_spawned_service_gets_its_identity_once_by_the_secret_in_its_pipe(house: House) -> None:
    secret = house.issuer.expect(Role.SERVICE, "ledger", elapsed_ms=elapsed_ms())
    received = wire.read_spawn_secret(spawn_pipe(secret))
    assert str(house.ask(secret=received).identity) == "spiffe://grafos.local/service/ledger"
    assert refused(lambda: house.ask(secret=received)).code == "DENIED"
    assert refused(lambda: house.ask(secret="\ud800")).code == "ENCODING"
    assert refused(lambda: house.ask(secret="")).code == "DENIED"


def test_a_spawn_secret_that_nobody_used_runs_out(tmp_path: Path) -> None:
    authority = Authority.init(tmp_path / "ca", now_ms=wall_ms())
    issuer = IdentityIssuer(authority, operator_uid=0)
    for _ in range(64):
        issuer.expect(Role.NODE, "n1", elapsed_ms=0)
    assert refused(lambda: issuer.expect(Role.NODE, "n1", elapsed_ms=0)).code == "RATE"
    assert issuer.expect(Role.NODE, "n1", elapsed_ms=SPAWN_TTL_MS)
    for role in (Role.HOLDER, Role.OPERATOR):
        assert refused(issuer.expect, role, "x", elapsed_ms=0).code == "ROLE"


def test_a_process_that_was_given_no_secret_is_told_so() -> None:
    for written in (b"", b"x" * 129, b"\xff"):
        reading, writing = os.pipe()
        os.write(writing, written)
        os.close(writing)
        assert refused(wire.read_spawn_secret, reading).code == "IDENTITY"


# Renewal


def test_a_certificate_is_renewed_over_the_same_key_until_it_runs_out(house: House) -> None:
    first = house.ask("operator")
    house.shift_ms = 1_800_000
    second = wire.renew_identity(str(house.path), first, now_ms=wall_ms() + house.shift_ms)
    assert (second.identity, second.thumbprint) == (first.identity, first.thumbprint)
    assert second.certificate.not_after_ms >= first.certificate.not_after_ms + 1_799_000
    house.shift_ms = 3_600_000
    late = refused(lambda: wire.renew_identity(str(house.path), first, now_ms=wall_ms()))
    assert late.code == "CERT_EXPIRED"


def test_renewal_is_due_at_half_life_give_or_take_a_tenth_and_survives_outages(
    house: House, tmp_path: Path
) -> None:
    files = IdentityFiles(tmp_path / "me")
    files.save(house.ask())
    end_ms = files.load().certificate.not_after_ms
    start_ms = end_ms - 3_600_000
    for jitter, due_ms in ((0.0, 1_800_000), (-0.1, 1_440_000), (0.1, 2_160_000)):
        probe = wire.Renewal(
            files, _renewing(house), now_ms=start_ms, jitter=partial(float, jitter)
        )
        assert probe.due_ms == start_ms + due_ms

    away = False

    def renew(credentials: Credentials, now_ms: int) -> Credentials:
        path = house.path.with_name("nobody.sock") if away else house.path
        house.shift_ms = now_ms - wall_ms()
        return wire.renew_identity(str(path), credentials, now_ms=now_ms)

    renewal = wire.Renewal(files, renew, now_ms=start_ms, jitter=lambda: 0.0)
    due_ms = start_ms + 1_800_000
    assert not renewal.tick(due_ms - 1)
    away = True
    before = files()
    assert not renewal.tick(due_ms)
    assert renewal.last_failure is not None
    assert renewal.last_failure.code == "UNREACHABLE"
    assert (renewal.due_ms, files()) == (due_ms + 1_000, before)
    assert not renewal.tick(due_ms + 1_000)
    assert renewal.due_ms == due_ms + 3_000
    away = False
    assert renewal.tick(due_ms + 3_000)
    assert files().thumbprint == before.thumbprint
    assert files().certificate.not_after_ms > before.certificate.not_after_ms
    assert IdentityFiles(tmp_path / "me").load() == files()


def _renewing(house: House) -> Callable[[Credentials, int], Credentials]:
    return lambda credentials, now_ms: wire.renew_identity(
        str(house.path), credentials, now_ms=now_ms
    )


# Hostile and clumsy peers


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (wire.LENGTH.pack(2) + b"{}", "VERSION"),
        (wire.LENGTH.pack(0), "ENCODING"),
        (wire.LENGTH.pack(9) + b'{"v": 1 }', "ENCODING"),
        (wire.LENGTH.pack(13) + b'{"v":1,"v":1}', "ENCODING"),
        (wire.LENGTH.pack(2) + b"\xff\xfe", "ENCODING"),
        (wire.LENGTH.pack(2) + b"[]", "ENCODING"),
        (wire.encode({"v": 2, "op": "issue"}), "VERSION"),
        (wire.encode({"v": True, "op": "issue"}), "VERSION"),
        (wire.encode({"v": 1}), "INVALID"),
        (wire.encode({"v": 1, "op": "join"}), "INVALID"),
        (wire.encode({"v": 1, "op": "issue", "csr": 7}), "INVALID"),
        (wire.encode({"v": 1, "op": "issue", "csr": "x"}), "IDENTITY"),
        (wire.encode({"v": 1, "op": "issue", "csr": "x\ud800"}), "ENCODING"),
        (wire.encode({"v": 1, "op": "issue", "csr": "x" * 20_000}), "MESSAGE_SIZE"),
        (wire.encode({"v": 1, "op": "renew", "csr": "x"}), "INVALID"),
        (wire.encode({"v": 1, "op": "renew", "csr": "x", "chain": "x", "proof": "g"}), "ENCODING"),
        (wire.encode({"v": 1, "op": "renew", "csr": "x", "chain": "x", "proof": ""}), "IDENTITY"),
        (wire.LENGTH.pack(65_537), "MESSAGE_SIZE"),
        (wire.LENGTH.pack(2**32 - 1) + b"x", "MESSAGE_SIZE"),
        (wire.LENGTH.pack(2) + b"{}{}", "MESSAGE_SIZE"),
        (wire.LENGTH.pack(60_000) + b'{"a":' * 12_000, "ENCODING"),
    ],
)
def test_a_question_that_is_none_gets_a_typed_refusal_and_the_next_one_its_answer(
    house: House, sent: bytes, code: str
) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(EVENT_BOUND_S)
        connection.connect(str(house.path))
        connection.sendall(sent)
        (length,) = wire.LENGTH.unpack(connection.recv(4))
        answer = wire.decode(connection.recv(length))
    assert answer["code"] == code
    assert house.ask().identity.role is Role.HOLDER


def test_a_peer_that_says_nothing_is_dismissed_after_two_seconds_and_keeps_nobody_waiting(
    house: House,
) -> None:
    started = time.monotonic()
    with contextlib.ExitStack() as silent:
        crowd = []
        for _ in range(64):
            connection = silent.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(EVENT_BOUND_S)
            connection.connect(str(house.path))
            crowd.append(connection)
        assert refused(house.ask).code == "UNREACHABLE"  # all places of this user are taken
        assert house.join(house.token()).identity.name == "n1"  # and nobody else's
        assert time.monotonic() - started < 2.0
        assert crowd[0].recv(1) == b""
        assert 1.8 < time.monotonic() - started < 4.0
        assert house.ask().identity.role is Role.HOLDER


@pytest.mark.parametrize("reaped", [True, False])
def test_a_program_that_asked_and_ended_gets_nothing(reaped: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")  # a name of its own, chosen by the kernel
        listening.listen()
        name = listening.getsockname()
        program = f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})"
        with subprocess.Popen([sys.executable, "-c", program]) as asker:
            connection, _ = listening.accept()
            os.waitid(os.P_PID, asker.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
            with connection, pytest.raises((FabricError, OSError)):
                local_peer(connection)


def test_a_socket_in_use_is_not_taken_and_a_stale_one_is(house: House, tmp_path: Path) -> None:
    server = IdentityServer()
    with contextlib.closing(server):
        taken = refused(lambda: add_identity_socket(server, house.path, house.issuer))
        assert taken.code == "INVALID"
        stale = tmp_path / "other" / "identity.sock"
        stale.parent.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX) as forgotten:
            forgotten.bind(str(stale))
        add_identity_socket(server, stale, house.issuer)
        long = tmp_path / ("x" * 100) / "identity.sock"
        assert refused(lambda: add_identity_socket(server, long, house.issuer)).code == "RANGE"
        open_folder = tmp_path / "open"
        open_folder.mkdir(mode=0o755)
        open_folder.chmod(0o755)
        attempt = open_folder / "identity.sock"
        refusal = refused(lambda: add_identity_socket(server, attempt, house.issuer))
        assert refusal.code == "IDENTITY"


def test_each_peer_has_a_rate_of_its_own_and_is_told_when_to_come_again() -> None:
    rate = Rate(burst=2, per_s=1)
    rate.take("a", 0)
    rate.take("a", 0)
    refusal = refused(lambda: rate.take("a", 500))
    assert (refusal.code, refusal.retry_after_ms) == ("RATE", 501)
    rate.take("b", 500)
    rate.take("a", 1_001)
    for number in range(2_000):
        rate.take(str(number), 1_001)
    assert len(rate._left) <= 1_024


# Joining


def test_a_machine_joins_with_its_token_and_can_renew_from_where_it_is(
    house: House, tmp_path: Path
) -> None:
    made = _authority.node_join(
        house.address, house.token("rack-7"), tmp_path / "node", now_ms=wall_ms()
    )
    assert str(made.identity) == "spiffe://grafos.local/node/rack-7"
    assert made.bundle_pem == house.authority.bundle_pem
    renewed = wire.renew_over_network(house.address, made, now_ms=wall_ms())
    assert renewed.thumbprint == made.thumbprint
    for local in (house.ask(), house.ask("operator")):
        attempt = refused(wire.renew_over_network, house.address, local, now_ms=wall_ms())
        assert attempt.code == "ROLE"


def test_of_many_joins_at_once_with_one_token_exactly_one_succeeds(house: House) -> None:
    token = house.token()
    start = threading.Barrier(4)

    def attempt() -> str:
        start.wait(EVENT_BOUND_S)
        try:
            return str(house.join(token).identity)
        except FabricError as refusal:
            return refusal.code

    with ThreadPoolExecutor(4) as pool:
        outcomes = sorted(each.result() for each in [pool.submit(attempt) for _ in range(4)])
    assert outcomes == ["JOIN_TOKEN"] * 3 + ["spiffe://grafos.local/node/n1"]


def test_of_two_servers_on_one_authority_only_one_takes_the_token(tmp_path: Path) -> None:
    authority = Authority.init(tmp_path / "ca", now_ms=wall_ms())
    pin = authority.pin
    for _ in range(5):
        token = authority.tokens.create("n1", pin, ttl_ms=60_000, now_ms=wall_ms())
        start = threading.Barrier(2)

        def attempt(token: str = token, start: threading.Barrier = start) -> str:
            tokens = Authority.open(tmp_path / "ca", now_ms=wall_ms()).tokens
            start.wait(EVENT_BOUND_S)
            try:
                return tokens.consume(token, pin=pin, now_ms=wall_ms())
            except FabricError as refusal:
                return refusal.code

        with ThreadPoolExecutor(2) as pool:
            outcomes = sorted(each.result() for each in [pool.submit(attempt) for _ in range(2)])
        assert outcomes == ["JOIN_TOKEN", "n1"]


def test_a_clumsy_request_does_not_cost_the_token(house: House) -> None:
    token = house.token()
    question = {"v": 1, "op": "join", "token": token, "csr": "not a request"}
    root = certificates.load_certificates(house.authority.bundle_pem)[0]
    assert refused(lambda: wire._ask_pinned(house.address, root, question)).code == "IDENTITY"
    assert house.join(token).identity.name == "n1"


def test_a_token_is_not_shown_to_a_fabric_that_did_not_make_it(
    house: House, tmp_path: Path
) -> None:
    with contextlib.closing(House(tmp_path / "b")) as impostor:
        token = house.token()
        seen: list[str] = []
        answer = impostor.issuer.answer_remote

        def listen(address: str, request: wire.Message, **clocks: int) -> wire.Message:
            seen.append(request["op"])
            return answer(address, request, **clocks)

        impostor.issuer.answer_remote = listen  # type: ignore[method-assign]
        key = certificates.new_tls_key()
        refusal = refused(lambda: wire.join(impostor.address, token, key, now_ms=wall_ms()))
        assert refusal.code == "JOIN_TOKEN"
        assert seen == ["root"]
    assert house.join(token).identity.name == "n1"


def test_a_node_does_not_renew_with_a_server_of_another_fabric(
    house: House, tmp_path: Path
) -> None:
    made = house.join(house.token())
    with contextlib.closing(House(tmp_path / "b")) as impostor:
        refusal = refused(lambda: wire.renew_over_network(impostor.address, made, now_ms=wall_ms()))
    assert refusal.code == "IDENTITY"


def test_joins_are_limited_per_address(house: House) -> None:
    codes = []
    for _ in range(25):
        try:
            house.join("n1." + "0" * 48 + f".{house.authority.pin}")
        except FabricError as refusal:
            codes.append(refusal.code)
    assert codes[0] == "JOIN_TOKEN"
    assert codes[-1] == "RATE"


def test_the_join_port_speaks_tls_1_3_only_and_closes_on_plain_text(house: House) -> None:
    host, port = house.address.split(":")
    with socket.create_connection((host, int(port)), EVENT_BOUND_S) as plain:
        plain.sendall(wire.encode({"v": 1, "op": "root"}))
        received = b"x"
        with contextlib.suppress(ConnectionResetError):
            while received:
                received = plain.recv(4096)
                assert b"BEGIN" not in received
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port)), EVENT_BOUND_S) as old:
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            context.wrap_socket(old)


def test_addresses_that_are_none_are_refused_before_anything_is_sent() -> None:
    for address in ("", "host", "host:", ":1", "host:x", "host:65536", "[::1:1", "host:²"):
        token, key = "n1.x." + "0" * 32, certificates.new_tls_key()
        refusal = refused(wire.join, address, token, key, now_ms=0)
        assert refusal.code == "INVALID", address


# Secrets


def test_no_secret_is_seen_in_logs_refusals_or_on_the_wire(
    house: House, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    token = house.token()
    secret = house.issuer.expect(Role.SERVICE, "audit", elapsed_ms=elapsed_ms())
    made = house.ask(secret=secret)
    shown = [repr(made), repr(wire.parse_token(token)), repr(wire._renewal(made))]
    house.join(token)
    for attempt in (lambda: house.ask(secret=secret), lambda: house.join(token)):
        refusal = refused(attempt)
        shown += [str(refusal), repr(refusal.fields()), repr(refusal.__cause__)]
    printed = capfd.readouterr()
    key_lines = [line for line in made.key_pem.decode().splitlines() if "-----" not in line]
    for text in [*shown, caplog.text, printed.out, printed.err]:
        for private in [secret, token.split(".")[1], *key_lines]:
            assert private not in text


def test_the_user_behind_a_local_program_is_read_from_its_certificate(house: House) -> None:
    assert spiffe.uid_of_local_holder(house.ask().identity) == os.getuid()
