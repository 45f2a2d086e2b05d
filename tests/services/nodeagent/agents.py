"""A node agent as its users start it: `python -m services.nodeagent`, in a fabric of the test's."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from grafos_core import failure
from grafos_core.failure import Degraded, FabricError
from grafos_core.spiffe import Identity
from grafos_proto.v1 import node_pb2, node_pb2_grpc
from grafos_proto.wire import failures
from grafos_proto.wire.credentials import Credentials, channel_credentials, server_name_option
from services.nodeagent import wardenlog
from services.nodeagent.ipc import LinkClosed
from services.nodeagent.wardenlog import LivingWarden
from tests.services.nodeagent.fabric import (
    CALL_S,
    NODE,
    OPERATOR,
    TRUST_DOMAIN,
    Fabric,
    HolderSide,
    eventually,
    now_ms,
)

MEMORY_BYTES, BLOCK_BYTES = 1 << 26, 1 << 22
STOP_S = 15


class AgentUnderTest:
    """One agent's state folder, and the process that serves it now."""

    def __init__(self, fabric: Fabric, folder: Path) -> None:
        self.fabric, self.folder = fabric, folder
        self.state = folder / "s"
        self.identity = folder / "identity"
        fabric.people.save(NODE, self.identity)
        self.process: subprocess.Popen[bytes] | None = None
        self.announced: dict[str, Any] = {}
        self._holders: list[HolderSide] = []
        self._channels: list[grpc.Channel] = []

    def start(
        self,
        *flags: str,
        fault: str = "",
        ready: bool = True,
        under: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        """Started, and ready to bind unless the test wants to see it otherwise.

        `under`: a command that starts another one, with less than we have.
        """
        read, write = os.pipe()
        arguments = [
            "--state-dir", str(self.state), "--identity-dir", str(self.identity),
            "--ledger", self.fabric.ledger_endpoint, "--trust-domain", TRUST_DOMAIN,
            "--memory-bytes", str(MEMORY_BYTES), "--block-bytes", str(BLOCK_BYTES),
            "--ready-fd", str(write), "--mode", "development", "--log-level", "warning", *flags,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "services.nodeagent", *arguments],
            pass_fds=[write],
            env={**os.environ, "GRAFOS_FAULT": fault, **environment},
        )
        os.close(write)
        with os.fdopen(read) as pipe:
            line = pipe.readline()
        assert line, "the agent did not start"
        self.announced = json.loads(line)
        if ready:
            eventually(self.is_ready)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def front_endpoint(self) -> str:
        return str(self.announced["endpoints"][0])

    @property
    def control_endpoint(self) -> str:
        return str(self.announced["endpoints"][1])

    def readiness(self) -> dict[str, Any]:
        url = f"http://{self.announced['http']}/api/v1/readiness"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as not_ready:
            with not_ready:
                return dict(json.load(not_ready))

    def is_ready(self) -> bool:
        report = self.readiness()
        kinds = report["kinds"].values()
        return report["state"] == "ready" and all(kind["ready"] for kind in kinds)

    def metrics(self) -> str:
        with urllib.request.urlopen(
            f"http://{self.announced['http']}/metrics", timeout=5
        ) as answer:
            return str(answer.read().decode())

    def holder(self, credentials: Credentials | None = None) -> HolderSide:
        made = HolderSide(self.front_endpoint, credentials or self.fabric.people.holder())
        self._holders.append(made)
        return made

    def order(self, method: str, request: Any, who: Identity = OPERATOR) -> Any:
        """A call to NodeControl."""
        shown = self.fabric.people.make(who)
        channel = grpc.secure_channel(
            self.control_endpoint, channel_credentials(shown), [server_name_option(NODE)]
        )
        with channel, failures.status_to_failures():
            stub = node_pb2_grpc.NodeControlStub(channel)
            return getattr(stub, method)(request, timeout=CALL_S)

    def leases(self) -> dict[str, node_pb2.NodeLease]:
        answer = self.order("ListLeases", node_pb2.ListNodeLeasesRequest())
        return {lease.lease_id: lease for lease in answer.leases}

    def child(self, name: str) -> int:
        """The pid of our `front` or `warden`; 0 where there is none."""
        return child_of(self.pid, name)

    def kill(self) -> None:
        """SIGKILL for control; what follows is the others' doing."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP_S)
        self._forget()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_S)
        self._forget()
        return status

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_S)
        self._forget()
        self._dismiss_wardens()

    def _dismiss_wardens(self) -> None:
        """As a next agent would: else a warden waits for one for ever."""
        folder = self.state / "warden"
        for boot_epoch in wardenlog.boot_epochs(folder):
            warden = LivingWarden.find(folder, boot_epoch)
            if warden is None:
                continue
            try:
                for _, fd in warden.fetch():
                    if fd is not None:
                        os.close(fd)
                warden.done()
            except LinkClosed:
                warden.close()  # it had nothing to tell and went by itself

    def _forget(self) -> None:
        for holder in self._holders:
            holder.close()
        self._holders = []


def child_of(parent: int, name: str) -> int:
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == parent and f"services.nodeagent.{name}".encode() in command:
            return int(path.name)
    return 0


@contextmanager
def agent_in(fabric: Fabric, folder: Path) -> Iterator[AgentUnderTest]:
    agent = AgentUnderTest(fabric, folder)
    try:
        yield agent
    finally:
        agent.close()


def code_of(expected: type[FabricError], call: Any, *arguments: Any) -> str:
    with pytest.raises(expected) as refusal:
        call(*arguments)
    return refusal.value.code


def bound(agent: AgentUnderTest, holder: HolderSide, **changes: Any) -> Any:
    slip = agent.fabric.token(holder.credentials, **changes)
    holder.bind(agent.fabric.sign(slip))
    return slip


def renewed(agent: AgentUnderTest, slip: Any, **changes: Any) -> tuple[Any, str]:
    at_ms = now_ms()
    fields = {
        "generation": slip.generation + 1, "lease_end_ms": at_ms + 60_000,
        "iat_ms": at_ms // 1000 * 1000, "nbf_ms": at_ms // 1000 * 1000, "exp_ms": at_ms + 30_000,
        "jti": secrets.token_hex(16),
    }  # fmt: skip
    later = replace(slip, **{**fields, **changes})
    return later, agent.fabric.sign(later)


def fetched(sock: socket.socket, answer: node_pb2.BindResponse, session: str) -> int:
    """The descriptor, or -1 where there is none to have."""
    sock.settimeout(5)
    sock.connect(answer.handover_path)
    secret = answer.handover_secret.hex()
    sock.send(json.dumps({"v": 1, "secret": secret, "session": session}).encode())
    packet, fds, _, _ = socket.recv_fds(sock, 4096, 4)
    assert json.loads(packet)["descriptor"] is bool(fds)
    return fds[0] if fds else -1


def tried(call: Any) -> Any:
    """What `call` gives, or nothing while it fails for reasons that pass."""
    try:
        return call()
    except (failure.Disconnected, failure.InternalError, Degraded):
        return None
