"""Somebody who stands outside a running fabric and writes down all that can be seen of it.

Rules. It looks through every window there is and trusts none alone: what the ledger and each node
say, which memories lie open in which process, each chain as its writer has it, and the collector's
export, verified with nothing but the keys in it. It asks as an operator and changes nothing; only
`end_all` gives an order.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from grafos._calls import Peer
from grafos._cli.chains import _key_id, _verify, export_lines
from grafos._cluster.description import ClusterDescription
from grafos._local import LocalFabric
from grafos_core import chain, export, surface
from grafos_core.chain import Record
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    lease_pb2,
    ledger_pb2,
    ledger_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
)
from grafos_proto.wire import certificates, failures
from grafos_proto.wire.identity import request_identity
from tests.chaos.laws import Book, MemorySeen, Scene, Slice, Told, memories_are_gone

ANSWER_MS: Final = 10_000
LOOK_S: Final = 0.05
PAGE: Final = 1_000
KIND_NAMES: Final = {lease_pb2.KIND_MEM: "mem", lease_pb2.KIND_BLOCK: "block"}
RELEASED: Final = lease_pb2.LEASE_STATE_RELEASED
FENCED: Final = lease_pb2.LEASE_STATE_FENCED
ENDED: Final = frozenset({lease_pb2.LEASE_STATE_ENDING, RELEASED, FENCED})
_MEMORY = re.compile(r"/memfd:grafos:([0-9a-f]{32}):([0-9a-f]{32}) \(deleted\)")


class Onlooker:
    """Looks at one fabric that runs on this machine."""

    def __init__(self, fabric: LocalFabric) -> None:
        self._fabric = fabric
        self._description: ClusterDescription = fabric.description
        shown = request_identity(
            self._description.identity_socket,
            certificates.new_tls_key(),
            "operator",
            now_ms=time.time_ns() // 1_000_000,
        )
        self._provider = lambda: shown
        where = self._description
        self._ledger = self._service("ledger", where.ledger, ledger_pb2_grpc.LedgerServiceStub)
        self._admission = self._service(
            "admission", where.admission_control, admission_pb2_grpc.AdmissionServiceStub
        )
        self._audit = self._service("audit", where.audit, audit_pb2_grpc.AuditServiceStub)
        self._nodes = {
            node.node_id: self._peer(
                node.control, Role.NODE, node.node_id, node_pb2_grpc.NodeControlStub
            )
            for node in where.nodes
        }

    def close(self) -> None:
        for peer in (self._ledger, self._admission, self._audit, *self._nodes.values()):
            peer.close()

    def _service(self, name: str, endpoint: str, stub: Any) -> Peer:
        return self._peer(endpoint, Role.SERVICE, name, stub)

    def _peer(self, endpoint: str, role: Role, name: str, stub: Any) -> Peer:
        who = Identity(self._description.trust_domain, role, None, name)
        return Peer(endpoint, self._provider, who, stub)

    # what the services say

    def snapshot(self) -> ledger_pb2.SnapshotResponse:
        found: ledger_pb2.SnapshotResponse = self._ledger.ask(
            "Snapshot", ledger_pb2.SnapshotRequest(), ANSWER_MS
        )
        return found

    def books(self) -> list[Book]:
        return books_of(self.snapshot())

    def leases(self) -> list[lease_pb2.Lease]:
        """Every lease that is charged to a node: all but those that were given back."""
        found: list[lease_pb2.Lease] = []
        after = ""
        while True:
            request = admission_pb2.ListLeasesRequest(limit=PAGE, after=after)
            page = self._ledger.ask("List", request, ANSWER_MS)
            found += page.leases
            after = page.next
            if not after:
                return found

    def node_slices(self) -> list[Slice]:
        """What each node charges, as it says itself."""
        found: list[Slice] = []
        for node_id, peer in self._nodes.items():
            answer = peer.ask("ListLeases", node_pb2.ListNodeLeasesRequest(), ANSWER_MS)
            found += [
                Slice(
                    each.lease_id, node_id, KIND_NAMES[each.kind], each.amount, each.extent_offset
                )
                for each in answer.leases
                if each.stage != "sealed"
            ]
        return found

    def end_all(self) -> None:
        """Order the end of every lease that still lives."""
        live = [each.lease_id for each in self.leases() if each.state not in ENDED]
        for start in range(0, len(live), 256):
            request = admission_pb2.RevokeRequest(
                request_id=secrets.token_hex(16),
                lease_ids=live[start : start + 256],
                reason="the test is over",
            )
            self._admission.ask("Revoke", request, ANSWER_MS)

    def clear_fences(self) -> dict[str, str]:
        """Order the clear of every fence, for those who accept residue; lease to cause."""
        fenced = {each.lease_id: each.fence_cause for each in self.leases() if each.state == FENCED}
        orders = [
            ledger_pb2.Command(
                clear=ledger_pb2.ClearFence(
                    request_id=secrets.token_hex(16), lease_id=lease_id, reason="chaos",
                    accept_residue=True,
                )
            )
            for lease_id in fenced
        ]  # fmt: skip
        if orders:
            request = ledger_pb2.CommitRequest(commands=orders)
            for outcome in self._ledger.ask("Commit", request, ANSWER_MS).outcomes:
                if outcome.HasField("failure"):
                    raise failures.failure_of(outcome.failure)
        return fenced

    def unsettled(
        self, among: Iterable[str] | None = None, *, also_fenced: bool = False
    ) -> list[str]:
        """Leases whose capacity is not back; of all, or of these."""
        wanted = None if among is None else set(among)
        settled = {RELEASED, FENCED} if also_fenced else {RELEASED}
        return [
            f"{each.lease_id} ({lease_pb2.LeaseState.Name(each.state)}, {each.cause or 'lives'}, "
            f"{each.node_id}, {each.fence_cause} {dict(each.fence_evidence) or ''})"
            for each in self.leases()
            if each.state not in settled and (wanted is None or each.lease_id in wanted)
        ]

    def wait_settled(
        self, among: Iterable[str] | None, seconds: float, *, also_fenced: bool = False
    ) -> list[str]:
        """What is unsettled when all is settled, or when the time is up.

        With `also_fenced` a fence settles it, too.
        """
        wanted = None if among is None else list(among)
        until = time.monotonic() + seconds
        while True:
            try:
                left = self.unsettled(wanted, also_fenced=also_fenced)
            except FabricError as refused:
                left = [f"the ledger does not answer: {refused}"]
            if not left or time.monotonic() >= until:
                return left
            time.sleep(LOOK_S)

    # the chains

    def ledger_chain(self) -> list[Record]:
        """As the ledger itself streams it, from the first record to the present one."""
        revision = self.snapshot().revision
        records: list[Record] = []
        request = ledger_pb2.WatchRequest(from_revision=0)
        calls = self._ledger.stub.Watch(request, timeout=ANSWER_MS / 1000)
        try:
            for part in failures.each_to_failures(calls):
                records += [chain.parse(event.record) for event in part.events]
                if part.revision >= revision:
                    break
        finally:
            calls.cancel()
        return records

    def node_chains(self) -> dict[str, list[Record]]:
        """As they lie on each node's disk: whole batches of the spool."""
        found = {}
        for node in self._description.nodes:
            folder = self._fabric.state_dir / f"node-{node.node_id}" / "surface"
            found[node.node_id] = list(_spooled(folder))
        return found

    def audit_stream(self, method: str, request: Any) -> Any:
        """What `export_lines` asks the collector through."""
        calls = getattr(self._audit.stub, method)(request, timeout=ANSWER_MS / 1000)
        return failures.each_to_failures(calls)

    def export(self) -> list[str]:
        """The collector's whole export, line by line."""
        return list(export_lines(self, "", set()))  # type: ignore[arg-type]

    def collected(self) -> tuple[dict[str, list[Record]], list[str]]:
        """The chains of an export by origin, and what offline verification says against it."""
        lines = self.export()
        report = export.verify_export(lines, _verify, _key_id)
        found: dict[str, list[Record]] = {}
        for record in records_of(lines):
            found.setdefault(record.origin, []).append(record)
        return found, [
            f"law 9, line {line} of the export: {what}" for line, what in report.problems
        ]

    # the machine

    def memories(self) -> list[MemorySeen]:
        """Every memory of this fabric's leases that any process has open."""
        ours = {node.incarnation for node in self.snapshot().nodes}
        return [each for each in open_memories() if each.incarnation in ours]

    def outliving(self) -> list[str]:
        """Memories that are still there though the ledger has given their capacity to others."""
        before = {each.lease_id for each in self.memories() if each.size_bytes}
        given_back = before - {each.lease_id for each in self.leases()}
        return memories_are_gone(self.memories(), given_back)

    # all of it

    def scene(self, told: Sequence[Told], seconds: float) -> tuple[Scene, list[str]]:
        """Everything, once the collector has caught up; and what could not be verified."""
        owed = self._wait_collected(seconds)
        kept, wrong = self.collected()
        ledger, nodes = self.ledger_chain(), self.node_chains()
        held = [slice_of(each) for each in self.leases() if each.state != RELEASED]
        scene = Scene(
            self.books(), held, self.node_slices(), self.memories(), ledger, nodes, told, kept, owed
        )
        return scene, wrong

    def _wait_collected(self, seconds: float) -> dict[str, int]:
        """By origin, how many records there are now; returns when the collector has as many."""
        owed = {name: own[-1].number for name, own in self.node_chains().items() if own}
        owed["ledger"] = self.snapshot().revision
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            answer = self._audit.ask("Head", audit_pb2.HeadRequest(), ANSWER_MS)
            kept = {head.origin: head.number for head in answer.heads}
            if all(kept.get(origin, 0) >= number for origin, number in owed.items()):
                break
            time.sleep(LOOK_S)
        return owed


def books_of(snapshot: ledger_pb2.SnapshotResponse) -> list[Book]:
    return [
        Book(
            node.node_id, KIND_NAMES[book.kind], book.total, book.free, book.leased, book.ending,
            book.fenced, book.withheld,
        )
        for node in snapshot.nodes
        for book in node.books
    ]  # fmt: skip


def slice_of(lease: lease_pb2.Lease) -> Slice:
    return Slice(
        lease.lease_id, lease.node_id, KIND_NAMES[lease.kind], lease.amount, lease.extent_offset
    )


def records_of(lines: Iterable[str]) -> Iterator[Record]:
    """The records of an export."""
    for line in lines:
        value = json.loads(line)
        if value["type"] == "record":
            yield chain.parse(base64.b64decode(value["record"]))


def open_memories() -> Iterator[MemorySeen]:
    """Of every lease of every fabric, in the processes that we may look into."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            descriptors = os.listdir(folder / "fd")
        except OSError:
            continue  # it ended, or is another user's
        for number in descriptors:
            path = folder / "fd" / number
            try:
                found = _MEMORY.fullmatch(os.readlink(path))
                if found:
                    size = path.stat().st_size
                    yield MemorySeen(int(folder.name), found[1], found[2], size)
            except OSError:
                continue  # closed while we looked


def _spooled(folder: Path) -> Iterator[Record]:
    segments = sorted(folder.glob("spool.*"), key=lambda path: int(path.suffix[1:]))
    for segment in segments:
        for batch in surface.read_batches(segment.read_bytes()):
            yield from batch.records
