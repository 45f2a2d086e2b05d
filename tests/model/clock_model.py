"""What clocks can and cannot do to a lease: grants, renewals and deadlines in true time.

One exclusive slot, two epochs.  True time moves in ticks.  The ledger and the agent have wall
clocks that are off by up to EPS from each other, or more, or step back; the agent and the holder
also count durations, which are right.  Binding, teardown and taking back are one step each here:
`lease_model` takes them apart.

    rule of the agent    the wall clock judges a token once, when it is bound; from then on the
                         deadline is a duration, and only a later generation moves it, later
    rule of the holder   it trusts its handle as long as the agent's own answer said
    rule of the ledger   capacity comes back on a receipt, whatever the time is
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.model.lease_model import act
from tests.model.search import Step

EPOCHS_MAX: Final = 2
TTL_TICKS: Final = 2
EPS_TICKS: Final = 1
FIRST_TICK: Final = 3
"""Above 0, so that a clock which is wrong stays positive; 0 means "none" below."""

LAW_1 = "law 1, exclusive: an effect of a lease whose capacity the ledger has given away"
LAW_4 = "law 4, fenced out: an effect of an older epoch"
# Laws 1 and 4 hold on any clock; law 5 is a promise that rests on good ones.
LAW_5 = "law 5, on time: an effect later than the lease's end and the published bound"
HOLDER = "rule of the holder: it still trusts a lease that the agent counts as over"


@dataclass(frozen=True, slots=True)
class Timing:
    """Defences against time, all there by default, and how wrong the clocks may be."""

    epoch_checked: bool = True
    floor_durable: bool = True
    receipts_needed: bool = True
    expiry_checked: bool = True
    """By the agent: the token's at the bind, the deadline at every operation."""
    ledger_waits: bool = True
    """Without receipts: the ledger waits EPS beyond the end."""
    renewal_only_later: bool = True
    """The agent takes a later generation only, and never an earlier deadline."""
    holder_trusts_agent_only: bool = True
    """The holder's deadline moves by the agent's answer, not by the ledger's."""

    clock_beyond_eps: bool = False
    clock_steps_back: bool = False
    """The agent's wall clock, once, by one tick."""
    renewals: bool = False
    early_release: bool = True
    """A holder may let go before its deadline: a narrow window opens only with this."""
    last_tick: int = 9


class Lease(NamedTuple):
    """What the ledger signed for one epoch: the ends of its two generations, on its clock."""

    end: int = 0
    renewed_end: int = 0


class State(NamedTuple):
    now: int
    agent_offset: int
    ledger_offset: int
    leases: tuple[Lease, ...] = (Lease(),) * (EPOCHS_MAX + 1)
    newest: int = 0
    free: bool = True
    receipts: int = 0
    floor: int = 0  # of the agent, in memory; while bound, the bound epoch
    floor_on_disk: int = 0
    bound: bool = False
    deadline: int = 0  # a duration from the bind, so in true time
    generation: int = 0
    handed: int = 0
    trusted_until: tuple[int, ...] = (0,) * (EPOCHS_MAX + 1)  # by the holders
    crashed: bool = False
    stepped: bool = False
    effect_epoch: int = 0


class ClockModel:
    """Every step that clocks, ledger, agent and holders can take from a state."""

    def __init__(self, timing: Timing) -> None:
        self._has = timing

    def first_states(self) -> list[State]:
        """Wall clocks that differ by no more than EPS, unless the variant says otherwise."""
        offsets = [(agent, ledger) for agent in (0, 1, -1) for ledger in (0, 1)]
        good = [pair for pair in offsets if abs(pair[0] - pair[1]) <= EPS_TICKS]
        bad = [(-3, 0), (-3, 1)] if self._has.clock_beyond_eps else []
        return [State(FIRST_TICK, *pair) for pair in good + bad]

    def steps(self, s: State) -> Iterator[Step[State]]:
        if s.now < self._has.last_tick:
            yield act("tick"), s._replace(now=s.now + 1), ""
        if self._has.clock_steps_back and not s.stepped and s.agent_offset >= 0:
            stepped = s._replace(agent_offset=s.agent_offset - 1, stepped=True)
            yield act("clock_steps_back"), stepped, ""
        yield from self._ledger(s)
        for e in range(1, s.newest + 1):
            yield from self._token(s, e)
            yield from self._operation(s, e)
        yield from self._agent(s)

    def broken_laws(self, s: State) -> Iterator[str]:
        """A holder may be wrong about a lease that crashed or was ended early, not about time."""
        if s.bound and s.deadline <= s.now < s.trusted_until[s.floor]:
            yield HOLDER

    def _ledger(self, s: State) -> Iterator[Step[State]]:
        now, e = s.now + s.ledger_offset, s.newest
        if s.free:
            if e < EPOCHS_MAX:
                granted = put_lease(s, e + 1, Lease(now + TTL_TICKS))
                yield act("grant", e + 1), granted._replace(newest=e + 1, free=False), ""
            return
        lease = s.leases[e]
        end = lease.renewed_end or lease.end
        if self._has.renewals and not lease.renewed_end and now < end and now + TTL_TICKS > end:
            renewed = put_lease(s, e, lease._replace(renewed_end=now + TTL_TICKS))
            if not self._has.holder_trusts_agent_only and s.handed >> e & 1:
                renewed = trusting(renewed, e, s.now + TTL_TICKS)
            yield act("renew", e), renewed, ""
        if self._has.receipts_needed:
            if s.receipts >> e & 1:
                yield act("credit", e), s._replace(free=True), ""
        elif now >= end + (EPS_TICKS if self._has.ledger_waits else 0):
            yield act("free_by_timeout", e), s._replace(free=True), ""

    def _token(self, s: State, e: int) -> Iterator[Step[State]]:
        """A token of either generation may arrive at any time, and again."""
        wall = s.now + s.agent_offset
        for generation, end in enumerate(s.leases[e]):
            if not end or (self._has.expiry_checked and wall >= end):
                continue
            remaining = max(min(TTL_TICKS, end - wall), 0)
            if s.bound and s.floor == e:
                yield from self._extend(s, e, generation, s.now + remaining)
            elif self._accepts(s, e):
                on_disk = e if self._has.floor_durable else 0
                bound = s._replace(
                    floor=e,
                    floor_on_disk=max(on_disk, s.floor_on_disk),
                    bound=True,
                    deadline=s.now + remaining,
                    generation=generation,
                    handed=s.handed | 1 << e,
                )
                yield act("bind", e, generation), trusting(bound, e, bound.deadline), ""

    def _accepts(self, s: State, e: int) -> bool:
        if self._has.epoch_checked and e <= s.floor:
            return False
        return not s.bound or not self._has.receipts_needed

    def _extend(self, s: State, e: int, generation: int, deadline: int) -> Iterator[Step[State]]:
        """The answer may get lost: then the agent's deadline has moved and the holder's has not."""
        if self._has.renewal_only_later:
            if generation <= s.generation:
                return
            deadline = max(deadline, s.deadline)
        extended = s._replace(generation=generation, deadline=deadline)
        yield act("extend", e, generation), trusting(extended, e, deadline), ""
        yield act("extend_answer_lost", e, generation), extended, ""

    def _operation(self, s: State, e: int) -> Iterator[Step[State]]:
        """A holder may have looked at its clock long ago; so its own check guards nothing here."""
        same = not self._has.epoch_checked or s.floor == e
        late = self._has.expiry_checked and s.now >= s.deadline
        if not s.handed >> e & 1 or not s.bound or not same or late:
            return
        verb = "operate" if s.floor == e else "late_operation"
        yield act(verb, e), s._replace(effect_epoch=e), self._broken_by_effect(s, e)

    def _broken_by_effect(self, s: State, e: int) -> str:
        if e < s.effect_epoch:
            return LAW_4
        if e != s.newest or s.free:
            return LAW_1
        return LAW_5 if self._overdue(s, e) else ""

    def _overdue(self, s: State, e: int) -> bool:
        end = s.leases[e].renewed_end or s.leases[e].end
        return s.now + s.ledger_offset >= end + EPS_TICKS

    def _agent(self, s: State) -> Iterator[Step[State]]:
        e = s.floor
        if s.bound:
            ended = s._replace(bound=False, deadline=0, receipts=s.receipts | 1 << e)
            if s.now >= s.deadline:
                yield act("expire", e), ended, ""
            elif self._has.early_release:  # a holder that lets go has stopped trusting
                yield act("release", e), trusting(ended, e, -1), ""
        elif self._has.receipts_needed and not s.free:
            yield from self._receipts(s)
        if not s.crashed:
            kept = s.floor_on_disk
            lost = s._replace(crashed=True, floor=kept, bound=False, deadline=0)
            yield act("agent_crash"), lost, ""

    def _receipts(self, s: State) -> Iterator[Step[State]]:
        """For what the warden took back in a crash, and for a grant that nobody ever bound."""
        e = s.newest
        receipts = s.receipts | 1 << e
        if s.floor == e:
            yield act("seal", e), s._replace(receipts=receipts), ""
        lease = s.leases[e]
        long_over = s.now + s.ledger_offset >= (lease.renewed_end or lease.end) + EPS_TICKS
        if s.floor < e and long_over:
            on_disk = e if self._has.floor_durable else s.floor_on_disk
            burnt = s._replace(floor=e, floor_on_disk=on_disk, receipts=receipts)
            yield act("burnt", e), burnt, ""


def put_lease(s: State, e: int, lease: Lease) -> State:
    return s._replace(leases=(*s.leases[:e], lease, *s.leases[e + 1 :]))


def trusting(s: State, e: int, until: int) -> State:
    """The holder of epoch e trusts its handle until then; -1 ends that, else it never shrinks."""
    trusted = 0 if until < 0 else max(until, s.trusted_until[e])
    values = (*s.trusted_until[:e], trusted, *s.trusted_until[e + 1 :])
    return s._replace(trusted_until=values)
