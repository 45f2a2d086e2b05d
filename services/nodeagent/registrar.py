"""What the node says of itself each second, and what it does with the ledger's answer.

Rules. The registration carries the evidence on which admission grants, so it is made anew for each
sending, from what is true then. The answer brings the keys in force, the number of the revocation
list and what the ledger still wants of this node; each of those may come any number of times. An
order among them that cannot be read concerns that order alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from grafos_core.failure import FabricError
from grafos_core.lease import Kind, check_lease_id
from grafos_core.node import Instant
from grafos_core.node_effects import Effect, ReceiptFacts
from grafos_proto.v1 import lease_pb2, ledger_pb2
from grafos_proto.wire import convert
from services.nodeagent.control import Control
from services.nodeagent.ledgerlink import Reported
from services.nodeagent.nodecontrol import target_of
from services.runtime.health import Readiness
from services.runtime.process import SERVING_GATE

PROTOCOL: Final = 1
SOFTWARE: Final = "grafos/0.1"
CALL_MS_MAX: Final = 2_000
CONTACT_GATES: Final = frozenset({"ledger", "revocations", SERVING_GATE})
"""The ledger knows better than we whether it hears us."""


@dataclass(slots=True)
class Endpoints:
    """Where this node is reached; `front` is known once the first front listens."""

    front: str = ""
    control: str = ""


class Registrar:
    """The owner of the line to the ledger: called from that line's threads."""

    def __init__(
        self,
        control: Control,
        capacities: Mapping[Kind, int],
        labels: Mapping[str, str],
        endpoints: Endpoints,
        readiness: Readiness,
    ) -> None:
        self._control, self._capacities = control, dict(capacities)
        self._labels, self._endpoints, self._readiness = dict(labels), endpoints, readiness
        self._send_live = True
        self._revocation_number = 0
        self.contact_ms: int | None = None
        """Boottime of the last answer."""
        self.register_soon: Callable[[], None] | None = None

    def announce(self, *, front: str, control: str) -> None:
        """Where this node is reached, from the next registration on."""
        self._endpoints.front, self._endpoints.control = front, control

    def changed(self) -> None:
        """The evidence has changed: whoever grants on it should know soon."""
        if self.register_soon is not None:
            self.register_soon()

    def registration(self) -> ledger_pb2.RegisterRequest:
        return self._control.loop.call(self._registration, CALL_MS_MAX)

    def name(self) -> tuple[str, str]:
        return self._control.node_id, self._control.rooms.book.incarnation

    def registered(self, response: ledger_pb2.RegisterResponse) -> None:
        control = self._control
        now = control.now()
        self.contact_ms, self._send_live = now.boot_ms, response.send_live
        control.rooms.keys.replace(response.keys, now.wall_ms, response.revoked_keys)
        if response.revocation_number > self._revocation_number:
            self._revocation_number = response.revocation_number
            control.rooms.book.note_revocation(response.revocation_number)
        number, issued_ms = response.revocation_number, response.now_ms

        def heard(now: Instant) -> list[Effect]:
            if issued_ms:
                control.core.learn_time(issued_ms, now)
            return control.core.heard(number, now)

        control.post(heard)
        for obligation in response.obligations:
            try:
                self._oblige(obligation)
            except FabricError as refusal:
                control.rooms.log.warning(
                    "obligation.refused", lease_id=obligation.lease_id, code=refusal.code
                )

    def unreachable(self, why: str) -> None:
        self._control.rooms.log.debug("ledger.unreachable", why=why)

    def credited(self, receipt: ReceiptFacts, refusal: FabricError | None) -> None:
        control = self._control
        if refusal is not None:
            control.rooms.log.warning(
                "receipt.refused", lease_id=receipt.lease_id, code=refusal.code
            )
            return  # the core sends it again
        control.post(
            lambda now: control.core.credited(receipt.lease_id, receipt.epoch, receipt.outcome, now)
        )

    def bound_reported(self, report: Reported, refusal: FabricError | None) -> None:
        if refusal is not None:
            self._control.rooms.log.warning("bound.refused", lease_id=report[0], code=refusal.code)

    def _oblige(self, obligation: ledger_pb2.Obligation) -> None:
        control = self._control
        core = control.core
        if obligation.action == "clear":
            order = control.clear_order(obligation.clear_order)
            control.post(lambda now: core.clear(None, order, now))
            return
        control.post(lambda now: self._obliged(obligation, now))

    def _obliged(self, obligation: ledger_pb2.Obligation, now: Instant) -> list[Effect]:
        """In the owner's thread."""
        core, lease = self._control.core, obligation.lease
        try:
            if lease.kind == lease_pb2.KIND_UNSPECIFIED:  # the ledger does not know it either
                lease_id = check_lease_id(obligation.lease_id)
                target = self._control.known(lease_id, obligation.epoch)
            else:
                target = target_of(lease, obligation.lease_id, obligation.epoch)
        except FabricError:
            return []
        match obligation.action:
            case "burn":
                return core.burn(None, target, now)
            case "release":
                return core.withdraw(None, target, now)
            case "revoke":
                reason = lease.reason or lease.cause or "revoked"
                return core.revoke(None, target, obligation.grace_ms, reason, now)
        return []

    def _registration(self) -> ledger_pb2.RegisterRequest:
        control, book = self._control, self._control.rooms.book
        return ledger_pb2.RegisterRequest(
            version=lease_pb2.Version(protocol=PROTOCOL, software=SOFTWARE),
            node_id=control.node_id,
            incarnation=book.incarnation,
            boot_epoch=book.boot_epoch,
            offers=[
                ledger_pb2.Offer(kind=convert.kind_to_proto(kind), total=total)
                for kind, total in self._capacities.items()
            ],
            high_waters=[
                ledger_pb2.HighWater(kind=convert.kind_to_proto(kind), epoch=epoch)
                for kind, epoch in control.core.high_waters().items()
            ],
            live=self._live() if self._send_live else [],
            has_live=self._send_live,
            readiness=self._evidence(),
            front_endpoint=self._endpoints.front,
            control_endpoint=self._endpoints.control,
            labels=self._labels,
            receipt_key=self._receipt_key(),
            revocation_number=self._revocation_number,
            audit_head=book.head,
            audit_number=book.number,
            clears_proved_clean=control.core.clears_proved_clean,
        )

    def _live(self) -> list[ledger_pb2.Bound]:
        return [
            ledger_pb2.Bound(lease_id=lease_id, epoch=epoch, generation=generation)
            for lease_id, epoch, generation in self._control.core.live()
        ]

    def _evidence(self) -> lease_pb2.Readiness:
        closed = {
            name: why for name, why in self._readiness.closed().items() if name not in CONTACT_GATES
        }
        ready_kinds = [
            convert.kind_to_proto(kind)
            for kind in self._capacities
            if f"{kind.value}/device" not in closed
        ]
        whole = not any("/" not in name for name in closed)
        return lease_pb2.Readiness(ready=whole, closed_gates=closed, ready_kinds=ready_kinds)

    def _receipt_key(self) -> lease_pb2.VerificationKey:
        control, book = self._control, self._control.rooms.book
        owner = control.owner_id
        return lease_pb2.VerificationKey(
            key_id=book.key_id, owner=owner, use="receipt", public_key=book.public_key
        )
