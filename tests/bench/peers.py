"""Other people's servers, private to one run: started, awaited, ended by their process number.

Rules. A peer listens on loopback or on a unix socket only, keeps its files in the folder of the
run, and ends with us however we end. One that is not installed or does not come up is missing, with
the reason; it never fails the run. Every wait has an end.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import redis

from tests.bench import certificates
from tests.bench.certificates import Certificates
from tests.bench.etcd import etcd_pb2
from tests.bench.harness import PeerMissingError, short_folder
from tests.bench.place import Place
from tests.requirements import add_system_path

UP_S_MAX: Final = 20.0
END_S_MAX: Final = 5.0
CALL_S_MAX: Final = 10.0
LOOK_S: Final = 0.02
STARTS_MAX: Final = 3
"""A free port may be taken by somebody else before it is used."""
LOG_BYTES_MAX: Final = 300


def version_of(command: str) -> str:
    """The first line of what `--version` says; empty where there is no such command."""
    add_system_path()
    if shutil.which(command) is None:
        return ""
    try:
        said = subprocess.run(
            [command, "--version"], capture_output=True, timeout=10, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip().split("\n", 1)[0]


@contextmanager
def running(command: Sequence[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and with us if we are killed."""
    add_system_path()
    if shutil.which(command[0]) is None:
        raise PeerMissingError(f"{command[0]} is not installed")
    dies_with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*dies_with_us, *command],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=log.parent,
        )  # fmt: skip
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Politely, then not; waited for in either case."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_S_MAX)


def await_up(process: subprocess.Popen[bytes], log: Path, is_up: Callable[[], bool]) -> None:
    until_s = time.monotonic() + UP_S_MAX
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise PeerMissingError(f"it ended by itself: {_last_words(log)}")
        if is_up():
            return
        time.sleep(LOOK_S)
    raise PeerMissingError(f"it was not up after {UP_S_MAX:.0f} s: {_last_words(log)}")


def _last_words(log: Path) -> str:
    text = log.read_bytes()[-LOG_BYTES_MAX:].decode("utf-8", "replace").strip()
    return text.replace("\n", " | ") or "it said nothing"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


# etcd


@dataclass(frozen=True, slots=True)
class Etcd:
    """A client of a running member: the calls that are measured."""

    pid: int
    channel: grpc.Channel

    def grant(self, ttl_s: int = 60) -> int:
        request = etcd_pb2.LeaseGrantRequest(ttl=ttl_s)
        lease_id: int = self._call("Lease/LeaseGrant", request, etcd_pb2.LeaseGrantResponse).id
        return lease_id

    def put_first(self, key: bytes, value: bytes, lease_id: int) -> None:
        """Put a key that must not be there yet, under a lease, in one transaction."""
        absent = etcd_pb2.Compare(key=key, version=0)
        put = etcd_pb2.PutRequest(key=key, value=value, lease=lease_id)
        request = etcd_pb2.TxnRequest(
            compare=[absent], success=[etcd_pb2.RequestOp(request_put=put)]
        )
        if not self._call("KV/Txn", request, etcd_pb2.TxnResponse).succeeded:
            raise AssertionError("etcd: the key was there already")

    def get(self, key: bytes) -> bytes:
        """As this member has it, without asking others."""
        request = etcd_pb2.RangeRequest(key=key, serializable=True)
        found = self._call("KV/Range", request, etcd_pb2.RangeResponse).kvs
        if len(found) != 1:
            raise AssertionError("etcd: the key is not there")
        value: bytes = found[0].value
        return value

    def revoke(self, lease_id: int) -> None:
        request = etcd_pb2.LeaseRevokeRequest(id=lease_id)
        self._call("Lease/LeaseRevoke", request, etcd_pb2.LeaseRevokeResponse)

    def _call(self, method: str, request: Any, answer: Any) -> Any:
        call = self.channel.unary_unary(
            f"/etcdserverpb.{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return call(request, timeout=CALL_S_MAX)


@contextmanager
def etcd(place: Place) -> Generator[Etcd]:
    """One member on loopback, client certificates demanded, its data on our disk."""
    folder = place.make("etcd")
    papers = certificates.make(folder)
    for attempt in range(STARTS_MAX):
        client_port, peer_port = free_ports(2)
        log = folder / f"log-{attempt}"
        command = _etcd_command(folder / f"data-{attempt}", papers, client_port, peer_port)
        with running(command, log) as process:
            channel = _etcd_channel(papers, client_port)
            try:
                await_up(process, log, lambda channel=channel: _answers(channel))  # type: ignore[misc]
            except PeerMissingError:
                channel.close()
                if attempt + 1 < STARTS_MAX and process.poll() is not None:
                    continue
                raise
            try:
                place.check_same_disk(folder / f"data-{attempt}")
                yield Etcd(process.pid, channel)
            finally:
                channel.close()
            return


def _etcd_command(data: Path, papers: Certificates, client_port: int, peer_port: int) -> list[str]:
    clients = f"https://127.0.0.1:{client_port}"
    peers = f"http://127.0.0.1:{peer_port}"
    flags = {
        "name": "one",
        "data-dir": str(data),
        "listen-client-urls": clients,
        "advertise-client-urls": clients,
        "listen-peer-urls": peers,
        "initial-advertise-peer-urls": peers,
        "initial-cluster": f"one={peers}",
        "cert-file": str(papers.server.certificate),
        "key-file": str(papers.server.key),
        "trusted-ca-file": str(papers.root),
        "client-cert-auth": "true",
        "log-level": "error",
    }
    return ["etcd", *(f"--{name}={value}" for name, value in flags.items())]


def _etcd_channel(papers: Certificates, port: int) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(
        papers.root.read_bytes(),
        papers.client.key.read_bytes(),
        papers.client.certificate.read_bytes(),
    )
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 200),
    ]
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, options)


def _answers(channel: grpc.Channel) -> bool:
    try:
        Etcd(0, channel).revoke(Etcd(0, channel).grant())
    except grpc.RpcError:
        return False
    return True


# Redis


@dataclass(frozen=True, slots=True)
class Redis:
    pid: int
    client: redis.Redis


@contextmanager
def redis_server(place: Place) -> Generator[Redis]:
    """One server on a unix socket, without persistence."""
    folder = place.make("redis")
    with short_folder() as sockets:
        path = sockets / "redis"
        command = [
            "redis-server", "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "600",
            "--save", "", "--appendonly", "no", "--dir", str(folder), "--daemonize", "no",
        ]  # fmt: skip
        log = folder / "log"
        with running(command, log) as process:
            client = redis.Redis(unix_socket_path=str(path), socket_timeout=CALL_S_MAX)
            try:
                await_up(process, log, lambda: _pings(client))
                yield Redis(process.pid, client)
            finally:
                client.close()


@contextmanager
def redis_over_tls(place: Place) -> Generator[Redis]:
    """One server on loopback under mutual TLS, without persistence."""
    folder = place.make("redis-tls")
    papers = certificates.make(folder)
    (port,) = free_ports(1)
    command = [
        "redis-server", "--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1",
        "--tls-cert-file", str(papers.server.certificate), "--tls-key-file", str(papers.server.key),
        "--tls-ca-cert-file", str(papers.root), "--tls-auth-clients", "yes",
        "--save", "", "--appendonly", "no", "--dir", str(folder), "--daemonize", "no",
    ]  # fmt: skip
    log = folder / "log"
    with running(command, log) as process:
        client = redis.Redis(
            host="127.0.0.1", port=port, ssl=True, socket_timeout=CALL_S_MAX,
            ssl_certfile=str(papers.client.certificate), ssl_keyfile=str(papers.client.key),
            ssl_ca_certs=str(papers.root),
        )  # fmt: skip
        try:
            await_up(process, log, lambda: _pings(client))
            yield Redis(process.pid, client)
        finally:
            client.close()


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def libraries() -> dict[str, str]:
    """What the clients stand on."""
    return {"grpcio": grpc.__version__, "redis-py": redis.__version__}
