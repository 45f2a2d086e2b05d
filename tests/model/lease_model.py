"""A lease's whole life in miniature: ledger, agent, warden and holders, and all that goes wrong.

Leases are named by their epochs, 1, 2, 3.  There is no clock in this model: a deadline may pass
at any moment, which allows more than any clock would (`clock_model` has the clocks).  Messages
are sets that nothing is ever taken out of, so each of them may be lost, late, doubled or out of
order.  The agent may crash between any two steps; the warden, the front and the holders live on.

Two shapes of a resource:

    SLOT    one exclusive extent of a disk.  Operations pass the front, which looks at the gate
            page and then moves bytes: between the two the gate may close.
    AMOUNT  two units of memory, one per lease.  The holder has a mapping and asks nobody; the
            end of it is the truncation of the memory, by the agent or by the warden.

A lease at the agent:

    NONE -bind-> BINDING -guard-> GUARDED -hand_over-> LIVE -mark_dead-> DEAD
                                                                          | quiesce erase measure
         FENCED <- fence, from any step of the teardown --clear-> DEAD    v seal
                                                                        SEALED -> receipt
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.model.search import Action, Step

# The ledger's states of a lease; everything between FREE and RELEASED is charged to the node.
FREE, PENDING, ACTIVE, ENDING, UNCONFIRMED, FENCED_IN_LEDGER, RELEASED = range(7)
# The agent's; from DEAD on, DEAD + n means that the first n steps of the teardown are done.
NONE, BINDING, GUARDED, LIVE, DEAD = range(5)
SEALED, FENCED = 10, 11

TEARDOWN: Final = ("quiesce", "erase", "measure", "seal")

LAW_1 = "law 1, exclusive: more is in use than there is"
LAW_1_IN_THE_BOOKS = "law 1, exclusive: more is leased and in use than there is"
LAW_3 = "law 3, proved back: capacity is free while bytes, a mapping or an operation remain"
LAW_4 = "law 4, fenced out: an operation took effect after its lease's teardown"
LAW_5 = "law 5, on time: the agent is dead and nobody can end the holder's access"
LAW_7 = "law 7, rising: an epoch was granted or bound a second time"
LAW_8 = "law 8, closed only with a reason: a good grant is refused as burnt"
LAW_10 = "law 10, slice: a fence went away without a clear"


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the world is.  Each number multiplies the states."""

    capacity: int
    epochs: int
    crashes: int = 1
    faults: int = 1
    """How many steps of a teardown may fail, or an erase leave bytes behind without saying so."""

    @property
    def is_slot(self) -> bool:
        return self.capacity == 1


SLOT: Final = Shape(capacity=1, epochs=2)


@dataclass(frozen=True, slots=True)
class Defences:
    """What stands between a fault and a broken law.  All of them by default."""

    epoch_checked_at_use: bool = True
    """An operation is compared with the epoch that the gate is open for."""
    epoch_checked_at_bind: bool = True
    """A token whose epoch is below the floor, or burnt, is refused."""
    floor_durable: bool = True
    """The floor is on disk before the first effect."""
    bind_record_durable: bool = True
    """The bind, with its floor, is on disk before the holder gets its handle."""
    ledger_durable: bool = True
    """A grant is on disk before its token exists."""
    window_kept: bool = True
    """Amounts: the window remembers every burnt epoch above the floor, not only the last."""
    window_used: bool = True
    """Amounts: there is a window at all, and not one number that burns all older grants."""
    receipts_needed: bool = True
    """The ledger credits on a receipt, not because time passed."""
    receipt_names_lease: bool = True
    """A receipt credits only the lease that it is for."""
    ledger_counts: bool = True
    """The ledger grants within capacity, and does not leave the counting to the agent."""
    agent_counts: bool = True
    """The agent refuses what exceeds its own capacity, whatever a token says."""
    teardown: tuple[str, ...] = TEARDOWN
    burn_raises_floor: bool = True
    """The receipt that nothing was created makes sure that nothing will be."""
    fence_durable: bool = True
    clear_proves: bool = True
    """A clear runs the teardown again before anything is free."""
    warden_guards: bool = True
    """The warden has its duplicate descriptor before the holder gets its handle."""
    warden_keyless: bool = True
    """What the warden took back is measured and signed by an agent, not by the warden."""
    recovery_measures: bool = True
    """A restarted agent tears down what it finds, and does not take it for gone."""


class State(NamedTuple):
    """Numbers that are sets have bit e set for the lease of epoch e."""

    ledger: tuple[int, ...]
    stage: tuple[int, ...]
    up: bool = True
    crashes: int = 0
    faults: int = 0
    minted: int = 0  # tokens out in the world, to be used at any time, more than once
    handed: int = 0  # holders that have had a handle
    receipts: int = 0
    fence_reports: int = 0
    refused: int = 0  # the floor and window of the agent, in memory
    durable: int = 0  # ... and on disk
    guarded: int = 0  # the warden has the descriptor and the deadline
    open: int = 0  # the gate page says open, or a mapping exists
    moving: int = 0  # the front has let the operation pass; its bytes have not landed
    residue: int = 0  # bytes of this lease lie in the slice
    unreachable: int = 0  # mappings whose last descriptor died with an agent
    fenced: int = 0  # what must stay FENCED, for law 10


def put(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


class LeaseModel:
    """Every step that ledger, agent, warden, front and holders can take from a state."""

    def __init__(self, shape: Shape, defences: Defences) -> None:
        self._shape = shape
        self._has = defences
        self._epochs = range(1, shape.epochs + 1)

    def first_states(self) -> list[State]:
        none = (0,) * (self._shape.epochs + 1)
        return [State(none, none, crashes=self._shape.crashes, faults=self._shape.faults)]

    def steps(self, s: State) -> Iterator[Step[State]]:
        yield from self._grants(s)
        for e in self._epochs:
            if not s.ledger[e]:
                break
            yield from self._ledger(s, e)
            yield from self._holder(s, e)
            yield from self._warden(s, e)
            if s.up:
                yield from self._binding(s, e)
                yield from self._teardown(s, e)
                yield from self._fences(s, e)
        yield from self._crash(s)

    def broken_laws(self, s: State) -> Iterator[str]:
        in_use = s.open | s.moving | s.residue
        if in_use.bit_count() > self._shape.capacity:
            yield LAW_1
        held = sum(1 << e for e in self._epochs if FREE < s.ledger[e] < RELEASED)
        if (in_use | held).bit_count() > self._shape.capacity:
            yield LAW_1_IN_THE_BOOKS
        if not s.up and s.open & ~s.guarded:
            yield LAW_5
        for e in self._epochs:
            bit = 1 << e
            if s.fenced & bit and (s.stage[e] != FENCED or s.ledger[e] == RELEASED):
                yield LAW_10
            wanted = s.minted & bit and s.ledger[e] == PENDING and s.stage[e] == NONE
            if wanted and s.refused & bit & ~(s.handed | s.receipts):
                yield LAW_8

    # -- ledger ------------------------------------------------------------------------------

    def _grants(self, s: State) -> Iterator[Step[State]]:
        """The next epoch, if the node has room: the precondition is checked with the commit."""
        e = next((e for e in self._epochs if s.ledger[e] == FREE), 0)
        held = sum(FREE < state < RELEASED for state in s.ledger[1:])
        if e and (held < self._shape.capacity or not self._has.ledger_counts):
            again = LAW_7 if s.minted >> e & 1 else ""
            yield act("grant", e), to_ledger(s, e, PENDING), again

    def _ledger(self, s: State, e: int) -> Iterator[Step[State]]:
        state, bit = s.ledger[e], 1 << e
        if state == RELEASED:
            return
        if state == PENDING:
            if not s.minted & bit:
                yield act("mint", e), s._replace(minted=s.minted | bit), ""
            if s.handed & bit:
                yield act("bound", e), to_ledger(s, e, ACTIVE), ""
            yield act("burn", e), to_ledger(s, e, ENDING), ""
        if state == ACTIVE:
            yield act("expire", e), to_ledger(s, e, ENDING), ""
        if state == ENDING and self._has.receipts_needed:
            yield act("unconfirmed", e), to_ledger(s, e, UNCONFIRMED), ""
        if state == ENDING and not self._has.receipts_needed:
            yield act("free_by_timeout", e), *self._freed(s, e)
        if s.fence_reports & bit and state != FENCED_IN_LEDGER:
            yield act("fence_recorded", e), to_ledger(s, e, FENCED_IN_LEDGER), ""
        for receipt in self._epochs if not self._has.receipt_names_lease else (e,):
            if s.receipts >> receipt & 1:
                yield act("credit", e, receipt), *self._freed(s, e)

    def _freed(self, s: State, e: int) -> tuple[State, str]:
        """Law 3 is judged by what is really in the slice, not by what was said about it."""
        remains = (s.open | s.moving | s.residue) >> e & 1
        return to_ledger(s, e, RELEASED), LAW_3 if remains else ""

    # -- holders, front ----------------------------------------------------------------------

    def _holder(self, s: State, e: int) -> Iterator[Step[State]]:
        """A holder may pause for ever between its own check and its operation: it never stops."""
        bit = 1 << e
        if s.moving & bit:
            landed = s._replace(moving=s.moving & ~bit, residue=s.residue | bit)
            yield act("operation_lands", e), landed, self._too_late(s, e)
        if not s.handed & bit:
            return
        if not self._shape.is_slot:
            if s.open & bit:
                yield act("operate", e), s._replace(residue=s.residue | bit), self._too_late(s, e)
        elif s.open & bit:
            yield act("operate", e), s._replace(moving=s.moving | bit), ""
        elif s.open and not self._has.epoch_checked_at_use:
            yield act("late_operation", e), s._replace(moving=s.moving | bit), ""

    def _too_late(self, s: State, e: int) -> str:
        stage = s.stage[e]
        done = self._has.teardown[: stage - DEAD] if DEAD <= stage < SEALED else ()
        ended = stage == SEALED or "measure" in done or s.ledger[e] == RELEASED
        return LAW_4 if ended else ""

    # -- agent -------------------------------------------------------------------------------

    def _binding(self, s: State, e: int) -> Iterator[Step[State]]:
        stage, bit = s.stage[e], 1 << e
        if s.minted & bit and stage in (NONE, SEALED) and self._accepts(s, e):
            again = LAW_7 if (s.handed | s.receipts) & bit else ""
            on_disk = self._has.floor_durable and self._has.bind_record_durable
            yield act("bind", e), to_stage(self._refusing(s, e, on_disk), e, BINDING), again
        if stage == BINDING and self._has.warden_guards:
            yield act("guard", e), to_stage(s, e, GUARDED)._replace(guarded=s.guarded | bit), ""
        if stage == (GUARDED if self._has.warden_guards else BINDING):
            handed = s._replace(handed=s.handed | bit, open=s.open | bit)
            yield act("hand_over", e), to_stage(handed, e, LIVE), ""
        if BINDING <= stage < LIVE:  # a bind that fails is torn down like any other
            yield act("bind_fails", e), to_stage(s, e, DEAD), ""
        ordered = ENDING <= s.ledger[e] <= UNCONFIRMED
        if stage == NONE and ordered and not s.receipts & bit:
            burnt = self._refusing(s, e, True) if self._has.burn_raises_floor else s
            yield act("burnt", e), burnt._replace(receipts=s.receipts | bit), ""

    def _accepts(self, s: State, e: int) -> bool:
        if self._has.epoch_checked_at_bind and s.refused >> e & 1:
            return False
        occupied = sum(NONE < stage != SEALED for stage in s.stage)
        return occupied < self._shape.capacity or not self._has.agent_counts

    def _refusing(self, s: State, e: int, on_disk: bool) -> State:
        """From now on epoch e cannot be bound: a floor for the slot, a window for amounts."""
        below = (1 << (e + 1)) - 2
        covered = below if self._shape.is_slot or not self._has.window_used else 1 << e
        kept = s.refused if self._has.window_kept else 0
        refused = kept | covered
        return s._replace(refused=refused, durable=refused if on_disk else s.durable)

    def _teardown(self, s: State, e: int) -> Iterator[Step[State]]:
        """One step at a time; which of them stand in which order is what the model is about."""
        stage, bit = s.stage[e], 1 << e
        if stage == LIVE:
            # By deadline, release or revocation: to the slice all three are the same.
            dead = to_stage(s, e, DEAD)._replace(open=self._shut(s, e))
            yield act("mark_dead", e), dead, ""
        if not DEAD <= stage < SEALED:
            return
        step = self._has.teardown[stage - DEAD]
        after = to_stage(s, e, stage + 1)
        if step == "quiesce":
            yield (
                act("quiesce", e),
                after._replace(moving=s.moving & ~bit, open=self._shut(s, e)),
                "",
            )
        if step == "erase":
            yield act("erase", e), self._erased(after, bit), ""
            if s.faults and s.residue & bit:
                yield act("erase_leaves_bytes", e), after._replace(faults=s.faults - 1), ""
        if step == "measure":
            clean = not (s.open | s.residue) & bit
            if clean:
                yield act("measure", e), after, ""
            else:
                yield act("measure_fails", e), fenced(s, e), ""
        if step == "seal":
            yield act("seal", e), self._sealed(s, e), ""
        if s.faults:
            yield act("fence", e), fenced(s._replace(faults=s.faults - 1), e), ""

    def _shut(self, s: State, e: int) -> int:
        """Quiesce does it again: a dead agent leaves the gate open, and the next one goes on."""
        return s.open & ~(1 << e) if self._shape.is_slot else s.open

    def _erased(self, s: State, bit: int) -> State:
        if s.unreachable & bit:
            return s
        shut = s.open if self._shape.is_slot else s.open & ~bit
        return s._replace(open=shut, residue=s.residue & ~bit)

    def _sealed(self, s: State, e: int) -> State:
        bit = 1 << e
        sealed = s._replace(receipts=s.receipts | bit, guarded=s.guarded & ~bit)
        return to_stage(sealed, e, SEALED)

    def _fences(self, s: State, e: int) -> Iterator[Step[State]]:
        if s.stage[e] == FENCED:
            cleared = s._replace(fenced=s.fenced & ~(1 << e))
            proof = (
                to_stage(cleared, e, DEAD) if self._has.clear_proves else self._sealed(cleared, e)
            )
            yield act("clear", e), proof, ""

    # -- warden, crashes -----------------------------------------------------------------------

    def _warden(self, s: State, e: int) -> Iterator[Step[State]]:
        """At the deadline, or because the agent is gone; it needs nobody's leave."""
        bit = 1 << e
        if not s.guarded & s.open & bit:
            return
        taken = s._replace(open=s.open & ~bit)
        if not self._shape.is_slot:
            taken = taken._replace(residue=s.residue & ~bit)
        if not self._has.warden_keyless:
            taken = taken._replace(receipts=s.receipts | bit)
        yield act("warden_takes_back", e), taken, ""

    def _crash(self, s: State) -> Iterator[Step[State]]:
        if not s.up:
            stage = s.stage
            if not self._has.recovery_measures:
                stage = tuple(SEALED if DEAD <= at < SEALED else at for at in stage)
            said = sum(1 << e for e in self._epochs if stage[e] == SEALED)
            yield (
                act("agent_start"),
                s._replace(up=True, stage=stage, receipts=s.receipts | said),
                "",
            )
        elif s.crashes:
            lost = s._replace(
                up=False,
                crashes=s.crashes - 1,
                stage=tuple(self._remembered(stage) for stage in s.stage),
                refused=s.durable,
                unreachable=s.unreachable | (s.open & ~s.guarded),
            )
            yield act("agent_crash"), lost, ""
            newest = max((e for e in self._epochs if s.ledger[e]), default=0)
            if newest and not self._has.ledger_durable:
                forgot = to_ledger(s, newest, FREE)._replace(crashes=s.crashes - 1)
                yield act("ledger_crash"), forgot, ""

    def _remembered(self, stage: int) -> int:
        """What the disk knows of a lease after a crash: bound and not ended means DEAD."""
        if stage == FENCED:
            return FENCED if self._has.fence_durable else NONE
        if BINDING <= stage < SEALED:
            return DEAD if self._has.bind_record_durable else NONE
        return stage


def act(verb: str, *args: int) -> Action:
    return verb, args


def to_ledger(s: State, e: int, state: int) -> State:
    return s._replace(ledger=put(s.ledger, e, state))


def to_stage(s: State, e: int, stage: int) -> State:
    return s._replace(stage=put(s.stage, e, stage))


def fenced(s: State, e: int) -> State:
    """The agent gives the slice up; law 10 holds from here on."""
    bit = 1 << e
    reported = s._replace(fenced=s.fenced | bit, fence_reports=s.fence_reports | bit)
    return to_stage(reported, e, FENCED)
