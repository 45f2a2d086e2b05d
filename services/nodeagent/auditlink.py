"""Carries this node's sealed records to the audit collector, in order, until acknowledged.

Rules. Only whole sealed batches leave. Where to begin is the collector's to say: its head is asked
for at each new start, and whatever it has already is not sent again. A collector that is away costs
a try now and then and lets the spool grow, nothing else waits for it. One that refuses (a gap, a
fork, a rollback) is asked again rarely: only a person can settle that, and the gate says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from grafos_core.chain import Record, Seal
from grafos_core.failure import FabricError
from grafos_proto.v1 import audit_pb2, audit_pb2_grpc
from services.runtime.client import Remote
from services.runtime.faults import fault
from services.runtime.logs import Log

RECORDS_MAX: Final = 256
BYTES_MAX: Final = 192 * 1024
CALL_MS: Final = 5_000
BACK_OFF_S_MIN, BACK_OFF_S_MAX = 0.25, 5.0
GATHER_S: Final = 0.2
"""Records come in crowds; sent one by one they would cost more than what they tell of."""


class SealedBatch(Protocol):
    @property
    def records(self) -> Sequence[Record]: ...

    @property
    def seal(self) -> Seal: ...


class Spool(Protocol):
    """The node's durable records, as far as sending them goes. Thread-safe."""

    def batches_after(self, number: int, batches_max: int) -> Sequence[SealedBatch]:
        """Batches with records beyond `number`, oldest first."""

    def acknowledged(self, number: int) -> None:
        """The collector has everything up to here."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose chain it is, and the key that seals it."""

    node_id: str
    incarnation: str
    public_key: bytes
    key_id: str


class AuditLink:
    """Constructed without effect; `start` makes the one thread."""

    def __init__(
        self,
        remote: Remote[audit_pb2_grpc.AuditServiceStub],
        origin: Origin,
        spool: Spool,
        acknowledged: Callable[[int], None],
        log: Log,
    ) -> None:
        self._remote, self._origin, self._spool = remote, origin, spool
        self._acknowledged, self._log = acknowledged, log
        self._new = threading.Event()
        self._stopped = threading.Event()
        self._hurry = threading.Event()
        self._caught_up = threading.Event()
        self._number: int | None = None
        """The last record that the collector has; None: it has to be asked."""

    def start(self) -> None:
        threading.Thread(target=self._run, name="audit", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self._hurry.set()
        self._new.set()
        self._remote.close()

    def wait_sent(self, timeout_s: float) -> bool:
        """Whether the collector has everything that was sealed before this call."""
        self._caught_up.clear()
        self._hurry.set()
        self._new.set()
        return self._caught_up.wait(timeout_s)

    def sealed(self) -> None:
        """There is more to send."""
        self._new.set()

    def _run(self) -> None:
        back_off_s = BACK_OFF_S_MIN
        while not self._stopped.is_set():
            try:
                if not self._send_next():
                    self._caught_up.set()
                    self._new.wait(BACK_OFF_S_MAX)
                    self._hurry.wait(GATHER_S)
                    self._new.clear()
                back_off_s = BACK_OFF_S_MIN
            except (FabricError, OSError) as error:
                self._number = None
                self._log.warning("audit.away", why=str(error))
                self._stopped.wait(back_off_s)
                back_off_s = min(2 * back_off_s, BACK_OFF_S_MAX)

    def _send_next(self) -> bool:
        """Whether there was anything to send."""
        if self._number is None:
            self._number = self._ask_head()
            self._spool.acknowledged(self._number)
            self._acknowledged(self._number)
        batches = _fitting(self._spool.batches_after(self._number, RECORDS_MAX), self._number)
        if not batches:
            return False
        fault("spool.send")
        answer = self._remote.call("Append", self._request(batches), timeout_ms=CALL_MS)
        self._number = max(self._number, answer.number)
        self._spool.acknowledged(self._number)
        self._acknowledged(self._number)
        return True

    def _ask_head(self) -> int:
        request = audit_pb2.HeadRequest(
            origin=self._origin.node_id, incarnation=self._origin.incarnation
        )
        heads = self._remote.call("Head", request, timeout_ms=CALL_MS).heads
        return max((head.number for head in heads), default=0)

    def _request(self, batches: Sequence[SealedBatch]) -> audit_pb2.AppendRequest:
        seals = [
            audit_pb2.Seal(
                number=batch.seal.number,
                hash=batch.seal.hash,
                key_id=batch.seal.key_id,
                signature=batch.seal.signature,
            )
            for batch in batches
        ]
        return audit_pb2.AppendRequest(
            origin=self._origin.node_id,
            incarnation=self._origin.incarnation,
            records=[record.data for batch in batches for record in batch.records],
            seals=seals,
            public_key=self._origin.public_key,
            key_id=self._origin.key_id,
        )


def _fitting(batches: Sequence[SealedBatch], number: int) -> list[SealedBatch]:
    """As many whole batches beyond `number` as one message holds, at least one."""
    chosen: list[SealedBatch] = []
    records = size = 0
    for batch in batches:
        if batch.seal.number <= number:
            continue
        records += len(batch.records)
        size += sum(len(record.data) for record in batch.records)
        if chosen and (records > RECORDS_MAX or size > BYTES_MAX):
            break
        chosen.append(batch)
    return chosen
