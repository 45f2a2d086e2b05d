"""Does what the core decides, effect by effect, in the order in which it gets them.

Rules. One owner thread performs, and it waits for nothing but the disk: devices and teardown steps
run in a small pool, the other processes are asked and answer later, and all of it comes back to the
owner as a verb of the core. Records of several lists that are performed together go to the disk in
one write, before anything that stands after the first of them; nothing is told before that.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

from grafos_core import failure
from grafos_core.chain import EventKind, Record
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.node import Instant, NodeCore
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
    Result,
    RunStep,
    SendReceipt,
    ShutFront,
    WardenDrop,
    WardenHold,
    WardenRaise,
)
from grafos_core.node_lease import NO_SLOT
from grafos_core.receipt import MEASURED_CHARS_MAX, Outcome, shortened
from grafos_core.recollection import PROVING
from grafos_core.teardown import Step
from services.nodeagent.endedshares import EndedShares
from services.nodeagent.frontdesk import failure_message
from services.nodeagent.gatepage import CellState, GatePage
from services.nodeagent.ipc import Message
from services.nodeagent.slices import Slices
from services.runtime.faults import fault

POOL_THREADS: Final = 4
"""Four threads reach the disk's best; more wait for each other."""
INLINE_BYTES_MAX: Final = 1 << 20
"""A smaller memory lease is made in 0.3 ms, less than handing it to another thread may take."""
ENDED_MAX: Final = 65_536
LATER_MS_MAX: Final = 100
NS_PER_MS: Final = 1_000_000
WHY_CHARS_MAX: Final = MEASURED_CHARS_MAX - 12
"""Of what went wrong, in a receipt, where the name of the step stands before it."""
Proof = tuple[int, str]
"""Number and hash of the record that holds what a receipt says."""
Verb = Callable[[Instant], list[Effect]]


class Durable(Protocol):
    """The durable surface: what it returns is on stable storage."""

    def append(
        self,
        events: Sequence[tuple[str, str, int, Mapping[str, Any]]],
        *,
        now: Instant,
        time_floor_ms: int,
    ) -> Sequence[Record]: ...


class Partner(Protocol):
    """Another process of this agent, as it is spoken to."""

    def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> bool: ...

    def ask(
        self,
        message: Mapping[str, Any],
        fds: Sequence[int],
        answered: Callable[[Message | None], None],
    ) -> None: ...


class Ledger(Protocol):
    def send_receipt(self, receipt: ReceiptFacts) -> None: ...

    def report_bound(self, report: tuple[str, int, int, str]) -> None: ...

    def forget_bound(self, lease_id: str) -> None: ...


class Watcher(Protocol):
    """Who wants to know what was performed: numbers for people."""

    def closed(self, lease_id: str, kind: Kind, deadline_ns: int) -> None: ...

    def erased(self, lease_id: str) -> None: ...

    def settled(self, receipt: ReceiptFacts) -> None: ...


class Front(Partner, Protocol):
    def expect(self, message: Mapping[str, Any]) -> None:
        """Something that it has to do, and nobody waits for."""


@dataclass(slots=True)
class Partners:
    """The processes beside us, as they come and go."""

    front: Front
    warden: Partner
    kill_front: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Tools:
    """What effects are performed with."""

    core: NodeCore
    gate: GatePage
    slices: Slices
    store: Durable
    ledger: Ledger
    post: Callable[[Verb], None]
    """Have the owner call a verb of the core and perform what it returns. From any thread."""
    now: Callable[[], Instant]
    answer: Callable[[int, Result], None]
    hand_out: Callable[[BoundFacts, str], bool]
    """Count a lease's memory as handed out to a session whose process is known; whether it is."""
    watcher: Watcher


class Performer:
    """For the owner's thread alone."""

    def __init__(self, tools: Tools, partners: Partners) -> None:
        self._tools, self.partners = tools, partners
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="step")
        self._aside: dict[Kind, ThreadPoolExecutor] = {}
        """A thread for each kind of device that has fences; one that hangs holds up none."""
        self._busy_aside: set[str] = set()
        """Leases with a step there that has not come back. Of the owner's thread."""
        self._facts: dict[str, BoundFacts] = {}
        """As last bound or attached, of what is charged."""
        self._ops: dict[str, tuple[str, ...]] = {}
        self._in_front: dict[str, tuple[str, int]] = {}
        """Session and slot by lease, of what the front has open."""
        self._ended: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.ended_shares = EndedShares()
        self._later: list[Persist] = []
        """Records that nothing rests on; they go with the next batch."""
        self._later_since_ms = 0
        self.proofs: dict[str, Proof] = {}
        self._does: dict[type, Callable[[Any], None]] = {
            CreateDevice: self._create_device,
            WardenHold: self._warden_hold,
            WardenRaise: self._warden_raise,
            WardenDrop: self._warden_drop,
            OpenGate: self._open_gate,
            CloseGate: self._close_gate,
            OpenFront: self._open_front,
            ShutFront: self._shut_front,
            KillFront: self._kill_front,
            DestroyKey: self._destroy_key,
            RunStep: self._run_step,
            SendReceipt: self._send_receipt,
            ReportBound: self._report_bound,
            Notify: self._notify,
            Answer: self._answer,
        }

    def perform(self, effects: Sequence[Effect]) -> None:
        """In order; all records at the place of the first that something rests on."""
        records = [effect for effect in effects if isinstance(effect, Persist)]
        urgent = next((each for each in records if not each.may_wait), None)
        if urgent is None and records:
            self._keep_for_later(records)
        for effect in effects:
            if not isinstance(effect, Persist):
                self._does[type(effect)](effect)
            elif effect is urgent:
                self._persist([*self._take_later(), *records])

    def flush(self, now_ms: int) -> int | None:
        """Write what has waited long enough; how long the rest may still wait."""
        if not self._later:
            return None
        left_ms = self._later_since_ms + LATER_MS_MAX - now_ms
        if left_ms <= 0:
            self._persist(self._take_later())
            return None
        return left_ms

    def flush_all(self) -> None:
        if self._later:
            self._persist(self._take_later())

    def _keep_for_later(self, records: Sequence[Persist]) -> None:
        if not self._later:
            self._later_since_ms = self._tools.now().boot_ms
        self._later += records

    def _take_later(self) -> list[Persist]:
        later, self._later = self._later, []
        return later

    def allow(self, lease_id: str, ops: tuple[str, ...]) -> None:
        """What the token that binds or attaches this lease lets its holder do."""
        self._ops[lease_id] = ops

    def forget_front(self) -> None:
        """The front is gone, and what it knew."""
        self._in_front.clear()

    def sessions(self) -> set[str]:
        """Of all leases that the front has open."""
        return {session for session, _ in self._in_front.values()}

    def ended_messages(self) -> Iterable[Message]:
        """For a fresh front: what has ended and why, in messages of a bounded size."""
        leases = list(self._ended.values())
        for at in range(0, len(leases), 64):
            yield {"op": "ended", "leases": leases[at : at + 64]}

    def remember_end(self, facts: BoundFacts, cause: FabricError) -> dict[str, Any]:
        """What a holder who comes back is told; the oldest give way."""
        fields = {
            "lease": facts.lease_id,
            "holder_key": facts.holder_key,
            "failure": failure_message(cause),
        }
        self._ended[facts.lease_id] = fields
        self._ended.move_to_end(facts.lease_id)
        while len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)
        return fields

    def stop(self) -> None:
        for pool in (self._pool, *self._aside.values()):
            pool.shutdown(wait=False, cancel_futures=True)

    # One method per effect

    def _persist(self, batch: Sequence[Persist]) -> None:
        events = [event for each in batch for event in each.events]
        if any(kind == EventKind.AGENT_TEARDOWN_END for kind, _, _, _ in events):
            fault("teardown.seal")
        records = self._tools.store.append(
            events,
            now=self._tools.now(),
            time_floor_ms=max(each.time_floor_ms for each in batch),
        )
        for record in records:
            if record.kind in PROVING:
                self.proofs[record.lease_id] = (record.number, record.hash.hex())

    def _create_device(self, effect: CreateDevice) -> None:
        self._facts[effect.lease_id] = effect.facts
        if effect.facts.kind is Kind.MEM and effect.facts.amount <= INLINE_BYTES_MAX:
            self._create(effect.facts)
        else:
            self._pool.submit(self._create, effect.facts)

    def _create(self, facts: BoundFacts) -> None:
        core, lease_id = self._tools.core, facts.lease_id
        try:
            self._tools.slices.create(facts)
        except (FabricError, OSError) as error:
            problem = _typed(error)
            self._tools.post(lambda now: core.device_failed(lease_id, problem, now))
            return
        self._tools.post(lambda now: core.device_created(lease_id, now))

    def _warden_hold(self, effect: WardenHold) -> None:
        core, lease_id = self._tools.core, effect.lease_id
        try:
            fault("bind.warden")
        except OSError:
            return  # as a warden that never answers: the deadline ends it
        message = {
            "op": "hold",
            "lease": effect.lease_id,
            "slot": effect.slot,
            "epoch": effect.epoch,
            "kind": effect.kind.value,
            "deadline_ms": effect.deadline_ms,
            "device": "memfd" if effect.kind is Kind.MEM else "block",
        }

        def answered(answer: Message | None) -> None:
            if answer is not None and answer.get("op") == "held":
                self._tools.post(lambda now: core.warden_held(lease_id, now))

        self.partners.warden.ask(message, self._tools.slices.descriptors(lease_id), answered)

    def _warden_raise(self, effect: WardenRaise) -> None:
        core, lease_id, deadline_ms = self._tools.core, effect.lease_id, effect.deadline_ms

        def answered(answer: Message | None) -> None:
            if answer is not None:
                stands_ms = answer.get("deadline_ms")
                self._tools.post(lambda now: core.warden_raised(lease_id, stands_ms, now))

        message = {"op": "raise", "lease": lease_id, "deadline_ms": deadline_ms}
        self.partners.warden.ask(message, [], answered)

    def _warden_drop(self, effect: WardenDrop) -> None:
        self.partners.warden.send({"op": "drop", "lease": effect.lease_id})
        self._tools.slices.forget(effect.lease_id)

    def _open_gate(self, effect: OpenGate) -> None:
        self._tools.gate.write_control(
            effect.slot,
            CellState.OPEN,
            effect.epoch,
            effect.deadline_ms * NS_PER_MS,
            bytes.fromhex(effect.lease_id),
        )
        if effect.lease_id in self._in_front:
            self.partners.front.send(
                {"op": "raise", "lease": effect.lease_id, "deadline_ms": effect.deadline_ms}
            )

    def _close_gate(self, effect: CloseGate) -> None:
        self._tools.gate.close_control(effect.slot)
        self._tools.ledger.forget_bound(effect.lease_id)
        facts = self._facts.get(effect.lease_id)
        if facts is None:
            return
        deadline_ns = self._tools.gate.control_deadline_ns(effect.slot)
        self._tools.watcher.closed(effect.lease_id, facts.kind, deadline_ns)
        cause = self._tools.core.verdict(effect.lease_id, facts.epoch, self._tools.now())
        if cause is not None:
            self.remember_end(facts, cause)

    def _open_front(self, effect: OpenFront) -> None:
        facts = effect.facts
        self._facts[effect.lease_id] = facts
        fields, fds = self._tools.slices.opening(facts)
        message = {
            "op": "open",
            "lease": effect.lease_id,
            "slot": effect.slot,
            "epoch": facts.epoch,
            "generation": facts.generation,
            "kind": facts.kind.value,
            "holder_key": facts.holder_key,
            "deadline_ms": effect.deadline_ms,
            "session": effect.session,
            "ops": list(self._ops.get(effect.lease_id, ())),
            "handed": self._tools.hand_out(facts, effect.session),
            **fields,
        }
        self._in_front[effect.lease_id] = (effect.session, effect.slot)
        self.partners.front.send(message, fds)

    def _shut_front(self, effect: ShutFront) -> None:
        core, lease_id, attempt = self._tools.core, effect.lease_id, effect.attempt
        _, slot = self._in_front.pop(lease_id, ("", NO_SLOT))
        ended = self._ended.get(lease_id, {})
        message: dict[str, Any] = {"op": "shut", "lease": lease_id, **ended}
        if self._is_quiet(lease_id, slot):
            self.partners.front.expect(message)
            self._step(lease_id, Step.QUIESCE, attempt, lambda: {"in_flight": 0})
            return

        def answered(answer: Message | None) -> None:
            if answer is None:
                return  # it died: its end is told on its own
            if answer.get("in_flight") == 0:
                self._step(lease_id, Step.QUIESCE, attempt, lambda: {"in_flight": 0})
            else:
                why = f"{answer.get('in_flight')} operations in flight"
                self._tools.post(
                    lambda now: core.step_failed(lease_id, Step.QUIESCE, attempt, why, now)
                )

        self.partners.front.ask(message, [], answered)

    def _is_quiet(self, lease_id: str, slot: int) -> bool:
        """Whether nothing is in flight, as the gate page shows since its gate was closed: then the
        front need not be asked, for what comes later finds the gate closed. Of blocks it has the
        key, and has to say that it is gone."""
        facts = self._facts.get(lease_id)
        is_memory = facts is not None and facts.kind is Kind.MEM
        return is_memory and slot != NO_SLOT and self._tools.gate.is_quiet(slot)

    def _kill_front(self, effect: KillFront) -> None:
        self.partners.kill_front(effect.why)

    def _destroy_key(self, effect: DestroyKey) -> None:
        self._tools.slices.destroy_key(effect.lease_id)

    def _run_step(self, effect: RunStep) -> None:
        def run() -> dict[str, int | str | bool]:
            return self._tools.slices.run(effect.step, effect.facts)

        where = (effect.lease_id, effect.step, effect.attempt, run)
        if effect.aside:
            self._run_aside(effect, where)
            return
        small = effect.facts.kind is Kind.MEM and effect.facts.amount <= INLINE_BYTES_MAX
        if small or effect.step is Step.REAP:
            self._step(*where)
        else:
            self._pool.submit(self._step, *where)

    def _run_aside(self, effect: RunStep, where: tuple[str, Step, int, Any]) -> None:
        """Of a fenced slice. While its step before hangs, another one would only queue behind it:
        the core sees that its time is up."""
        lease_id, kind = effect.lease_id, effect.facts.kind
        if lease_id in self._busy_aside:
            return
        self._busy_aside.add(lease_id)
        if kind not in self._aside:
            self._aside[kind] = ThreadPoolExecutor(1, thread_name_prefix=f"fence-{kind.value}")

        def done(now: Instant) -> list[Effect]:
            self._busy_aside.discard(lease_id)
            return []

        def run() -> None:
            self._step(*where, before=done)

        self._aside[kind].submit(run)

    def _step(
        self,
        lease_id: str,
        step: Step,
        attempt: int,
        run: Callable[[], Mapping[str, int | str | bool]],
        before: Verb | None = None,
    ) -> None:
        """Do a step wherever this is called, and tell the core how it went; `before` that, more."""
        core, why, evidence = self._tools.core, "", {}
        try:
            if step is Step.QUIESCE:
                fault("teardown.quiesce")
            evidence = dict(run())
            if step is Step.ERASE:
                self._tools.watcher.erased(lease_id)
        except (FabricError, OSError) as error:
            why = _cut(_typed(error))

        def told(now: Instant) -> list[Effect]:
            effects = [] if before is None else before(now)
            if why:
                return effects + core.step_failed(lease_id, step, attempt, why, now)
            return effects + core.step_done(lease_id, step, attempt, evidence, now)

        self._tools.post(told)

    def _send_receipt(self, effect: SendReceipt) -> None:
        receipt = effect.receipt
        self.ended_shares.forget(receipt.lease_id, receipt.epoch)
        if receipt.outcome is Outcome.FENCED:
            self._tell_fenced(receipt)
        else:
            self._facts.pop(receipt.lease_id, None)
            self._ops.pop(receipt.lease_id, None)
        self._tools.ledger.forget_bound(receipt.lease_id)
        self._tools.watcher.settled(receipt)
        self._tools.ledger.send_receipt(receipt)

    def _tell_fenced(self, receipt: ReceiptFacts) -> None:
        facts = self._facts.get(receipt.lease_id)
        cause = self._tools.core.verdict(receipt.lease_id, receipt.epoch, self._tools.now())
        if facts is not None and cause is not None:
            fields = self.remember_end(facts, cause)
            self.partners.front.send({"op": "ended", "leases": [fields]})

    def _report_bound(self, effect: ReportBound) -> None:
        stage = effect.stage.value if effect.stage else ""
        self._tools.ledger.report_bound((effect.lease_id, effect.epoch, effect.generation, stage))

    def _notify(self, effect: Notify) -> None:
        facts = self._facts.get(effect.lease_id)
        cause = None
        if facts is not None and effect.kind not in ("revoke_warning", "degraded"):
            cause = self._tools.core.verdict(effect.lease_id, facts.epoch, self._tools.now())
        self.partners.front.send(
            {
                "op": "notice",
                "session": effect.session,
                "lease": effect.lease_id,
                "kind": effect.kind,
                "reason": effect.reason,
                "grace_ms": effect.grace_ms,
                "failure": failure_message(cause) if cause else None,
            }
        )

    def _answer(self, effect: Answer) -> None:
        self._tools.answer(effect.request, effect.result)


def _typed(error: FabricError | OSError) -> FabricError:
    """What went wrong, as a failure that a holder may read."""
    if isinstance(error, FabricError):
        return error
    return failure.of("IO", errno.errorcode.get(error.errno or 0, "unknown"))


def _cut(problem: FabricError) -> str:
    """As receipts want it."""
    text = f"{problem.code}: {problem.detail}" if problem.detail else problem.code
    return shortened(text, WHY_CHARS_MAX)
