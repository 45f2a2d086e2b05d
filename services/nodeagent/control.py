"""Control: the one owner of everything that a node agent decides, and the only one who writes it.

Questions come in from holders (by the front), from the ledger and from operators, news from the
warden, from devices and from processes that died. Each becomes a verb of the core, in one thread;
what the core answers is performed there too. Several verbs that have gathered are performed
together, so that their records share one write.

Rules. Nothing is decided here. Tokens and orders are verified before they reach the owner's thread.
Whoever asks gets exactly one answer, or the connection ends. A broken invariant and a disk that
fails end the process: the warden then takes everything back, and the next start recovers.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from grafos_core import failure, receipt
from grafos_core.failure import FabricError
from grafos_core.lease import BLOCK_BYTES, Kind, LeaseId
from grafos_core.node import Instant, NodeCore
from grafos_core.node_effects import (
    Bound,
    BoundFacts,
    Detached,
    Effect,
    Extended,
    Ordered,
    ReceiptFacts,
    Released,
    Result,
    Target,
)
from grafos_core.node_lease import LeaseView
from grafos_core.receipt import ClearOrder
from grafos_core.spiffe import Identity
from grafos_core.token import LeaseToken
from services.nodeagent.book import Book
from services.nodeagent.exports import ANY_AGE
from services.nodeagent.frontdesk import failure_message
from services.nodeagent.frontline import FrontLine, Reply
from services.nodeagent.gatepage import GatePage
from services.nodeagent.ipc import Message, close_all
from services.nodeagent.leftovers import Leftovers
from services.nodeagent.meters import Meters
from services.nodeagent.nodecontrol import Question
from services.nodeagent.orphans import began_ticks
from services.nodeagent.performer import Partners, Performer, Tools
from services.nodeagent.pidwatch import ProcessWatch, Watched
from services.nodeagent.slices import Slices
from services.nodeagent.trust import TrustedKeys
from services.nodeagent.wardenline import WardenLine
from services.runtime.clock import Clock
from services.runtime.faults import fault
from services.runtime.logs import Log
from services.runtime.loop import Loop

ASK_MS_MAX: Final = 15_000
QUEUE_MAX: Final = 65_536
"""What waits for the owner. Feedback of devices must not be lost to a crowd of questions."""
QUESTIONS_MAX: Final = 4_096
"""Of holders that wait for an answer; more are told to come back."""
TICK_MS: Final = 200
"""How often the gates are looked at while nothing happens."""

Answered = Callable[[Result], None]


@dataclass(frozen=True, slots=True)
class Rooms:
    """What control is made of; each has a file of its own."""

    book: Book
    gate: GatePage
    slices: Slices
    keys: TrustedKeys
    watch: ProcessWatch
    meters: Meters
    clock: Clock
    log: Log


class Control:
    """Made in one thread; from `start` on the owner's."""

    def __init__(
        self,
        identity: Identity,
        core: NodeCore,
        rooms: Rooms,
        leftovers: Leftovers,
        halt: Callable[[], None],
        on_tick: Callable[[Instant], None],
    ) -> None:
        self.node_id, self.owner_id = identity.name, str(identity)
        self.core, self.rooms = core, rooms
        self._leftovers, self._halt, self._on_tick = leftovers, halt, on_tick
        self.loop = Loop(
            "control",
            on_tick=lambda now: self._tick(Instant(now.boot_ms, now.wall_ms)),
            log=rooms.log,
            halt=halt,
            clock=rooms.clock,
            queue_max=QUEUE_MAX,
            after=self._perform,
        )
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Answered] = {}
        self._effects: list[Effect] = []
        self._after: list[Callable[[], None]] = []
        self._holders: dict[str, Watched] = {}
        self._began: dict[str, int] = {}
        """By session, when its process began, in clock ticks."""
        """The watched process of each session."""
        self._connected: set[str] = set()
        """Sessions that have had a connection."""
        self._signed: tuple[tuple[ReceiptFacts, str, int], str] | None = None
        """The last receipt: most are wanted twice in a row."""
        self._settled = False
        self._empty = threading.Event()
        self.front_ready = threading.Event()
        """Set once the first front listens."""
        self.performer: Performer
        self.front: FrontLine
        self.warden: WardenLine

    def equip(self, front: FrontLine, warden: WardenLine, ledger: Any) -> None:
        """The processes beside us and the line to the ledger, which know us in turn."""
        self.front, self.warden = front, warden
        tools = Tools(
            self.core,
            self.rooms.gate,
            self.rooms.slices,
            self.rooms.book,
            ledger,
            self.post,
            self.now,
            self._answer,
            self._hand_out,
            self.rooms.meters,
        )
        self.performer = Performer(tools, Partners(front, warden, self._kill_front))

    def start(self) -> None:
        """Take back what the last boot left, and begin to serve."""
        self.loop.start()
        self.in_owner(self.warden.start)
        self.post(lambda now: self.core.start(now, self._leftovers.journal))
        self.in_owner(self.front.start)

    def now(self) -> Instant:
        boot_ms, wall_ms = self.rooms.clock.instant()
        return Instant(boot_ms, wall_ms)

    # Into the owner's thread

    def in_owner(self, function: Callable[[], None]) -> None:
        """Soon, in the owner's thread. Dropped where that is over: then so is everything."""
        try:
            self.loop.post(function)
        except FabricError as refusal:
            self.rooms.log.debug("control.dropped", code=refusal.code)

    def soon(self, function: Callable[[], None]) -> None:
        """As `in_owner`, but at once and in this thread where nobody is before it. Not for what may
        start a process."""
        try:
            self.loop.run(function)
        except FabricError as refusal:
            self.rooms.log.debug("control.dropped", code=refusal.code)

    def post(self, verb: Callable[[Instant], list[Effect]]) -> None:
        """Have a verb of the core called, and performed."""
        self.soon(lambda: self._effects.extend(verb(self.now())))

    def ask(self, question: Question, timeout_ms: int) -> Result:
        """For threads of the listeners: put a question to the core, wait, raise its refusal."""
        done = threading.Event()
        results: list[Result] = []

        def answered(result: Result) -> None:
            results.append(result)
            done.set()

        self._put(question, answered)
        if not done.wait(min(timeout_ms, ASK_MS_MAX) / 1000):
            raise failure.of("DEADLINE")
        if isinstance(results[0], FabricError):
            raise results[0]
        return results[0]

    def leases(self) -> tuple[LeaseView, ...]:
        return self.loop.call(lambda: self.core.leases(self.now()), ASK_MS_MAX)

    def target(self, lease_id: LeaseId, epoch: int) -> Target:
        """A lease that is or was bound here; refused where none was."""
        return self.loop.call(lambda: self.known(lease_id, epoch), ASK_MS_MAX)

    def known(self, lease_id: LeaseId, epoch: int) -> Target:
        """The same, in the owner's thread."""
        now = self.now()
        for view in self.core.leases(now):
            if view.lease_id == lease_id:
                return Target(lease_id, epoch, view.kind, view.amount, view.extent_offset)
        verdict = self.core.verdict(lease_id, epoch, now)
        if verdict is not None and verdict.code == "NOT_FOUND":
            raise verdict
        return Target(lease_id, epoch, Kind.MEM, 0)  # it has ended: only its receipt is wanted

    def clear_order(self, text: str) -> ClearOrder:
        return self.rooms.keys.clear_order(text)

    def receipt_text(self, ordered: Ordered) -> str:
        return "" if ordered.receipt is None else self.sign_receipt(ordered.receipt)

    def sign_receipt(self, facts: ReceiptFacts) -> str:
        """With the key that is in force now; what it says is in the book already. The ledger and
        the holder get the same text."""
        book = self.rooms.book
        number, record_hash = self.performer.proofs.get(facts.lease_id, (0, ""))
        about = (facts, book.key_id, number)
        known = self._signed
        if known is not None and known[0] == about:
            return known[1]
        made = facts.receipt(self.node_id, book.incarnation, book.boot_epoch, number, record_hash)
        text = receipt.mint(made, book.key_id, book.sign)
        self._signed = (about, text)
        return text

    def _put(self, question: Question, answered: Answered) -> None:
        number = next(self._numbers)

        def put() -> None:
            self._waiting[number] = answered
            self._effects.extend(question(self.core, number, self.now()))

        if self.loop.depth() >= QUESTIONS_MAX:
            raise failure.of("RATE", retry_after_ms=100)
        self.loop.run(put)

    def _answer(self, number: int, result: Result) -> None:
        answered = self._waiting.pop(number, None)
        if answered is not None:
            answered(result)

    # The owner's turn

    def _tick(self, now: Instant) -> int:
        """Only the owner's own thread starts processes: they end with the thread that did."""
        self._effects.extend(self.core.tick(now))
        self._perform()
        self._on_tick(now)
        later_ms = self.performer.flush(now.boot_ms)
        waits = [
            self.front.tick(),
            self.warden.tick(),
            self.core.timeout_ms(now),
            TICK_MS,
            later_ms,
        ]
        return min(wait for wait in waits if wait is not None)

    def _perform(self) -> int:
        """What the core answered; in how many ms it wants to be asked again."""
        effects, self._effects = self._effects, []
        if effects:
            self.performer.perform(effects)
        after, self._after = self._after, []
        for each in after:
            each()
        self._settle()
        timeout_ms = self.core.timeout_ms(self.now())
        return TICK_MS if timeout_ms is None else min(timeout_ms, TICK_MS)

    def _settle(self) -> None:
        """The last boot's leases are all proved back or fenced: its wardens may go."""
        if not self._settled and not self.core.recovering:
            self._settled = True
            self._leftovers.settle()
        if self._empty_wanted and not self._busy():
            self._empty.set()

    _empty_wanted = False

    def _busy(self) -> bool:
        fenced = ("fenced", "sealed")
        return any(view.stage not in fenced for view in self.core.leases(self.now()))

    # Holders, by the front. In the link's thread

    def asked(self, message: Message, fds: list[int], reply: Reply) -> None:
        op = message["op"]
        if op == "holder":
            self.soon(lambda: self._holder(message, fds, reply))
            return
        close_all(fds)
        match op:
            case "bind" | "attach" | "extend":
                self._bind(op, message, reply)
            case "release" | "detach":
                self._let_go(op, message, reply)
            case "share_root":
                self.rooms.keys.prove_root(message["token"], self.now().wall_ms)
                reply({"op": "proved"})
            case "share_ended":
                self.in_owner(lambda: self._share_ended(message, reply))
            case "session_lost":
                self.post(lambda now: self.core.session_lost(message["session"], now))
            case "session_back":
                self.post(lambda now: self._session_back(message["session"], now))
            case "device_failed":
                self.rooms.log.error("device.failed", lease_id=message["lease"], why=message["why"])
                self.in_owner(lambda: self._device_failed(message["lease"], message["why"]))
            case "hello":
                self.in_owner(self._front_arrived)
            case "ready":
                self.rooms.log.info("front.ready", endpoint=message["endpoint"])
                self.front_ready.set()

    def _bind(self, op: str, message: Message, reply: Reply) -> None:
        holder_key, session = message["peer_key"], message["session"]
        token = self.rooms.keys.accept(message["token"], holder_key, self.now().wall_ms)

        def question(core: NodeCore, number: int, now: Instant) -> list[Effect]:
            if op == "extend":
                return core.extend(number, token, holder_key, now)
            self.performer.allow(token.lease_id, token.ops)
            if op == "attach":
                return core.attach(number, token, holder_key, session, now)
            return core.bind(number, token, holder_key, session, now)

        def answered(result: Result) -> None:
            if isinstance(result, FabricError):
                result = self._why_not(token, result)
            try:
                fault("bind.answer")
            except OSError:
                return  # as an answer that is lost on its way
            reply(self._told(result))

        self._put(question, answered)

    def _why_not(self, token: LeaseToken, refusal: FabricError) -> FabricError:
        """An epoch that was used up because the lease was revoked is refused as revoked."""
        self.rooms.meters.rejected(token.kind, refusal)
        if refusal.code == "EPOCH_BURNT":
            verdict = self.core.verdict(token.lease_id, token.epoch, self.now())
            if verdict is not None and verdict.code == "REVOKED":
                return verdict
        return refusal

    def _let_go(self, op: str, message: Message, reply: Reply) -> None:
        lease_id, epoch, holder_key = message["lease"], message["epoch"], message["peer_key"]

        def question(core: NodeCore, number: int, now: Instant) -> list[Effect]:
            if op == "detach":
                return core.detach(number, lease_id, epoch, holder_key, now)
            wait_ms = message["credit_wait_ms"]
            if message.get("checkpoint"):
                return core.checkpoint_done(number, lease_id, epoch, holder_key, wait_ms, now)
            return core.release(number, lease_id, epoch, holder_key, wait_ms, now)

        self._put(question, lambda result: reply(self._told(result)))

    def _told(self, result: Result) -> Mapping[str, Any]:
        """An answer of the core as the front passes it on."""
        match result:
            case Bound(facts, _, remaining_ms):
                is_block = facts.kind is Kind.BLOCK
                block = self.rooms.slices.block
                return {
                    "lease_id": facts.lease_id,
                    "epoch": facts.epoch,
                    "generation": facts.generation,
                    "remaining_ms": remaining_ms,
                    "size_bytes": facts.amount * (BLOCK_BYTES if is_block else 1),
                    "block_bytes": BLOCK_BYTES if is_block else 0,
                    "descriptor": facts.may_export,
                    "direct_io": block.mode if is_block and block is not None else "",
                }
            case Extended(remaining_ms, generation):
                return {"remaining_ms": remaining_ms, "generation": generation}
            case Released(facts, credited):
                return {"receipt": self.sign_receipt(facts), "credited": credited}
            case Detached(remaining_ms):
                return {"remaining_ms": remaining_ms}
            case FabricError():
                return {"failure": failure_message(result)}
        raise failure.InvariantViolation(f"not an answer for a holder: {result}")

    # In the owner's thread

    def _holder(self, message: Message, fds: list[int], reply: Reply) -> None:
        """A local process has come for its lease: from now on it counts as handed out."""
        lease_id, session = message["lease"], message["session"]
        held = self.rooms.slices.held(lease_id)
        if held is None or not self.core.is_live(lease_id):
            close_all(fds)
            reply({"failure": failure_message(failure.of("NOT_FOUND", lease_id=lease_id))})
            return
        if message["exported"]:
            if session not in self._began:
                self._began[session] = min(map(began_ticks, fds), default=ANY_AGE)
            self.rooms.slices.export(held, self._began[session])
            self.core.exported(lease_id)
        if session in self._holders:
            close_all(fds)
        else:
            self._watch_holder(session, fds)
        reply({"op": "exported"})

    def _hand_out(self, facts: BoundFacts, session: str) -> bool:
        """A process that came for an earlier lease need not come for this one."""
        held = self.rooms.slices.held(facts.lease_id)
        if held is None or not facts.may_export or facts.kind is not Kind.MEM:
            return False
        if session not in self._holders or session not in self._began:
            return False
        self.rooms.slices.export(held, self._began[session])
        self.core.exported(facts.lease_id)
        return True

    def _share_ended(self, message: Message, reply: Reply) -> None:
        """What the front has struck out; the next one will be told."""
        if self.core.is_live(message["lease"]):
            fields = (message["lease"], message["epoch"], message["share"], message["by"])
            self.performer.ended_shares.add(*fields)
        reply({"op": "remembered"})

    def _watch_holder(self, session: str, fds: list[int]) -> None:
        def gone(now: Instant) -> list[Effect]:
            self._holders.pop(session, None)
            self._began.pop(session, None)
            return self.core.holder_exited(session, now)

        def died() -> None:
            self.post(gone)

        for pidfd in fds:
            self._holders[session] = self.rooms.watch.add(pidfd, died)

    def _device_failed(self, lease_id: str, why: str) -> None:
        """What cannot be read or written any more is taken back and fenced."""
        self._effects.extend(self.core.device_broken(lease_id, why, self.now()))

    def _front_arrived(self) -> None:
        """A fresh front: everything that lives, then what has ended, then the holders."""
        self.warden.tell_front(self.front.pid, self.front.pidfd)
        self._effects.extend(self.core.front_started(self.now()))
        self._after.append(self._let_holders_in)

    def _let_holders_in(self) -> None:
        sessions = self.performer.sessions()
        self._connected &= sessions
        self._effects.extend(self._excused(sessions, self.now()))
        for message in self.performer.ended_messages():
            self.front.send(message)
        for message in self.performer.ended_shares.messages():
            self.front.send(message)
        self.front.send({"op": "serve"})

    def _excused(self, sessions: set[str], now: Instant) -> list[Effect]:
        """Who lost no connection with a front that died, or is known to be alive by its pidfd, need
        not come back to the next one."""
        effects: list[Effect] = []
        for session in sessions:
            if session not in self._connected or session in self._holders:
                effects += self.core.session_back(session, now)
        return effects

    def _session_back(self, session: str, now: Instant) -> list[Effect]:
        self._connected.add(session)
        return self.core.session_back(session, now)

    def _kill_front(self, why: str) -> None:
        self.rooms.log.warning("front.killed", why=why)
        self.front.kill()
        self.loop.wake()  # the next one is started by a tick

    def front_lost(self) -> None:
        """It is gone, with everything it had in flight."""
        self.rooms.gate.reset_in_flight()
        sessions = self.performer.sessions()
        self.performer.forget_front()
        self.post(lambda now: self.core.front_lost(now) + self._excused(sessions, now))

    # The warden. `taken` is called in its link's thread

    def started(self) -> None:
        self.post(self.core.warden_started)

    def lost(self) -> None:
        self.rooms.log.warning("warden.lost")
        self.post(self.core.warden_lost)

    def broken(self) -> None:
        self.rooms.log.error("warden.broken")
        self._halt()

    def taken(self, message: Message) -> None:
        lease_id, cause = message["lease"], message["cause"]
        measured = {**message["measured"], "late_us": message["late_us"]}
        if cause == "deadline":
            self.rooms.meters.taken(lease_id, message["late_us"])
        self.post(lambda now: self.core.taken_by_warden(lease_id, cause, measured, now))

    # The end

    def drain(self, timeout_s: float) -> bool:
        """Bind nothing, let calls end, take every lease back; whether all of them are."""
        stopped = threading.Event()

        def begin() -> None:
            self.core.hold_binds("NOT_READY", "draining")
            self.front.ask({"op": "stop"}, [], lambda answer: stopped.set())

        def take_back() -> None:
            self._empty_wanted = True
            for lease_id, _, _ in self.core.live():
                self._effects.extend(
                    self.core.taken_by_warden(lease_id, "agent_lost", {}, self.now())
                )

        self.in_owner(begin)
        stopped.wait(timeout_s / 3)
        self.in_owner(take_back)
        is_empty = self._empty.wait(timeout_s)
        self.in_owner(self.performer.flush_all)
        return is_empty

    def stop(self) -> None:
        """After `drain`: end the other processes. A warden that holds something stays."""
        self.loop.call(self.front.stop, ASK_MS_MAX)
        self.loop.call(self.warden.say_bye, ASK_MS_MAX)
        self.performer.stop()
        self.loop.stop()
        self.rooms.book.close()


def short_enough(path: str) -> str:
    """A socket's address has 107 bytes at most."""
    if len(os.fsencode(path)) > 107:
        raise failure.of("INVALID", "the state folder's path is too long for a unix socket")
    return path
