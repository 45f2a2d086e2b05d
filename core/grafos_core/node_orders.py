"""What the ledger orders of a node, and how a revocation goes until the teardown begins.

    revoke ──► REVOKE_WARNING ──► GRACE_RUNNING ─┬─ checkpoint_done, release ──► CHECKPOINT_REPORTED
                recorded, told,    the alarm of  ├─ the grace is over ─────────► FORCED_TEARDOWN
                no more renewals   the lease's   └─ the deadline is here ──────► EXPIRED
                                   end stands too

Rules. A grace ends at the lease's deadline, whatever was ordered; nothing that a revocation does
moves that. A second order may shorten a grace, never lengthen it, and the same order told again
changes nothing. With the end of the grace the gate is closed first. Without a grace, or where
nobody uses the lease yet, its end begins at once. A holder who is not there misses the warning.
"""

from __future__ import annotations

from grafos_core import failure
from grafos_core.gate import refused
from grafos_core.lease import EPOCH_MAX, EndCause, LeaseId, RevokeStage
from grafos_core.node_effects import (
    Answer,
    Effect,
    Instant,
    Notify,
    Ordered,
    RequestId,
    Target,
)
from grafos_core.node_endings import Wake, nobody
from grafos_core.node_fences import Fences
from grafos_core.node_lease import QUARANTINED, NodeLease, Phase
from grafos_core.receipt import Outcome


class Orders(Fences):
    """What ends a lease by somebody's word. `request` None: nobody waits for the answer."""

    # Of the ledger

    def burn(self, request: RequestId | None, target: Target, now: Instant) -> list[Effect]:
        """Give up an epoch that the ledger never saw bound."""
        return self.tick(now) + self._ordered(request, target, EndCause.BURNT, "burnt", 0, now)

    def withdraw(self, request: RequestId | None, target: Target, now: Instant) -> list[Effect]:
        """Its holder released it at the ledger."""
        reason = "released by its holder"
        return self.tick(now) + self._ordered(request, target, EndCause.RELEASE, reason, 0, now)

    def revoke(
        self, request: RequestId | None, target: Target, grace_ms: int, reason: str, now: Instant
    ) -> list[Effect]:
        """Take it back, after a notice and `grace_ms`; a later order never lengthens the grace."""
        effects = self.tick(now)
        return effects + self._ordered(request, target, EndCause.REVOKED, reason, grace_ms, now)

    def _ordered(
        self, request: RequestId | None, target: Target, cause: EndCause, reason: str,
        grace_ms: int, now: Instant,
    ) -> list[Effect]:  # fmt: skip
        lease = self._leases.get(target.lease_id)
        if lease is None and not _is_sound(target):
            wrong = failure.of("RANGE", lease_id=target.lease_id, epoch=target.epoch)
            return [] if request is None else [Answer(request, wrong)]
        if lease is None:
            effects, lease = self._burn(target, cause, now)
        elif lease.epoch != target.epoch:
            wrong = failure.of("EPOCH_STALE", lease_id=target.lease_id, epoch=target.epoch)
            return [] if request is None else [Answer(request, wrong)]
        elif lease.phase in QUARANTINED or lease.phase is Phase.ENDED:
            effects = self._send_again(lease, now)
        elif cause is EndCause.REVOKED and grace_ms > 0 and lease.phase is Phase.LIVE:
            effects = self._warn(lease, reason, grace_ms, now)
        else:
            effects = self._end(lease, cause, reason, now)
        if request is None or lease is None:
            return effects
        stage = lease.revocation.value if lease.phase is Phase.LIVE else lease.stage
        return [*effects, Answer(request, Ordered(stage, lease.receipt))]

    def _burn(
        self, target: Target, cause: EndCause, now: Instant
    ) -> tuple[list[Effect], NodeLease | None]:
        """Of an epoch used before, and forgotten since, nothing exists either."""
        fresh = self._gate.burn(target.kind, target.epoch, target.extent_offset, target.amount)
        outcome = Outcome.NOTHING_CREATED if fresh else Outcome.TORNDOWN
        lease = NodeLease(nobody(target), Phase.ENDED)
        return self._nothing_created(lease, cause, outcome, now), lease

    def _warn(self, lease: NodeLease, reason: str, grace_ms: int, now: Instant) -> list[Effect]:
        wake = (lease.lease_id, Wake.GRACE)
        grace_ms = min(grace_ms, lease.remaining_ms(now))
        until_ms = now.boot_ms + grace_ms
        known_ms = self._timers.at_ms(wake)
        if known_ms is not None and known_ms <= until_ms:
            return []
        if not lease.revoking:
            lease.reach(RevokeStage.REVOKE_WARNING)
        self._timers.set(wake, until_ms)
        lease.revoking, lease.reason = True, reason
        body = {"grace_ms": grace_ms, "reason": reason}
        effects: list[Effect] = [
            self._persist(("agent.revoke_warning", lease, body), seal_now=False)
        ]
        effects += self._refuse_raises(lease, "REVOKED", reason)
        if lease.session:
            effects.append(self._warning(lease, now))
        lease.reach(RevokeStage.GRACE_RUNNING)
        return [*effects, self._report(lease)]

    def _warning(self, lease: NodeLease, now: Instant) -> Notify:
        """With what is left of the grace."""
        until_ms = self._timers.at_ms((lease.lease_id, Wake.GRACE)) or now.boot_ms
        left_ms = max(0, until_ms - now.boot_ms)
        return Notify(lease.lease_id, lease.session, "revoke_warning", lease.reason, left_ms)

    # Of the holder

    def release(
        self, request: RequestId, lease_id: str, epoch: int, holder_key: str,
        credit_wait_ms: int, now: Instant,
    ) -> list[Effect]:  # fmt: skip
        """The holder ends it; answered with the receipt, at most `credit_wait_ms` after it."""
        effects = self.tick(now)
        lease = self._holders(lease_id, epoch, holder_key)
        if lease is None:
            return [*effects, Answer(request, failure.of("NOT_FOUND", lease_id=lease_id))]
        if lease.revoking and lease.phase is Phase.LIVE:
            lease.reach(RevokeStage.CHECKPOINT_REPORTED)
        effects += self._wait_for_receipt(lease, request, credit_wait_ms, now)
        return effects + self._end(lease, EndCause.RELEASE, "released by its holder", now)

    def checkpoint_done(
        self, request: RequestId, lease_id: str, epoch: int, holder_key: str,
        credit_wait_ms: int, now: Instant,
    ) -> list[Effect]:  # fmt: skip
        """Its holder has saved what it wanted: the grace is over at once, and was enough. Of a
        lease that is over by now, the receipt."""
        effects = self.tick(now)
        lease = self._holders(lease_id, epoch, holder_key)
        if lease is None:
            return [*effects, Answer(request, failure.of("NOT_FOUND", lease_id=lease_id))]
        if lease.phase is Phase.LIVE and not lease.revoking:
            idle = failure.of("PRECONDITION", "it is not being revoked", lease_id=lease_id)
            return [*effects, Answer(request, idle)]
        if lease.phase is Phase.LIVE:
            lease.reach(RevokeStage.CHECKPOINT_REPORTED)
        effects += self._wait_for_receipt(lease, request, credit_wait_ms, now)
        return effects + self._end(lease, EndCause.REVOKED, lease.reason, now)

    def _holders(self, lease_id: str, epoch: int, holder_key: str) -> NodeLease | None:
        """To anybody else it does not exist."""
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None or lease.epoch != epoch or lease.facts.holder_key != holder_key:
            return None
        return lease

    # What both do

    def _refuse_raises(self, lease: NodeLease, code: str, detail: str) -> list[Effect]:
        waiting, lease.raises = lease.raises, []
        if waiting:
            facts = lease.facts
            self._gate.take_back_generation(lease.lease_id, facts.generation, facts.holder_key)
        return [
            Answer(request, refused(code, one.token, detail))
            for one in waiting
            for request in one.requests
        ]


def _is_sound(target: Target) -> bool:
    """Whether such a lease could have been granted at all."""
    return 1 <= target.epoch <= EPOCH_MAX and target.amount > 0 and target.extent_offset >= 0
