"""One lease at its node: what the agent keeps of it from the bind until long after its end.

                      device_failed, nothing left
    bind ──► CREATING ──────────────────────────────────────────────► ENDED ◄─────────┐
                │ │ device_created                                      ▲             │
                │ ▼                                                     │ sealed      │
                │ HOLDING ── warden_held ──► LIVE ── any end ──► ENDING ┤             │
                │    └────────── any end ──────────────────────────▲    │ failed      │
                │ hangs past its end                                    ▼    proved   │
                └───────────────────────────────────────────────────► FENCED ⇄ CLEARING
                                                                        ⇅
                                                                     PROBING

A lease is usable while LIVE and at no other time. ENDED is remembered until the ledger has credited
the receipt, and then for as long as there is room, so that a late caller learns why.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grafos_core import failure
from grafos_core.failure import FabricError, invariant
from grafos_core.lease import EndCause, Kind, LeaseId, RevokeStage, next_stage
from grafos_core.node_effects import BoundFacts, Instant, ReceiptFacts, RequestId
from grafos_core.quarantine import Finding, Quarantine
from grafos_core.receipt import Assurance, Cleared, ClearOrder, Outcome
from grafos_core.teardown import Stage, Teardown
from grafos_core.token import LeaseToken

NO_SLOT: Final = -1
"""Of what was bound before a restart, or never: it has no cell in the gate page."""


class Phase(enum.StrEnum):
    CREATING = "creating"
    HOLDING = "holding"
    LIVE = "live"
    ENDING = "ending"
    FENCED = "fenced"
    CLEARING = "clearing"
    PROBING = "probing"
    ENDED = "ended"


PHASES: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.CREATING: frozenset({Phase.HOLDING, Phase.ENDED, Phase.FENCED}),
    Phase.HOLDING: frozenset({Phase.LIVE, Phase.ENDING}),
    Phase.LIVE: frozenset({Phase.ENDING}),
    Phase.ENDING: frozenset({Phase.ENDED, Phase.FENCED}),
    Phase.FENCED: frozenset({Phase.CLEARING, Phase.PROBING}),
    Phase.CLEARING: frozenset({Phase.ENDED, Phase.FENCED}),
    Phase.PROBING: frozenset({Phase.FENCED}),
    Phase.ENDED: frozenset(),
}

CHARGED: Final = frozenset(Phase) - {Phase.ENDED}
"""Phases in which the slice takes up room at the gate."""
QUARANTINED: Final = frozenset({Phase.FENCED, Phase.CLEARING, Phase.PROBING})

CODE_OF_CAUSE: Final[Mapping[EndCause, str]] = {
    EndCause.RELEASE: "LEASE_RELEASED",
    EndCause.EXPIRED: "LEASE_EXPIRED",
    EndCause.REVOKED: "REVOKED",
    EndCause.BURNT: "EPOCH_BURNT",
    EndCause.HOLDER_EXIT: "LEASE_RELEASED",
    EndCause.DISCONNECTED: "LEASE_EXPIRED",
    EndCause.AGENT_LOST: "AGENT_LOST",
    EndCause.BIND_FAILED: "NOT_FOUND",
    EndCause.DEVICE_FAILED: "IO",
    EndCause.CLEARED: "FENCED",
}
"""What a holder that comes back to a lease of the past meets."""

NOTICE_OF_CAUSE: Final[Mapping[EndCause, str]] = {
    EndCause.RELEASE: "released",
    EndCause.EXPIRED: "expired",
    EndCause.REVOKED: "revoked",
    EndCause.BURNT: "revoked",
    EndCause.HOLDER_EXIT: "released",
    EndCause.DISCONNECTED: "expired",
    EndCause.AGENT_LOST: "fenced",
    EndCause.DEVICE_FAILED: "fenced",
}


@dataclass(frozen=True, slots=True)
class Raise:
    """A renewal or an attach that waits for the warden's word."""

    requests: tuple[RequestId, ...]
    """Of an attach, all that asked for the same."""
    token: LeaseToken
    deadline_ms: int
    session: str | None
    """Of the new holder; None: a renewal."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """Somebody who released, and waits for the receipt, or for its credit until `until_ms`."""

    request: RequestId
    wait_ms: int
    until_ms: int | None = None
    """Known once it is sealed."""


@dataclass(frozen=True, slots=True)
class LeaseView:
    """One lease for people and for the ledger."""

    lease_id: LeaseId
    kind: Kind
    epoch: int
    generation: int
    amount: int
    extent_offset: int
    remaining_ms: int
    stage: str
    fence_cause: str
    exported: bool
    evidence: Mapping[str, Any]
    revoke_stage: RevokeStage
    fence: FenceView | None = None


@dataclass(frozen=True, slots=True)
class FenceView:
    """What probes have found of a fenced slice, and when the next one is due."""

    since_ms: int
    """Wall clock."""
    probes: int
    findings: tuple[Finding, ...]
    """The last ones that were written down, the newest last."""
    latest: Finding | None
    """The newest, though it may say nothing new."""
    next_probe_ms: int | None
    """From now; None: one is under way, or waits its turn."""


@dataclass(slots=True)
class NodeLease:
    """The agent's memory of one lease. `deadline_ms` is boottime."""

    facts: BoundFacts
    phase: Phase
    slot: int = NO_SLOT
    deadline_ms: int = 0
    session: str = ""
    """Of the holder; empty: it has none at the moment."""
    keep: bool = False
    """It outlives its holder."""
    bind_requests: list[RequestId] = field(default_factory=list)
    """All that asked for the same bind; empty once they are answered."""
    raises: list[Raise] = field(default_factory=list)
    revoking: bool = False
    """A revocation gave it a grace; nothing prolongs the lease any more."""
    revocation: RevokeStage = RevokeStage.ACTIVE
    """How far it had come when the teardown began."""
    cause: EndCause | None = None
    reason: str = ""
    teardown: Teardown | None = None
    """The running or last one; also that of a clear or a probe."""
    warden: dict[str, Any] = field(default_factory=dict)
    """What the warden did and measured, if it was first."""
    exported: bool = False
    """Its descriptor was handed out."""
    broken: str = ""
    """What its device did wrong while it lived: measured clean or not, its slice is fenced."""
    waiters: list[Waiter] = field(default_factory=list)
    receipt: ReceiptFacts | None = None
    credited: bool = False
    sendings: int = 0
    order: ClearOrder | None = None
    """An operator's, being carried out, or waiting for a probe to be over."""
    order_request: RequestId | None = None
    probe_requests: list[RequestId] = field(default_factory=list)
    """All that wait for the probe under way."""
    quarantine: Quarantine | None = None
    """While it is fenced."""
    unmade: bool = False
    """It was fenced because its device was not made in time, and may still be in the making."""
    nonces: list[str] = field(default_factory=list)
    fence_cause: str = ""

    @property
    def lease_id(self) -> LeaseId:
        return self.facts.lease_id

    @property
    def epoch(self) -> int:
        return self.facts.epoch

    def move(self, phase: Phase) -> None:
        """An illegal step is a broken invariant and changes nothing."""
        invariant(
            phase in PHASES[self.phase], f"{self.lease_id} cannot go from {self.phase} to {phase}"
        )
        self.phase = phase

    def reach(self, stage: RevokeStage) -> None:
        """A stage that would be gone back to is a broken invariant and changes nothing."""
        self.revocation = next_stage(self.revocation, stage, self.lease_id)

    @property
    def revoke_stage(self) -> RevokeStage:
        """How far its end has come, in the words of the ledger."""
        if self.phase in QUARANTINED:
            return RevokeStage.FENCED
        return RevokeStage.TORNDOWN if self.phase is Phase.ENDED else self.revocation

    def remaining_ms(self, now: Instant) -> int:
        return max(0, self.deadline_ms - now.boot_ms) if self.phase is Phase.LIVE else 0

    def failure(self) -> FabricError:
        """What a holder meets that comes back to this lease."""
        if self.phase in QUARANTINED:
            code = "FENCED"
        elif self.cause is None:
            code = "NOT_FOUND"
        else:
            code = CODE_OF_CAUSE[self.cause]
        cause = str(self.cause or "")
        return failure.of(code, lease_id=self.lease_id, epoch=self.epoch, cause=cause)

    @property
    def stage(self) -> str:
        if self.phase in QUARANTINED:
            return Stage.FENCED.value
        if self.phase is Phase.ENDED:
            return Stage.SEALED.value
        if self.phase is Phase.ENDING and self.teardown is not None:
            return self.teardown.stage.value
        return Stage.LIVE.value if self.phase is Phase.LIVE else self.phase.value

    def receipt_facts(
        self, outcome: Outcome, cause: EndCause, now: Instant, *, cleared: Cleared | None = None
    ) -> ReceiptFacts:
        """What the receipt of this end says. Where no teardown ran, nothing was measured."""
        facts, teardown = self.facts, self.teardown
        began = now if teardown is None else Instant(teardown.began_ms, teardown.began_wall_ms)
        if outcome is Outcome.FENCED or cleared is Cleared.RESIDUE:
            assurance = Assurance.NONE
        else:
            assurance = Assurance.DETACHED if self.exported else Assurance.FREED
        return ReceiptFacts(
            facts.lease_id, facts.kind, facts.epoch, facts.amount, facts.extent_offset, outcome,
            cause, assurance, began.wall_ms, max(began.wall_ms, now.wall_ms),
            (now.boot_ms - began.boot_ms) * 1000, teardown.measured() if teardown else {}, cleared,
        )  # fmt: skip

    def view(self, now: Instant, next_probe_ms: int | None = None) -> LeaseView:
        facts = self.facts
        evidence = dict(self.teardown.measured()) if self.teardown else {}
        if not evidence and self.receipt is not None:
            evidence = dict(self.receipt.measured)
        return LeaseView(
            facts.lease_id, facts.kind, facts.epoch, facts.generation, facts.amount,
            facts.extent_offset, self.remaining_ms(now), self.stage, self.fence_cause,
            self.exported, evidence, self.revoke_stage, self._fence_view(next_probe_ms),
        )  # fmt: skip

    def _fence_view(self, next_probe_ms: int | None) -> FenceView | None:
        known = self.quarantine
        if known is None or self.phase not in QUARANTINED:
            return None
        return FenceView(known.since_ms, known.probes, known.findings, known.latest, next_probe_ms)
