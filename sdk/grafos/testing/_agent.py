"""One virtual node: the agent's core and the warden's, and in this process what they ask for.

    control   NodeCore; its effects are performed in order, what it persisted is its records
    warden    WardenCore; lives on when control is killed or stopped, and takes everything back
    front     what moves bytes: open leases, their holders' sessions

Everything happens at once or not at all: a device makes and erases without delay, a record is
durable when it is written. A fault makes a step fail, an agent die or stop; then the cores do what
they do in production.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grafos._notice import Notice
from grafos.testing import _device
from grafos.testing._control import ISSUER, TRUST_DOMAIN, Caller, Control
from grafos.testing._device import Slice
from grafos.testing._keys import SigningKey, hex_of
from grafos.testing._time import VirtualTime
from grafos_core import commands as c
from grafos_core import failure, jws, receipt, share
from grafos_core import token as tokens
from grafos_core.chain import Chain, Record
from grafos_core.failure import FabricError
from grafos_core.lease import Kind, NodeId
from grafos_core.lessor import CLEAR_ORDER_MS
from grafos_core.node import NodeCore
from grafos_core.node_effects import (
    Answer,
    BoundFacts,
    CloseGate,
    CreateDevice,
    DestroyKey,
    Effect,
    KillFront,
    Notify,
    OpenFront,
    OpenGate,
    Persist,
    ReceiptFacts,
    ReportBound,
    RunStep,
    SendReceipt,
    ShutFront,
    Target,
    WardenDrop,
    WardenHold,
    WardenRaise,
)
from grafos_core.receipt import ClearOrder
from grafos_core.recollection import PROVING, Recollection
from grafos_core.sharebook import Entry, ShareBook
from grafos_core.surface_state import SurfaceState
from grafos_core.teardown import Step
from grafos_core.token import LeaseToken, audience_of
from grafos_core.warden import TakeBack, WardenCore
from grafos_proto.wire import es256

if TYPE_CHECKING:
    from grafos.testing._wire import Network

ANSWER_MS_MAX: Final = 15_000


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that became durable together."""

    records: tuple[Record, ...]


@dataclass(slots=True)
class Opened:
    """A lease as the front knows it."""

    facts: BoundFacts
    session: str


class Agent:
    """A node. Everything here is called with the clock's lock held."""

    def __init__(
        self, node_id: str, capacities: Mapping[Kind, int], labels: Mapping[str, str], *,
        time: VirtualTime, control: Control, network: Network, dice: random.Random,
    ) -> None:  # fmt: skip
        self.node_id = NodeId(node_id)
        self.capacities, self.labels = dict(capacities), dict(labels)
        self._time, self._control, self._network, self._dice = time, control, network, dice
        self.incarnation, self.key = hex_of(dice), SigningKey.draw(dice)
        self.endpoint = f"virtual:{node_id}"
        self.core: NodeCore | None = None
        self.warden: WardenCore | None = None
        self.is_stopped = False
        self.failing: dict[Step, int | None] = {}
        """Steps of teardowns that fail, and how many times yet; None: always."""
        self.failing_binds = 0
        self.sessions: dict[str, deque[Notice]] = {}
        self._keys = jws.Keys()
        self._revoked_keys: frozenset[str] = frozenset()
        self._batches: list[Batch] = []
        self._boot_epoch, self._head, self._number = 0, bytes(32), 0
        self._time_floor_ms = 0
        self._proofs: dict[str, tuple[int, str]] = {}
        self._slices: dict[tuple[str, int], Slice] = {}
        self._open: dict[str, Opened] = {}
        self.shares = ShareBook()
        self._owners: dict[str, tuple[str, int]] = {}
        """Lease to its holder's key and its epoch, also of leases that are over."""
        self._journal: dict[str, Mapping[str, Any]] = {}
        self._reports: list[c.ReportBound] = []
        self._answers: dict[int, Any] = {}
        self._requests = 0
        self._todo: deque[Effect] = deque()
        self._is_performing = False
        self._wants_live = True

    # Processes

    @property
    def is_up(self) -> bool:
        """Whether its processes run, stopped or not."""
        return self.core is not None

    @property
    def hears_control(self) -> bool:
        reachable = self._network.reaches(self.node_id, "control")
        return self.core is not None and not self.is_stopped and reachable

    def start(self) -> None:
        """A new agent: recall the records, hear what the warden did, take back what is left."""
        failure.invariant(self.core is None, f"{self.node_id} runs already")
        self._boot_epoch += 1
        state = SurfaceState()
        for batch in self._batches:
            for record in batch.records:
                state.fold(record)
        recalled = Recollection(state, self._batches)
        self._proofs = dict(recalled.proofs)
        self._chain = Chain(
            self.node_id, self.incarnation, self._boot_epoch, self._head, self._number
        )
        now = self._time.instant
        self.core = NodeCore(
            self.node_id, self.incarnation, self.capacities,
            recalled.recovered(self.capacities, self._time_floor_ms), now,
        )  # fmt: skip
        journal, self._journal = self._journal, {}
        self._verb(self.core.start(now, journal))
        self.warden = WardenCore(now.boot_ms)
        self._verb(self.core.warden_started(now))
        self._verb(self.core.front_started(now))
        self.core.allow_binds("NOT_READY")
        self._wants_live = True
        self.beat()

    def kill(self) -> None:
        """The agent dies; its warden takes everything back, and ends too."""
        self.core, self.is_stopped = None, False
        self._answers.clear()
        self._todo.clear()
        self._open.clear()
        self.sessions.clear()
        self._reports.clear()
        if self.warden is not None:
            self._take_back(self.warden.agent_lost(self._time.boot_ms))
            self.warden = None

    def resume(self) -> None:
        """A stopped agent runs on; one whose warden has given it up is started anew."""
        self.is_stopped = False
        if self.warden is not None and self.warden.agent_is_lost:
            self.kill()
            self.start()

    # Time

    def next_ms(self) -> int | None:
        """Boottime at which something falls due here."""
        now = self._time.instant
        due: list[int | None] = []
        if self.core is not None and not self.is_stopped:
            due.append(self.core.timeout_ms(now))
            if not self.hears_control:
                due.append(1_000)  # what it owes, it tries to say now and then
        elif self.warden is not None:
            due.append(self.warden.timeout_ms(now.boot_ms))
        known = [after_ms for after_ms in due if after_ms is not None]
        return now.boot_ms + min(known) if known else None

    def beat(self) -> None:
        """What an agent does each second: a word to its warden, its registration at the ledger."""
        if self.core is None or self.is_stopped:
            return
        if self.warden is not None:
            self.warden.agent_heard(self._time.boot_ms)
        if not self.hears_control:
            return
        live = None
        if self._wants_live:
            live = tuple(c.LiveLease(*lease) for lease in self.core.live())
        owed, self._wants_live = self._control.register(self._registration(live))
        self.trust(self._control.token_key, self._control.lessor.state.revoked_keys)
        self._verb(self.core.heard(0, self._time.instant))
        reports, self._reports = self._reports, []
        for report in reports:
            self._control.bound(report)
        for obligation in owed:
            self.oblige(obligation, self._time.now_ms)

    def _registration(self, live: tuple[c.LiveLease, ...] | None) -> c.Register:
        assert self.core is not None
        closed = self.core.closed_gates(self._time.instant)
        closed.pop("REVOCATION_STALE", None)  # being heard is what ends this
        owner = f"spiffe://{TRUST_DOMAIN}/node/{self.node_id}"
        key = c.PublishedKey(self.key.key_id, owner, "receipt", self.key.public)
        return c.Register(
            self.node_id, self.incarnation, self._boot_epoch, self.capacities,
            self.core.high_waters(), frozenset() if closed else frozenset(self.capacities), closed,
            self.endpoint, self.endpoint, self.labels, key, live,
        )  # fmt: skip

    def wake(self) -> None:
        """The warden first: it is there for when control is late."""
        if self.warden is not None:
            self._take_back(self.warden.tick(self._time.boot_ms))
        if self.core is not None and not self.is_stopped:
            self._verb(self.core.tick(self._time.instant))

    # The ledger's wishes

    def oblige(self, owed: c.Obligation, ledger_ms: int) -> None:
        assert self.core is not None
        lease, now = owed.lease, self._time.instant
        target = Target(
            lease.lease_id, lease.epoch, lease.kind, lease.amount, lease.extent_offset,
            lease.generation,
        )  # fmt: skip
        match owed.action:
            case "burn":
                self._verb(self.core.burn(None, target, now))
            case "revoke":
                self._verb(self.core.revoke(None, target, lease.grace_ms, owed.reason, now))
            case "clear":
                order = ClearOrder(
                    lease.lease_id, self.node_id, self.incarnation, lease.epoch, owed.nonce,
                    ledger_ms + CLEAR_ORDER_MS, owed.reason, owed.operator, owed.accept_residue,
                )  # fmt: skip
                self._verb(self.core.clear(None, order, now))
            case _:
                self._verb(self.core.withdraw(None, target, now))

    # Holders

    def ask(self, verb: str, who: Caller, timeout_ms: float, *args: Any) -> Any:
        """Control's answer to a question of a holder; time passes until there is one."""
        with self._time.lock:
            assert self.core is not None
            self._requests += 1
            request = self._requests
            self._verb(getattr(self.core, verb)(request, *args, self._time.instant))
        until_ms = self._time.boot_ms + int(min(timeout_ms, ANSWER_MS_MAX))
        if not self._time.wait_for(lambda: request in self._answers, until_ms):
            raise failure.of("DEADLINE", verb)
        result = self._answers.pop(request)
        if isinstance(result, FabricError):
            raise result
        return result

    def trust(self, key: SigningKey, revoked: Iterable[str]) -> None:
        """Tokens by this key, and by none that is revoked."""
        self._revoked_keys = frozenset(revoked)
        for key_id in self._revoked_keys:
            self._keys.retire(jws.LEASE, key_id)
        self._keys.add(jws.LEASE, key.key_id, key.verify)

    def accept(self, token: str, who: Caller) -> LeaseToken:
        """The token, if it is for this node, this moment and this holder."""
        try:
            return tokens.accept(
                token, self._keys, issuer=ISSUER,
                audience=audience_of(self.node_id, self.incarnation), holder_thumbprint=who.key,
                now_ms=self._time.now_ms,
            )  # fmt: skip
        except FabricError as refused:
            if refused.code == "TOKEN_KEY_UNKNOWN" and self._revoked_keys:
                why = "the key that signed the token is revoked"
                raise failure.of("REVOKED", why) from refused
            raise

    def slice_of(self, facts: BoundFacts) -> Slice:
        return self._slices[facts.lease_id, facts.epoch]

    def export(self, lease_id: str, epoch: int) -> int | None:
        """A descriptor of the lease's memory; None for what has none."""
        slice_ = self._slices.get((lease_id, epoch))
        if self.core is None or not isinstance(slice_, _device.MemorySlice):
            return None
        descriptor = slice_.descriptor()
        self.core.exported(lease_id)
        return descriptor

    def operate(
        self, who: Caller, lease_id: str, epoch: int, act: Callable[[Slice], bytes],
        shown: str = "",
    ) -> bytes:  # fmt: skip
        """Bytes move, between two looks at whether they may."""
        entry = self.shares.find(lease_id, shown, who.key) if shown else None
        self._check_owner(lease_id, entry.holder_key if entry is not None else who.key)
        self._check_open(lease_id, epoch, entry)
        data = act(self.slice_of(self._open[lease_id].facts))
        self._check_open(lease_id, epoch, entry)
        return data

    def _check_owner(self, lease_id: str, key: str) -> None:
        owner, _ = self._owners.get(lease_id, ("", 0))
        if owner != key:
            raise failure.of("NOT_FOUND")

    def show_share(self, text: str, who: Caller) -> tuple[Entry, list[str], int]:
        """Its entry, what it allows and for how many milliseconds."""
        chain = share.verify_chain(text, read_root=self._read_root, verify=es256.verify)
        lease_id, epoch = chain.root.lease_id, chain.root.epoch
        self._check_owner(lease_id, chain.root.holder_thumbprint)
        self._check_open(lease_id, epoch)
        now_ms, now_ns = self._time.now_ms, self._time.boot_ns()
        share.judge(chain, key=who.key, name=who.name, now_ms=now_ms)
        entry = self.shares.show(chain, key=who.key, now_ms=now_ms, now_ns=now_ns)
        left_ms = max(0, entry.deadline_ns - now_ns) // 1_000_000
        return entry, list(entry.scope.ops), left_ms

    def share_offset(self, who: Caller, request: Any, op: str, length: int) -> int:
        """Where a share begins, if it allows this."""
        scope = self.shares.find(request.lease_id, request.share, who.key).scope
        if op not in scope.ops:
            raise failure.of("SCOPE", lease_id=request.lease_id)
        if request.offset + length > scope.length:
            raise failure.of("EXTENT", f"the share ends at {scope.length}")
        return scope.offset

    def speaker(self, lease_id: str, epoch: int, digest: str, who: Caller) -> str:
        """In the name of which share somebody speaks; empty: of the lease."""
        entry = self.shares.find(lease_id, digest, who.key) if digest else None
        self._check_owner(lease_id, entry.holder_key if entry is not None else who.key)
        self._check_open(lease_id, epoch, entry)
        return entry.share_id if entry is not None else ""

    def _read_root(self, token: str) -> LeaseToken:
        read = LeaseToken.from_claims(jws.verify(token, jws.LEASE, self._keys))
        if read.audience != audience_of(self.node_id, self.incarnation):
            raise failure.of("TOKEN_AUDIENCE")
        return read

    def remaining_ms(self, lease_id: str) -> int:
        views = self.core.leases(self._time.instant) if self.core else ()
        return next((view.remaining_ms for view in views if view.lease_id == lease_id), 0)

    def _check_open(self, lease_id: str, epoch: int, entry: Entry | None = None) -> None:
        assert self.core is not None
        verdict = self.core.verdict(lease_id, epoch, self._time.instant)
        if verdict is None and entry is not None:
            verdict = entry.end(self._time.boot_ns())
        if verdict is not None:
            raise verdict

    def slip(self, facts: ReceiptFacts) -> str:
        """The receipt, signed."""
        number, record_hash = self._proofs[facts.lease_id]
        said = facts.receipt(self.node_id, self.incarnation, self._boot_epoch, number, record_hash)
        return receipt.mint(said, self.key.key_id, self.key.sign)

    def lose_session(self, session: str) -> None:
        """The holder's connection is gone; it has its policy's time to come back."""
        if self.sessions.pop(session, None) is not None:
            self.verb("session_lost", session)

    # Effects

    def verb(self, name: str, *args: Any) -> None:
        """Something happened that the core must know."""
        if self.core is not None:
            self._verb(getattr(self.core, name)(*args, self._time.instant))

    def _verb(self, effects: list[Effect]) -> None:
        """In order; what an effect brings about comes after those that were asked for before."""
        self._todo.extend(effects)
        if self._is_performing:
            return
        self._is_performing = True
        try:
            while self._todo:
                self._perform(self._todo.popleft())
        finally:
            self._is_performing = False

    def _perform(self, effect: Effect) -> None:
        assert self.core is not None
        now = self._time.instant
        match effect:
            case Persist():
                self._persist(effect)
            case CreateDevice():
                self._create(effect)
            case WardenHold():
                self._hold(effect)
            case WardenRaise():
                stands_ms = None
                if self.warden is not None:
                    stands_ms = self.warden.raise_deadline(
                        effect.lease_id, effect.deadline_ms, now.boot_ms
                    )
                self._verb(self.core.warden_raised(effect.lease_id, stands_ms, now))
            case WardenDrop():
                if self.warden is not None:
                    self.warden.drop(effect.lease_id)
            case OpenFront():
                self._open[effect.lease_id] = Opened(effect.facts, effect.session)
                self._owners[effect.lease_id] = (effect.facts.holder_key, effect.facts.epoch)
            case ShutFront():
                self._open.pop(effect.lease_id, None)
                self.shares.forget(effect.lease_id)
                where = (effect.lease_id, Step.QUIESCE, effect.attempt)
                self._verb(self.core.step_done(*where, {}, now))
            case KillFront():
                self._verb(self.core.front_lost(now))
                self._verb(self.core.front_started(now))
            case RunStep():
                self._run(effect)
            case SendReceipt():
                self._send(effect)
            case ReportBound():
                self._report(c.ReportBound(
                    self.node_id, self.incarnation, effect.lease_id, effect.epoch,
                    effect.generation, effect.stage,
                ))  # fmt: skip
            case Answer():
                self._answers[effect.request] = effect.result
            case Notify():
                self._notify(effect)
            case OpenGate() | CloseGate() | DestroyKey():
                pass  # the core's own verdict is the gate here; there are no keys at rest

    def _persist(self, effect: Persist) -> None:
        now = self._time.instant
        records = tuple(
            self._chain.append(
                kind, wall_ms=now.wall_ms, boottime_ns=self._time.boot_ns(), lease_id=lease_id,
                epoch=epoch, body=body,
            )
            for kind, lease_id, epoch, body in effect.events
        )  # fmt: skip
        self._batches.append(Batch(records))
        self._head, self._number = self._chain.head, self._chain.number
        self._time_floor_ms = effect.time_floor_ms
        for record in records:
            if record.kind in PROVING:
                self._proofs[record.lease_id] = (record.number, record.hash.hex())

    def _create(self, effect: CreateDevice) -> None:
        assert self.core is not None
        facts, now = effect.facts, self._time.instant
        if self.failing_binds > 0:
            self.failing_binds -= 1
            problem = failure.of("NO_CAPACITY", "the device failed", lease_id=facts.lease_id)
            self._verb(self.core.device_failed(facts.lease_id, problem, now))
            return
        try:
            slice_ = _device.make(facts.kind, facts.amount)
        except FabricError as problem:
            self._verb(self.core.device_failed(facts.lease_id, problem, now))
            return
        self._slices[facts.lease_id, facts.epoch] = slice_
        self._verb(self.core.device_created(facts.lease_id, now))

    def _hold(self, effect: WardenHold) -> None:
        if self.warden is None or self.core is None:
            return
        orders = self.warden.hold(
            effect.lease_id, slot=effect.slot, epoch=effect.epoch, deadline_ms=effect.deadline_ms,
            now_ms=self._time.boot_ms,
        )  # fmt: skip
        if orders:
            self._take_back(orders)
        else:
            self._verb(self.core.warden_held(effect.lease_id, self._time.instant))

    def _take_back(self, orders: list[TakeBack]) -> None:
        """The warden cuts memory, measures it, and says or writes down what it found."""
        for order in orders:
            slice_ = self._slices.get((order.lease_id, order.epoch))
            if slice_ is not None and slice_.kind is Kind.MEM:
                slice_.erase()
            measured = {"cause": order.cause, "late_ms": order.late_ms}
            if slice_ is not None:
                measured |= slice_.measure()
            if self.core is not None and not self.is_stopped:
                self.verb("taken_by_warden", order.lease_id, order.cause, measured)
            else:
                self._journal[order.lease_id] = measured

    def _run(self, effect: RunStep) -> None:
        """A step of a teardown; one that was told to fail fails."""
        assert self.core is not None
        where = (effect.lease_id, effect.step, effect.attempt)
        left = self.failing.get(effect.step, 0)
        if left is None or left > 0:
            self.failing[effect.step] = None if left is None else left - 1
            self._verb(
                self.core.step_failed(*where, "EIO: a fault of the test", self._time.instant)
            )
            return
        slice_ = self._slices.get((effect.lease_id, effect.facts.epoch))
        found: dict[str, Any] = {}
        if slice_ is not None and effect.step is Step.ERASE:
            slice_.erase()
        if slice_ is not None and effect.step is Step.MEASURE:
            found = slice_.measure()
            if any(found.values()):
                self._verb(self.core.step_failed(*where, "bytes are left", self._time.instant))
                return
            slice_.close()
            del self._slices[effect.lease_id, effect.facts.epoch]
        self._verb(self.core.step_done(*where, found, self._time.instant))

    def _send(self, effect: SendReceipt) -> None:
        if not self.hears_control:
            return  # it is sent again, later and later
        facts = effect.receipt
        try:
            outcome = self._control.credit(self.slip(facts))
        except FabricError:  # not believed, so not credited: it is sent again
            return
        if outcome is not None:
            self.verb("credited", facts.lease_id, facts.epoch, outcome)

    def _report(self, report: c.ReportBound) -> None:
        if self.hears_control:
            self._control.bound(report)
        else:
            self._reports.append(report)

    def _notify(self, effect: Notify) -> None:
        inbox = self.sessions.get(effect.session)
        if inbox is None or self.core is None or not self._network.reaches("holder", self.node_id):
            return
        cause = None
        _, epoch = self._owners.get(effect.lease_id, ("", 0))
        if epoch and effect.kind not in ("revoke_warning", "degraded"):
            cause = self.core.verdict(effect.lease_id, epoch, self._time.instant)
        inbox.append(Notice(effect.lease_id, effect.kind, effect.reason, effect.grace_ms, cause))

    def close(self) -> None:
        for slice_ in self._slices.values():
            slice_.close()
        self._slices.clear()


def session_of(who: Caller, session: str) -> str:
    """A session belongs to the key that opened it; nobody can name another's."""
    return f"{who.key}:{session}"
