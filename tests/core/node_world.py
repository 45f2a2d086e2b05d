"""A node agent's shell and world that go wrong at random, for the core to be judged in.

Steps fail, answers come late, twice or never, processes die, clocks jump, the agent restarts from
nothing but its durable records. What must hold is judged from the effects alone, each by those
before it, not from what the core believes; the core's own laws are checked as well.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from grafos_core import failure
from grafos_core import node_effects as e
from grafos_core.epochs import EpochWindow, ExtentEpochs
from grafos_core.gate import fresh_epochs
from grafos_core.lease import Kind, LeaseId
from grafos_core.node import NodeCore
from grafos_core.node_effects import (
    BoundFacts,
    Effect,
    FenceFacts,
    Instant,
    ReceiptFacts,
    Recovered,
)
from grafos_core.receipt import ClearOrder, Outcome
from grafos_core.teardown import Step
from tests.core.node_script import INCARNATION, NODE, WALL_MS, lease_id, letter, token

CAPACITIES: Final = {Kind.MEM: 16_384, Kind.BLOCK: 8}
ENDS: Final = ("agent.teardown_end", "agent.burnt", "agent.cleared")
OPTIONS: Final[tuple[dict[str, str], ...]] = ({}, {}, {"stop": "2000"}, {"exit": "keep"})
Dice = random.Random


class Records:
    """What is durable, folded as `Recovered` says it must be."""

    def __init__(self) -> None:
        self.bound: dict[str, BoundFacts] = {}
        self.fences: dict[str, FenceFacts] = {}
        self.owed: dict[str, ReceiptFacts] = {}
        self.used: list[BoundFacts] = []
        self.epochs = {kind: fresh_epochs(kind) for kind in CAPACITIES}

    def fold(self, kind: str, lease: str, epoch: int, body: dict[str, object]) -> None:
        if kind == "agent.bound":
            facts = BoundFacts.of_body(lease, epoch, body)
            self._check_never_used(facts)
            self.used.append(facts)
            self.bound[lease] = facts
            self._use(facts.kind, epoch, facts.extent_offset, facts.amount)
        if kind in (*ENDS, "agent.fenced"):
            receipt = ReceiptFacts.of_body(lease, epoch, body)
            self.owed[lease] = receipt
            was = self.bound.pop(lease, None)
            if kind == "agent.fenced":
                assert was is not None
                self.fences[lease] = FenceFacts(was, receipt)
            if kind == "agent.burnt":
                self._use(receipt.kind, epoch, receipt.extent_offset, receipt.amount)
        if kind == "agent.cleared":
            del self.fences[lease]
        if kind == "agent.credited" and self.owed[lease].outcome == body["outcome"]:
            del self.owed[lease]

    def _check_never_used(self, new: BoundFacts) -> None:
        for old in self.used:
            if old.kind is not new.kind:
                continue
            apart = new.kind.has_extents and (
                new.extent_offset >= old.extent_offset + old.amount
                or old.extent_offset >= new.extent_offset + new.amount
            )
            if new.kind.has_extents:
                assert apart or new.epoch > old.epoch, "law 7: epochs of a block only rise"
            else:
                assert new.epoch != old.epoch, "law 7: an epoch is bound once"

    def _use(self, kind: Kind, epoch: int, offset: int, amount: int) -> None:
        epochs = self.epochs[kind]
        if isinstance(epochs, EpochWindow):
            epochs.use(epoch)
        else:
            epochs.use(offset, offset + amount, epoch)

    def recovered(self) -> Recovered:
        copies = {
            kind: EpochWindow(one.floor, one.burnt)
            if isinstance(one, EpochWindow)
            else ExtentEpochs(one.runs)
            for kind, one in self.epochs.items()
        }
        return Recovered(
            copies, tuple(self.bound.values()), tuple(self.fences.values()),
            tuple(self.owed.values()), WALL_MS,
        )  # fmt: skip

    def check_charged(self) -> None:
        held = list(self.bound.values()) + [one.bound for one in self.fences.values()]
        for kind, capacity in CAPACITIES.items():
            mine = [one for one in held if one.kind is kind]
            assert sum(one.amount for one in mine) <= capacity, "law 1: more is bound than there is"
            if kind.has_extents:
                blocks = [
                    b
                    for one in mine
                    for b in range(one.extent_offset, one.extent_offset + one.amount)
                ]
                assert len(blocks) == len(set(blocks)), "law 1: a block is bound twice"


class World:
    """One node agent with everything that can happen to it; `act` lets one thing happen."""

    def __init__(self) -> None:
        self.now = Instant(0, WALL_MS)
        self.records = Records()
        self.epoch = 0
        self.nonce = 0
        self._boot()

    def _boot(self) -> None:
        self.steps: list[e.RunStep | e.ShutFront] = []
        self.created: list[LeaseId] = []
        self.holds: list[e.WardenHold] = []
        self.raises: list[e.WardenRaise] = []
        self.warden: dict[str, int] = {}
        self.open: dict[str, int] = {}
        self.measured: set[str] = set()
        self.core = NodeCore(NODE, INCARNATION, CAPACITIES, self.records.recovered(), self.now)
        self.perform(self.core.start(self.now))
        self.core.allow_binds("NOT_READY")
        self.perform(self.core.front_started(self.now))
        self.perform(self.core.warden_started(self.now))
        self.perform(self.core.heard(1, self.now))

    # The shell: performs effects in order, and judges each by those before it

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case e.Persist():
                for kind, lease, epoch, body in effect.events:
                    if kind == "agent.teardown_end":
                        assert lease in self.measured, "law 3: sealed without a measurement"
                        assert lease not in self.open, "law 4: sealed while the gate is open"
                        self.measured.discard(lease)
                    self.records.fold(kind, lease, epoch, dict(body))
            case e.CreateDevice():
                assert effect.lease_id in self.records.bound, "law 6: made before it is durable"
                self.created.append(effect.lease_id)
            case e.WardenHold():
                self.holds.append(effect)
            case e.WardenRaise():
                self.raises.append(effect)
            case e.WardenDrop():
                self.warden.pop(effect.lease_id, None)
            case e.OpenGate():
                held_ms = self.warden.get(effect.lease_id, -1)
                assert held_ms >= effect.deadline_ms, "law 5: open and the warden does not know"
                assert effect.lease_id in self.records.bound, "law 6: open before it is durable"
                assert effect.deadline_ms >= self.open.get(effect.lease_id, 0), "never shortened"
                self.open[effect.lease_id] = effect.deadline_ms
            case e.CloseGate():
                del self.open[effect.lease_id]
            case e.RunStep() | e.ShutFront():
                assert effect.lease_id not in self.open, "a step while the gate is open"
                self.steps.append(effect)
            case e.SendReceipt():
                receipt = self.records.owed.get(effect.lease_id)
                assert receipt is None or receipt == effect.receipt, "law 6: not what is durable"
                assert effect.lease_id not in self.records.bound, "law 3: a receipt of what stands"
            case e.Answer():
                self._judge(effect.result)

    def _judge(self, result: e.Result) -> None:
        if isinstance(result, e.Bound):
            assert result.facts.lease_id in self.open, "told before it is open"
            left_ms = self.open[result.facts.lease_id] - self.now.boot_ms
            assert result.remaining_ms <= left_ms, "told more than there is"
        if isinstance(result, e.Released):
            durable = self.records.owed.get(result.receipt.lease_id)
            assert result.credited or durable == result.receipt, "law 6: told before durable"

    # What tenants, ledger and operators do

    def act(self, name: str, dice: Dice) -> None:
        action: Callable[[Dice], None] = getattr(self, f"_act_{name}")
        action(dice)
        self.core.check()
        self.records.check_charged()

    def _act_bind(self, dice: Dice) -> None:
        """Present a token, sound or not; most of the time what follows goes well at once."""
        self.epoch += 1
        kind = dice.choice([Kind.MEM] * 4 + [Kind.BLOCK] * 4 + [Kind.GPU])
        session = dice.choice("abcdefgh")
        lease = dice.choice("abcd") if dice.random() < 0.1 else chr(0x80 + self.epoch % 100)
        amount = dice.choice([1, 1, 1, 1, 2, 2, 0, 5, 9]) * (4096 if kind is Kind.MEM else 1)
        options = {
            "epoch": str(max(1, self.epoch - dice.choice([0, 0, 0, 1, 3]))),
            "ttl": dice.choice(["1000", "10000", "60000"]), "kind": kind.value,
            "amount": str(amount), "session": session,
            "offset": str(dice.randrange(8)) if kind.has_extents else "0",
        }  # fmt: skip
        presented = token(lease, options | dice.choice(OPTIONS), self.now)
        self.perform(self.core.bind(1, presented, "K", session, self.now))
        goes_well = dice.random()
        while goes_well < 0.8 and self.created:
            self.perform(self.core.device_created(self.created.pop(0), self.now))
        while goes_well < 0.7 and self.holds:
            self._hold(self.holds.pop(0))

    def _some(self, dice: Dice) -> BoundFacts | None:
        """A lease that stands, or now and then one that has gone."""
        facts = list(self.records.bound.values())
        facts += [one.bound for one in self.records.fences.values()]
        if not facts or dice.random() < 0.1:
            facts = self.records.used
        return dice.choice(facts) if facts else None

    def _act_renew(self, dice: Dice) -> None:
        facts = self._some(dice)
        if facts is None:
            return
        options = {
            "epoch": str(facts.epoch), "kind": facts.kind.value, "amount": str(facts.amount),
            "offset": str(facts.extent_offset), "key": facts.holder_key,
            "gen": str(max(0, facts.generation + dice.choice([-1, 0, 1, 1, 1, 2]))),
        }  # fmt: skip
        presented = token(letter(facts.lease_id), options, self.now)
        if dice.random() < 0.3:
            effects = self.core.attach(3, presented, facts.holder_key, "z", self.now)
        else:
            effects = self.core.extend(2, presented, facts.holder_key, self.now)
        self.perform(effects)
        if dice.random() < 0.7:
            self._act_guard(dice)

    def _act_end(self, dice: Dice) -> None:
        facts = self._some(dice)
        if facts is None:
            return
        lease, epoch, key = facts.lease_id, facts.epoch, facts.holder_key
        target = e.Target(lease, epoch, facts.kind, facts.amount, facts.extent_offset)
        match dice.randrange(6):
            case 0 | 1:
                effects = self.core.release(4, lease, epoch, key, 500, self.now)
            case 2:
                effects = self.core.detach(5, lease, epoch, key, self.now)
            case 3:
                effects = self.core.burn(6, target, self.now)
            case 4:
                effects = self.core.revoke(6, target, 700, "why", self.now)
            case _:
                effects = self.core.revoke(6, target, 0, "why", self.now)
        self.perform(effects)

    def _act_session(self, dice: Dice) -> None:
        core = self.core
        verb = dice.choice([core.holder_exited, core.session_lost, core.session_back])
        self.perform(verb(dice.choice("abcdefgh"), self.now))

    def _act_burn(self, dice: Dice) -> None:
        kind = dice.choice([Kind.MEM, Kind.BLOCK])
        epoch = max(1, self.epoch + dice.randrange(-3, 3))
        target = e.Target(
            lease_id(dice.choice("mnop")), epoch, kind, 4096 if kind is Kind.MEM else 2,
            dice.randrange(6) if kind.has_extents else 0,
        )  # fmt: skip
        self.perform(self.core.burn(6, target, self.now))

    def _act_fence(self, dice: Dice) -> None:
        if not self.records.fences:
            return
        facts = dice.choice(list(self.records.fences.values())).bound
        if dice.random() < 0.3:
            self.perform(self.core.probe(7, facts.lease_id, self.now))
            return
        self.nonce += dice.choice([0, 1, 1])
        order = ClearOrder(
            facts.lease_id, NODE, INCARNATION, facts.epoch, f"{self.nonce:032x}",
            self.now.wall_ms + 1000, "why", "spiffe://t/operator", dice.random() < 0.5,
        )  # fmt: skip
        self.perform(self.core.clear(8, order, self.now))

    def _act_credit(self, dice: Dice) -> None:
        owed = list(self.records.owed.values())
        if owed:
            one = dice.choice(owed)
            said = dice.choice([one.outcome, one.outcome, *Outcome])
            self.perform(self.core.credited(one.lease_id, one.epoch, said, self.now))

    # What devices, warden and front answer

    def _act_create(self, dice: Dice) -> None:
        if not self.created:
            return
        lease = self.created.pop(0)
        if dice.random() < 0.6:
            self.perform(self.core.device_created(lease, self.now))
        else:
            problem, clean = failure.of("DISK"), dice.random() < 0.5
            self.perform(self.core.device_failed(lease, problem, self.now, clean=clean))

    def _hold(self, hold: e.WardenHold) -> None:
        self.warden[hold.lease_id] = hold.deadline_ms
        self.perform(self.core.warden_held(hold.lease_id, self.now))

    def _act_guard(self, dice: Dice) -> None:
        if self.holds:
            self._hold(self.holds.pop(0))
        elif self.raises:
            raised = self.raises.pop(0)
            known_ms = self.warden.get(raised.lease_id)
            if known_ms is not None:
                known_ms = self.warden[raised.lease_id] = max(known_ms, raised.deadline_ms)
            self.perform(self.core.warden_raised(raised.lease_id, known_ms, self.now))

    def _act_step(self, dice: Dice) -> None:
        if self.steps:
            index = dice.randrange(len(self.steps))
            one = self.steps[index] if dice.random() < 0.1 else self.steps.pop(index)
            self._step(one, good=dice.random() < 0.7)

    def _act_steps(self, dice: Dice) -> None:
        """Everything that is under way goes well."""
        while self.steps:
            self._step(self.steps.pop(0), good=True)

    def _step(self, one: e.RunStep | e.ShutFront, *, good: bool) -> None:
        step = one.step if isinstance(one, e.RunStep) else Step.QUIESCE
        if good:
            if step is Step.MEASURE:
                self.measured.add(one.lease_id)
            found = {"n": 0}
            effects = self.core.step_done(one.lease_id, step, one.attempt, found, self.now)
        else:
            effects = self.core.step_failed(one.lease_id, step, one.attempt, "EIO", self.now)
        self.perform(effects)

    def _act_front(self, dice: Dice) -> None:
        self.perform(self.core.front_lost(self.now))
        if dice.random() < 0.7:
            self.perform(self.core.front_started(self.now))

    def _act_warden(self, dice: Dice) -> None:
        self.holds, self.raises, self.warden = [], [], {}
        self.perform(self.core.warden_lost(self.now))
        if dice.random() < 0.8:
            self.perform(self.core.warden_started(self.now))

    def _act_take(self, dice: Dice) -> None:
        if self.warden:
            lease = dice.choice(sorted(self.warden))
            del self.warden[lease]
            self.perform(self.core.taken_by_warden(lease, "agent_lost", {"st_size": 0}, self.now))

    # Time, and the end of the process

    def _act_wait(self, dice: Dice) -> None:
        passed = dice.choice([1, 1, 50, 100, 100, 300, 1000, 5000])
        jump = dice.choice([0, 0, 0, 0, -700, 900])
        self.now = Instant(self.now.boot_ms + passed, self.now.wall_ms + passed + jump)
        self.perform(self.core.heard(1, self.now))
        late = [one for one, deadline_ms in self.open.items() if deadline_ms <= self.now.boot_ms]
        assert not late, "law 5: a gate stands open after the deadline"

    def _act_crash(self, dice: Dice) -> None:
        self._boot()

    # How it must end once the faults stop

    def settle(self) -> None:
        """Nothing is stuck: all that ended is proved back or fenced, and every receipt is owed."""
        self.perform(self.core.front_lost(self.now) + self.core.front_started(self.now))
        for _ in range(12):
            self._act_steps(Dice(0))
            self.now = Instant(self.now.boot_ms + 10_000, self.now.wall_ms + 10_000)
            self.perform(self.core.heard(1, self.now))
            for lease in list(self.created):
                self.created.remove(lease)
                self.perform(self.core.device_created(lease, self.now))
        self._act_steps(Dice(0))
        self.core.check()
        assert not self.records.bound, "law 5: a lease never ended"
        assert not self.core.recovering, "the node never becomes ready"


ACTIONS: Final = tuple(
    sorted(name.removeprefix("_act_") for name in vars(World) if name.startswith("_act_"))
)


def walk(seed: int, steps: int) -> World:
    """One life of a node; each seed has its own weights, so that some things are rare in it."""
    dice = Dice(seed)
    weights = [float(dice.choice([0, 1, 2, 4, 8])) for _ in ACTIONS]
    weights[ACTIONS.index("bind")] += 8
    weights[ACTIONS.index("crash")] *= 0.3
    world = World()
    for name in dice.choices(ACTIONS, weights, k=steps):
        world.act(name, dice)
    world.settle()
    return world
