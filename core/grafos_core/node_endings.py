"""How leases end at their node: the way from LIVE to a receipt that the ledger has credited.

Order of an end, always the same:

    CloseGate → ShutFront (within 250 ms, else KillFront) → DestroyKey → reap → erase → measure
    → Persist(begin, end), sealed → WardenDrop → SendReceipt, again and again until credited

    and where it fails:  Persist(begin, fenced), sealed → SendReceipt(fenced), charged as before

Rules: taking away waits for no record, giving back does. A slice is free only in the list that
begins with the durable record of its measurement. A fence concerns one slice and no neighbour.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from heapq import heapify, heappush
from typing import Any, Final

from grafos_core import failure
from grafos_core.chain import EventKind
from grafos_core.failure import invariant
from grafos_core.gate import SLICES_MAX, Gate, Slice
from grafos_core.lease import (
    EndCause,
    Kind,
    LeaseId,
    OnDisconnect,
    Policy,
    RevokeStage,
)
from grafos_core.node_effects import (
    Answer,
    BoundFacts,
    CloseGate,
    DestroyKey,
    Effect,
    FenceFacts,
    Instant,
    KillFront,
    Notify,
    Persist,
    ReceiptFacts,
    Recovered,
    Released,
    ReportBound,
    RequestId,
    RunStep,
    SendReceipt,
    ShutFront,
    Target,
    WardenDrop,
)
from grafos_core.node_lease import (
    CHARGED,
    NO_SLOT,
    NOTICE_OF_CAUSE,
    QUARANTINED,
    NodeLease,
    Phase,
    Waiter,
)
from grafos_core.receipt import Outcome
from grafos_core.teardown import QUIESCE_MS_MAX, Stage, Step, Teardown, limit_ms
from grafos_core.timefloor import TimeFloor
from grafos_core.timers import Timers

RESEND_MS_MIN: Final = 250
RESEND_MS_MAX: Final = 5_000
CREDIT_WAIT_MS_MAX: Final = 10_000


class Wake(enum.StrEnum):
    """Why a lease wants to be looked at again."""

    DEADLINE = "deadline"
    RECONNECT = "reconnect"
    CONTACT = "contact"
    GRACE = "grace"
    QUIESCE = "quiesce"
    TEARDOWN = "teardown"
    RECEIPT = "receipt"
    WAITER = "waiter"
    WARDEN = "warden"
    PROBE = "probe"


@dataclass(frozen=True, slots=True)
class Limits:
    """What protects the node's memory. Each is asserted against its neighbours."""

    leases_max: int = SLICES_MAX
    """Charged at a time, fenced ones among them; also the slots of the gate page."""
    uncredited_max: int = 2 * SLICES_MAX
    """Receipts that the ledger has not taken; more of them and nothing new is bound."""
    ended_max: int = SLICES_MAX
    """Ends that are remembered after their credit."""
    waiters_max: int = 16
    """Calls that wait for the end of one lease."""
    raises_max: int = 8
    """Renewals of one lease that wait for the warden."""
    nonces_max: int = 64
    """Clear orders that one fence may use up."""

    def __post_init__(self) -> None:
        invariant(0 < self.leases_max <= SLICES_MAX, "no more leases than the gate takes")
        invariant(self.uncredited_max >= self.leases_max, "what is live can end")
        invariant(min(self.waiters_max, self.raises_max, self.nonces_max) > 0, "some of each")


class Endings:
    """The leases of a node and the ways in which they end. `NodeCore` adds how they begin."""

    def __init__(
        self,
        node_id: str,
        incarnation: str,
        capacities: Mapping[Kind, int],
        recovered: Recovered,
        now: Instant,
        limits: Limits,
    ) -> None:
        self.node_id = node_id
        self.incarnation = incarnation
        self._limits = limits
        self._gate = Gate(
            node_id, incarnation, capacities, recovered.epochs, slices_max=limits.leases_max
        )
        self._now = now
        self._ticked_ms = now.boot_ms
        self._floor = TimeFloor(recovered.time_floor_ms, now)
        self._leases: dict[LeaseId, NodeLease] = {}
        self._timers: Timers[tuple[str, Wake]] = Timers()
        self._slots = list(range(limits.leases_max))
        heapify(self._slots)
        self._settled: deque[LeaseId] = deque()
        self._uncredited = 0
        self._recovering: set[LeaseId] = set()
        self._front_is_up = False
        self._front_is_dying = False
        self._heard_ms: int | None = None

    # Recovery: what was bound or fenced when the last boot ended

    def _restore(self, recovered: Recovered) -> None:
        unsent = {(one.lease_id, one.epoch): one for one in recovered.receipts}
        for fence in recovered.fences:
            self._restore_fence(fence, unsent, exported=_may_be_out(fence.bound, recovered))
        for receipt in unsent.values():
            self._restore_ended(receipt)
        for facts in recovered.open_binds:
            lease = NodeLease(facts, Phase.ENDING, exported=_may_be_out(facts, recovered))
            lease.cause, lease.reason = EndCause.AGENT_LOST, "the agent was restarted"
            self._adopt(lease)
            self._recovering.add(facts.lease_id)

    def _restore_fence(
        self,
        fence: FenceFacts,
        unsent: dict[tuple[LeaseId, int], ReceiptFacts],
        *,
        exported: bool,
    ) -> None:
        lease = NodeLease(fence.bound, Phase.FENCED, exported=exported)
        lease.receipt = fence.receipt
        lease.cause = fence.receipt.cause
        lease.nonces = list(fence.nonces)
        lease.fence_cause = str(fence.receipt.measured.get("cause", ""))
        waiting = unsent.pop((fence.bound.lease_id, fence.bound.epoch), None)
        lease.credited = waiting is None
        self._uncredited += waiting is not None
        self._adopt(lease)
        self._quarantined(lease, self._now, fence)

    def _restore_ended(self, receipt: ReceiptFacts) -> None:
        lease = NodeLease(bound_of(receipt), Phase.ENDED)
        lease.receipt, lease.cause = receipt, receipt.cause
        self._leases[receipt.lease_id] = lease
        self._uncredited += 1

    def _adopt(self, lease: NodeLease) -> None:
        facts = lease.facts
        invariant(facts.lease_id not in self._leases, "one fate per lease")
        self._leases[facts.lease_id] = lease
        self._gate.restore(
            Slice(facts.lease_id, facts.kind, facts.epoch, facts.generation, facts.amount,
                  facts.extent_offset, facts.holder_key)
        )  # fmt: skip

    def start(
        self, now: Instant, journal: Mapping[str, Mapping[str, Any]] | None = None
    ) -> list[Effect]:
        """Take back what the last boot left, told what the old warden did and measured, by lease.

        What that warden had ended at its deadline was over before its agent was lost.
        """
        effects = self.tick(now)
        for lease in list(self._leases.values()):
            if lease.phase is Phase.ENDING:
                lease.warden = dict((journal or {}).get(lease.lease_id, {}))
                if lease.warden.get("cause") == "deadline":
                    lease.cause, lease.reason = EndCause.EXPIRED, "the TTL ran out"
                effects += self._begin_teardown(lease, Stage.QUIESCED, now)
            elif lease.receipt is not None and not lease.credited:
                effects += self._send(lease, now)
        return effects

    # Time

    def _advance(self, now: Instant) -> None:
        invariant(now.boot_ms >= self._now.boot_ms, "boottime does not go back")
        self._now = now

    def tick(self, now: Instant) -> list[Effect]:
        """Do what fell due. Each verb does it first, so that none meets a lease past its end."""
        self._advance(now)
        effects: list[Effect] = []
        for lease_id, wake in self._timers.due(now.boot_ms):
            effects += self._fired(lease_id, wake, now)
        self._ticked_ms = now.boot_ms
        return effects

    def timeout_ms(self, now: Instant) -> int | None:
        """How long nothing will fall due; None: for as long as nothing happens."""
        next_ms = self._timers.next_ms()
        return None if next_ms is None else max(0, next_ms - now.boot_ms)

    def _fired(self, lease_id: str, wake: Wake, now: Instant) -> list[Effect]:
        if wake is Wake.WARDEN:
            return self._warden_overdue(now)
        lease = self._leases[LeaseId(lease_id)]
        match wake:
            case Wake.DEADLINE:
                return self._end(lease, EndCause.EXPIRED, "the TTL ran out", now)
            case Wake.RECONNECT:
                return self._end(lease, EndCause.DISCONNECTED, "the holder did not return", now)
            case Wake.GRACE:
                return self._end(lease, EndCause.REVOKED, lease.reason, now)
            case Wake.CONTACT:
                return self._contact_fired(lease, now)
            case Wake.QUIESCE:
                return self._kill_front(f"lease {lease.lease_id} does not empty")
            case Wake.TEARDOWN:
                return self._overdue(lease, now)
            case Wake.RECEIPT:
                return self._send(lease, now)
            case Wake.WAITER:
                return self._answer_waiters(lease, now)
            case Wake.PROBE:
                return self._probe_due(lease, now)

    def _warden_overdue(self, now: Instant) -> list[Effect]:
        """No new warden has taken everything over in time: nothing goes on unwatched."""
        effects: list[Effect] = []
        for lease in list(self._leases.values()):
            effects += self._end(lease, EndCause.AGENT_LOST, "the warden was lost", now)
        return effects

    def _contact_fired(self, lease: NodeLease, now: Instant) -> list[Effect]:
        stop_after_ms = lease.facts.policy.stop_after_ms
        invariant(stop_after_ms is not None, "only such leases have this alarm")
        due_ms = (self._heard_ms or 0) + (stop_after_ms or 0)
        if due_ms <= now.boot_ms:
            return self._end(lease, EndCause.DISCONNECTED, "the control plane is away", now)
        self._timers.set((lease.lease_id, Wake.CONTACT), due_ms)
        return []

    # The end of one lease

    def _end(self, lease: NodeLease, cause: EndCause, reason: str, now: Instant) -> list[Effect]:
        """Begin the end, for the first cause that comes; a second one changes nothing."""
        if lease.phase is Phase.CREATING:
            return self._end_wanted(lease, cause, reason, now)
        if lease.phase not in (Phase.HOLDING, Phase.LIVE):
            return []
        was_live = lease.phase is Phase.LIVE
        lease.move(Phase.ENDING)
        if lease.cause is None:
            lease.cause, lease.reason = cause, reason
        if lease.revocation is not RevokeStage.CHECKPOINT_REPORTED:
            expired = lease.cause is EndCause.EXPIRED
            lease.reach(RevokeStage.EXPIRED if expired else RevokeStage.FORCED_TEARDOWN)
        self._gate.close(lease.lease_id)
        effects: list[Effect] = []
        if was_live:
            effects.append(CloseGate(lease.lease_id, lease.slot))
        if lease.revoking and lease.revocation is not RevokeStage.EXPIRED:
            effects.append(self._report(lease))
        effects += self._begin_teardown(lease, Stage.DEAD if was_live else Stage.QUIESCED, now)
        return effects + self._refuse_pending(lease) + self._notice(lease)

    def _end_wanted(
        self, lease: NodeLease, cause: EndCause, reason: str, now: Instant
    ) -> list[Effect]:
        """The device is still being made: its end begins when that is over, or fences it."""
        if lease.cause is None:
            lease.cause, lease.reason = cause, reason
            lease.teardown = self._teardown(lease, Stage.QUIESCED, now)
            self._timers.set((lease.lease_id, Wake.TEARDOWN), lease.teardown.deadline_ms)
        return self._refuse_pending(lease)

    def _begin_teardown(self, lease: NodeLease, stage: Stage, now: Instant) -> list[Effect]:
        for wake in (Wake.DEADLINE, Wake.RECONNECT, Wake.CONTACT, Wake.GRACE):
            self._timers.cancel((lease.lease_id, wake))
        lease.teardown = self._teardown(lease, stage, now)
        if lease.revoking or lease.cause is EndCause.REVOKED:
            lease.teardown.evidence["revoke"] = {"stage": lease.revocation.value}
        if lease.warden:
            lease.teardown.evidence["warden"] = lease.warden
        self._timers.set((lease.lease_id, Wake.TEARDOWN), lease.teardown.deadline_ms)
        if stage is Stage.DEAD and self._front_is_up:
            self._timers.set((lease.lease_id, Wake.QUIESCE), now.boot_ms + QUIESCE_MS_MAX)
            return [ShutFront(lease.lease_id, lease.teardown.attempt)]
        if stage is Stage.DEAD:
            lease.teardown.done(Step.QUIESCE, {"front": "down"}, now.boot_ms)
        return self._go_on(lease, now)

    def _teardown(self, lease: NodeLease, stage: Stage, now: Instant) -> Teardown:
        """From `stage` on; its attempts are counted on, so that no late answer is taken for one."""
        attempt = lease.teardown.attempt + 1 if lease.teardown else 1
        limit = limit_ms(lease.facts.kind)
        return Teardown(now.boot_ms, now.wall_ms, stage, limit, attempt)

    def _report(self, lease: NodeLease) -> ReportBound:
        stage = lease.revoke_stage if lease.revoking else None
        return ReportBound(lease.lease_id, lease.epoch, lease.facts.generation, stage)

    def _refuse_pending(self, lease: NodeLease) -> list[Effect]:
        requests = [request for raised in lease.raises for request in raised.requests]
        requests += lease.bind_requests
        lease.raises, lease.bind_requests = [], []
        return [Answer(request, lease.failure()) for request in requests]

    def _notice(self, lease: NodeLease) -> list[Effect]:
        kind = NOTICE_OF_CAUSE.get(lease.cause) if lease.cause else None
        if not lease.session or kind is None:
            return []
        return [Notify(lease.lease_id, lease.session, kind, lease.reason)]

    # Its steps

    def _go_on(self, lease: NodeLease, now: Instant) -> list[Effect]:
        """The next step, or what follows the last one."""
        teardown = lease.teardown
        invariant(teardown is not None and teardown.stage is not Stage.DEAD, "the front is shut")
        step = teardown.next_step() if teardown else None
        if teardown is None or step is None:
            return self._measured(lease, now)
        effects: list[Effect] = [DestroyKey(lease.lease_id)] if step is Step.REAP else []
        return [*effects, self._run_step(lease, step, teardown)]

    def _run_step(self, lease: NodeLease, step: Step, teardown: Teardown) -> RunStep:
        aside = lease.phase in QUARANTINED
        return RunStep(lease.lease_id, step, teardown.attempt, lease.facts, aside)

    def _measured(self, lease: NodeLease, now: Instant) -> list[Effect]:
        match lease.phase:
            case Phase.CLEARING | Phase.PROBING:
                return self._looked(lease, now, clean=True)
            case _ if lease.broken and lease.teardown is not None:
                lease.teardown.fence(f"device: {lease.broken}")
                return self._fence(lease, now)
            case _:
                return self._seal(lease, now)

    def _awaited(
        self, lease_id: str, step: Step, attempt: int
    ) -> tuple[NodeLease, Teardown] | None:
        """The lease that waits for exactly this answer; one to an older attempt is for none."""
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None or lease.teardown is None or not lease.teardown.expects(step, attempt):
            return None
        running = lease.phase in (Phase.ENDING, Phase.CLEARING, Phase.PROBING)
        return (lease, lease.teardown) if running else None

    def step_done(
        self, lease_id: str, step: Step, attempt: int, evidence: Mapping[str, Any], now: Instant
    ) -> list[Effect]:
        """A step has succeeded; `evidence` is what it found, flat and short."""
        effects = self.tick(now)
        awaited = self._awaited(lease_id, step, attempt)
        if awaited is None:
            return effects
        lease, teardown = awaited
        teardown.done(step, evidence, now.boot_ms)
        if step is Step.QUIESCE:
            self._timers.cancel((lease.lease_id, Wake.QUIESCE))
        return effects + self._go_on(lease, now)

    def step_failed(
        self, lease_id: str, step: Step, attempt: int, why: str, now: Instant
    ) -> list[Effect]:
        """A step has failed, or measured that something is left."""
        effects = self.tick(now)
        awaited = self._awaited(lease_id, step, attempt)
        if awaited is None:
            return effects
        lease, teardown = awaited
        if step is Step.QUIESCE:
            return effects + self._kill_front(why)
        if teardown.failed(step, why, now.boot_ms):
            return [*effects, self._run_step(lease, step, teardown)]
        return effects + self._fail(lease, now)

    def _overdue(self, lease: NodeLease, now: Instant) -> list[Effect]:
        teardown = lease.teardown
        if lease.phase is Phase.CREATING and teardown is not None:
            teardown.fence("create: not done in time")
            return self._fence(lease, now)
        if teardown is None or not teardown.overdue(now.boot_ms):
            return []
        return self._fail(lease, now)

    def _fail(self, lease: NodeLease, now: Instant) -> list[Effect]:
        match lease.phase:
            case Phase.CLEARING | Phase.PROBING:
                return self._looked(lease, now, clean=False)
            case _:
                return self._fence(lease, now)

    # The front, which may be killed for one lease and then stands for all

    def _kill_front(self, why: str) -> list[Effect]:
        if not self._front_is_up or self._front_is_dying:
            return []
        self._front_is_dying = True
        return [KillFront(why)]

    def front_lost(self, now: Instant) -> list[Effect]:
        """It is gone, by our hand or its own: nothing is in flight any more, sessions are lost."""
        effects = self.tick(now)
        self._front_is_up = self._front_is_dying = False
        for lease in list(self._leases.values()):
            teardown = lease.teardown
            if lease.phase is Phase.LIVE:
                self._await_return(lease, now)
            elif lease.phase is Phase.ENDING and teardown and teardown.stage is Stage.DEAD:
                self._timers.cancel((lease.lease_id, Wake.QUIESCE))
                teardown.done(Step.QUIESCE, {"front": "killed"}, now.boot_ms)
                effects += self._go_on(lease, now)
        return effects

    def _await_return(self, lease: NodeLease, now: Instant, within_ms: int | None = None) -> None:
        """The holder's connection is lost: it has time to come back, its policy's unless said."""
        wake, policy = (lease.lease_id, Wake.RECONNECT), lease.facts.policy
        keep = lease.keep or policy.on_disconnect is OnDisconnect.KEEP
        if not keep and wake not in self._timers:
            within_ms = policy.reconnect_ms if within_ms is None else within_ms
            self._timers.set(wake, now.boot_ms + within_ms)

    # Sealed, fenced, credited

    def _seal(self, lease: NodeLease, now: Instant) -> list[Effect]:
        teardown = lease.teardown
        invariant(teardown is not None, "what is sealed was torn down")
        if teardown:
            teardown.seal()
        receipt = lease.receipt_facts(Outcome.TORNDOWN, lease.cause or EndCause.RELEASE, now)
        effects: list[Effect] = [
            self._persist(
                (EventKind.AGENT_TEARDOWN_BEGIN, lease, self._begin_body(lease)),
                (EventKind.AGENT_TEARDOWN_END, lease, receipt.body()),
            ),
            WardenDrop(lease.lease_id),
        ]
        return effects + self._free(lease, receipt, now)

    def _free(self, lease: NodeLease, receipt: ReceiptFacts, now: Instant) -> list[Effect]:
        """The record stands before this in the list: room at the gate, then the receipt."""
        self._timers.cancel((lease.lease_id, Wake.TEARDOWN))
        self._gate.free(lease.lease_id)
        if lease.slot != NO_SLOT:
            heappush(self._slots, lease.slot)
        lease.move(Phase.ENDED)
        self._recovering.discard(lease.lease_id)
        return self._owe(lease, receipt, now)

    def _owe(self, lease: NodeLease, receipt: ReceiptFacts, now: Instant) -> list[Effect]:
        """This receipt is the one that the ledger must have; answer who waited for it."""
        if lease.receipt is None or lease.credited:
            self._uncredited += 1
        lease.receipt, lease.credited, lease.sendings = receipt, False, 0
        waiters = [replace(one, until_ms=now.boot_ms + one.wait_ms) for one in lease.waiters]
        lease.waiters = waiters
        return self._send(lease, now) + self._answer_waiters(lease, now)

    def _fence(self, lease: NodeLease, now: Instant) -> list[Effect]:
        teardown = lease.teardown
        invariant(teardown is not None, "what is fenced was to be torn down")
        lease.fence_cause = teardown.fence_cause if teardown else ""
        for wake in (Wake.TEARDOWN, Wake.QUIESCE, Wake.DEADLINE, Wake.RECONNECT, Wake.CONTACT):
            self._timers.cancel((lease.lease_id, wake))
        if lease.phase is Phase.CREATING:
            self._gate.close(lease.lease_id)
            lease.unmade = True
        lease.move(Phase.FENCED)
        self._recovering.discard(lease.lease_id)
        self._quarantined(lease, now, None)
        receipt = lease.receipt_facts(Outcome.FENCED, lease.cause or EndCause.RELEASE, now)
        effects: list[Effect] = [
            DestroyKey(lease.lease_id),
            self._persist(
                (EventKind.AGENT_TEARDOWN_BEGIN, lease, self._begin_body(lease)),
                (EventKind.AGENT_FENCED, lease, receipt.body() | {"cause": lease.fence_cause}),
            ),
        ]
        if lease.session:
            effects.append(Notify(lease.lease_id, lease.session, "fenced", lease.fence_cause))
        return effects + self._owe(lease, receipt, now)

    def _begin_body(self, lease: NodeLease) -> dict[str, Any]:
        began_ms = lease.teardown.began_wall_ms if lease.teardown else 0
        cause = (lease.cause or EndCause.RELEASE).value
        return {"cause": cause, "reason": lease.reason, "began_ms": began_ms}

    def _persist(
        self, *events: tuple[str, NodeLease, Mapping[str, Any]], seal_now: bool = True
    ) -> Persist:
        rows = tuple(
            (str(kind), str(lease.lease_id), lease.epoch, dict(body))
            for kind, lease, body in events
        )
        return Persist(rows, seal_now, self._floor.floor_ms(self._now))

    def _send(self, lease: NodeLease, now: Instant) -> list[Effect]:
        """Now, and again later and later until it is credited."""
        invariant(lease.receipt is not None, "there is a receipt to send")
        if lease.receipt is None:
            return []
        pause_ms = min(RESEND_MS_MIN << min(lease.sendings, 10), RESEND_MS_MAX)
        lease.sendings += 1
        self._timers.set((lease.lease_id, Wake.RECEIPT), now.boot_ms + pause_ms)
        return [SendReceipt(lease.receipt)]

    def _send_again(self, lease: NodeLease, now: Instant) -> list[Effect]:
        """The ledger asks for it, though it may have said once that it has it."""
        if lease.receipt is None:
            return []
        return [SendReceipt(lease.receipt)] if lease.credited else self._send(lease, now)

    def credited(self, lease_id: str, epoch: int, outcome: Outcome, now: Instant) -> list[Effect]:
        """The ledger has taken this receipt; an answer to an older one settles nothing."""
        effects = self.tick(now)
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None or lease.receipt is None or lease.credited:
            return effects
        if (lease.epoch, lease.receipt.outcome) != (epoch, outcome):
            return effects
        lease.credited = True
        self._uncredited -= 1
        self._timers.cancel((lease.lease_id, Wake.RECEIPT))
        effects += self._answer_waiters(lease, now)
        # The ledger has it on its disk; our note only spares a receipt that is sent once more.
        body = {"outcome": outcome.value}
        note = self._persist(("agent.credited", lease, body), seal_now=False)
        effects.append(replace(note, may_wait=True))
        if lease.phase is Phase.ENDED:
            self._forget_after(lease)
        return effects

    def _forget_after(self, lease: NodeLease) -> None:
        self._settled.append(lease.lease_id)
        if len(self._settled) > self._limits.ended_max:
            del self._leases[self._settled.popleft()]

    def _answer_waiters(self, lease: NodeLease, now: Instant) -> list[Effect]:
        """Who waited for a receipt, or for its credit until now, gets it."""
        effects: list[Effect] = []
        waiting: list[Waiter] = []
        for waiter in lease.waiters:
            until_ms = waiter.until_ms if waiter.until_ms is not None else now.boot_ms
            if lease.phase in QUARANTINED:
                effects.append(Answer(waiter.request, lease.failure()))
            elif lease.receipt and (lease.credited or until_ms <= now.boot_ms):
                effects.append(Answer(waiter.request, Released(lease.receipt, lease.credited)))
            else:
                waiting.append(waiter)
        lease.waiters = waiting
        self._timers.cancel((lease.lease_id, Wake.WAITER))
        if waiting and lease.phase is Phase.ENDED:
            first_ms = min(waiter.until_ms or now.boot_ms for waiter in waiting)
            self._timers.set((lease.lease_id, Wake.WAITER), first_ms)
        return effects

    def _wait_for_receipt(
        self, lease: NodeLease, request: RequestId, wait_ms: int, now: Instant
    ) -> list[Effect]:
        if len(lease.waiters) >= self._limits.waiters_max:
            return [Answer(request, failure.of("RATE", lease_id=lease.lease_id))]
        wait_ms = min(max(0, wait_ms), CREDIT_WAIT_MS_MAX)
        until_ms = now.boot_ms + wait_ms if lease.phase is Phase.ENDED else None
        lease.waiters.append(Waiter(request, wait_ms, until_ms))
        done = lease.phase is Phase.ENDED or lease.phase in QUARANTINED
        return self._answer_waiters(lease, now) if done else []

    def _nothing_created(
        self, lease: NodeLease, cause: EndCause, outcome: Outcome, now: Instant
    ) -> list[Effect]:
        """An epoch is used up and nothing exists under it; the record says so, then the receipt."""
        lease.cause = cause
        receipt = lease.receipt_facts(outcome, cause, now)
        self._leases[lease.lease_id] = lease
        record = self._persist((EventKind.AGENT_BURNT, lease, receipt.body()))
        return [record, *self._owe(lease, receipt, now)]

    # Fences: what node_fences.py adds

    def _quarantined(self, lease: NodeLease, now: Instant, fence: FenceFacts | None) -> None:
        """Its quarantine has begun; or, with `fence`, had begun in an earlier boot."""
        raise NotImplementedError

    def _probe_due(self, lease: NodeLease, now: Instant) -> list[Effect]:
        raise NotImplementedError

    def _looked(self, lease: NodeLease, now: Instant, *, clean: bool) -> list[Effect]:
        """A probe or a clear has gone through all of its steps, or failed at one."""
        raise NotImplementedError

    # Laws

    def check(self) -> None:
        """Every law that can be seen from here."""
        self._gate.check()
        self._timers.check()
        charged = {lease.lease_id for lease in self._leases.values() if lease.phase in CHARGED}
        at_gate = {one.lease_id for one in self._gate.slices()}
        invariant(charged == at_gate, "charged at the gate is what is not proved back")
        slots = [one.slot for one in self._charged() if one.slot != NO_SLOT]
        invariant(len(slots) == len(set(slots)), "no two leases share a slot")
        invariant(not set(slots) & set(self._slots), "a slot in use is not free")
        owed = sum(1 for one in self._leases.values() if one.receipt and not one.credited)
        invariant(owed == self._uncredited, "receipts owed are counted")
        for lease in self._leases.values():
            self._check_lease(lease)

    def _charged(self) -> list[NodeLease]:
        return [one for one in self._leases.values() if one.phase in CHARGED]

    def _check_lease(self, lease: NodeLease) -> None:
        is_open = self._gate.is_open(lease.lease_id, lease.epoch)
        live = lease.phase in (Phase.CREATING, Phase.HOLDING, Phase.LIVE)
        invariant(is_open == live, f"{lease.lease_id}: the gate is open while it lives, not longer")
        grace_ms = self._timers.at_ms((lease.lease_id, Wake.GRACE))
        running = lease.revocation is RevokeStage.GRACE_RUNNING
        invariant((grace_ms is not None) == running, f"the grace of {lease.lease_id} has its alarm")
        if grace_ms is not None:
            invariant(grace_ms <= lease.deadline_ms, f"no grace of {lease.lease_id} prolongs it")
        if lease.phase is Phase.LIVE:
            invariant(lease.deadline_ms > self._ticked_ms, f"{lease.lease_id} lives past its end")
            alarm = self._timers.at_ms((lease.lease_id, Wake.DEADLINE))
            invariant(alarm == lease.deadline_ms, f"{lease.lease_id} has its alarm")
        if lease.phase in (Phase.ENDING, Phase.CLEARING, Phase.PROBING) and lease.teardown:
            lease.teardown.check(self._ticked_ms)
            alarm = self._timers.at_ms((lease.lease_id, Wake.TEARDOWN))
            invariant(alarm is not None, f"the end of {lease.lease_id} has a bound")
        if lease.phase is Phase.ENDED and lease.receipt is not None:
            torn = lease.receipt.outcome is Outcome.TORNDOWN and lease.teardown is not None
            sealed = lease.teardown is not None and lease.teardown.stage is Stage.SEALED
            invariant(sealed or not torn, f"{lease.lease_id} is ended without proof")
        if lease.receipt is not None and not lease.credited:
            waits = (lease.lease_id, Wake.RECEIPT) in self._timers
            invariant(waits, f"the receipt of {lease.lease_id} is sent again")


def _may_be_out(facts: BoundFacts, recovered: Recovered) -> bool:
    return facts.may_export and facts.lease_id not in recovered.unexported


def bound_of(receipt: ReceiptFacts) -> BoundFacts:
    """As much of a bind as its receipt knows; nobody's any more."""
    return nobody(
        Target(receipt.lease_id, receipt.epoch, receipt.kind, receipt.amount, receipt.extent_offset)
    )


def nobody(target: Target) -> BoundFacts:
    """The facts of a lease that was never bound here."""
    return BoundFacts(
        target.lease_id, target.kind, target.epoch, target.generation, target.amount,
        target.extent_offset, "", "", 0, Policy(),
    )  # fmt: skip
