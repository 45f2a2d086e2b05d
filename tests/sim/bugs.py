"""Mistakes planted on purpose, at least one per law. A simulation that misses one proves nothing.

Each changes one place of the cores that ship, for as long as the context is open.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from grafos_core import commands, placement
from grafos_core import lessor as lessor_module
from grafos_core.books import CapacityBook, ExtentMap, Place
from grafos_core.chain import Chain
from grafos_core.commands import Event, GrantBundle
from grafos_core.failure import FabricError
from grafos_core.holder import HolderLease
from grafos_core.lease import EndCause, LeaseState, OnDisconnect
from grafos_core.ledger_state import LedgerState
from grafos_core.lessor import Lessor
from grafos_core.node import NodeCore
from grafos_core.node_effects import CloseGate
from grafos_core.node_endings import Endings, Wake
from grafos_core.node_fences import Fences
from grafos_core.node_lease import Phase
from grafos_core.node_orders import Orders
from grafos_core.receipt import Cleared
from grafos_core.teardown import Stage, Step
from grafos_core.warden import WardenCore
from services.ledger.wall import LedgerTime
from tests.sim.holder import Holder
from tests.sim.node import Node


@dataclass(frozen=True, slots=True)
class Bug:
    """`law` is the one it is meant to break; each place is (owner, name, what it becomes)."""

    label: str
    law: int
    places: tuple[tuple[Any, str, Any], ...]


def _bug(label: str, law: int, owner: Any, name: str, broken: Any) -> Bug:
    return Bug(label, law, ((owner, name, broken),))


@contextmanager
def planted(bug: Bug) -> Generator[None, None, None]:
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in bug.places]
    try:
        for owner, name, broken in bug.places:
            setattr(owner, name, broken)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _wrap(owner: type, name: str, make: Callable[[Any], Any]) -> Any:
    return make(owner.__dict__[name])


def _frees_by_timeout(self: Lessor, lease: Any, now_ms: int) -> Event:
    if lease.state is LeaseState.ENDING:
        return Event("lease.released", now_ms, lease.lease_id, lease.epoch)
    cause = EndCause.BURNT if lease.state is LeaseState.PENDING else EndCause.EXPIRED
    body = {"cause": cause.value, "reason": "", "grace_ms": 0, "by": "ledger"}
    return Event("lease.ending", now_ms, lease.lease_id, lease.epoch, body)


def _grants_what_fits(self: Lessor, ask: GrantBundle, now_ms: int) -> commands.Step:
    """Each member by itself, whatever becomes of the others."""
    tag = {"bundle": ask.request_id, "members": len(ask.grants)}
    steps = []
    for grant in ask.grants:
        try:
            steps.append(self._grant(grant, now_ms))
        except FabricError:
            continue
    events = [replace(x, body={**x.body, **tag}) for step in steps for x in step.events]
    return commands.Step(tuple(events), leases=tuple(step.lease for step in steps if step.lease))


def _first_extent(self: ExtentMap, length: int) -> int | None:
    return 0 if self._total >= length else None


def _extent_taken_unseen(self: ExtentMap, start: int, length: int) -> None:
    """Neither looked up nor taken off the list."""


def _gives_twice(self: CapacityBook, origin: Place, offset: int, amount: int) -> None:
    self._places[Place.FREE] += amount
    if self._extents:
        self._extents.give_back(offset, amount)


def _forgets_epoch(original: Any) -> Any:
    def granted(self: LedgerState, event: Event) -> None:
        node = self.nodes[event.body["node_id"]]
        before = dict(node.epochs)
        original(self, event)
        if event.epoch % 3 == 0:
            node.epochs = before

    return granted


def _no_quiesce(original: Any) -> Any:
    def begin(self: Endings, lease: Any, stage: Stage, now: Any) -> Any:
        return original(self, lease, Stage.QUIESCED if stage is Stage.DEAD else stage, now)

    return begin


def _measures_nothing(original: Any) -> Any:
    def go_on(self: Endings, lease: Any, now: Any) -> Any:
        teardown = lease.teardown
        if teardown is not None and teardown.next_step() in (
            Step.ERASE,
            Step.MEASURE,
        ):
            while teardown.next_step() is not None:
                teardown.done(teardown.next_step(), {}, now.boot_ms)
        return original(self, lease, now)

    return go_on


def _gate_stays_open(self: Node, cell: Any, epoch: int) -> bool:
    return True


def _no_deadline(original: Any) -> Any:
    def fired(self: Endings, lease_id: str, wake: Any, now: Any) -> Any:
        return [] if wake.value == "deadline" else original(self, lease_id, wake, now)

    return fired


def _grace_anew(self: Orders, lease: Any, reason: str, grace_ms: int, now: Any) -> Any:
    """Each order, the same one told again among them, begins the grace anew."""
    self._timers.cancel((lease.lease_id, Wake.GRACE))
    return WARN(self, lease, reason, min(grace_ms, lease.remaining_ms(now)), now)


def _gate_left_open(original: Any) -> Any:
    def end(self: Endings, lease: Any, *why: Any) -> Any:
        grace = lease.revoking
        effects = original(self, lease, *why)
        return [each for each in effects if not (grace and isinstance(each, CloseGate))]

    return end


def _does_not_see(self: NodeCore, session: str, now: Any) -> Any:
    """The end of a holder's connection."""
    return self.tick(now)


def _keeps_nothing(original: Any) -> Any:
    def wait(self: Endings, lease: Any, now: Any, within_ms: int | None = None) -> None:
        facts = lease.facts
        policy = replace(facts.policy, on_disconnect=OnDisconnect.GRACE)
        lease.facts = replace(facts, policy=policy)
        original(self, lease, now, within_ms)

    return wait


def _any_key_signs(self: Lessor, key_id: str) -> None:
    """Also one that is revoked."""


def _forgets_key(original: Any) -> Any:
    def renewed(self: LedgerState, event: Event) -> None:
        body = {name: value for name, value in event.body.items() if name != "key_id"}
        original(self, replace(event, body=body))

    return renewed


def _renewal_shortens(original: Any) -> Any:
    def raised(self: Any, lease: Any, one: Any, now: Any) -> Any:
        return original(self, lease, replace(one, deadline_ms=now.boot_ms + 200), now)

    return raised


def _believes_the_ledger(original: Any) -> Any:
    def sent(self: HolderLease, now_ms: int) -> None:
        original(self, now_ms)
        self._stop_ms = max(self._stop_ms, now_ms + 20_000)

    return sent


def _bind_not_kept(original: Any) -> Any:
    """The record of a bind is told of and never reaches the disk."""

    def persist(self: Node, effect: Any) -> None:
        if effect.events[0][0] == "agent.bound":
            return
        original(self, effect)

    return persist


def _head_not_kept(original: Any) -> Any:
    def persist(self: Node, effect: Any) -> None:
        before = (self.disk.head, self.disk.number)
        original(self, effect)
        if self.disk.number % 7 == 0:
            self.disk.head, self.disk.number = before

    return persist


def _link_lost(original: Any) -> Any:
    def advance(self: Chain, record: Any) -> None:
        original(self, record)
        if record.number % 11 == 0:
            self._number += 1

    return advance


def _fence_frees(original: Any) -> Any:
    def fence(self: Endings, lease: Any, now: Any) -> Any:
        effects = original(self, lease, now)
        self._gate.free(lease.lease_id)
        del self._leases[lease.lease_id]
        return effects

    return fence


def _never_quarantined(self: Lessor, receipt: Any, lease: Any, now_ms: int) -> Any:
    events = (Event("lease.released", now_ms, lease.lease_id, lease.epoch),)
    return self._commit(*events, lease_id=lease.lease_id)


def _probe_frees(original: Any) -> Any:
    """What is found clean goes straight back, without a word of anybody."""

    def probed(self: Fences, lease: Any, now: Any, *, clean: bool) -> Any:
        effects = original(self, lease, now, clean=clean)
        if clean and lease.order is None:
            self._timers.cancel((lease.lease_id, Wake.PROBE))
            lease.move(Phase.CLEARING)
            effects += self._cleared(lease, now, Cleared.POLICY)
        return effects

    return probed


def _trusts_the_probe(original: Any) -> Any:
    """A clear takes an old finding for a measurement, where there is one that says clean."""

    def begin_clear(self: Fences, lease: Any, now: Any) -> Any:
        known = lease.quarantine
        if known is None or not any(each.clean for each in known.findings):
            return original(self, lease, now)
        lease.move(Phase.CLEARING)
        self._timers.cancel((lease.lease_id, Wake.PROBE))
        by = Cleared.OPERATOR if lease.order else Cleared.POLICY
        return self._cleared(lease, now, by)

    return begin_clear


def _looks_once(original: Any) -> Any:
    def await_probe(self: Fences, lease: Any, now: Any) -> None:
        original(self, lease, now)
        if lease.quarantine.probes:
            due = (lease.lease_id, Wake.PROBE)
            self._timers.set(due, now.boot_ms + 3_600_000)

    return await_probe


def _hours_by_the_wall(original: Any) -> Any:
    """Alarms go off by the wall clock, as far as it has gone forwards."""

    def tick(self: Endings, now: Any) -> Any:
        effects = original(self, now)
        known = _wall_since.setdefault(self, (now.wall_ms, now.boot_ms, now.boot_ms))
        by_wall_ms = max(known[2], known[1] + now.wall_ms - known[0])
        _wall_since[self] = (known[0], known[1], by_wall_ms)
        for lease in list(self._leases.values()):
            if lease.phase is Phase.LIVE and lease.deadline_ms <= by_wall_ms:
                effects += self._fired(lease.lease_id, Wake.DEADLINE, now)
        return effects

    return tick


def _whole_ttl(self: NodeCore, token: Any, now: Any) -> int:
    """From the bind on, however late it comes."""
    return int(token.ttl_ms)


def _moves_its_stop(original: Any) -> Any:
    """When the ledger has agreed, and the node has not been asked yet."""

    def renewal_granted(self: Holder, lease: Any, token: Any) -> None:
        original(self, lease, token)
        held = self.held.get(lease.lease_id)
        if held is not None and held.belief is not None:
            stop_ms = self.clock.boot_ms() + lease.ttl_ms
            held.belief._stop_ms = max(held.belief._stop_ms, stop_ms)

    return renewal_granted


def _counts_what_it_slept(self: WardenCore, duration_ms: int, now_ms: int) -> None:
    """As silence of the agent."""


def _makes_nothing_up(original: Any) -> Any:
    """What the ledger's time stood still is taken for a leap afterwards."""

    def read(self: LedgerTime, now: Any) -> int:
        found: int = original(self, now)
        if "behind" in self.why:
            self._trusted = now._replace(wall_ms=found)
        return found

    return read


def _forgets_at_once(original: Any) -> Any:
    """A clock that was set is good again in the same moment."""

    def trust(self: LedgerTime, *reading: Any) -> None:
        self._held_until_ms = None
        original(self, *reading)

    return trust


_wall_since: weakref.WeakKeyDictionary[Endings, tuple[int, int, int]] = weakref.WeakKeyDictionary()
WARN = Orders._warn
BUGS = (
    _bug("blocks are found without a look at what is free", 1, ExtentMap, "find", _first_extent),
    _bug("blocks that are taken stay on the list", 1, ExtentMap, "take", _extent_taken_unseen),
    _bug("a bundle is granted as far as it fits", 1, Lessor, "_grant_bundle", _grants_what_fits),
    _bug("capacity comes back and is not taken away", 2, CapacityBook, "give_back", _gives_twice),
    _bug("an overdue receipt frees capacity", 3, Lessor, "_due_event", _frees_by_timeout),
    _bug("any receipt takes a slice out of quarantine", 3, Lessor, "_credit_fenced",
         _never_quarantined),
    _bug("teardown is sealed without erase and measure", 3, Endings, "_go_on",
        _wrap(Endings, "_go_on", _measures_nothing)),
    _bug("teardown does not wait for what is in flight", 4, Endings, "_begin_teardown",
        _wrap(Endings, "_begin_teardown", _no_quiesce)),
    _bug("the front does not look at the gate", 4, Node, "_open", _gate_stays_open),
    _bug("neither control nor warden keeps the hour", 5, Endings, "_fired",
        _wrap(Endings, "_fired", _no_deadline)),
    _bug("a renewal shortens", 5, NodeCore, "_raised",
        _wrap(NodeCore, "_raised", _renewal_shortens)),
    _bug("a holder believes before the node has answered", 5, HolderLease, "renewal_sent",
        _wrap(HolderLease, "renewal_sent", _believes_the_ledger)),
    _bug("deadlines are kept by the wall clock", 5, Endings, "tick",
        _wrap(Endings, "tick", _hours_by_the_wall)),
    _bug("a late bind has the whole time", 5, NodeCore, "_remaining_ms", _whole_ttl),
    _bug("the ledger's word moves a holder's stop", 5, Holder, "renewal_granted",
        _wrap(Holder, "renewal_granted", _moves_its_stop)),
    _bug("who slept takes silence for death", 5, WardenCore, "slept", _counts_what_it_slept),
    _bug("a clock that was behind has leapt", 8, LedgerTime, "read",
        _wrap(LedgerTime, "read", _makes_nothing_up)),
    _bug("a clock that was set is good at once", 8, LedgerTime, "_trust",
        _wrap(LedgerTime, "_trust", _forgets_at_once)),
    _bug("a bind is told of and not durable", 6, Node, "_persist",
        _wrap(Node, "_persist", _bind_not_kept)),
    _bug("a grace is lengthened by the order that is told again", 5, Orders, "_warn", _grace_anew),
    _bug("a revoked lease goes on after its grace", 4, Endings, "_end",
        _wrap(Endings, "_end", _gate_left_open)),
    _bug("nobody sees that a holder is lost", 5, NodeCore, "session_lost", _does_not_see),
    _bug("what is to be kept ends with a connection", 5, Endings, "_await_return",
         _wrap(Endings, "_await_return", _keeps_nothing)),
    _bug("a revoked key signs on", 8, Lessor, "_check_signer", _any_key_signs),
    _bug("it is forgotten which key signed a renewal", 8, LedgerState, "_renewed",
         _wrap(LedgerState, "_renewed", _forgets_key)),
    _bug("an epoch is given again", 7, LedgerState, "_granted",
        _wrap(LedgerState, "_granted", _forgets_epoch)),
    Bug("old evidence of readiness counts", 8, (
        (lessor_module, "EVIDENCE_MS_MAX", 60_000), (placement, "EVIDENCE_MS_MAX", 60_000),
        (lessor_module, "REGISTRATION_TTL_MS", 60_000),
    )),
    _bug("the head trails the records", 9, Node, "_persist",
        _wrap(Node, "_persist", _head_not_kept)),
    _bug("a record number is skipped", 9, Chain, "advance", _wrap(Chain, "advance", _link_lost)),
    _bug("a probe frees what it finds clean", 10, Fences, "_probed",
        _wrap(Fences, "_probed", _probe_frees)),
    _bug("what is proved clean is cleared without the policy", 10, Fences, "_may_clear",
        lambda self, lease: True),
    _bug("a clear trusts an old probe", 3, Fences, "_begin_clear",
        _wrap(Fences, "_begin_clear", _trusts_the_probe)),
    _bug("a fence is looked at once and forgotten", 10, Fences, "_await_probe",
        _wrap(Fences, "_await_probe", _looks_once)),
    _bug("residue counts as cleared though nobody accepted it", 10, Fences, "_clear_failed",
        lambda self, lease, now: self._cleared(lease, now, Cleared.RESIDUE)),
    _bug("what is fenced is free at once", 10, Endings, "_fence",
        _wrap(Endings, "_fence", _fence_frees)),
)  # fmt: skip
