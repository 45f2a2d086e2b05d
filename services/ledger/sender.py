"""Hands the ledger's sealed chain to the audit collector, and goes on from where that one is.

Rules. The event table is the spool: a collector that is away lets nothing grow but its own lag.
At each new connection the collector is asked how far it is; what it acknowledged is remembered only
as the place to go on from. One that knows more of us than we do has seen a later ledger than this
one: somebody restored an old copy, and that closes the gate `audit` until a person has looked.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

from grafos_core.chain import Seal
from grafos_core.failure import FabricError
from grafos_proto.v1 import audit_pb2, audit_pb2_grpc
from services.ledger.records import ORIGIN
from services.ledger.store import Store
from services.ledger.writer import Ledger
from services.runtime.client import Remote
from services.runtime.health import Readiness
from services.runtime.logs import Log

CALL_MS: Final = 5_000
AGAIN_MS_MIN, AGAIN_MS_MAX = 100, 5_000
IDLE_MS: Final = 1_000
GATHER_MS: Final = 100
"""Nobody waits for the collector: what happens within this time goes together."""


class Sender:
    def __init__(
        self, ledger: Ledger, store: Store, remote: Remote[audit_pb2_grpc.AuditServiceStub], *,
        readiness: Readiness, log: Log,
    ) -> None:  # fmt: skip
        self._ledger, self._remote, self._readiness, self._log = ledger, remote, readiness, log
        self._incarnation, self._key = store.incarnation, store.key
        self._wake, self._ended = threading.Event(), threading.Event()
        self.acknowledged: int | None = None
        """The last record that the collector has; None: not asked yet."""
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        self._ended.set()
        self._wake.set()
        self._remote.close()
        if self._thread.is_alive():
            self._thread.join(CALL_MS / 1000)

    def _run(self) -> None:
        tries = 0
        while not self._ended.is_set():
            try:
                more = self._turn()
                tries = 0
            except FabricError as error:
                tries, more = tries + 1, False
                self._refused(error, tries)
            if not more:
                pause_ms = min(AGAIN_MS_MAX, AGAIN_MS_MIN * 2**tries) if tries else IDLE_MS
                self._wake.wait(pause_ms / 1000)
                self._ended.wait(GATHER_MS / 1000)
                self._wake.clear()

    def _turn(self) -> bool:
        """Send one batch; whether there may be more."""
        if self.acknowledged is None:
            self.acknowledged = self._ask_head()
        after = self.acknowledged
        records, seals = self._ledger.with_store(lambda store: store.sealed_page(after))
        if not records:
            return False
        answer = self._append(records, seals)
        self.acknowledged = answer.number
        return True

    def _append(self, records: Sequence[bytes], seals: Sequence[Seal]) -> Any:
        request = audit_pb2.AppendRequest(
            origin=ORIGIN, incarnation=self._incarnation, records=records,
            seals=[
                audit_pb2.Seal(
                    number=s.number, hash=s.hash, key_id=s.key_id, signature=s.signature
                )
                for s in seals
            ],
            public_key=self._key.public_key, key_id=self._key.key_id,
        )  # fmt: skip
        return self._remote.call("Append", request, timeout_ms=CALL_MS, tries_max=1)

    def _ask_head(self) -> int:
        """How far the collector is. Where it knows us it is told, under seal, how far we are."""
        request = audit_pb2.HeadRequest(origin=ORIGIN, incarnation=self._incarnation)
        answer = self._remote.call("Head", request, timeout_ms=CALL_MS, tries_max=1)
        number = max((head.number for head in answer.heads), default=0)
        seal = self._ledger.with_store(lambda store: store.last_seal())
        if number and seal is not None:
            self._append([], [seal])
        self._readiness.open("audit")
        return number

    def _refused(self, error: FabricError, tries: int) -> None:
        self.acknowledged = None
        if error.code in ("ROLLBACK", "FORK", "CHAIN", "SEAL_KEY"):
            self._readiness.close("audit", f"{error.code}: {error.detail}")
        if tries == 1 or error.code != "UNREACHABLE":
            self._log.warning("audit.refused", code=error.code, detail=error.detail)
