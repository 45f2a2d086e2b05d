"""A throw-away fabric for tests: an authority, identities, one real ledger process, and callers."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from grafos._authority import Authority
from grafos_core import receipt, spiffe
from grafos_core.failure import FabricError
from grafos_core.lease import EndCause, Kind
from grafos_core.spiffe import Identity
from grafos_proto.v1 import lease_pb2, ledger_pb2, ledger_pb2_grpc
from grafos_proto.wire import certificates, convert, failures
from grafos_proto.wire.credentials import (
    Credentials,
    IdentityFiles,
    channel_credentials,
    server_name_option,
)
from services.runtime.signing import key_id_of

ROOT = Path(__file__).resolve().parents[3]
DOMAIN = "grafos.local"
START_S = 20
CALL_S = 10
HOLDER_KEY = "h" * 43


class House:
    """One trust domain in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.init(folder / "ca", now_ms=_now_ms())
        self._credentials: dict[str, Credentials] = {}

    def credentials(self, path: str) -> Credentials:
        """Of `service/admission`, `node/n1`, `operator/alice`, …"""
        if path not in self._credentials:
            identity = spiffe.parse_id(f"spiffe://{DOMAIN}/{path}")
            key = certificates.new_tls_key()
            chain = self.authority.issue(key.public_key(), identity, now_ms=_now_ms())
            self._credentials[path] = Credentials(
                certificates.key_pem(key), chain, self.authority.bundle_pem
            )
        return self._credentials[path]

    def identity_dir(self, path: str) -> Path:
        folder = self.folder / "identities" / path.replace("/", "-")
        IdentityFiles(folder).save(self.credentials(path))
        return folder

    def channel(self, endpoint: str, path: str, peer: str) -> grpc.Channel:
        expected: Identity = spiffe.parse_id(f"spiffe://{DOMAIN}/{peer}")
        return grpc.secure_channel(
            endpoint,
            channel_credentials(self.credentials(path)),
            [server_name_option(expected), ("grpc.max_receive_message_length", 4 << 20)],
        )


class ServiceProcess:
    """A service as a process of its own, serving when this is made."""

    def __init__(
        self,
        house: House,
        name: str,
        state: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        preexec: Any = None,
    ) -> None:
        reading, writing = os.pipe()
        self.log_path = state.with_suffix(".log")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", f"services.{name}", "--state-dir", str(state),
                    "--identity-dir", str(house.identity_dir(f"service/{name}")),
                    "--ready-fd", str(writing), *arguments,
                ],
                cwd=ROOT, env=_environment() | (environment or {}), stderr=log, stdout=log,
                pass_fds=(writing,), preexec_fn=preexec,
            )  # fmt: skip
        os.close(writing)
        self.ready = self._wait_ready(reading)
        self.endpoint = self.ready["endpoints"][0] if self.ready else ""
        self.http = self.ready.get("http", "")

    def _wait_ready(self, reading: int) -> dict[str, Any]:
        """What it announced; empty: it has refused to start."""
        with os.fdopen(reading) as pipe:
            if not select.select([pipe], [], [], START_S)[0]:
                self.kill()
                raise AssertionError(f"no start within {START_S} s: {self.log()}")
            line = pipe.readline()
        if not line:
            self.process.wait(START_S)
        ready: dict[str, Any] = json.loads(line) if line else {}
        return ready

    def log(self) -> str:
        return self.log_path.read_text()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(START_S)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_S)


class Caller:
    """Somebody who calls the ledger; failures are raised as what they are."""

    def __init__(self, house: House, endpoint: str, path: str) -> None:
        self.path = f"spiffe://{DOMAIN}/{path}"
        self.channel = house.channel(endpoint, path, "service/ledger")
        self._stub = ledger_pb2_grpc.LedgerServiceStub(self.channel)

    def __call__(self, method: str, request: Any, timeout_s: float = CALL_S) -> Any:
        with failures.status_to_failures():
            return getattr(self._stub, method)(request, timeout=timeout_s, wait_for_ready=True)

    def stream(self, method: str, request: Any, timeout_s: float = CALL_S) -> Any:
        return getattr(self._stub, method)(request, timeout=timeout_s, wait_for_ready=True)

    def commit(self, *commands: ledger_pb2.Command) -> list[Any]:
        answer = self("Commit", ledger_pb2.CommitRequest(commands=commands))
        return [unpacked(outcome) for outcome in answer.outcomes]

    def grant(self, node: Node, **fields: Any) -> Any:
        """A lease, or the failure."""
        return self.commit(grant(node, **fields))[0]

    def end(self, lease: Any, cause: str = "release") -> Any:
        end = ledger_pb2.EndLease(
            request_id=secrets.token_hex(8), lease_id=lease.lease_id, cause=cause, by=self.path,
            tenant=lease.tenant, holder=lease.holder,
        )  # fmt: skip
        return self.commit(ledger_pb2.Command(end=end))[0]

    def close(self) -> None:
        self.channel.close()


class Node:
    """What a node says to the ledger, without a node."""

    def __init__(self, house: House, endpoint: str, name: str) -> None:
        self.name, self.incarnation, self.boot_epoch = name, secrets.token_hex(16), 1
        self.key = Ed25519PrivateKey.generate()
        self.public_key = self.key.public_key().public_bytes_raw()
        self.caller = Caller(house, endpoint, f"node/{name}")
        self.offers = {Kind.MEM: 1 << 30, Kind.BLOCK: 1 << 16}
        self.high_waters: dict[Kind, int] = {}
        self.live: list[Any] | None = []
        self.version, self.control_endpoint = 1, ""
        self.clears_proved_clean = False

    def request(self) -> ledger_pb2.RegisterRequest:
        return ledger_pb2.RegisterRequest(
            version=lease_pb2.Version(protocol=self.version, software="test"),
            node_id=self.name, incarnation=self.incarnation, boot_epoch=self.boot_epoch,
            offers=[
                ledger_pb2.Offer(kind=convert.kind_to_proto(kind), total=total)
                for kind, total in self.offers.items()
            ],
            high_waters=[
                ledger_pb2.HighWater(kind=convert.kind_to_proto(kind), epoch=epoch)
                for kind, epoch in self.high_waters.items()
            ],
            readiness=lease_pb2.Readiness(
                ready=True, ready_kinds=[convert.kind_to_proto(kind) for kind in self.offers]
            ),
            front_endpoint="127.0.0.1:1", control_endpoint=self.control_endpoint,
            receipt_key=lease_pb2.VerificationKey(
                key_id=key_id_of(self.public_key), owner=self.caller.path, use="receipt",
                public_key=self.public_key,
            ),
            has_live=self.live is not None, live=self.live or [],
            clears_proved_clean=self.clears_proved_clean,
        )  # fmt: skip

    def register(self) -> ledger_pb2.RegisterResponse:
        answer: ledger_pb2.RegisterResponse = self.caller("Register", self.request())
        return answer

    def bound(self, lease: Any) -> Any:
        bound = ledger_pb2.Bound(
            lease_id=lease.lease_id, epoch=lease.epoch, generation=lease.generation
        )
        answer = self.caller(
            "ReportBound",
            ledger_pb2.ReportBoundRequest(
                node_id=self.name, incarnation=self.incarnation, bound=[bound]
            ),
        )
        return unpacked(answer.outcomes[0])

    def receipt(self, lease: Any, *, key: Ed25519PrivateKey | None = None, **changes: Any) -> str:
        signing = key or self.key
        fields: dict[str, Any] = {
            "lease_id": lease.lease_id, "node_id": self.name, "incarnation": self.incarnation,
            "boot_epoch": self.boot_epoch, "kind": convert.kind_from_proto(lease.kind),
            "epoch": lease.epoch, "amount": lease.amount, "extent_offset": lease.extent_offset,
            "cause": EndCause.RELEASE, "outcome": receipt.Outcome.TORNDOWN,
            "assurance": receipt.Assurance.FREED, "measured": {"size_bytes": 0},
            "record_number": 7, "record_hash": "0" * 64,
        } | changes  # fmt: skip
        return receipt.mint(
            receipt.TeardownReceipt(**fields), key_id_of(self.public_key), signing.sign
        )

    def credit(self, *receipts: str) -> list[Any]:
        answer = self.caller("Credit", ledger_pb2.CreditRequest(receipts=receipts))
        return [unpacked(outcome) for outcome in answer.outcomes]

    def close(self) -> None:
        self.caller.close()


_counter = itertools.count()


def grant(node: Node, **fields: Any) -> ledger_pb2.Command:
    values: dict[str, Any] = {
        "request_id": f"ask-{next(_counter)}", "lease_id": secrets.token_hex(16), "tenant": "acme",
        "holder": f"spiffe://{DOMAIN}/tenant/acme/holder/web", "holder_key": HOLDER_KEY,
        "kind": lease_pb2.KIND_MEM, "node_id": node.name, "incarnation": node.incarnation,
        "amount": 4096, "ttl_ms": 60_000,
    } | fields  # fmt: skip
    return ledger_pb2.Command(grant=ledger_pb2.Grant(**values))


def unpacked(outcome: ledger_pb2.Outcome) -> Any:
    """The lease, or the failure as an exception that is not raised."""
    if outcome.HasField("failure"):
        return failures.failure_of(outcome.failure)
    return outcome.lease


def code(outcome: Any) -> str:
    """The failure's code; empty where there is none."""
    return outcome.code if isinstance(outcome, FabricError) else ""


def codes(outcomes: Sequence[Any]) -> list[str]:
    return [code(outcome) for outcome in outcomes]


def _environment() -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "core", "protos", "sdk"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GRAFOS_")}
    return kept | {"PYTHONPATH": path}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
