"""The ledger as admission uses it: batched commits and renewals, and plain look-ups.

Rules. A refusal is worth a record but no message of its own: it travels with the next commit, or
by itself a second later. One that could not be handed over is tried again, so after a broken
connection it may be recorded twice. It is dropped only for want of room, and counted all the same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.lease import LeaseId
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2
from grafos_proto.v1.ledger_pb2_grpc import LedgerServiceStub
from grafos_proto.wire.coalescing import Coalescer
from services.runtime.client import Remote
from services.runtime.faults import fault

BATCH_MAX: Final = 128
"""Half of what the ledger takes in one message: requests are about 1 KiB at most, and a message of
ours has 256 KiB."""
REFUSALS_MAX: Final = 1_024
"""Refusals that may wait to be recorded; more are counted by the metrics alone."""
REFUSALS_PER_COMMIT_MAX: Final = 64
LOOK_TIMEOUT_MS: Final = 5_000
COMMIT_TIMEOUT_MS: Final = 10_000
UPKEEP_TIMEOUT_MS: Final = 2_000
PAGE_LEASES: Final = 10_000
PAGES_MAX: Final = 1_000
"""A bound on paging; 1,000 pages of half a MiB are a million leases."""


class Ledger:
    """Safe from any thread."""

    def __init__(self, remote: Remote[LedgerServiceStub]) -> None:
        self._remote = remote
        self._refusals: deque[ledger_pb2.Command] = deque()
        self._lock = threading.Lock()
        self.commit: Coalescer[ledger_pb2.Command, ledger_pb2.Outcome] = Coalescer(
            self.commit_all, BATCH_MAX
        )
        self.renew: Coalescer[ledger_pb2.LedgerRenew, ledger_pb2.Outcome] = Coalescer(
            self._renew, BATCH_MAX
        )

    def record_refusal(self, refusal: ledger_pb2.Refusal) -> None:
        """With the next commit, or when `flush_refusals` is called."""
        with self._lock:
            if len(self._refusals) < REFUSALS_MAX:
                self._refusals.append(ledger_pb2.Command(refusal=refusal))

    def flush_refusals(self) -> None:
        if self._refusals:
            self.commit_all([], timeout_ms=UPKEEP_TIMEOUT_MS)

    def commit_each(
        self, commands: Sequence[ledger_pb2.Command], timeout_ms: int
    ) -> Sequence[ledger_pb2.Outcome]:
        """As `commit`, for what came together: it goes together, without waiting for anybody."""
        if len(commands) == 1:
            return [self.commit(commands[0], timeout_ms)]
        return self.commit_all(commands, min(timeout_ms, COMMIT_TIMEOUT_MS))

    def renew_each(
        self, asks: Sequence[ledger_pb2.LedgerRenew], timeout_ms: int
    ) -> Sequence[ledger_pb2.Outcome]:
        if len(asks) == 1:
            return [self.renew(asks[0], timeout_ms)]
        return self._renew(asks, min(timeout_ms, COMMIT_TIMEOUT_MS))

    def commit_all(
        self, commands: Sequence[ledger_pb2.Command], timeout_ms: int = COMMIT_TIMEOUT_MS
    ) -> Sequence[ledger_pb2.Outcome]:
        """One outcome for each of at most `BATCH_MAX`; refusals that wait travel along."""
        failure.invariant(len(commands) <= BATCH_MAX, "a batch fits in a message")
        fault("admission.commit")
        refusals = self._take_refusals()
        request = ledger_pb2.CommitRequest(commands=[*commands, *refusals])
        try:
            response = self._remote.call("Commit", request, timeout_ms=timeout_ms)
        except FabricError:
            self._put_back(refusals)
            raise
        outcomes: list[ledger_pb2.Outcome] = list(response.outcomes[: len(commands)])
        return outcomes

    def _take_refusals(self) -> list[ledger_pb2.Command]:
        with self._lock:
            count = min(REFUSALS_PER_COMMIT_MAX, len(self._refusals))
            return [self._refusals.popleft() for _ in range(count)]

    def _put_back(self, refusals: Sequence[ledger_pb2.Command]) -> None:
        with self._lock:
            room = max(0, REFUSALS_MAX - len(self._refusals))
            self._refusals.extendleft(reversed(refusals[:room]))

    def _renew(
        self, asks: Sequence[ledger_pb2.LedgerRenew], timeout_ms: int = COMMIT_TIMEOUT_MS
    ) -> Sequence[ledger_pb2.Outcome]:
        request = ledger_pb2.LedgerRenewRequest(renewals=asks)
        response = self._remote.call("Renew", request, timeout_ms=timeout_ms)
        outcomes: list[ledger_pb2.Outcome] = list(response.outcomes)
        return outcomes

    def get(self, lease_id: LeaseId) -> lease_pb2.Lease:
        request = admission_pb2.GetLeaseRequest(lease_id=lease_id)
        found: lease_pb2.Lease = self._remote.call("Get", request, timeout_ms=LOOK_TIMEOUT_MS)
        return found

    def receipt_keys(self) -> list[lease_pb2.VerificationKey]:
        """With which the receipts of all nodes are verified, those of former nodes included."""
        snapshot: ledger_pb2.SnapshotResponse = self._remote.call(
            "Snapshot", ledger_pb2.SnapshotRequest(), timeout_ms=LOOK_TIMEOUT_MS
        )
        return [key for key in snapshot.keys if key.use == "receipt"]

    def pages(
        self, request: admission_pb2.ListLeasesRequest
    ) -> Iterator[admission_pb2.ListLeasesResponse]:
        """Everything that matches, page by page, as large as they come."""
        asked = admission_pb2.ListLeasesRequest()
        asked.CopyFrom(request)
        asked.limit = PAGE_LEASES
        for _ in range(PAGES_MAX):
            page: admission_pb2.ListLeasesResponse = self._remote.call(
                "List", asked, timeout_ms=COMMIT_TIMEOUT_MS
            )
            yield page
            if not page.next:
                return
            asked.after = page.next

    def watch(
        self, request: ledger_pb2.WatchRequest
    ) -> tuple[Iterator[ledger_pb2.WatchResponse], Callable[[], Any]]:
        """The events, and what ends them."""
        return self._remote.stream("Watch", request)
