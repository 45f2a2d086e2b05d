"""A real process, from its flags to its end."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from grafos_core import failure
from grafos_proto.v1 import node_pb2, node_pb2_grpc
from grafos_proto.wire import failures
from grafos_proto.wire.credentials import IdentityFiles
from services.runtime.client import channel
from tests.services.runtime.world import HOLDER, NODE, TRUST_DOMAIN, Keyring

ROOT = Path(__file__).parents[3]
REQUEST = node_pb2.ReadRequest(lease_id="a" * 32, epoch=7, length=1)


class Started:
    """One small service as its own process, with the pipes that a supervisor would hold."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.keyring = Keyring(directory)
        identity = directory / "identity"
        IdentityFiles(identity).save(self.keyring.credentials(NODE))
        ready_read, ready_write = os.pipe()
        parent_read, self.parent = os.pipe()
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.services.runtime.small_service",
                "--state-dir", str(directory / "state"), "--identity-dir", str(identity),
                "--trust-domain", TRUST_DOMAIN, "--ready-fd", str(ready_write),
                "--exit-with-parent-fd", str(parent_read), *arguments,
            ],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, pass_fds=(ready_write, parent_read),
            env={"PYTHONPATH": f"{ROOT}:{ROOT}/core:{ROOT}/protos:{ROOT}/sdk"},
        )  # fmt: skip
        os.close(ready_write)
        os.close(parent_read)
        with os.fdopen(ready_read) as ready:
            line = ready.readline()
        self.ready: dict[str, Any] = json.loads(line) if line else {}

    def read(self, timeout: float = 5) -> bytes:
        holder = self.keyring.credentials(HOLDER)
        remote = channel(self.ready["endpoints"][0], lambda: holder, NODE)
        try:
            with failures.status_to_failures():
                stub = node_pb2_grpc.NodeServiceStub(remote.get())
                return bytes(stub.Read(REQUEST, timeout=timeout).data)
        finally:
            remote.close()

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """(exit status, log lines), once the process has ended."""
        try:
            _, text = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, [
            json.loads(line) for line in text.splitlines() if line.startswith("{")
        ]

    def events(self) -> tuple[int, list[str]]:
        status, lines = self.end()
        return status, [line["event"] for line in lines]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        try:
            os.close(self.parent)
        except OSError:
            pass  # the test has closed it


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    made: list[Started] = []

    def make(*arguments: str) -> Started:
        made.append(Started(tmp_path / str(len(made)), *arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


SYS_TGKILL = {"x86_64": 234, "aarch64": 131}


def test_a_signal_that_another_thread_got_ends_it_too(start: Any) -> None:
    """The kernel may give a process's signal to any of its threads."""
    service = start()
    pid = service.process.pid
    other = max(int(each) for each in os.listdir(f"/proc/{pid}/task"))
    assert other != pid
    number = SYS_TGKILL[os.uname().machine]
    assert ctypes.CDLL(None).syscall(number, pid, other, signal.SIGTERM) == 0
    assert service.process.wait(10) == 0


def test_it_says_where_it_is_serves_and_ends_on_SIGTERM(start: Any) -> None:
    service = start()
    assert service.ready["pid"] == service.process.pid
    assert service.read() == b"read"
    readiness = f"http://{service.ready['http']}/api/v1/readiness"
    with urllib.request.urlopen(readiness, timeout=5) as answer:
        assert json.load(answer)["state"] == "ready"
    service.process.send_signal(signal.SIGTERM)
    status, events = service.events()
    assert status == 0
    assert events == [
        "service.started", "service.draining", "stopped.last", "stopped.first", "service.stopped",
    ]  # fmt: skip


def test_what_is_in_flight_is_answered_before_the_end(start: Any) -> None:
    service = start("--slow-ms", "800")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(service.read)
        threading.Event().wait(0.4)
        service.process.send_signal(signal.SIGTERM)
        assert reading.result(5) == b"read"
    assert service.events()[0] == 0


def test_it_ends_with_the_process_that_started_it_however_that_dies(start: Any) -> None:
    service = start()
    os.close(service.parent)
    status, lines = service.end()
    assert status == 0
    assert lines[-1]["why"] == "parent ended"


def test_a_second_signal_ends_it_at_once(start: Any) -> None:
    service = start("--slow-ms", "9000")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(service.read, 8)
        threading.Event().wait(0.4)
        service.process.send_signal(signal.SIGTERM)
        threading.Event().wait(0.3)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(2) == 130
        with pytest.raises(failure.Disconnected):
            reading.result(5)


def test_a_start_that_is_refused_says_why_and_exits_with_one(start: Any) -> None:
    service = start("--refuse", "yes")
    assert service.ready == {}
    status, lines = service.end()
    assert status == 1
    assert lines[-1]["event"] == "service.refused"
    assert "record 7 is damaged" in str(lines[-1])


def test_flags_that_do_not_fit_exit_with_two_before_anything_is_opened(
    start: Any, tmp_path: Path
) -> None:
    service = start("--slow-ms", "never")
    assert service.ready == {}
    assert service.end()[0] == 2
    assert not (tmp_path / "0" / "state").exists()


def test_a_channel_to_nobody_is_unavailable(tmp_path: Path) -> None:
    holder = Keyring(tmp_path).credentials(HOLDER)
    remote = channel("127.0.0.1:1", lambda: holder, NODE)
    with pytest.raises(grpc.RpcError):
        node_pb2_grpc.NodeServiceStub(remote.get()).Read(REQUEST, timeout=2)
    remote.close()


def test_a_handler_that_outlives_its_grace_does_not_keep_the_process(start: Any) -> None:
    service = start("--slow-ms", "9000")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(service.read, 12)
        threading.Event().wait(0.4)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(6) == 0
        with pytest.raises(failure.Disconnected):
            reading.result(5)
