"""What the node agent's core asks its shell to do, and the facts that outlive both.

The shell performs effects strictly in the order in which it gets them, one owner, one thread: an
effect may rely on every effect before it. `Persist` is done when its events are on stable storage;
whatever stands after it in a list, or comes from a later call, is not begun before that.

Facts (`BoundFacts`, `ReceiptFacts`, `FenceFacts`) are what durable records hold: `body()` gives
what the canonical codec can write, `of_body` reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grafos_core.epochs import EpochWindow, ExtentEpochs
from grafos_core.failure import FabricError
from grafos_core.lease import (
    EndCause,
    Isolation,
    Kind,
    LeaseId,
    OnDisconnect,
    OnHolderExit,
    Policy,
    Priority,
    RevokeStage,
)
from grafos_core.quarantine import Finding
from grafos_core.receipt import Assurance, Cleared, Outcome, TeardownReceipt
from grafos_core.teardown import Step
from grafos_core.token import LeaseToken

RequestId = int
"""Chosen by the shell for each question that waits for an `Answer`."""


@dataclass(frozen=True, slots=True)
class Instant:
    """One moment on two clocks. Durations are counted on the first, which counts suspend too."""

    boot_ms: int
    wall_ms: int


# Facts


@dataclass(frozen=True, slots=True)
class BoundFacts:
    """A bind as its record has it: all that a teardown after a restart needs to know."""

    lease_id: LeaseId
    kind: Kind
    epoch: int
    generation: int
    amount: int
    extent_offset: int
    holder: str
    holder_key: str
    lease_end_ms: int
    policy: Policy

    @classmethod
    def of_token(cls, token: LeaseToken) -> BoundFacts:
        return cls(
            LeaseId(token.lease_id), token.kind, token.epoch, token.generation, token.amount,
            token.extent_offset, token.subject, token.holder_thumbprint, token.lease_end_ms,
            token.policy,
        )  # fmt: skip

    @property
    def may_export(self) -> bool:
        """Whether its memory may ever be handed out as a descriptor."""
        hidden = (Isolation.CONTEXT, Isolation.PARTITION)
        return self.kind is Kind.MEM and self.policy.isolation not in hidden

    def body(self) -> dict[str, Any]:
        policy = self.policy
        return {
            "kind": self.kind.value, "generation": self.generation, "amount": self.amount,
            "extent_offset": self.extent_offset, "holder": self.holder,
            "holder_key": self.holder_key, "lease_end_ms": self.lease_end_ms,
            "on_holder_exit": policy.on_holder_exit.value, "reconnect_ms": policy.reconnect_ms,
            "stop_after_ms": policy.stop_after_ms, "isolation": policy.isolation.value,
            "scrub": policy.scrub, "priority": policy.priority.value,
            "on_disconnect": policy.on_disconnect.value,
        }  # fmt: skip

    @classmethod
    def of_body(cls, lease_id: str, epoch: int, body: Mapping[str, Any]) -> BoundFacts:
        policy = Policy(
            OnHolderExit(body["on_holder_exit"]), body["reconnect_ms"], body["stop_after_ms"],
            Isolation(body["isolation"]), body["scrub"], Priority(body["priority"]),
            OnDisconnect(body.get("on_disconnect", OnDisconnect.GRACE)),
        )  # fmt: skip
        return cls(
            LeaseId(lease_id), Kind(body["kind"]), epoch, body["generation"], body["amount"],
            body["extent_offset"], body["holder"], body["holder_key"], body["lease_end_ms"],
            policy,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReceiptFacts:
    """What a receipt says, before the node signs it; the same each time it is sent."""

    lease_id: LeaseId
    kind: Kind
    epoch: int
    amount: int
    extent_offset: int
    outcome: Outcome
    cause: EndCause
    assurance: Assurance
    began_ms: int
    """Wall clock, as is `ended_ms`."""
    ended_ms: int
    duration_us: int
    """Counted on boottime."""
    measured: Mapping[str, int | str | bool] = field(default_factory=dict)
    """What was found, by step; for a fence also `cause`: what failed."""
    cleared: Cleared | None = None

    def receipt(
        self, node_id: str, incarnation: str, boot_epoch: int, number: int, record_hash: str
    ) -> TeardownReceipt:
        """To be signed. `number` and `record_hash` are the record's that holds these facts."""
        return TeardownReceipt(
            self.lease_id, node_id, incarnation, boot_epoch, self.kind, self.epoch, self.amount,
            self.extent_offset, self.cause, self.outcome, self.assurance, self.measured,
            self.began_ms, self.ended_ms, self.duration_us, number, record_hash, self.cleared,
        )  # fmt: skip

    def body(self) -> dict[str, Any]:
        body = {
            "kind": self.kind.value, "amount": self.amount, "extent_offset": self.extent_offset,
            "outcome": self.outcome.value, "ended_by": self.cause.value,
            "assurance": self.assurance.value, "began_ms": self.began_ms,
            "ended_ms": self.ended_ms, "duration_us": self.duration_us,
            "measured": dict(self.measured),
        }  # fmt: skip
        return body if self.cleared is None else body | {"cleared": self.cleared.value}

    @classmethod
    def of_body(cls, lease_id: str, epoch: int, body: Mapping[str, Any]) -> ReceiptFacts:
        return cls(
            LeaseId(lease_id), Kind(body["kind"]), epoch, body["amount"], body["extent_offset"],
            Outcome(body["outcome"]), EndCause(body["ended_by"]), Assurance(body["assurance"]),
            body["began_ms"], body["ended_ms"], body["duration_us"], body["measured"],
            _cleared_of(body),
        )  # fmt: skip


def _cleared_of(body: Mapping[str, Any]) -> Cleared | None:
    """Older records said of a clear only whether residue was accepted."""
    if body["outcome"] != Outcome.CLEARED:
        return None
    return Cleared(body.get("cleared", "residue" if body.get("residue") else "operator"))


@dataclass(frozen=True, slots=True)
class FenceFacts:
    """A quarantined slice: its bind, the receipt that says so, the clear orders used up, and what
    probes have found."""

    bound: BoundFacts
    receipt: ReceiptFacts
    nonces: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    """The last ones that were written down."""

    @classmethod
    def of_cause(cls, bound: BoundFacts, cause: str) -> FenceFacts:
        """Of a fence of which only the cause is remembered."""
        receipt = ReceiptFacts(
            bound.lease_id, bound.kind, bound.epoch, bound.amount, bound.extent_offset,
            Outcome.FENCED, EndCause.AGENT_LOST, Assurance.NONE, 0, 0, 0, {"cause": cause},
        )  # fmt: skip
        return cls(bound, receipt)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the durable surface knew when this boot began; nothing at all on a fresh node.

    Folded from the records: a bind is open from `agent.bound` until `agent.teardown_end`,
    `agent.fenced` or `agent.burnt` of its lease and epoch; a fence stands from `agent.fenced` until
    `agent.cleared`; a receipt stands in the body of any of these until `agent.credited` names its
    outcome; nonces are those of `agent.clear_begun`, findings those of `agent.probed`.
    """

    epochs: Mapping[Kind, EpochWindow | ExtentEpochs] = field(default_factory=dict)
    open_binds: tuple[BoundFacts, ...] = ()
    fences: tuple[FenceFacts, ...] = ()
    receipts: tuple[ReceiptFacts, ...] = ()
    """Not credited yet, those of fences among them."""
    time_floor_ms: int = 0
    """Wall time that had certainly passed."""
    unexported: frozenset[LeaseId] = frozenset()
    """Of these it is certain that no descriptor ever left the agent."""


@dataclass(frozen=True, slots=True)
class Target:
    """A lease as the ledger names it, for what may never have been bound here."""

    lease_id: LeaseId
    epoch: int
    kind: Kind
    amount: int
    extent_offset: int = 0
    generation: int = 0


# Effects


@dataclass(frozen=True, slots=True)
class Persist:
    """Write these records, durably; with `seal_now` under a signature too. Nothing before it."""

    events: tuple[tuple[str, str, int, Mapping[str, Any]], ...]
    """(kind, lease id, epoch, body) each, in this order, one batch."""
    seal_now: bool
    time_floor_ms: int = 0
    may_wait: bool = False
    """Nothing rests on it: it may go with the next batch, or soon."""


@dataclass(frozen=True, slots=True)
class CreateDevice:
    """Make the slice usable, for nobody yet. Its bind, with the used epoch, is durable before."""

    lease_id: LeaseId
    facts: BoundFacts


@dataclass(frozen=True, slots=True)
class WardenHold:
    """Give the warden a duplicate and the deadline (boottime). The device exists before."""

    lease_id: LeaseId
    slot: int
    epoch: int
    kind: Kind
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class WardenRaise:
    """Move the warden's deadline, later only. Nothing need be durable before."""

    lease_id: LeaseId
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class WardenDrop:
    """The warden may forget it. The end of its teardown is durable before."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class OpenGate:
    """Write control's cell. The warden has said that it holds the lease to this deadline before."""

    lease_id: LeaseId
    slot: int
    epoch: int
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class CloseGate:
    """One store in control's cell. Taking away waits for no record."""

    lease_id: LeaseId
    slot: int


@dataclass(frozen=True, slots=True)
class OpenFront:
    """Tell the front about the lease, with its descriptors and keys. The gate is open before."""

    lease_id: LeaseId
    slot: int
    facts: BoundFacts
    session: str
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class ShutFront:
    """Let the front forget the lease. Its empty answer is `step_done(QUIESCE)`."""

    lease_id: LeaseId
    attempt: int


@dataclass(frozen=True, slots=True)
class KillFront:
    """End the front, which did not empty in time; then call `front_lost`."""

    why: str


@dataclass(frozen=True, slots=True)
class DestroyKey:
    """Overwrite control's copy of the lease's key. The front has forgotten its own before."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class RunStep:
    """Do one step and report it with the same `attempt`. The steps before it are done."""

    lease_id: LeaseId
    step: Step
    attempt: int
    facts: BoundFacts
    aside: bool = False
    """Of a fenced slice, whose device may hang: in the way of nobody else's teardown."""


@dataclass(frozen=True, slots=True)
class SendReceipt:
    """Sign with the current key, send to the ledger. What it says is durable and sealed before."""

    receipt: ReceiptFacts

    @property
    def lease_id(self) -> LeaseId:
        return self.receipt.lease_id


@dataclass(frozen=True, slots=True)
class ReportBound:
    """Tell the ledger that it is bound. Its record is durable before. Of a lease that is being
    revoked, also how far that has come: said late or not at all, the receipt says more."""

    lease_id: LeaseId
    epoch: int
    generation: int
    stage: RevokeStage | None = None


@dataclass(frozen=True, slots=True)
class Notify:
    """Tell the holder's session, if it is there. It may be lost; the next use says it again."""

    lease_id: LeaseId
    session: str
    kind: str
    """revoke_warning, revoked, expired, fenced, released or degraded."""
    reason: str
    grace_ms: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a question. Whatever the answer says is durable before."""

    request: RequestId
    result: Result


# Answers


@dataclass(frozen=True, slots=True)
class Bound:
    """Bind and attach. `remaining_ms` counts from the moment of the answer."""

    facts: BoundFacts
    slot: int
    remaining_ms: int


@dataclass(frozen=True, slots=True)
class Extended:
    remaining_ms: int
    generation: int


@dataclass(frozen=True, slots=True)
class Released:
    receipt: ReceiptFacts
    credited: bool


@dataclass(frozen=True, slots=True)
class Detached:
    remaining_ms: int


@dataclass(frozen=True, slots=True)
class Ordered:
    """Burn, revoke and clear: how far the revocation has come, from its end on the teardown; and
    the receipt where there is one already."""

    stage: str
    receipt: ReceiptFacts | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    clean: bool
    """A clear would succeed now."""
    evidence: Mapping[str, Any]


Result = Bound | Extended | Released | Detached | Ordered | Probed | FabricError

Effect = (
    Persist | CreateDevice | WardenHold | WardenRaise | WardenDrop | OpenGate | CloseGate
    | OpenFront | ShutFront | KillFront | DestroyKey | RunStep | SendReceipt | ReportBound
    | Notify | Answer
)  # fmt: skip
