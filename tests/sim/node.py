"""One simulated node: NodeCore as control, WardenCore as warden, and stand-ins for the rest.

control   performs effects in order; what it persisted survives its crash, nothing else does
warden    lives on when control dies; closes its cells, takes back, keeps what it measured
front     lets operations in and out; each is in flight for a while, and some hang
device    knows for each slice whether it exists, and which bytes anybody wrote to it

A crash may fall between any two effects of one list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grafos_core import commands as c
from grafos_core import failure
from grafos_core import token as tokens
from grafos_core.chain import Chain, Record, Seal
from grafos_core.failure import FabricError
from grafos_core.lease import (
    CLOCK_ERROR_MS,
    RETURN_MS,
    Kind,
    LeaseId,
    NodeId,
    OnDisconnect,
    rate_margin_ms,
)
from grafos_core.lessor import CLEAR_ORDER_MS, REGISTRATION_TTL_MS
from grafos_core.node import NodeCore
from grafos_core.node_effects import (
    Answer,
    BoundFacts,
    CloseGate,
    CreateDevice,
    Effect,
    KillFront,
    Notify,
    OpenFront,
    OpenGate,
    Persist,
    ReportBound,
    RunStep,
    SendReceipt,
    ShutFront,
    Target,
    WardenDrop,
    WardenHold,
    WardenRaise,
)
from grafos_core.receipt import Cleared, ClearOrder, Outcome
from grafos_core.recollection import Recollection
from grafos_core.surface_state import SurfaceState
from grafos_core.teardown import Step
from grafos_core.token import LeaseToken, audience_of
from grafos_core.warden import TakeBack, WardenCore
from tests.sim.ledger import ISSUER, Ledger
from tests.sim.world import Clock, LawBroken, World

CAPACITY: Final = {Kind.MEM: 16 * 4096, Kind.BLOCK: 16}
TICK_MS: Final = 50
TICK_CALM_MS: Final = 500
AWAY_MS_MAX: Final = 1_500


@dataclass(slots=True)
class Cell:
    """A lease's place in the gate page: control's and the warden's word, and who is inside."""

    lease_id: LeaseId
    epoch: int
    control_open: bool = False
    warden_open: bool = False
    deadline_ms: int = 0
    inside: int = 0


@dataclass(slots=True)
class Slice:
    """What exists of a lease on the device."""

    lease_id: LeaseId
    epoch: int
    kind: Kind
    offset: int
    amount: int
    erased: bool = False
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    records: tuple[Record, ...]


@dataclass(slots=True)
class Disk:
    """What a power cut leaves: batches of records, each whole."""

    batches: list[Batch] = field(default_factory=list)
    head: bytes = bytes(32)
    number: int = 0
    boot_epoch: int = 0
    time_floor_ms: int = 0


class Node:
    def __init__(self, world: World, ledger: Ledger, node_id: str) -> None:
        self.world, self.ledger = world, ledger
        self.node_id = NodeId(node_id)
        self.incarnation = f"{world.dice.getrandbits(128):032x}"
        self.clock = Clock(world)
        self.disk = Disk()
        self.slices: dict[tuple[LeaseId, int], Slice] = {}
        self.cells: dict[int, Cell] = {}
        self.core: NodeCore | None = None
        self.warden: WardenCore | None = None
        self.front_up = False
        self.up = False
        self.boot = 0
        self._ticked_ms = self.clock.boot_ms()
        self._until_ms: dict[LeaseId, int] = {}
        """In true time: when each lease is certainly over, by the tokens that were shown here."""
        self.touched = False
        """Something may have changed here since the laws looked."""
        self._shutting: dict[LeaseId, int] = {}
        """Leases that the front is to empty, with the attempt to answer to."""
        self._closing: dict[LeaseId, int] = {}
        """Of revoked leases, when by the orders that were heard nothing works any more."""
        self._ending: set[tuple[LeaseId, int]] = set()
        """Leases whose teardown has begun."""
        self._connected: set[str] = set()
        self._lost_at_ms: dict[str, int] = {}
        """Sessions whose connection broke, by boottime; those of a front that died are not here."""
        self._answers: dict[int, Any] = {}
        self._requests = 0
        self._front_life = 0
        self._creating = False
        self._wants_live = True
        self._sent_live = False
        self._heard_at_ms = -REGISTRATION_TTL_MS
        self._journal: dict[str, Mapping[str, Any]] = {}
        self._hanging: set[tuple[LeaseId, Step]] = set()
        self.policy = world.rates.policy
        """It was told to clear what it proves clean."""
        self.acked_number = 0
        ledger.nodes[self.node_id] = self
        self._later(world.dice.randint(0, 500), self._start)
        self._later(TICK_MS, self._tick)
        self._later(100, self._register)
        self._later(world.dice.randint(500, 6_000), self._suffer)

    def _later(self, delay_ms: int, call: Callable[..., None], *args: Any) -> None:
        self.world.after(delay_ms, self.world.awake, self.node_id, call, *args)

    # processes

    def _start(self) -> None:
        """A new control: fold the records, hear the old warden, take back what is left."""
        self.boot += 1
        self.disk.boot_epoch += 1
        state = SurfaceState()
        for batch in self.disk.batches:
            for record in batch.records:
                state.fold(record)
        recovered = Recollection(state, self.disk.batches).recovered(
            CAPACITY, self.disk.time_floor_ms
        )
        self._end_front()
        if self.warden is not None:
            self._take_back(self.warden.agent_lost(self.clock.boot_ms()))
        self.cells.clear()
        self.chain = Chain(
            self.node_id, self.incarnation, self.disk.boot_epoch, self.disk.head, self.disk.number
        )
        now = self.clock.instant()
        self.core = NodeCore(
            self.node_id, self.incarnation, CAPACITY, recovered, now,
            clears_proved_clean=self.policy,
        )  # fmt: skip
        self.up, self._sent_live = True, False
        journal, self._journal = self._journal, {}
        self.world.tell(self.node_id, "boot", self.disk.boot_epoch)
        self._verb(self.core.start(now, journal))
        if self.core is not None:
            self._start_warden()
        if self.core is not None:
            self.core.allow_binds("NOT_READY")
            self._start_front()

    def _start_warden(self) -> None:
        if self.core is not None:
            self.warden = WardenCore(self.clock.boot_ms())
            self._verb(self.core.warden_started(self.clock.instant()))

    def _start_front(self) -> None:
        if self.core is not None and not self.front_up:
            self.front_up = True
            self._front_life += 1
            self._verb(self.core.front_started(self.clock.instant()))

    def _end_front(self) -> None:
        """Everything in flight ends with it."""
        self.front_up = False
        self._front_life += 1
        for cell in self.cells.values():
            cell.inside = 0

    def _crash(self) -> None:
        """Control is gone; the warden hears it at once, or a little later."""
        self.world.tell(self.node_id, "control dies")
        self.world.count("agent_crash")
        self.core, self.up = None, False
        self._answers.clear()
        self._hanging.clear()
        self._connected.clear()
        self._lost_at_ms.clear()
        if self.warden is not None and self.world.chance(0.2):
            self.world.tell(self.node_id, "warden dies too")
            self.warden = None
            self._end_front()
        self._later(1, self._warden_hears)
        self._later(self.world.dice.randint(20, 4_000), self._start)

    def _warden_hears(self) -> None:
        if self.core is None and self.warden is not None:
            self._take_back(self.warden.agent_lost(self.clock.boot_ms()))

    def _take_back(self, orders: list[TakeBack]) -> None:
        """The warden's order: close its cell, end the front if control is gone, erase, measure."""
        for order in orders:
            self.world.count(f"taken_{order.cause}")
            cell = self.cells.get(order.slot)
            if cell is not None and cell.lease_id == order.lease_id:
                cell.warden_open = False
            if order.cause == "agent_lost":
                self._end_front()
            slice_ = self.slices.get((order.lease_id, order.epoch))
            if slice_ is not None and slice_.kind is Kind.MEM:
                slice_.erased = True
            measured = {"cause": order.cause, "size_bytes": 0}
            if self.core is not None:
                self._verb(
                    self.core.taken_by_warden(
                        order.lease_id, order.cause, measured, self.clock.instant()
                    )
                )
            else:
                self._journal[order.lease_id] = measured

    # time and bad luck

    def _tick(self) -> None:
        now_ms = self.clock.boot_ms()
        away_ms, self._ticked_ms = now_ms - self._ticked_ms, now_ms
        if self.warden is not None:
            if away_ms > AWAY_MS_MAX:
                self.warden.slept(away_ms - TICK_MS, now_ms)
            orders = self.warden.tick(now_ms)
            if self.core is not None:
                if any(order.cause == "agent_lost" for order in orders):
                    raise LawBroken("law 5: an agent that lives is taken for dead")
                self.warden.agent_heard(now_ms)
            self._take_back(orders)
        if self.core is not None:
            self._verb(self.core.tick(self.clock.instant()))
        self._later(TICK_CALM_MS if self.world.calm else TICK_MS, self._tick)

    def _suffer(self) -> None:
        rates, dice = self.world.rates, self.world.dice
        if self.core is not None and self.world.chance(rates.agent_crash):
            self._crash()
        elif self.core is not None and self.world.chance(rates.warden_crash):
            self.world.tell(self.node_id, "warden dies")
            self.warden = None
            self._verb(self.core.warden_lost(self.clock.instant()))
            self._later(dice.randint(10, 1_500), self._new_warden)
        if self.front_up and self.world.chance(rates.front_crash):
            self._lose_front()
        if self.world.chance(rates.cut):
            self.world.cut(self.node_id, "ledger")
            self.world.after(dice.randint(100, 12_000), self.world.heal, self.node_id, "ledger")
        self._stir()
        self.clock.suffer()
        if self.world.chance(rates.suspend):
            self.world.sleep(self.node_id, dice.randint(500, 9_000))
        self._later(dice.randint(500, 6_000), self._suffer)

    def _stir(self) -> None:
        """A device that failed once may do so again: what a fenced slice held turns up anew."""
        for view in self.core.leases(self.clock.instant()) if self.core is not None else ():
            slice_ = self.slices.get((view.lease_id, view.epoch))
            if view.fence is None or slice_ is None:
                continue
            if self.world.chance(self.world.rates.stir):
                self.world.tell(self.node_id, "stirs", view.lease_id[:6])
                self.world.count("stirs")
                slice_.erased = slice_.measured = False

    def _new_warden(self) -> None:
        if self.core is not None and self.warden is None:
            self._start_warden()

    def _lose_front(self) -> None:
        self.world.tell(self.node_id, "front dies")
        self._end_front()
        self._later(1, self._front_lost)

    def _front_lost(self) -> None:
        """Heard a little later; not where a new control has started another since."""
        if self.core is not None and not self.front_up:
            sessions, self._connected = sorted(self._connected), set()
            self._verb(self.core.front_lost(self.clock.instant()))
            self._later(20, self._start_front)
            for session in sessions:
                self._later(20 + self.world.dice.randint(0, 2_000), self.join, session)

    # the ledger

    def _register(self) -> None:
        if self.core is not None:
            live = None
            if self._wants_live or not self._sent_live:
                live = tuple(c.LiveLease(*lease) for lease in self.core.live())
            kinds = frozenset() if self.core.closed_gates(self.clock.instant()) else CAPACITY.keys()
            ask = c.Register(
                self.node_id, self.incarnation, self.disk.boot_epoch, CAPACITY,
                self.core.high_waters(), frozenset(kinds), {}, self.node_id, self.node_id, {},
                c.PublishedKey(f"key-{self.node_id}", self.node_id, "receipt", bytes(32)), live,
                self.policy,
            )  # fmt: skip
            self.world.send(self.node_id, "ledger", self._ask, ask, self.boot, self.world.now_ms)
        self._later(1_000, self._register)

    def _ask(self, ask: c.Register, boot: int, sent_ms: int) -> None:
        self._heard_at_ms = max(self._heard_at_ms, self.world.now_ms)
        self.ledger.register(
            ask, lambda *answer: self._registered(boot, ask.live is not None, *answer)
        )

    def check_heard_lately(self) -> None:
        age_ms = self.world.now_ms - self._heard_at_ms
        if age_ms > REGISTRATION_TTL_MS + 50:
            raise LawBroken(f"law 8: granted on {self.node_id}, unheard for {age_ms} ms")

    def _registered(
        self, boot: int, told_live: bool, owed: list[c.Obligation], strangers: list[c.LiveLease],
        wants_live: bool, ledger_ms: int,
    ) -> None:  # fmt: skip
        if self.core is None or boot != self.boot:
            return
        self._wants_live = wants_live
        self._sent_live = self._sent_live or told_live
        self._verb(self.core.heard(0, self.clock.instant()))
        for obligation in owed:
            self.oblige(obligation, ledger_ms)

    def oblige(self, owed: c.Obligation, ledger_ms: int) -> None:
        """What the ledger wants; the same by push and by pull."""
        if self.core is None:
            return
        lease, now = owed.lease, self.clock.instant()
        target = Target(
            lease.lease_id, lease.epoch, lease.kind, lease.amount, lease.extent_offset,
            lease.generation,
        )  # fmt: skip
        if owed.action == "burn":
            self._verb(self.core.burn(None, target, now))
        elif owed.action == "revoke":
            self._promise(lease.lease_id, lease.grace_ms)
            self._verb(self.core.revoke(None, target, lease.grace_ms, owed.reason, now))
        elif owed.action == "clear":
            order = ClearOrder(
                lease.lease_id, self.node_id, self.incarnation, lease.epoch, owed.nonce,
                ledger_ms + CLEAR_ORDER_MS, owed.reason, owed.operator, owed.accept_residue,
            )  # fmt: skip
            self._verb(self.core.clear(None, order, now))
        else:
            self._verb(self.core.withdraw(None, target, now))

    def _promise(self, lease_id: LeaseId, grace_ms: int) -> None:
        """S14: until when at the latest this node lets anything of the lease take effect."""
        cell = self._cell(lease_id)
        if cell is not None:
            known_ms = self._closing.get(lease_id, cell.deadline_ms)
            until_ms = min(known_ms, cell.deadline_ms, self.clock.boot_ms() + grace_ms)
            self._closing[lease_id] = until_ms

    def _tell(self, effect: Notify) -> None:
        listener = self.ledger.listeners.get(effect.session)
        if listener is not None and effect.kind == "revoke_warning":
            call = listener.warned
            self.world.send(self.node_id, listener.name, call, effect.lease_id, effect.grace_ms)

    def _cell(self, lease_id: str) -> Cell | None:
        return next((cell for cell in self.cells.values() if cell.lease_id == lease_id), None)

    def _credited(self, boot: int, lease_id: str, epoch: int, outcome: Outcome, code: str) -> None:
        if code in ("RECEIPT", "NOT_FOUND"):
            raise LawBroken(f"law 3: the ledger refuses an honest receipt: {code}")
        if self.core is not None and boot == self.boot and not code:
            self._verb(self.core.credited(lease_id, epoch, outcome, self.clock.instant()))

    # holders

    def bind(self, token: LeaseToken, key: str, session: str, answer: Any) -> None:
        self._question("bind", token, key, session, answer)

    def attach(self, token: LeaseToken, key: str, session: str, answer: Any) -> None:
        self._question("attach", token, key, session, answer)

    def extend(self, token: LeaseToken, key: str, session: str, answer: Any) -> None:
        self._question("extend", token, key, session, answer)

    def _question(self, verb: str, token: LeaseToken, key: str, session: str, answer: Any) -> None:
        if self.core is None or not self.front_up:
            return
        if verb != "extend":
            self.join(session)
        now = self.clock.instant()
        try:
            tokens.judge(
                token, issuer=ISSUER, audience=audience_of(self.node_id, self.incarnation),
                holder_thumbprint=key, now_ms=now.wall_ms,
            )  # fmt: skip
        except FabricError as refusal:
            answer(refusal)
            return
        self._note_end(token)
        self._requests += 1
        request = self._requests
        self._answers[request] = answer
        if verb == "bind":
            self._verb(self.core.bind(request, token, key, session, now))
        elif verb == "attach":
            self._verb(self.core.attach(request, token, key, session, now))
        else:
            self._verb(self.core.extend(request, token, key, now))

    def _note_end(self, token: LeaseToken) -> None:
        """S8: never longer than the TTL from here; and where the clocks are as they must be, never
        beyond the end that was granted and what they may differ by."""
        lease_id = LeaseId(token.lease_id)
        granted_until_ms, error_ms = self.ledger.true_ends[lease_id, token.generation]
        apart_ms = max(CLOCK_ERROR_MS, error_ms - self.clock.wall_error_ms)
        until_ms = min(self.world.now_ms + token.ttl_ms, granted_until_ms + apart_ms)
        until_ms += rate_margin_ms(token.ttl_ms) + 2
        self._until_ms[lease_id] = max(until_ms, self._until_ms.get(lease_id, 0))

    def release(self, lease_id: LeaseId, epoch: int, key: str, answer: Any) -> None:
        if self.core is None or not self.front_up:
            return
        self._requests += 1
        self._answers[self._requests] = answer
        now = self.clock.instant()
        self._verb(self.core.release(self._requests, lease_id, epoch, key, 1_000, now))

    def checkpoint_done(self, lease_id: LeaseId, epoch: int, key: str, answer: Any) -> None:
        if self.core is None or not self.front_up:
            return
        self._requests += 1
        self._answers[self._requests] = answer
        now = self.clock.instant()
        self._verb(self.core.checkpoint_done(self._requests, lease_id, epoch, key, 1_000, now))

    def detach(self, lease_id: LeaseId, epoch: int, key: str) -> None:
        if self.core is not None and self.front_up:
            self._requests += 1
            self._verb(self.core.detach(self._requests, lease_id, epoch, key, self.clock.instant()))

    def join(self, session: str) -> None:
        """A holder's connection stands."""
        if self.core is not None and self.front_up and session not in self._connected:
            self._connected.add(session)
            self._lost_at_ms.pop(session, None)
            self._verb(self.core.session_back(session, self.clock.instant()))

    def hang_up(self, session: str) -> None:
        if self.core is not None and self.front_up and session in self._connected:
            self._connected.discard(session)
            self._lost_at_ms[session] = self.clock.boot_ms()
            self._verb(self.core.session_lost(session, self.clock.instant()))

    def holder_exited(self, session: str) -> None:
        self._connected.discard(session)
        if self.core is not None:
            self._verb(self.core.holder_exited(session, self.clock.instant()))

    # the data path

    def operate(self, lease_id: LeaseId, epoch: int, answer: Any) -> None:
        """The front: verdict, some time later the effect, verdict again, and then the answer."""
        cell = self._cell(lease_id)
        if not self.front_up or cell is None or not self._open(cell, epoch):
            return
        cell.inside += 1
        slow = self.world.chance(self.world.rates.slow_operation)
        delay_ms = self.world.dice.randint(200, 2_000) if slow else self.world.dice.randint(0, 5)
        self._later(delay_ms, self._land, cell, epoch, self._front_life, answer)

    def _open(self, cell: Cell, epoch: int) -> bool:
        return (
            cell.control_open and cell.warden_open and cell.epoch == epoch
            and self.clock.boot_ms() < cell.deadline_ms
        )  # fmt: skip

    def _land(self, cell: Cell, epoch: int, front_life: int, answer: Any) -> None:
        if front_life != self._front_life:
            return  # it died with its front
        slice_ = self.slices.get((cell.lease_id, epoch))
        if slice_ is not None and (slice_.kind.has_extents or not slice_.erased):
            self._write(slice_)  # a truncated memfd takes no bytes, a zeroed extent does
        acknowledged = self._open(cell, epoch)
        cell.inside -= 1
        if cell.inside == 0 and self.core is not None:
            self._drained(cell)
        if acknowledged:
            self._acknowledge(cell)
            answer()

    def _write(self, slice_: Slice) -> None:
        """Bytes change. Laws 1 and 4 are about this instant."""
        self.world.count("writes")
        if slice_.measured:
            raise LawBroken(f"law 4: bytes of {slice_.lease_id[:6]} change after it was measured")
        if slice_.kind.has_extents:
            for other in self.slices.values():
                overlaps = (
                    other.kind is slice_.kind and other is not slice_ and not other.measured
                    and slice_.offset < other.offset + other.amount
                    and other.offset < slice_.offset + slice_.amount
                )  # fmt: skip
                if overlaps:
                    raise LawBroken("law 1: two slices have the same blocks")

    def _acknowledge(self, cell: Cell) -> None:
        """Law 5, by the node's own clock, and in true time by the ledger's end; and S14."""
        closing_ms = self._closing.get(cell.lease_id)
        tick_ms = TICK_CALM_MS if self.world.calm else TICK_MS
        if closing_ms is not None and self.clock.boot_ms() > closing_ms + tick_ms + 1:
            raise LawBroken("S14: an operation is acknowledged past the grace of a revocation")
        if (cell.lease_id, cell.epoch) in self._ending:
            raise LawBroken("S14: an operation is acknowledged after its teardown began")
        late_ms = self.clock.boot_ms() - cell.deadline_ms
        if late_ms > 0:
            raise LawBroken(f"law 5: an operation is acknowledged {late_ms} ms past its deadline")
        late_ms = self.world.now_ms - self._until_ms[cell.lease_id]
        if late_ms > 0:
            raise LawBroken(f"S8: an operation is acknowledged {late_ms} ms late, in true time")
        self._check_is_held(cell, tick_ms)
        self.world.count("acknowledged")

    def _check_is_held(self, cell: Cell, tick_ms: int) -> None:
        """What was fixed with the lease for the case that its holder's connection breaks."""
        lease = self.core._leases.get(cell.lease_id) if self.core is not None else None
        granted = self.ledger.lessor.state.find(cell.lease_id)
        lost_ms = self._lost_at_ms.get(lease.session) if lease is not None else None
        if lease is None or granted is None or lost_ms is None or lease.keep:
            return
        policy = granted.policy
        within_ms = {
            OnDisconnect.RELEASE: RETURN_MS,
            OnDisconnect.GRACE: policy.reconnect_ms,
        }.get(policy.on_disconnect)
        if within_ms is not None and self.clock.boot_ms() > lost_ms + within_ms + tick_ms + 1:
            raise LawBroken("law 5: a lease outlives its holder's connection")

    def _drained(self, cell: Cell) -> None:
        attempt = self._shutting.get(cell.lease_id)
        if attempt is not None and self.core is not None:
            self._verb(
                self.core.step_done(cell.lease_id, Step.QUIESCE, attempt, {}, self.clock.instant())
            )

    # effects

    def _verb(self, effects: list[Effect]) -> None:
        """Perform what a verb asked for, strictly in order; a crash may fall in between."""
        boot = self.boot
        self.touched = self.touched or bool(effects)
        for effect in effects:
            if self.core is None or boot != self.boot:
                return
            if self.world.chance(self.world.rates.agent_crash * 0.01):
                self._crash()
                return
            self._one(effect)

    def _one(self, effect: Effect) -> None:
        match effect:
            case Persist():
                self._persist(effect)
            case CreateDevice():
                self._create(effect.facts)
            case WardenHold():
                self._warden_hold(effect)
            case WardenRaise():
                self._warden_raise(effect)
            case WardenDrop():
                if self.warden is not None:
                    self.warden.drop(effect.lease_id)
            case OpenGate():
                self._open_gate(effect)
            case CloseGate():
                cell = self.cells.get(effect.slot)
                if cell is not None and cell.lease_id == effect.lease_id:
                    cell.control_open = False
            case OpenFront():
                self.world.count("opened")
            case ShutFront():
                self._shut(effect)
            case KillFront():
                self._lose_front()
            case RunStep():
                self._step(effect)
            case SendReceipt():
                self._send_receipt(effect)
            case ReportBound():
                report = c.ReportBound(
                    self.node_id,
                    self.incarnation,
                    effect.lease_id,
                    effect.epoch,
                    effect.generation,
                    effect.stage,
                )
                self.world.send(self.node_id, "ledger", self.ledger.bound, report)
            case Answer():
                answer = self._answers.pop(effect.request, None)
                if answer is not None:
                    answer(effect.result)
            case Notify():
                self.world.count("notices")
                self._tell(effect)

    def _persist(self, effect: Persist) -> None:
        records = tuple(
            self.chain.append(
                kind, wall_ms=self.clock.wall_ms(), boottime_ns=self.clock.boot_ms() * 1_000_000,
                lease_id=lease_id, epoch=epoch, body=body,
            )
            for kind, lease_id, epoch, body in effect.events
        )  # fmt: skip
        self.disk.batches.append(Batch(records))
        self.disk.head, self.disk.number = self.chain.head, self.chain.number
        self.disk.time_floor_ms = effect.time_floor_ms
        for record in records:
            self.world.tell(self.node_id, record.kind, record.lease_id[:6], record.epoch)
            self.world.count(record.kind)

    def seal(self, record: Record) -> Seal:
        return Seal(record.number, record.hash, f"key-{self.node_id}", bytes(64))

    def _create(self, facts: BoundFacts) -> None:
        if self.world.chance(self.world.rates.step_failure):
            problem = failure.of("NO_CAPACITY")
            assert self.core is not None
            self._verb(self.core.device_failed(facts.lease_id, problem, self.clock.instant()))
            return
        self.slices[facts.lease_id, facts.epoch] = Slice(
            facts.lease_id, facts.epoch, facts.kind, facts.extent_offset, facts.amount
        )
        assert self.core is not None
        self._verb(self.core.device_created(facts.lease_id, self.clock.instant()))

    def _warden_hold(self, effect: WardenHold) -> None:
        if self.warden is None or self.core is None:
            return
        orders = self.warden.hold(
            effect.lease_id, slot=effect.slot, epoch=effect.epoch, deadline_ms=effect.deadline_ms,
            now_ms=self.clock.boot_ms(),
        )  # fmt: skip
        cell = self.cells.get(effect.slot)
        if cell is None or cell.lease_id != effect.lease_id:
            cell = self.cells[effect.slot] = Cell(effect.lease_id, effect.epoch)
        cell.warden_open, cell.deadline_ms = not orders, effect.deadline_ms
        if orders:
            self._take_back(orders)
        else:
            self._verb(self.core.warden_held(effect.lease_id, self.clock.instant()))

    def _warden_raise(self, effect: WardenRaise) -> None:
        if self.warden is None or self.core is None:
            return
        stands_ms = self.warden.raise_deadline(
            effect.lease_id, effect.deadline_ms, self.clock.boot_ms()
        )
        self._verb(self.core.warden_raised(effect.lease_id, stands_ms, self.clock.instant()))

    def _open_gate(self, effect: OpenGate) -> None:
        cell = self.cells.get(effect.slot)
        if cell is not None and cell.lease_id == effect.lease_id:
            if cell.control_open and effect.deadline_ms < cell.deadline_ms:
                raise LawBroken("law 5: a deadline was shortened")
            cell.control_open, cell.deadline_ms = True, effect.deadline_ms

    def _shut(self, effect: ShutFront) -> None:
        cell = self._cell(effect.lease_id)
        if cell is not None:
            self._ending.add((effect.lease_id, cell.epoch))
        if cell is None or cell.inside == 0:
            assert self.core is not None
            self._verb(
                self.core.step_done(
                    effect.lease_id, Step.QUIESCE, effect.attempt, {}, self.clock.instant()
                )
            )
        else:
            self._shutting[effect.lease_id] = effect.attempt

    def _step(self, effect: RunStep) -> None:
        """Steps take a moment, fail now and then, and now and then never come back."""
        failing = self.world.chance(self.world.rates.step_failure)
        if failing and self.world.dice.random() < 0.3:
            self.world.tell(self.node_id, effect.step, effect.lease_id[:6], "hangs")
            return
        delay_ms = self.world.dice.randint(0, 30)
        self._later(delay_ms, self._stepped, effect, self.boot, failing)

    def _stepped(self, effect: RunStep, boot: int, failing: bool) -> None:
        if self.core is None or boot != self.boot:
            return
        now, where = self.clock.instant(), (effect.lease_id, effect.step, effect.attempt)
        if failing:
            self._verb(self.core.step_failed(*where, "EIO", now))
            return
        slice_ = self.slices.get((effect.lease_id, effect.facts.epoch))
        if slice_ is not None and effect.step is Step.ERASE:
            slice_.erased = True
        if slice_ is not None and effect.step is Step.MEASURE:
            if not slice_.erased:
                self._verb(self.core.step_failed(*where, "bytes are left", now))
                return
            slice_.measured = True
        self._verb(self.core.step_done(*where, {"size_bytes": 0}, now))

    def _send_receipt(self, effect: SendReceipt) -> None:
        facts = effect.receipt
        if facts.cleared is Cleared.RESIDUE:
            self.slices.pop((facts.lease_id, facts.epoch), None)  # a person answers for it
        receipt = facts.receipt(
            self.node_id, self.incarnation, self.disk.boot_epoch, self.disk.number,
            self.disk.head.hex(),
        )  # fmt: skip
        boot = self.boot
        self.world.send(
            self.node_id, "ledger", self.ledger.credit, c.Credit(receipt, self.node_id),
            lambda *answer: self._credited(boot, *answer),
        )  # fmt: skip
