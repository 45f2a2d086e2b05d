"""What becomes of a slice that is fenced: looked at by itself, cleared by somebody's word.

    FENCED ──its hour──► PROBING ──► FENCED           a probe measures, and frees nothing
       ▲ │                  │ clean, by itself, and the policy is on
       │ └─ clear order ─┐  ▼
       └──── failed ──── CLEARING ── erased and measured anew, or residue accepted ──► ENDED

Rules. A clear trusts no probe: what it frees it has erased and measured itself, a moment before. An
order that comes while a probe runs waits for its end, so that one slice is under one step at a
time. Without the policy nothing is ever freed by itself; and with it nothing that an operator's
probe has found, nor what was fenced because its device failed in use: a clean measurement does not
prove that a device works. Nor before the ledger has heard of the fence: what it does not know to be
fenced it cannot count as cleared. Few probes run at a time, and what they do is in the way of none
of the node's other work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from grafos_core import failure
from grafos_core.chain import EventKind
from grafos_core.failure import FabricError, invariant
from grafos_core.lease import EndCause, Kind, LeaseId
from grafos_core.node_effects import (
    Answer,
    Effect,
    FenceFacts,
    Instant,
    Ordered,
    Probed,
    Recovered,
    RequestId,
    Result,
    WardenDrop,
)
from grafos_core.node_endings import Endings, Limits, Wake
from grafos_core.node_lease import QUARANTINED, LeaseView, NodeLease, Phase
from grafos_core.quarantine import Quarantine
from grafos_core.receipt import Cleared, ClearOrder, Outcome, judge_clear
from grafos_core.teardown import Stage

PROBES_AT_ONCE: Final = 4
"""Of the node's own. A device that fails fences many slices in one moment."""
UNMADE: Final = "its device is still being made"


class Fences(Endings):
    """Quarantined slices. `clears_proved_clean` is the policy: off unless somebody opted in."""

    def __init__(
        self, node_id: str, incarnation: str, capacities: Mapping[Kind, int],
        recovered: Recovered, now: Instant, limits: Limits, *, clears_proved_clean: bool,
    ) -> None:  # fmt: skip
        super().__init__(node_id, incarnation, capacities, recovered, now, limits)
        self._clears_proved_clean = clears_proved_clean
        self._own_probes: set[LeaseId] = set()
        """Under way, by the node's own clock."""
        self._turns: deque[LeaseId] = deque()
        """Whose hour has come while enough probes were under way."""

    # Queries

    @property
    def clears_proved_clean(self) -> bool:
        return self._clears_proved_clean

    def leases(self, now: Instant) -> tuple[LeaseView, ...]:
        """What is charged, for people."""
        return tuple(lease.view(now, self._next_probe_ms(lease, now)) for lease in self._charged())

    def _next_probe_ms(self, lease: NodeLease, now: Instant) -> int | None:
        due_ms = self._timers.at_ms((lease.lease_id, Wake.PROBE))
        return None if due_ms is None else max(0, due_ms - now.boot_ms)

    # The beginning of a quarantine

    def _quarantined(self, lease: NodeLease, now: Instant, fence: FenceFacts | None) -> None:
        if fence is None:
            lease.quarantine = Quarantine(now.wall_ms)
        else:
            probes = fence.findings[-1].number if fence.findings else 0
            lease.quarantine = Quarantine(fence.receipt.ended_ms, fence.findings, probes)
        self._await_probe(lease, now)

    def _await_probe(self, lease: NodeLease, now: Instant) -> None:
        invariant(lease.quarantine is not None, "what is fenced has a record")
        if lease.quarantine is not None:
            due_ms = now.boot_ms + lease.quarantine.pause_ms()
            self._timers.set((lease.lease_id, Wake.PROBE), due_ms)

    # Looking

    def probe(self, request: RequestId, lease_id: str, now: Instant) -> list[Effect]:
        """Measure a fenced slice again; frees nothing, whatever is found."""
        effects = self.tick(now)
        try:
            lease = self._fenced(lease_id)
        except FabricError as refused:
            return [*effects, Answer(request, refused)]
        lease.probe_requests.append(request)
        if lease.phase is Phase.PROBING:
            return effects
        return effects + self._begin_probe(lease, now)

    def _fenced(self, lease_id: str) -> NodeLease:
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None:
            raise failure.of("NOT_FOUND", lease_id=lease_id)
        if lease.phase not in QUARANTINED:
            raise failure.of("PRECONDITION", "it is not fenced", lease_id=lease_id)
        if lease.phase is Phase.CLEARING or lease.order is not None:
            raise failure.of("DEGRADED", "it is being cleared already", lease_id=lease_id)
        if len(lease.probe_requests) >= self._limits.waiters_max:
            raise failure.of("RATE", "too many wait for this probe", lease_id=lease_id)
        return lease

    def _probe_due(self, lease: NodeLease, now: Instant) -> list[Effect]:
        if len(self._own_probes) >= PROBES_AT_ONCE:
            self._turns.append(lease.lease_id)
            return []
        self._own_probes.add(lease.lease_id)
        return self._begin_probe(lease, now)

    def _begin_probe(self, lease: NodeLease, now: Instant) -> list[Effect]:
        lease.move(Phase.PROBING)
        return self._begin_again(lease, Stage.ERASED, now)

    def _begin_again(self, lease: NodeLease, stage: Stage, now: Instant) -> list[Effect]:
        self._timers.cancel((lease.lease_id, Wake.PROBE))
        lease.teardown = self._teardown(lease, stage, now)
        self._timers.set((lease.lease_id, Wake.TEARDOWN), lease.teardown.deadline_ms)
        return self._go_on(lease, now)

    def _looked(self, lease: NodeLease, now: Instant, *, clean: bool) -> list[Effect]:
        if lease.unmade and lease.teardown is not None:
            lease.teardown.evidence["create"] = UNMADE
            clean = False
        if lease.phase is Phase.PROBING:
            return self._probed(lease, now, clean=clean)
        if clean:
            by = Cleared.OPERATOR if lease.order is not None else Cleared.POLICY
            return self._cleared(lease, now, by)
        if lease.order is not None and lease.order.accept_residue:
            return self._cleared(lease, now, Cleared.RESIDUE)
        return self._clear_failed(lease, now)

    def _probed(self, lease: NodeLease, now: Instant, *, clean: bool) -> list[Effect]:
        measured = self._task_over(lease)
        requests, lease.probe_requests = lease.probe_requests, []
        own = lease.lease_id in self._own_probes
        self._own_probes.discard(lease.lease_id)
        effects = self._write_down(lease, measured, now, clean=clean, asked=bool(requests))
        effects += [Answer(request, Probed(clean, measured)) for request in requests]
        if lease.order is not None:
            effects += self._begin_clear(lease, now)
        elif clean and own and self._may_clear(lease):
            effects += self._clear_by_policy(lease, now)
        else:
            self._await_probe(lease, now)
        return effects + self._next_turn(now)

    def _write_down(
        self, lease: NodeLease, measured: Mapping[str, Any], now: Instant, *, clean: bool,
        asked: bool,
    ) -> list[Effect]:  # fmt: skip
        known = lease.quarantine
        invariant(known is not None, "what is probed has a record")
        finding = known and known.found(
            measured, now.boot_ms, at_ms=now.wall_ms, clean=clean, asked=asked
        )
        if not finding:
            return []
        record = self._persist(("agent.probed", lease, finding.body()), seal_now=asked)
        return [record if asked else replace(record, may_wait=True)]

    def _next_turn(self, now: Instant) -> list[Effect]:
        while self._turns and len(self._own_probes) < PROBES_AT_ONCE:
            lease = self._leases.get(self._turns.popleft())
            waits = lease is not None and (lease.lease_id, Wake.PROBE) in self._timers
            if lease is not None and lease.phase is Phase.FENCED and not waits:
                return self._probe_due(lease, now)
        return []

    # Clearing

    def clear(self, request: RequestId | None, order: ClearOrder, now: Instant) -> list[Effect]:
        """Carry out an operator's order, signature verified: erase, measure, and only then free."""
        effects = self.tick(now)
        try:
            lease = self._clearable(order, now)
        except FabricError as refused:
            return effects + ([] if request is None else [Answer(request, refused)])
        lease.nonces.append(order.nonce)
        lease.order, lease.order_request = order, request
        effects.append(self._persist(("agent.clear_begun", lease, _order_body(order))))
        if lease.phase is Phase.PROBING:
            return effects
        return effects + self._begin_clear(lease, now)

    def _clearable(self, order: ClearOrder, now: Instant) -> NodeLease:
        lease = self._leases.get(LeaseId(order.lease_id))
        if lease is None or lease.phase not in QUARANTINED:
            raise failure.of("CLEAR", "nothing is fenced", lease_id=order.lease_id)
        judge_clear(
            order,
            lease_id=lease.lease_id,
            node_id=self.node_id,
            incarnation=self.incarnation,
            epoch=lease.epoch,
            nonce=order.nonce,
            now_ms=self._floor.now_ms(now),
        )
        if order.nonce in lease.nonces or len(lease.nonces) >= self._limits.nonces_max:
            raise failure.of("CLEAR", "the nonce is used", lease_id=order.lease_id)
        if lease.phase is Phase.CLEARING or lease.order is not None:
            raise failure.of("DEGRADED", "it is being cleared already", lease_id=order.lease_id)
        return lease

    def _may_clear(self, lease: NodeLease) -> bool:
        broken = lease.cause is EndCause.DEVICE_FAILED or lease.fence_cause.startswith("device:")
        return self._clears_proved_clean and not broken and lease.credited

    def _clear_by_policy(self, lease: NodeLease, now: Instant) -> list[Effect]:
        begun = ("agent.clear_begun", lease, _POLICY_BODY)
        return [self._persist(begun), *self._begin_clear(lease, now)]

    def _begin_clear(self, lease: NodeLease, now: Instant) -> list[Effect]:
        """Erase again, measure again: what a probe saw may be over."""
        lease.move(Phase.CLEARING)
        return self._begin_again(lease, Stage.REAPED, now)

    def _cleared(self, lease: NodeLease, now: Instant, by: Cleared) -> list[Effect]:
        order, request = lease.order, lease.order_request
        receipt = lease.receipt_facts(Outcome.CLEARED, EndCause.CLEARED, now, cleared=by)
        body = receipt.body() | (_order_body(order) if order else _POLICY_BODY)
        lease.order = lease.order_request = None
        lease.cause, lease.quarantine = EndCause.CLEARED, None
        effects: list[Effect] = [
            self._persist((EventKind.AGENT_CLEARED, lease, body)),
            WardenDrop(lease.lease_id),
        ]
        effects += self._free(lease, receipt, now)
        return effects + _answered(request, Ordered("sealed", receipt))

    def _clear_failed(self, lease: NodeLease, now: Instant) -> list[Effect]:
        """It stays fenced, and the order is used up."""
        order, request = lease.order, lease.order_request
        lease.order = lease.order_request = None
        measured = self._task_over(lease)
        if order is not None and lease.quarantine is not None:
            lease.quarantine.hasten()
        self._await_probe(lease, now)
        record = self._persist(("agent.clear_failed", lease, {"measured": measured}))
        refused = failure.of(
            "FENCED", str(measured.get("cause", "")), lease_id=lease.lease_id, epoch=lease.epoch
        )
        return [record, *_answered(request, refused)]

    def _task_over(self, lease: NodeLease) -> dict[str, Any]:
        """A probe or a clear has ended without freeing anything; what it measured."""
        self._timers.cancel((lease.lease_id, Wake.TEARDOWN))
        lease.move(Phase.FENCED)
        return dict(lease.teardown.measured()) if lease.teardown else {}

    # Laws

    def check(self) -> None:
        super().check()
        invariant(len(self._own_probes) <= PROBES_AT_ONCE, "few probes at a time")
        probing = {one.lease_id for one in self._leases.values() if one.phase is Phase.PROBING}
        invariant(self._own_probes <= probing, "a probe that is over is not under way")

    def _check_lease(self, lease: NodeLease) -> None:
        super()._check_lease(lease)
        who = lease.lease_id
        if lease.phase not in QUARANTINED:
            invariant(lease.order is None, f"{who}: only what is fenced is cleared")
            return
        invariant(lease.quarantine is not None, f"the fence of {who} has a record")
        if lease.quarantine is not None:
            lease.quarantine.check()
        if lease.phase is Phase.FENCED:
            waits = (lease.lease_id, Wake.PROBE) in self._timers
            invariant(waits or who in self._turns, f"the fence of {who} is looked at again")
        allowed = lease.order is not None or self._clears_proved_clean
        invariant(allowed or lease.phase is not Phase.CLEARING, f"nobody ordered to clear {who}")


def _answered(request: RequestId | None, result: Result) -> list[Effect]:
    return [] if request is None else [Answer(request, result)]


_POLICY_BODY: Final[dict[str, Any]] = {
    "nonce": "", "operator": "", "reason": "a probe proved it clean", "accept_residue": False,
}  # fmt: skip
"""In the place of an order: nobody gave one."""


def _order_body(order: ClearOrder) -> dict[str, Any]:
    return {
        "nonce": order.nonce, "operator": order.operator, "reason": order.reason,
        "accept_residue": order.accept_residue,
    }  # fmt: skip
