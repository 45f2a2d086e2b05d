"""The operator's connections to the fabric of this machine.

Rules. The certificate is asked for anew by each command, from the identity socket, where the kernel
says who asks; it is never stored. Every call has the deadline of the command. This module loads
gRPC, so commands import it when they run.
"""

from __future__ import annotations

import argparse
import secrets
from typing import Any, Final

from grafos import _clock
from grafos._calls import Peer
from grafos._cli import settings
from grafos._cli.cluster import running
from grafos._cluster.description import ClusterDescription
from grafos_core import failure
from grafos_core.spiffe import Identity, Role, is_below
from grafos_proto.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    audit_pb2_grpc,
    lease_pb2,
    ledger_pb2,
    ledger_pb2_grpc,
    node_pb2_grpc,
)
from grafos_proto.wire import certificates, failures
from grafos_proto.wire.identity import request_identity

LEASE_ID_CHARS: Final = 32
PAGE_MAX: Final = 1_000
LEASES_MAX: Final = 100_000
KINDS: Final = {"mem": lease_pb2.KIND_MEM, "block": lease_pb2.KIND_BLOCK}
KIND_NAMES: Final = {number: name for name, number in KINDS.items()}
STATE_NAMES: Final = {
    number: name.removeprefix("LEASE_STATE_").lower()
    for name, number in lease_pb2.LeaseState.items()
}


class Operator:
    """Calls as the operator that this command's user is."""

    def __init__(self, given: argparse.Namespace) -> None:
        layout = settings.the_layout(given)
        found = running(layout)
        if found is None:
            raise failure.of("UNREACHABLE", f"no fabric runs in {layout.run}")
        self.description: ClusterDescription = found
        self._timeout_ms = 1000 * int(settings.value(given, "timeout_s"))
        credentials = request_identity(
            found.identity_socket, certificates.new_tls_key(), "operator", now_ms=_clock.wall_ms()
        )
        self._provider = lambda: credentials
        self._peers: dict[str, Peer] = {}

    def ledger(self, method: str, request: Any) -> Any:
        return self._ask("ledger", self.description.ledger, ledger_pb2_grpc.LedgerServiceStub,
                         method, request)  # fmt: skip

    def admission(self, method: str, request: Any) -> Any:
        where = self.description.admission_control or self.description.admission
        stub = admission_pb2_grpc.AdmissionServiceStub
        return self._ask("admission", where, stub, method, request)

    def audit(self, method: str, request: Any) -> Any:
        return self._ask("audit", self.description.audit, audit_pb2_grpc.AuditServiceStub,
                         method, request)  # fmt: skip

    def audit_stream(self, method: str, request: Any) -> Any:
        """The answers of a stream, which ends with the command's deadline."""
        peer = self._peer("audit", self.description.audit, audit_pb2_grpc.AuditServiceStub)
        calls = getattr(peer.stub, method)(request, timeout=self._timeout_ms / 1000)
        return failures.each_to_failures(calls)

    def node(self, node_id: str, method: str, request: Any) -> Any:
        """At a node's control listener, as the ledger has it registered."""
        node = next((n for n in self.snapshot().nodes if n.node_id == node_id), None)
        if node is None or not node.control_endpoint:
            raise failure.of("NOT_FOUND", f"no node {node_id} is registered")
        identity = Identity(self.description.trust_domain, Role.NODE, None, node_id)
        peer = self._peers.setdefault(
            f"node {node_id}",
            Peer(node.control_endpoint, self._provider, identity, node_pb2_grpc.NodeControlStub),
        )
        return peer.ask(method, request, self._timeout_ms)

    def snapshot(self) -> ledger_pb2.SnapshotResponse:
        found: ledger_pb2.SnapshotResponse = self.ledger("Snapshot", ledger_pb2.SnapshotRequest())
        return found

    def commit(self, command: ledger_pb2.Command) -> ledger_pb2.Outcome:
        """One command's outcome; a refusal is raised."""
        response = self.ledger("Commit", ledger_pb2.CommitRequest(commands=[command]))
        outcome: ledger_pb2.Outcome = response.outcomes[0]
        if outcome.HasField("failure"):
            raise failures.failure_of(outcome.failure)
        return outcome

    def leases(self, *, holder_prefix: str = "", **wanted: Any) -> list[lease_pb2.Lease]:
        """All that match, page by page; never a part of them."""
        found: list[lease_pb2.Lease] = []
        after = ""
        while True:
            request = admission_pb2.ListLeasesRequest(limit=PAGE_MAX, after=after, **wanted)
            page = self.ledger("List", request)
            found += [each for each in page.leases if is_below(each.holder, holder_prefix)]
            after = page.next
            if not after:
                return found
            if len(found) >= LEASES_MAX:
                raise failure.of("RANGE", f"more than {LEASES_MAX} leases: say more of which")

    def lease(self, text: str) -> lease_pb2.Lease:
        """The lease with this id, or the one whose id begins with it."""
        if len(text) == LEASE_ID_CHARS:
            request = admission_pb2.GetLeaseRequest(lease_id=text)
            found: lease_pb2.Lease = self.ledger("Get", request)
            return found
        matching = self.leases(prefix=text) if text else []
        if len(matching) > 1:
            raise failure.of("INVALID", f"{len(matching)} leases begin with {text}: say more of it")
        if not matching:
            raise failure.of("NOT_FOUND", f"no lease begins with {text}")
        return matching[0]

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, name: str, where: str, stub: Any, method: str, request: Any) -> Any:
        return self._peer(name, where, stub).ask(method, request, self._timeout_ms)

    def _peer(self, name: str, where: str, stub: Any) -> Peer:
        if name not in self._peers:
            identity = Identity(self.description.trust_domain, Role.SERVICE, None, name)
            self._peers[name] = Peer(where, self._provider, identity, stub)
        return self._peers[name]


def new_request_id() -> str:
    """One that nobody else has; retries of one command carry the same."""
    return secrets.token_hex(16)


def kind_name(number: int) -> str:
    return KIND_NAMES.get(number, str(number))  # type: ignore[call-overload, no-any-return]


def amount_of(kind: str, text: str) -> int:
    """In the kind's unit: a size for memory; a number of blocks, or a size, for blocks."""
    from grafos._cluster.layout import parse_size

    if kind == "block" and not text.isdigit():
        return -(-parse_size(text) // 4096)
    return parse_size(text)


def shown_amount(kind: str, amount: int) -> str:
    from grafos._cluster.layout import shown_size

    return shown_size(amount * 4096 if kind == "block" else amount)


def lease_row(lease: lease_pb2.Lease) -> dict[str, Any]:
    """A lease with the names that JSON readers get."""
    return {
        "lease_id": lease.lease_id, "kind": kind_name(lease.kind), "amount": lease.amount,
        "state": STATE_NAMES[lease.state], "stage": lease.stage, "node_id": lease.node_id,
        "tenant": lease.tenant, "holder": lease.holder, "epoch": lease.epoch,
        "generation": lease.generation, "ttl_ms": lease.ttl_ms,
        "granted_at_ms": lease.granted_at_ms, "end_ms": lease.end_ms,
        "lifetime_end_ms": lease.lifetime_end_ms or None, "cause": lease.cause,
        "reason": lease.reason, "unconfirmed": lease.unconfirmed,
        "on_holder_exit": lease.policy.on_holder_exit, "extent_offset": lease.extent_offset,
        "fence_cause": lease.fence_cause, "fence_evidence": dict(lease.fence_evidence),
        "fenced_at_ms": lease.fenced_at_ms or None, "grace_ms": lease.grace_ms,
        "key_ids": list(lease.key_ids), "on_disconnect": lease.policy.on_disconnect,
        "cleared": lease.cleared,
    }  # fmt: skip
