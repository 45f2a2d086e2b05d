"""The node's line to the ledger: registers each second, reports what was bound, sends receipts.

Rules. Everything here repeats until it is acknowledged, and everything it sends may arrive twice.
A receipt is signed anew at each sending, with the key that is in force then. What comes back is
handed to control as it came; nothing is decided here. Three threads, so that a slow answer to one
kind of message does not hold up the others: registration carries the readiness evidence and must be
on time. A ledger that is away costs one try per back-off period, never a tenant's time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final, Protocol

import grpc

from grafos_core.failure import FabricError
from grafos_core.node_effects import ReceiptFacts
from grafos_proto.v1 import ledger_pb2, ledger_pb2_grpc
from grafos_proto.wire import failures
from grafos_proto.wire.credentials import PeerChannel
from services.runtime.faults import fault

GATHER_S: Final = 0.05
"""How long a report of what was bound waits for others to go with."""
REGISTER_S: Final = 1.0
"""The registration lives for 3 s: two renewals may get lost."""
CALL_S: Final = 2.0
RECEIPTS_MAX: Final = 256
BOUND_MAX: Final = 1_024
BACK_OFF_S_MIN, BACK_OFF_S_MAX = 0.05, 2.0

Reported = tuple[str, int, int, str]
"""(lease id, epoch, generation, stage) of a lease that was bound; the stage where it is revoked."""


class Owner(Protocol):
    """Control, as seen from here. All of it is thread-safe and returns at once."""

    def registration(self) -> ledger_pb2.RegisterRequest:
        """What the node says of itself now."""

    def name(self) -> tuple[str, str]:
        """The node's id and its incarnation."""

    def registered(self, response: ledger_pb2.RegisterResponse) -> None: ...

    def unreachable(self, why: str) -> None: ...

    def credited(self, receipt: ReceiptFacts, refusal: FabricError | None) -> None: ...

    def bound_reported(self, report: Reported, refusal: FabricError | None) -> None: ...


class Outbox:
    """What waits to be sent. One lock, and a bell for each who waits: to wake a thread that has
    nothing to do costs those that have."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.new_receipt, self.new_bound, self.settled = (
            threading.Condition(self.lock) for _ in range(3)
        )
        self.receipts: dict[str, ReceiptFacts] = {}
        self.bound: dict[str, Reported] = {}
        self.stopped = threading.Event()


class LedgerLink:
    """Constructed without effect; `start` makes its threads."""

    def __init__(
        self, channel: PeerChannel, owner: Owner, sign: Callable[[ReceiptFacts], str]
    ) -> None:
        self._channel, self._owner, self._sign = channel, owner, sign
        self._outbox = Outbox()
        self._register_now = threading.Event()
        self._made: tuple[grpc.Channel, ledger_pb2_grpc.LedgerServiceStub] | None = None

    def start(self) -> None:
        for work in (self._register_always, self._report_always, self._credit_always):
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True).start()

    def stop(self) -> None:
        box = self._outbox
        with box.lock:
            box.stopped.set()
            for bell in (box.new_receipt, box.new_bound, box.settled):
                bell.notify_all()
        self._register_now.set()

    def register_soon(self) -> None:
        """Something that the registration carries has changed."""
        self._register_now.set()

    def send_receipt(self, receipt: ReceiptFacts) -> None:
        """Until the ledger has answered. A second receipt for a lease replaces the first."""
        with self._outbox.lock:
            self._outbox.receipts[receipt.lease_id] = receipt
            self._outbox.new_receipt.notify()

    def report_bound(self, report: Reported) -> None:
        with self._outbox.lock:
            self._outbox.bound[report[0]] = report
            self._outbox.new_bound.notify()

    def forget_bound(self, lease_id: str) -> None:
        """The lease has ended: its receipt says more."""
        with self._outbox.lock:
            self._outbox.bound.pop(lease_id, None)

    def wait_sent(self, timeout_s: float) -> bool:
        """Whether every receipt was acknowledged in time."""
        with self._outbox.lock:
            return self._outbox.settled.wait_for(lambda: not self._outbox.receipts, timeout_s)

    def _register_always(self) -> None:
        while not self._outbox.stopped.is_set():
            self._register_now.clear()
            try:
                self._owner.registered(self._register())
            except (FabricError, OSError) as cause:
                self._owner.unreachable(str(cause))
            self._register_now.wait(REGISTER_S)

    def _register(self) -> ledger_pb2.RegisterResponse:
        fault("register.send")
        with failures.status_to_failures():
            return self._stub().Register(self._owner.registration(), timeout=CALL_S)

    def _report_always(self) -> None:
        """Nobody waits for a report: what is bound within a moment goes together, and a lease that
        has ended by then is spared one."""
        box = self._outbox

        def next_batch() -> list[Reported]:
            with box.lock:
                box.new_bound.wait_for(lambda: box.bound or box.stopped.is_set())
            box.stopped.wait(GATHER_S)
            with box.lock:
                return list(box.bound.values())[:BOUND_MAX]

        self._always(lambda: self._report(next_batch()))

    def _credit_always(self) -> None:
        """Somebody waits for a credit: it goes at once."""
        box = self._outbox

        def next_batch() -> dict[str, ReceiptFacts]:
            with box.lock:
                box.new_receipt.wait_for(lambda: box.receipts or box.stopped.is_set())
                return dict(list(box.receipts.items())[:RECEIPTS_MAX])

        self._always(lambda: self._credit(next_batch()))

    def _always(self, send_batch: Callable[[], None]) -> None:
        back_off_s = BACK_OFF_S_MIN
        while not self._outbox.stopped.is_set():
            try:
                send_batch()
                back_off_s = BACK_OFF_S_MIN
            except (FabricError, OSError):
                self._outbox.stopped.wait(back_off_s)
                back_off_s = min(2 * back_off_s, BACK_OFF_S_MAX)

    def _report(self, bound: list[Reported]) -> None:
        if not bound:
            return
        node_id, incarnation = self._owner.name()
        request = ledger_pb2.ReportBoundRequest(
            node_id=node_id,
            incarnation=incarnation,
            bound=[
                ledger_pb2.Bound(lease_id=lease_id, epoch=epoch, generation=generation, stage=stage)
                for lease_id, epoch, generation, stage in bound
            ],
        )
        with failures.status_to_failures():
            response = self._stub().ReportBound(request, timeout=CALL_S)
        for report, outcome in zip(bound, response.outcomes, strict=True):
            with self._outbox.lock:
                if self._outbox.bound.get(report[0]) == report:
                    del self._outbox.bound[report[0]]
            self._owner.bound_reported(report, refusal_of(outcome))

    def _credit(self, receipts: dict[str, ReceiptFacts]) -> None:
        if not receipts:
            return
        fault("receipt.send")
        request = ledger_pb2.CreditRequest(receipts=[self._sign(r) for r in receipts.values()])
        with failures.status_to_failures():
            response = self._stub().Credit(request, timeout=CALL_S)
        for receipt, outcome in zip(receipts.values(), response.outcomes, strict=True):
            with self._outbox.lock:
                if self._outbox.receipts.get(receipt.lease_id) is receipt:
                    del self._outbox.receipts[receipt.lease_id]
                if not self._outbox.receipts:
                    self._outbox.settled.notify_all()
            self._owner.credited(receipt, refusal_of(outcome))

    def _stub(self) -> ledger_pb2_grpc.LedgerServiceStub:
        channel, made = self._channel.get(), self._made
        if made is None or made[0] is not channel:
            made = self._made = (channel, ledger_pb2_grpc.LedgerServiceStub(channel))
        return made[1]


def refusal_of(outcome: ledger_pb2.Outcome) -> FabricError | None:
    return failures.failure_of(outcome.failure) if outcome.HasField("failure") else None
