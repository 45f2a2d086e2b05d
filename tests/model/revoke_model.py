"""A revocation with a grace, in true time: what is ordered, what is told, and what still works.

One lease.  An authority orders its end with a grace, and may order it once more with another one;
orders travel as messages that arrive late, twice, in any order.  The node keeps a deadline and,
once it has heard, the end of the grace.  The holder operates, renews, reports that it has saved its
work, or does nothing.  An operation passes the gate first and moves its bytes later.

    ACTIVE --hear--> GRACE --report--> COOPERATIVE --measure--> DOWN
                       | grace over --> FORCED ------measure------^
       deadline, from either, -------> EXPIRED -----measure-------^

The ledger shows the stage that it ordered, or the last one that the node's reports told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.model.lease_model import act
from tests.model.search import Step

TTL_TICKS: Final = 4
GRACES: Final = (3, 1)
"""Of the first and the second order."""
LAST_TICK: Final = 7
ACTIVE, GRACE, COOPERATIVE, FORCED, EXPIRED, DOWN = range(6)

S14: Final = "S14: an operation takes effect after the forced teardown began"
GRACE_LAW: Final = "grace: the lease works past the grace that was ordered, counted from hearing it"
DEADLINE: Final = "deadline: a revocation has let the lease work past its end"
VIEW: Final = "view: the ledger shows more than the node has done"


@dataclass(frozen=True, slots=True)
class Grace:
    """Defences of a revocation, all there by default."""

    only_shortens: bool = True
    """An order that comes again, or later with more grace, does not begin the grace anew."""
    within_deadline: bool = True
    """The grace is cut to what is left of the lease, and its deadline stands beside it."""
    no_renewal: bool = True
    """What is being revoked is not renewed."""
    gate_first: bool = True
    """The gate is closed before anything of the teardown is done."""
    in_flight_awaited: bool = True
    """What passed the gate before is waited for, or its front is killed, before the erase."""
    reports_only_forward: bool = True
    """The ledger takes a stage that is later than the one it shows, and no other."""


class State(NamedTuple):
    now: int = 0
    stage: int = ACTIVE
    deadline: int = TTL_TICKS
    granted_end: int = TTL_TICKS  # what the last renewal before the revocation gave
    grace_end: int = 0  # of the node; 0: it has not heard
    allowed_end: int = 0  # by the laws: the least of all that was heard
    ordered: int = 0  # how many orders are out
    renewed: bool = False
    gate_open: bool = True
    moving: bool = False
    reports: int = 0  # stages that the node has told, as bits; none is ever lost for good
    shown: int = ACTIVE


class RevokeModel:
    """Every step that authority, node and holder can take from a state."""

    def __init__(self, has: Grace) -> None:
        self._has = has

    def first_states(self) -> list[State]:
        return [State()]

    def steps(self, s: State) -> Iterator[Step[State]]:
        yield from self._ledger(s)
        yield from self._node(s)
        yield from self._holder(s)
        if s.now < LAST_TICK and not self._due(s):
            yield act("tick"), s._replace(now=s.now + 1), ""

    def broken_laws(self, s: State) -> Iterator[str]:
        told = max((stage for stage in range(6) if s.reports >> stage & 1), default=ACTIVE)
        if s.shown > told:
            yield VIEW

    def _ledger(self, s: State) -> Iterator[Step[State]]:
        if s.ordered < len(GRACES):
            yield act("order", s.ordered + 1), s._replace(ordered=s.ordered + 1), ""
        for stage in range(GRACE, DOWN + 1):
            later = stage > s.shown if self._has.reports_only_forward else stage != s.shown
            if s.reports >> stage & 1 and later:
                law = "" if stage > s.shown else VIEW
                yield act("report", stage), s._replace(shown=stage), law

    def _due(self, s: State) -> bool:
        """The node does what fell due before time goes on."""
        if s.stage not in (ACTIVE, GRACE):
            return False
        return s.now >= s.deadline or (s.stage == GRACE and s.now >= s.grace_end)

    def _node(self, s: State) -> Iterator[Step[State]]:
        for order in range(s.ordered):
            if s.stage in (ACTIVE, GRACE) and not self._due(s):
                yield act("hear", order + 1), self._heard(s, s.now + GRACES[order]), ""
        if s.stage == GRACE and s.now >= s.grace_end:
            yield act("grace_over"), self._closing(s, FORCED), ""
        elif s.stage in (ACTIVE, GRACE) and s.now >= s.deadline:
            yield act("deadline"), self._closing(s, EXPIRED), ""
        if s.stage in (COOPERATIVE, FORCED, EXPIRED):
            if not s.gate_open and self._has.in_flight_awaited and s.moving:
                yield act("quiesce"), s._replace(moving=False), ""
            else:
                down = s._replace(stage=DOWN, gate_open=False, reports=s.reports | 1 << DOWN)
                yield act("measure"), down, ""

    def _heard(self, s: State, until: int) -> State:
        bound = until if not s.allowed_end else min(until, s.allowed_end)
        if self._has.within_deadline:
            until = min(until, s.deadline)
        if self._has.only_shortens and s.grace_end:
            until = min(until, s.grace_end)
        deadline = s.deadline if self._has.within_deadline else max(s.deadline, until)
        return s._replace(
            stage=GRACE, grace_end=until, allowed_end=bound, deadline=deadline,
            reports=s.reports | 1 << GRACE,
        )  # fmt: skip

    def _closing(self, s: State, stage: int) -> State:
        still_open = s.gate_open and not self._has.gate_first
        return s._replace(stage=stage, gate_open=still_open, reports=s.reports | 1 << stage)

    def _holder(self, s: State) -> Iterator[Step[State]]:
        if s.gate_open and not s.moving:
            yield act("operate"), s._replace(moving=True), self._late(s)
        if s.moving:
            law = S14 if s.stage == DOWN else ""
            yield act("operation_lands"), s._replace(moving=False), law
        if s.stage == GRACE and not self._due(s):
            yield act("checkpoint_done"), self._closing(s, COOPERATIVE), ""
        may_renew = s.stage == ACTIVE or (s.stage == GRACE and not self._has.no_renewal)
        if may_renew and not s.renewed and not self._due(s):
            end = s.now + TTL_TICKS
            granted = end if s.stage == ACTIVE else s.granted_end
            yield act("renew"), s._replace(renewed=True, deadline=end, granted_end=granted), ""

    def _late(self, s: State) -> str:
        """What an operation breaks that passes the gate now."""
        if s.stage in (COOPERATIVE, FORCED, EXPIRED, DOWN):
            return S14
        if s.now >= s.granted_end and not self._due(s):
            return DEADLINE
        if s.allowed_end and s.now >= s.allowed_end and not self._due(s):
            return GRACE_LAW
        return ""
