"""What an agent remembers of the boots before: its own records, read once more from the first on.

    agent.bound, attached, extended     an open bind, with all that its teardown needs
    agent.teardown_end, burnt           closes it; a receipt is owed
    agent.fenced                        closes it; a fence stands, and a receipt is owed
    agent.clear_begun                   a nonce is used up, where an operator ordered it
    agent.probed                        what a look at a fenced slice has found
    agent.cleared                       the fence is gone; a receipt is owed
    agent.credited                      the receipt of that outcome is not owed any more

Rules. What the records say in full is taken from them. Of what began before the oldest record that
is still there, the balance at the beginning of a segment knows the slice and not the policy: then
the stricter policy is assumed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from grafos_core.chain import EventKind, Record
from grafos_core.lease import EndCause, Kind, LeaseId, Policy
from grafos_core.node_effects import BoundFacts, FenceFacts, ReceiptFacts, Recovered
from grafos_core.quarantine import FINDINGS_MAX, Finding
from grafos_core.receipt import Assurance, Outcome
from grafos_core.surface_state import OpenBind, SurfaceState

PROVING: Final = frozenset(
    {
        EventKind.AGENT_TEARDOWN_END,
        EventKind.AGENT_FENCED,
        EventKind.AGENT_BURNT,
        EventKind.AGENT_CLEARED,
    }
)
"""Records that hold a receipt's facts."""
CREDITED: Final = "agent.credited"
ENDED_MAX: Final = 1_024


class BatchOfRecords(Protocol):
    @property
    def records(self) -> Sequence[Record]: ...


class Recollection:
    """Folded from the records of all boots before this one."""

    def __init__(self, state: SurfaceState, batches: Iterable[BatchOfRecords]) -> None:
        self._state = state
        self._bound: dict[str, BoundFacts] = {}
        self._fenced: dict[str, tuple[BoundFacts, ReceiptFacts]] = {}
        self._nonces: dict[str, list[str]] = {}
        self._findings: dict[str, list[Finding]] = {}
        self._owed: dict[tuple[str, int], ReceiptFacts] = {}
        self._closed: set[tuple[str, int]] = set()
        self.proofs: dict[str, tuple[int, str]] = {}
        """Number and hash of the record that holds what a lease's receipt says."""
        self.needed: dict[str, int] = {}
        """Numbers of the records without which the next recovery would know less."""
        self.ended: OrderedDict[str, tuple[BoundFacts, EndCause]] = OrderedDict()
        """The last ones that were known with their holders: so a late caller learns why."""
        for batch in batches:
            for record in batch.records:
                self._fold(record)
        self._check_against_state()

    def recovered(self, kinds: Iterable[Kind], time_floor_ms: int) -> Recovered:
        """As the core wants to hear it."""
        return Recovered(
            epochs={kind: self._state.epochs(kind) for kind in kinds},
            open_binds=tuple(self._bound.values()),
            fences=tuple(
                self._fence(lease_id, bound, receipt)
                for lease_id, (bound, receipt) in self._fenced.items()
            ),
            receipts=tuple(self._owed.values()),
            time_floor_ms=time_floor_ms,
        )

    def _fence(self, lease_id: str, bound: BoundFacts, receipt: ReceiptFacts) -> FenceFacts:
        nonces, findings = self._nonces.get(lease_id, ()), self._findings.get(lease_id, ())
        return FenceFacts(bound, receipt, tuple(nonces), tuple(findings))

    @property
    def open_binds(self) -> tuple[BoundFacts, ...]:
        return tuple(self._bound.values())

    @property
    def fenced(self) -> tuple[BoundFacts, ...]:
        return tuple(bound for bound, _ in self._fenced.values())

    def _fold(self, record: Record) -> None:
        lease_id, body = record.lease_id, record.body
        match record.kind:
            case EventKind.AGENT_BOUND | EventKind.AGENT_ATTACHED:
                self._bound[lease_id] = BoundFacts.of_body(lease_id, record.epoch, body)
                self.needed.setdefault(lease_id, record.number)
            case EventKind.AGENT_EXTENDED if lease_id in self._bound:
                self._bound[lease_id] = replace(
                    self._bound[lease_id],
                    generation=body["generation"],
                    lease_end_ms=body["lease_end_ms"],
                )
            case kind if kind in PROVING:
                self._ended_by(record)
            case "agent.clear_begun" if body["nonce"]:
                self._nonces.setdefault(lease_id, []).append(body["nonce"])
            case "agent.probed":
                known = self._findings.get(lease_id, [])
                self._findings[lease_id] = [*known, Finding.of_body(body)][-FINDINGS_MAX:]
            case "agent.credited":
                self._credited(lease_id, record.epoch, body["outcome"])

    def _ended_by(self, record: Record) -> None:
        lease_id = record.lease_id
        receipt = ReceiptFacts.of_body(lease_id, record.epoch, record.body)
        bound = self._bound.pop(lease_id, None)
        if record.kind == EventKind.AGENT_FENCED:
            self._fenced[lease_id] = (bound or _stranger(receipt), receipt)
        elif record.kind == EventKind.AGENT_CLEARED:
            was = self._fenced.pop(lease_id, None)
            self._nonces.pop(lease_id, None)
            self._findings.pop(lease_id, None)
            bound = was[0] if was else None
        if bound is not None:
            self.ended[lease_id] = (bound, receipt.cause)
            while len(self.ended) > ENDED_MAX:
                self.ended.popitem(last=False)
        self._owed[lease_id, record.epoch] = receipt
        self._closed.add((lease_id, record.epoch))
        self.proofs[lease_id] = (record.number, record.hash.hex())
        self.needed[lease_id] = record.number

    def _credited(self, lease_id: str, epoch: int, outcome: str) -> None:
        owed = self._owed.get((lease_id, epoch))
        if owed is None or owed.outcome.value != outcome:
            return
        del self._owed[lease_id, epoch]
        if owed.outcome is not Outcome.FENCED:
            self.needed.pop(lease_id, None)
            self.proofs.pop(lease_id, None)

    def _check_against_state(self) -> None:
        """What only the balance knows is added, what it does not know is not open."""
        open_binds = self._state.open_binds()
        self._bound = {
            lease_id: self._bound.get(lease_id) or _bound_of(slice_)
            for lease_id, slice_ in open_binds.items()
            if (lease_id, slice_.epoch) not in self._closed
        }
        for lease_id, fence in self._state.fences().items():
            if lease_id not in self._fenced:
                bound = _bound_of(fence.slice)
                self._fenced[lease_id] = (bound, _fence_receipt(bound, fence.cause))


def _bound_of(open_bind: OpenBind) -> BoundFacts:
    return BoundFacts(
        LeaseId(open_bind.lease_id),
        open_bind.kind,
        open_bind.epoch,
        open_bind.generation,
        open_bind.amount,
        open_bind.extent_offset,
        "",
        open_bind.holder_key,
        0,
        Policy(scrub=True),
    )


def _stranger(receipt: ReceiptFacts) -> BoundFacts:
    """The slice of a fence whose bind is not among the records."""
    return BoundFacts(
        receipt.lease_id,
        receipt.kind,
        receipt.epoch,
        0,
        receipt.amount,
        receipt.extent_offset,
        "",
        "",
        0,
        Policy(scrub=True),
    )


def _fence_receipt(bound: BoundFacts, cause: str) -> ReceiptFacts:
    """Of a fence that only the balance knows: that it stands, and what had failed."""
    return ReceiptFacts(
        bound.lease_id,
        bound.kind,
        bound.epoch,
        bound.amount,
        bound.extent_offset,
        Outcome.FENCED,
        EndCause.AGENT_LOST,
        Assurance.NONE,
        0,
        0,
        0,
        {"cause": cause},
    )
