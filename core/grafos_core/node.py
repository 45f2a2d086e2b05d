"""Everything that a node agent decides: who may bind, for how long, and when each lease must end.

The agent is a landlord of few words. A tenant arrives with a signed slip; the landlord looks at the
slip and at his own rooms, asks nobody, writes the tenant into his book before he hands over the
key, and has a watchman know the hour of leaving before the door opens for the first time.

    bind     Persist(bound) → CreateDevice → (device_created) WardenHold → (warden_held) OpenGate
             → OpenFront → Answer → ReportBound
    extend   WardenRaise → (warden_raised) Persist(extended) → OpenGate → Answer
    attach   WardenRaise → (warden_raised) Persist(attached) → OpenGate → Notify(former holder)
             → OpenFront → Answer → ReportBound

How leases live is drawn in node_lease.py, who may end them and how a revocation goes in
node_orders.py, how they end in node_endings.py, and what becomes of what is fenced in
node_fences.py.

Rules: verbs take `now` last and return effects, to be performed strictly in order. Every verb first
does what fell due. A refusal is an `Answer` too. Signature, audience and times of a token, and the
signature of a clear order, were verified before they come here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from heapq import heappop
from typing import Any, Final

from grafos_core import failure
from grafos_core.chain import EventKind
from grafos_core.epochs import EpochWindow
from grafos_core.failure import FabricError, invariant
from grafos_core.gate import refused
from grafos_core.lease import RETURN_MS, EndCause, Kind, LeaseId, OnDisconnect, OnHolderExit
from grafos_core.node_effects import (
    Answer,
    Bound,
    BoundFacts,
    CreateDevice,
    Detached,
    Effect,
    Extended,
    Instant,
    Notify,
    OpenFront,
    OpenGate,
    Recovered,
    RequestId,
    WardenHold,
    WardenRaise,
)
from grafos_core.node_endings import Limits, Wake
from grafos_core.node_lease import NodeLease, Phase, Raise
from grafos_core.node_orders import Orders
from grafos_core.receipt import Outcome
from grafos_core.token import LeaseToken

__all__ = ["Instant", "Limits", "NodeCore"]

EVIDENCE_MS_MAX: Final = 5_000
"""Older than this the revocation list is too old to bind on."""
WARDEN_MS_MAX: Final = 1_000
"""A new warden has everything within this time, or everything is taken back."""
HOLDS: Final = ("NOT_READY", "WARDEN_LOST", "SPOOL_FULL", "REVOCATION_STALE")
"""Why nothing new is bound, in the order in which it is told."""


class NodeCore(Orders):
    """One node agent's decisions. Call `start` once, before anything else."""

    def __init__(
        self,
        node_id: str,
        incarnation: str,
        capacities: Mapping[Kind, int],
        recovered: Recovered,
        now: Instant,
        limits: Limits | None = None,
        *,
        clears_proved_clean: bool = False,
    ) -> None:
        super().__init__(
            node_id, incarnation, capacities, recovered, now, limits or Limits(),
            clears_proved_clean=clears_proved_clean,
        )  # fmt: skip
        self._holds: dict[str, str] = {"NOT_READY": "starting", "WARDEN_LOST": "not started yet"}
        self._ready_kinds = frozenset(capacities)
        self._revocation_number = 0
        self._warden_is_up = False
        self._unguarded: set[LeaseId] = set()
        """Live leases that a new warden has not confirmed yet."""
        self._restore(recovered)

    # Readiness: why nothing new is bound, and whom we hear

    @property
    def recovering(self) -> frozenset[LeaseId]:
        """Leases of the last boot, not proved back yet; until then the node is not ready."""
        return frozenset(self._recovering)

    def hold_binds(self, code: str, detail: str) -> None:
        """Bind nothing new, for a reason that the shell sees: NOT_READY or SPOOL_FULL."""
        invariant(code in HOLDS, f"{code} is no reason to hold binds")
        self._holds[code] = detail

    def allow_binds(self, code: str) -> None:
        self._holds.pop(code, None)

    def set_ready_kinds(self, kinds: frozenset[Kind]) -> None:
        """Kinds whose self-test has passed; the others are not bound."""
        self._ready_kinds = kinds

    def heard(self, revocation_number: int, now: Instant) -> list[Effect]:
        """The control plane answered, with this revocation list; a lower number is no answer."""
        effects = self.tick(now)
        if revocation_number >= self._revocation_number:
            self._revocation_number = revocation_number
            self._heard_ms = now.boot_ms
        return effects

    def learn_time(self, issued_ms: int, now: Instant) -> None:
        """A verified message of the control plane was issued at this wall time."""
        self._advance(now)
        self._floor.learn(issued_ms, now)

    def closed_gates(self, now: Instant) -> dict[str, str]:
        """Reason by code; empty when leases are bound."""
        closed = dict(self._holds)
        if self._recovering:
            closed["NOT_READY"] = f"{len(self._recovering)} leases of the last boot"
        if self._uncredited >= self._limits.uncredited_max:
            closed["NOT_READY"] = "too many receipts are not credited"
        if self._heard_ms is None or now.boot_ms - self._heard_ms > EVIDENCE_MS_MAX:
            closed["REVOCATION_STALE"] = "the control plane is silent"
        if self._floor.regressed(now):
            closed["CLOCK_REGRESSED"] = "the wall clock is behind the time floor"
        return closed

    def _check_open(self, token: LeaseToken, now: Instant) -> None:
        closed = self.closed_gates(now)
        for code in ("CLOCK_REGRESSED", *HOLDS):
            if code in closed:
                raise refused(code, token, closed[code])
        if token.kind not in self._ready_kinds:
            raise refused("NOT_READY", token, f"{token.kind} has not passed its self-test")

    # Queries

    def is_live(self, lease_id: str) -> bool:
        """Whether it is bound and its end has not begun."""
        lease = self._leases.get(LeaseId(lease_id))
        return lease is not None and lease.phase is Phase.LIVE

    def live(self) -> tuple[tuple[LeaseId, int, int], ...]:
        """(lease, epoch, generation) of what is bound, for the ledger."""
        return tuple(
            (lease.lease_id, lease.epoch, lease.facts.generation)
            for lease in self._leases.values()
            if lease.phase is Phase.LIVE
        )

    def high_waters(self) -> dict[Kind, int]:
        return self._gate.high_waters()

    def verdict(self, lease_id: str, epoch: int, now: Instant) -> FabricError | None:
        """Why an operation under this epoch is refused; None: it may take effect now."""
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None:
            return failure.of("NOT_FOUND", lease_id=lease_id, epoch=epoch)
        if lease.epoch != epoch:
            return failure.of("EPOCH_STALE", lease_id=lease_id, epoch=epoch)
        if lease.phase is not Phase.LIVE:
            return lease.failure()
        if lease.deadline_ms <= now.boot_ms:
            return failure.of("LEASE_EXPIRED", lease_id=lease_id, epoch=epoch)
        return None

    # Bind

    def bind(
        self, request: RequestId, token: LeaseToken, holder_key: str, session: str, now: Instant
    ) -> list[Effect]:
        """Bind a verified token for the holder with this key, if nothing stands against it."""
        effects = self.tick(now)
        try:
            if self._is_again(token, holder_key, session):
                return effects + self._again(request, token, session, now)
            remaining_ms = self._admit(token, holder_key, now)
        except FabricError as refusal:
            return [*effects, Answer(request, refusal)]
        self._gate.bind(token)
        facts = BoundFacts.of_token(token)
        lease = NodeLease(
            facts, Phase.CREATING, heappop(self._slots), now.boot_ms + remaining_ms, session,
            keep=facts.policy.on_holder_exit is OnHolderExit.KEEP, bind_requests=[request],
        )  # fmt: skip
        self._leases[facts.lease_id] = lease
        self._timers.set((facts.lease_id, Wake.DEADLINE), lease.deadline_ms)
        body = facts.body() | {"jti": token.jti, "remaining_ms": remaining_ms}
        record = self._persist((EventKind.AGENT_BOUND, lease, body | self._floor_of(facts.kind)))
        return [*effects, record, CreateDevice(facts.lease_id, facts)]

    def _is_again(self, token: LeaseToken, holder_key: str, session: str) -> bool:
        """Whether what is asked for was given, or is about to be, to the same holder in the same
        session: then the answer was lost, or is late."""
        lease = self._leases.get(LeaseId(token.lease_id))
        if lease is None or not session or not self._gate.holds(token, holder_key):
            return False
        if lease.facts.generation == token.generation:
            return lease.session == session
        return any(raised.session == session for raised in self._raises_to(lease, token))

    def _raises_to(self, lease: NodeLease, token: LeaseToken) -> list[Raise]:
        return [each for each in lease.raises if each.token.generation == token.generation]

    def _again(
        self, request: RequestId, token: LeaseToken, session: str, now: Instant
    ) -> list[Effect]:
        """Answered as before, at once or together with those who asked first."""
        lease = self._leases[LeaseId(token.lease_id)]
        if lease.cause is not None:
            return [Answer(request, lease.failure())]
        if lease.facts.generation != token.generation:
            return self._join_raise(request, lease, token)
        if lease.phase is Phase.LIVE:
            return [Answer(request, Bound(lease.facts, lease.slot, lease.remaining_ms(now)))]
        if len(lease.bind_requests) >= self._limits.waiters_max:
            raise refused("RATE", token, "too many wait for this bind")
        lease.bind_requests.append(request)
        return []

    def _join_raise(self, request: RequestId, lease: NodeLease, token: LeaseToken) -> list[Effect]:
        for at, raised in enumerate(lease.raises):
            if raised.token.generation == token.generation:
                if len(raised.requests) >= self._limits.waiters_max:
                    raise refused("RATE", token, "too many wait for this attach")
                lease.raises[at] = replace(raised, requests=(*raised.requests, request))
        return []

    def _floor_of(self, kind: Kind) -> dict[str, int]:
        epochs = self._gate.epochs(kind)
        return {"floor": epochs.floor} if isinstance(epochs, EpochWindow) else {}

    def _admit(self, token: LeaseToken, holder_key: str, now: Instant) -> int:
        self._gate.check_bind(token, holder_key)
        if LeaseId(token.lease_id) in self._leases:
            raise refused("SLOT_BUSY", token, "an earlier epoch of this lease is remembered")
        self._floor.learn(token.iat_ms, now)
        remaining_ms = self._remaining_ms(token, now)
        if remaining_ms <= 0:
            raise refused("LEASE_EXPIRED", token)
        self._check_open(token, now)
        return remaining_ms

    def _remaining_ms(self, token: LeaseToken, now: Instant) -> int:
        return min(token.ttl_ms, token.lease_end_ms - self._floor.now_ms(now))

    def device_created(self, lease_id: str, now: Instant) -> list[Effect]:
        """The slice can be used; the warden must know of it before anybody does."""
        effects = self.tick(now)
        lease = self._being_made(lease_id)
        if lease is None:
            return effects
        lease.move(Phase.HOLDING)
        if lease.cause is not None:
            return effects + self._end(lease, lease.cause, lease.reason, now)
        return [*effects, self._hold(lease)]

    def _being_made(self, lease_id: str) -> NodeLease | None:
        """The lease whose device was being made; where that took too long, it is fenced by now."""
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None:
            return None
        lease.unmade = False
        return lease if lease.phase is Phase.CREATING else None

    def _hold(self, lease: NodeLease) -> WardenHold:
        return WardenHold(
            lease.lease_id, lease.slot, lease.epoch, lease.facts.kind, lease.deadline_ms
        )

    def device_failed(
        self, lease_id: str, problem: FabricError, now: Instant, *, clean: bool = True
    ) -> list[Effect]:
        """Nothing was made; or, not `clean`, something is left that must be taken back."""
        effects = self.tick(now)
        lease = self._being_made(lease_id)
        if lease is None:
            return effects
        requests, lease.bind_requests = lease.bind_requests, []
        answer: list[Effect] = [Answer(request, problem) for request in requests]
        if not clean:
            lease.move(Phase.HOLDING)
            return effects + self._end(lease, EndCause.BIND_FAILED, problem.code, now) + answer
        for wake in (Wake.DEADLINE, Wake.RECONNECT, Wake.TEARDOWN):
            self._timers.cancel((lease.lease_id, wake))
        lease.cause, lease.reason, lease.teardown = EndCause.BIND_FAILED, problem.code, None
        receipt = lease.receipt_facts(Outcome.NOTHING_CREATED, EndCause.BIND_FAILED, now)
        record = self._persist((EventKind.AGENT_BURNT, lease, receipt.body()))
        self._gate.close(lease.lease_id)
        return [*effects, record, *self._free(lease, receipt, now), *answer]

    def warden_held(self, lease_id: str, now: Instant) -> list[Effect]:
        """The warden has the duplicate and the deadline: the door may open."""
        effects = self.tick(now)
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None or not self._warden_is_up:
            return effects
        self._guarded(lease.lease_id)
        if lease.phase is not Phase.HOLDING:
            return effects
        lease.move(Phase.LIVE)
        self._watch_contact(lease, now)
        effects.append(OpenGate(lease.lease_id, lease.slot, lease.epoch, lease.deadline_ms))
        effects += self._open_front(lease, now)
        requests, lease.bind_requests = lease.bind_requests, []
        bound = Bound(lease.facts, lease.slot, lease.remaining_ms(now))
        effects += [Answer(request, bound) for request in requests]
        return [*effects, self._report(lease)]

    def _open_front(self, lease: NodeLease, now: Instant) -> list[Effect]:
        if not self._front_is_up:
            self._await_return(lease, now)
            return []
        return [
            OpenFront(lease.lease_id, lease.slot, lease.facts, lease.session, lease.deadline_ms)
        ]

    def _watch_contact(self, lease: NodeLease, now: Instant) -> None:
        """A lease with `stop_after_ms` ends when the control plane was silent for so long."""
        stop_after_ms = lease.facts.policy.stop_after_ms
        self._timers.cancel((lease.lease_id, Wake.CONTACT))
        if stop_after_ms is not None:
            since_ms = self._heard_ms if self._heard_ms is not None else now.boot_ms
            self._timers.set((lease.lease_id, Wake.CONTACT), since_ms + stop_after_ms)

    # Extend and attach

    def extend(
        self, request: RequestId, token: LeaseToken, holder_key: str, now: Instant
    ) -> list[Effect]:
        """Move the deadline of a live lease, never to an earlier one. The same token again is
        answered with what remains, so that a lost answer can be asked for again."""
        effects = self.tick(now)
        try:
            lease = self._raisable(token, holder_key)
            if lease.facts.holder_key != holder_key:
                raise refused("HOLDER_MISMATCH", token)
            known = self._generation(lease)
            if token.generation == known:
                answer = Extended(lease.remaining_ms(now), lease.facts.generation)
                return [*effects, Answer(request, answer)]
            self._check_raise(lease, token, known)
        except FabricError as refusal:
            return [*effects, Answer(request, refusal)]
        return effects + self._raise(lease, request, token, None, now)

    def attach(
        self, request: RequestId, token: LeaseToken, holder_key: str, session: str, now: Instant
    ) -> list[Effect]:
        """Give a live lease to the holder of this token of a higher generation."""
        effects = self.tick(now)
        try:
            if self._is_again(token, holder_key, session):
                return effects + self._again(request, token, session, now)
            lease = self._raisable(token, holder_key)
            self._check_raise(lease, token, self._generation(lease))
            self._check_open(token, now)
        except FabricError as refusal:
            return [*effects, Answer(request, refusal)]
        return effects + self._raise(lease, request, token, session, now)

    def _raisable(self, token: LeaseToken, holder_key: str) -> NodeLease:
        """The live lease that a token is for; of one that is over, why it is."""
        lease = self._leases.get(LeaseId(token.lease_id))
        try:
            self._gate.check_raise(token, holder_key)
        except FabricError as refusal:
            over = lease is not None and lease.epoch == token.epoch
            if lease is not None and over and refusal.code in ("EPOCH_BURNT", "NOT_FOUND"):
                raise lease.failure() from refusal
            raise
        invariant(lease is not None, "what the gate has open is remembered")
        if lease is None or lease.phase is not Phase.LIVE:
            raise refused("DEGRADED", token, "it is not bound yet")
        return lease

    def _generation(self, lease: NodeLease) -> int:
        found = self._gate.slice(lease.lease_id)
        return found.generation if found else lease.facts.generation

    def _check_raise(self, lease: NodeLease, token: LeaseToken, known: int) -> None:
        if token.generation <= known:
            raise refused("LEASE_BOUND", token, "a generation at least as high is bound")
        if lease.revoking:
            raise refused("REVOKED", token, lease.reason)
        if "WARDEN_LOST" in self._holds:
            raise refused("WARDEN_LOST", token, self._holds["WARDEN_LOST"])
        if len(lease.raises) >= self._limits.raises_max:
            raise refused("RATE", token, "too many renewals at a time")

    def _raise(
        self, lease: NodeLease, request: RequestId, token: LeaseToken, session: str | None,
        now: Instant,
    ) -> list[Effect]:  # fmt: skip
        """The warden's deadline moves first; one that is not later is confirmed as it stands."""
        self._floor.learn(token.iat_ms, now)
        self._gate.raise_generation(lease.lease_id, token.generation, token.holder_thumbprint)
        before_ms = lease.raises[-1].deadline_ms if lease.raises else lease.deadline_ms
        deadline_ms = max(before_ms, now.boot_ms + self._remaining_ms(token, now))
        lease.raises.append(Raise((request,), token, deadline_ms, session))
        return [WardenRaise(lease.lease_id, deadline_ms)]

    def warden_raised(self, lease_id: str, deadline_ms: int | None, now: Instant) -> list[Effect]:
        """The warden's deadline stands at `deadline_ms`; None: it does not hold the lease."""
        effects = self.tick(now)
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None or lease.phase is not Phase.LIVE or not lease.raises:
            return effects
        if deadline_ms is None or deadline_ms < lease.raises[0].deadline_ms:
            return effects + self._refuse_raises(lease, "DEGRADED", "the warden has ended it")
        return effects + self._raised(lease, lease.raises.pop(0), now)

    def _raised(self, lease: NodeLease, raised: Raise, now: Instant) -> list[Effect]:
        token, facts = raised.token, lease.facts
        invariant(raised.deadline_ms >= lease.deadline_ms, "a renewal never shortens")
        invariant(token.generation > facts.generation, "generations only rise")
        lease.deadline_ms = raised.deadline_ms
        self._timers.set((lease.lease_id, Wake.DEADLINE), lease.deadline_ms)
        lease.facts = replace(facts, generation=token.generation, lease_end_ms=token.lease_end_ms)
        opened = OpenGate(lease.lease_id, lease.slot, lease.epoch, lease.deadline_ms)
        if raised.session is not None:
            return self._attached(lease, raised, raised.session, opened, now)
        body = {"generation": token.generation, "lease_end_ms": token.lease_end_ms}
        record = self._persist((EventKind.AGENT_EXTENDED, lease, body))
        answer = Extended(lease.remaining_ms(now), token.generation)
        return [record, opened, *(Answer(request, answer) for request in raised.requests)]

    def _attached(
        self, lease: NodeLease, raised: Raise, session: str, opened: OpenGate, now: Instant
    ) -> list[Effect]:
        token, former = raised.token, lease.session
        lease.facts = replace(
            lease.facts, holder=token.subject, holder_key=token.holder_thumbprint,
            policy=token.policy,
        )  # fmt: skip
        lease.session = session
        lease.keep = token.policy.on_holder_exit is OnHolderExit.KEEP
        self._timers.cancel((lease.lease_id, Wake.RECONNECT))
        self._watch_contact(lease, now)
        record = self._persist((EventKind.AGENT_ATTACHED, lease, lease.facts.body()))
        effects: list[Effect] = [record, opened]
        if former not in ("", session):
            effects.append(Notify(lease.lease_id, former, "fenced", "another holder attached"))
        effects += self._open_front(lease, now)
        bound = Bound(lease.facts, lease.slot, lease.remaining_ms(now))
        effects += [Answer(request, bound) for request in raised.requests]
        return [*effects, self._report(lease)]

    # The holder goes, or lets go

    def detach(
        self, request: RequestId, lease_id: str, epoch: int, holder_key: str, now: Instant
    ) -> list[Effect]:
        """From now on the lease outlives its holder, to its deadline."""
        effects = self.tick(now)
        lease = self._holders(lease_id, epoch, holder_key)
        if lease is None:
            return [*effects, Answer(request, failure.of("NOT_FOUND", lease_id=lease_id))]
        if lease.phase is not Phase.LIVE:
            return [*effects, Answer(request, lease.failure())]
        lease.keep = True
        self._timers.cancel((lease.lease_id, Wake.RECONNECT))
        record = self._persist(("agent.detached", lease, {}), seal_now=False)
        return [*effects, record, Answer(request, Detached(lease.remaining_ms(now)))]

    def exported(self, lease_id: str) -> None:
        """Its descriptor was handed out: pages may outlive the lease in a hostile holder."""
        lease = self._leases.get(LeaseId(lease_id))
        if lease is not None:
            lease.exported = True

    def _of_session(self, session: str) -> list[NodeLease]:
        held = (Phase.CREATING, Phase.HOLDING, Phase.LIVE)
        return [
            one for one in self._leases.values() if one.session == session and one.phase in held
        ]

    def holder_exited(self, session: str, now: Instant) -> list[Effect]:
        """The holder's process is gone for certain."""
        effects = self.tick(now)
        for lease in self._of_session(session):
            if lease.keep:
                lease.session = ""
            else:
                effects += self._end(lease, EndCause.HOLDER_EXIT, "the holder is gone", now)
        return effects

    def session_lost(self, session: str, now: Instant) -> list[Effect]:
        """The holder's connection is gone; whether it may come back is its lease's policy."""
        effects = self.tick(now)
        for lease in self._of_session(session):
            at_once = lease.facts.policy.on_disconnect is OnDisconnect.RELEASE
            self._await_return(lease, now, RETURN_MS if at_once else None)
        return effects

    def session_back(self, session: str, now: Instant) -> list[Effect]:
        """The holder is there again. What warned it may have been lost with its connection."""
        effects = self.tick(now)
        for lease in self._of_session(session):
            self._timers.cancel((lease.lease_id, Wake.RECONNECT))
            if lease.revoking and lease.phase is Phase.LIVE:
                effects.append(self._warning(lease, now))
        return effects

    def device_broken(self, lease_id: str, why: str, now: Instant) -> list[Effect]:
        """Its bytes could not be read or written: it ends, and its slice serves nobody."""
        effects = self.tick(now)
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None or lease.phase is not Phase.LIVE:
            return effects
        lease.broken = why
        return effects + self._end(lease, EndCause.DEVICE_FAILED, f"its device: {why}", now)

    # Front and warden, as processes

    def front_started(self, now: Instant) -> list[Effect]:
        """A fresh front: it gets every live lease again."""
        effects = self.tick(now)
        self._front_is_up, self._front_is_dying = True, False
        for lease in self._leases.values():
            if lease.phase is Phase.LIVE:
                effects += self._open_front(lease, now)
        return effects

    def warden_lost(self, now: Instant) -> list[Effect]:
        """Nothing is bound or renewed until a new one has everything, and it has a second."""
        effects = self.tick(now)
        self._warden_is_up = False
        if "WARDEN_LOST" in self._holds:
            return effects
        self._holds["WARDEN_LOST"] = "being replaced"
        self._timers.set(("", Wake.WARDEN), now.boot_ms + WARDEN_MS_MAX)
        for lease in self._leases.values():
            effects += self._refuse_raises(lease, "WARDEN_LOST", "being replaced")
        return effects

    def warden_started(self, now: Instant) -> list[Effect]:
        """Give a new warden everything; what it holds is told by `warden_held`."""
        effects = self.tick(now)
        self._warden_is_up = True
        for lease in self._leases.values():
            if lease.phase in (Phase.HOLDING, Phase.LIVE):
                effects.append(self._hold(lease))
                self._unguarded.add(lease.lease_id)
        self._guarded()
        return effects

    def _guarded(self, lease_id: LeaseId | None = None) -> None:
        """Binds go on once the warden has everything that lives."""
        if lease_id is not None:
            self._unguarded.discard(lease_id)
        live = (Phase.HOLDING, Phase.LIVE)
        self._unguarded = {one for one in self._unguarded if self._leases[one].phase in live}
        if not self._unguarded and "WARDEN_LOST" in self._holds:
            del self._holds["WARDEN_LOST"]
            self._timers.cancel(("", Wake.WARDEN))

    def taken_by_warden(
        self, lease_id: str, cause: str, measured: Mapping[str, Any], now: Instant
    ) -> list[Effect]:
        """The warden was first: its measurement is part of the evidence, ours still follows."""
        effects = self.tick(now)
        lease = self._leases.get(LeaseId(lease_id))
        if lease is None:
            return effects
        lease.warden = dict(measured)
        if lease.teardown is not None and lease.phase is Phase.ENDING:
            lease.teardown.evidence["warden"] = dict(measured)
        expired = cause == "deadline"
        end = EndCause.EXPIRED if expired else EndCause.AGENT_LOST
        return effects + self._end(lease, end, "taken back by the warden", now)
