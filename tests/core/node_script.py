"""Golden scripts for the node agent's core: one command a line, effects as they are to be done.

node [mem=65536] [block=64] [policy]    a fresh node, started, ready, heard (the default)
restart open=a,b fences=c owed=d used=5 journal=a expired=b kept=b   after a crash
at 5000 [wall=…]                       now; the wall clock is 1000000 later unless said
bind a [epoch=1] [gen=1] [amount=4096] [offset=0] [ttl=10000] [end=…] [key=K] [session=s]
     [exit=keep] [disconnect=release] [stop=…] [reconnect=…] [kind=mem]
extend a gen=2 … | attach a gen=2 key=L session=t …
created a | create_failed a [dirty] | held a | raised a 20000|none
done a quiesce [found=…] | failed a erase why=…        attempt is the awaited one unless said
ended a                                every step of its teardown succeeds
release a [wait=0] | checkpoint a | stage a | detach a | exited s | lost s | back s | exported a
burn a epoch=… | revoke a grace=… | withdraw a | probe a | clear a nonce=… [residue]
credited a torndown | taken a deadline | front lost|started | warden lost|started
heard | hold SPOOL_FULL | allow SPOOL_FULL | tick | leases | wait | verdict a | gates
fenced a                               up to a fence whose receipt is credited, without a word
fence a                                what is known of it
"""

from collections.abc import Callable
from typing import Any

from grafos_core import failure
from grafos_core import node_effects as e
from grafos_core.epochs import EpochWindow, ExtentEpochs
from grafos_core.failure import FabricError
from grafos_core.gate import fresh_epochs
from grafos_core.lease import Kind, LeaseId, OnDisconnect, OnHolderExit, Policy
from grafos_core.node import NodeCore
from grafos_core.node_effects import BoundFacts, Effect, FenceFacts, Instant, Recovered
from grafos_core.receipt import ClearOrder, Outcome
from grafos_core.teardown import Step
from grafos_core.token import LeaseToken, audience_of

NODE, INCARNATION = "n1", "1" * 32
WALL_MS = 1_000_000


def words(line: str) -> tuple[str, list[str], dict[str, str]]:
    """A command, its bare words, and its `name=value` words."""
    head, *rest = line.split()
    bare = [word for word in rest if "=" not in word]
    return head, bare, dict(word.split("=", 1) for word in rest if "=" in word)


def lease_id(letter: str) -> LeaseId:
    return LeaseId(f"{ord(letter[0]):02x}" * 16)


def letter(lease: str) -> str:
    return chr(int(lease[:2], 16)) if lease else "-"


def policy(options: dict[str, str]) -> Policy:
    stop = options.get("stop")
    return Policy(
        on_holder_exit=OnHolderExit(options.get("exit", "release")),
        reconnect_ms=int(options.get("reconnect", 5000)),
        stop_after_ms=int(stop) if stop else None,
        on_disconnect=OnDisconnect(options.get("disconnect", "grace")),
    )


def token(name: str, options: dict[str, str], now: Instant) -> LeaseToken:
    ttl_ms = int(options.get("ttl", 10_000))
    node = options.get("node", NODE)
    return LeaseToken(
        "adm", "spiffe://t/holder", audience_of(node, INCARNATION), "ab" * 16,
        int(options.get("iat", now.wall_ms)), now.wall_ms, now.wall_ms + 1000,
        options.get("key", "K"), lease_id(name), Kind(options.get("kind", "mem")),
        int(options.get("amount", 4096)),
        tuple(op for op in options.get("ops", "read,write").split(",") if op),
        int(options.get("epoch", 1)), int(options.get("gen", 1)), ttl_ms,
        int(options.get("end", now.wall_ms + ttl_ms)), int(options.get("offset", 0)),
        policy=policy(options),
    )  # fmt: skip


def told(failed: FabricError) -> str:
    return f"{type(failed).__name__} {failed.code}" + (
        f" ({failed.detail})" if failed.detail else ""
    )


def receipt(facts: e.ReceiptFacts) -> str:
    found = "".join(f" {name}={value}" for name, value in facts.measured.items())
    by = f" by {facts.cleared}" if facts.cleared else f" by {facts.cause}"
    return f"{facts.outcome}{by}, {facts.assurance}{found}"


def result(value: e.Result) -> str:
    match value:
        case FabricError():
            return told(value)
        case e.Bound():
            return f"bound gen {value.facts.generation}, {value.remaining_ms} ms"
        case e.Extended():
            return f"extended gen {value.generation}, {value.remaining_ms} ms"
        case e.Released():
            return f"released, credited {value.credited}"
        case e.Detached():
            return f"detached, {value.remaining_ms} ms"
        case e.Ordered():
            return f"ordered, {value.stage}"
        case e.Probed():
            return f"probed, clean {value.clean}"


def persisted(effect: e.Persist) -> str:
    kinds = ", ".join(f"{kind.removeprefix('agent.')}" for kind, _, _, _ in effect.events)
    lease = letter(effect.events[0][1])
    return f"Persist {lease}: {kinds}{', sealed' if effect.seal_now else ''}"


def shown(effect: Effect) -> str:
    match effect:
        case e.Persist():
            return persisted(effect)
        case e.Answer():
            return f"Answer {result(effect.result)}"
        case e.SendReceipt():
            return f"SendReceipt {letter(effect.lease_id)}: {receipt(effect.receipt)}"
        case e.KillFront():
            return "KillFront"
    name, lease = type(effect).__name__, letter(effect.lease_id)
    match effect:
        case e.OpenGate() | e.WardenHold() | e.WardenRaise():
            return f"{name} {lease} until {effect.deadline_ms}"
        case e.OpenFront():
            return f"{name} {lease} for {effect.session}"
        case e.RunStep():
            return f"{name} {lease} {effect.step} #{effect.attempt}"
        case e.ReportBound() if effect.stage:
            return f"{name} {lease}: {effect.stage}"
        case e.Notify():
            grace = f", grace {effect.grace_ms}" if effect.grace_ms else ""
            return f"{name} {lease} to {effect.session}: {effect.kind}{grace}"
    return f"{name} {lease}"


class Script:
    """One node, and everything that its shell would tell it."""

    def __init__(self) -> None:
        self.now = Instant(0, WALL_MS)
        self.core = self._fresh({}, Recovered())

    def _fresh(self, options: dict[str, str], recovered: Recovered) -> NodeCore:
        capacities = {
            Kind.MEM: int(options.get("mem", 65_536)), Kind.BLOCK: int(options.get("block", 64))
        }  # fmt: skip
        return NodeCore(
            NODE, INCARNATION, capacities, recovered, self.now,
            clears_proved_clean="policy" in options,
        )  # fmt: skip

    def _ready(self) -> list[Effect]:
        self.core.allow_binds("NOT_READY")
        effects = self.core.front_started(self.now) + self.core.warden_started(self.now)
        return effects + self.core.heard(1, self.now)

    def __call__(self, text: str) -> str:
        lines = []
        for line in text.splitlines():
            head, bare, options = words(line)
            answer = getattr(self, f"do_{head}")(bare, options)
            self.core.check()
            lines += [answer] if isinstance(answer, str) else [shown(one) for one in answer]
        return "\n".join(line for line in lines if line)

    # The node

    def do_node(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        self.core = self._fresh(options | dict.fromkeys(bare, ""), Recovered())
        return self.core.start(self.now) + self._ready()

    def do_restart(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        def facts(name: str) -> BoundFacts:
            return BoundFacts.of_token(token(name, options | {"epoch": str(ord(name))}, self.now))

        binds = [facts(name) for name in options.get("open", "").split(",") if name]
        fences = [facts(name) for name in options.get("fences", "").split(",") if name]
        owed = [facts(name) for name in options.get("owed", "").split(",") if name]
        receipts = tuple(
            e.ReceiptFacts.of_body(
                one.lease_id, one.epoch,
                FenceFacts.of_cause(one, "").receipt.body() | {"outcome": "torndown"},
            )
            for one in owed
        )  # fmt: skip
        epochs = {kind: fresh_epochs(kind) for kind in (Kind.MEM, Kind.BLOCK)}
        for number in options.get("used", "").split(","):
            for one in epochs.values():
                if isinstance(one, EpochWindow) and number:
                    one.use(int(number))
                elif isinstance(one, ExtentEpochs) and number:
                    one.use(0, 64, int(number))
        recovered = Recovered(
            epochs, tuple(binds), tuple(FenceFacts.of_cause(one, "erase: EIO") for one in fences),
            receipts, WALL_MS, frozenset(lease_id(one) for one in options.get("kept", "")),
        )  # fmt: skip
        self.core = self._fresh(options, recovered)
        journal: dict[str, dict[str, int | str]] = {
            lease_id(one): {"st_size": 0} for one in options.get("journal", "")
        }
        for name in options.get("expired", ""):
            journal[lease_id(name)] = {"cause": "deadline", "late_us": 1_500}
        return self.core.start(self.now, journal) + self._ready()

    def do_at(self, bare: list[str], options: dict[str, str]) -> str:
        boot_ms = int(bare[0])
        self.now = Instant(boot_ms, int(options.get("wall", WALL_MS + boot_ms)))
        return ""

    def do_tick(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.tick(self.now)

    def do_heard(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.heard(int(options.get("number", 1)), self.now)

    def do_hold(self, bare: list[str], options: dict[str, str]) -> str:
        self.core.hold_binds(bare[0], "as told")
        return ""

    def do_allow(self, bare: list[str], options: dict[str, str]) -> str:
        self.core.allow_binds(bare[0])
        return ""

    def do_wait(self, bare: list[str], options: dict[str, str]) -> str:
        return f"{self.core.timeout_ms(self.now)} ms"

    def do_gates(self, bare: list[str], options: dict[str, str]) -> str:
        return "\n".join(f"{code}: {why}" for code, why in self.core.closed_gates(self.now).items())

    def do_leases(self, bare: list[str], options: dict[str, str]) -> str:
        return "\n".join(
            f"{letter(one.lease_id)} {one.kind} {one.amount} {one.stage} {one.remaining_ms} ms"
            + (f", {one.fence_cause}" if one.fence_cause else "")
            for one in self.core.leases(self.now)
        )

    def do_verdict(self, bare: list[str], options: dict[str, str]) -> str:
        failed = self.core.verdict(lease_id(bare[0]), int(options.get("epoch", 1)), self.now)
        return "may" if failed is None else told(failed)

    # Tokens

    def do_bind(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        presented = token(bare[0], options, self.now)
        holder_key = options.get("peer", presented.holder_thumbprint)
        return self.core.bind(1, presented, holder_key, options.get("session", "s"), self.now)

    def do_up(self, bare: list[str], options: dict[str, str]) -> str:
        """Bind, and everything that follows, without a word about it."""
        self.do_bind(bare, options)
        self.core.device_created(lease_id(bare[0]), self.now)
        self.core.warden_held(lease_id(bare[0]), self.now)
        failed = self.core.verdict(lease_id(bare[0]), int(options.get("epoch", 1)), self.now)
        return "up" if failed is None else told(failed)

    def do_extend(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        presented = token(bare[0], options, self.now)
        return self.core.extend(2, presented, presented.holder_thumbprint, self.now)

    def do_attach(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        presented = token(bare[0], options, self.now)
        session = options.get("session", "s")
        return self.core.attach(3, presented, presented.holder_thumbprint, session, self.now)

    # Devices, warden, front

    def do_created(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.device_created(lease_id(bare[0]), self.now)

    def do_create_failed(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        problem = failure.of("DISK")
        clean = "dirty" not in bare
        return self.core.device_failed(lease_id(bare[0]), problem, self.now, clean=clean)

    def do_held(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.warden_held(lease_id(bare[0]), self.now)

    def do_raised(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        deadline_ms = None if bare[1] == "none" else int(bare[1])
        return self.core.warden_raised(lease_id(bare[0]), deadline_ms, self.now)

    def _attempt(self, name: str, options: dict[str, str]) -> int:
        lease = self.core._leases[lease_id(name)]
        known = lease.teardown.attempt if lease.teardown else 0
        return int(options.get("attempt", known))

    def do_done(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        found: dict[str, Any] = {"found": options["found"]} if "found" in options else {}
        attempt = self._attempt(bare[0], options)
        return self.core.step_done(lease_id(bare[0]), Step(bare[1]), attempt, found, self.now)

    def do_failed(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        attempt, why = self._attempt(bare[0], options), options.get("why", "EIO")
        return self.core.step_failed(lease_id(bare[0]), Step(bare[1]), attempt, why, self.now)

    def do_ended(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        effects: list[Effect] = []
        for step in Step:
            effects = self.do_done([bare[0], step.value], {}) or effects
        return effects

    def do_broken(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.device_broken(lease_id(bare[0]), "EIO", self.now)

    def do_taken(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        measured = {"st_size": 0}
        return self.core.taken_by_warden(lease_id(bare[0]), bare[1], measured, self.now)

    def do_front(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        verb = self.core.front_lost if bare[0] == "lost" else self.core.front_started
        return verb(self.now)

    def do_warden(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        verb = self.core.warden_lost if bare[0] == "lost" else self.core.warden_started
        return verb(self.now)

    # Holders

    def do_release(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        epoch, key = int(options.get("epoch", 1)), options.get("key", "K")
        wait_ms = int(options.get("wait", 0))
        return self.core.release(4, lease_id(bare[0]), epoch, key, wait_ms, self.now)

    def do_checkpoint(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        epoch, key = int(options.get("epoch", 1)), options.get("key", "K")
        return self.core.checkpoint_done(4, lease_id(bare[0]), epoch, key, 0, self.now)

    def do_stage(self, bare: list[str], options: dict[str, str]) -> str:
        return str(self.core._leases[lease_id(bare[0])].revoke_stage)

    def do_detach(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.detach(5, lease_id(bare[0]), 1, options.get("key", "K"), self.now)

    def do_exited(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.holder_exited(bare[0], self.now)

    def do_lost(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.session_lost(bare[0], self.now)

    def do_back(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.session_back(bare[0], self.now)

    def do_exported(self, bare: list[str], options: dict[str, str]) -> str:
        self.core.exported(lease_id(bare[0]))
        return ""

    # The ledger and operators

    def _target(self, bare: list[str], options: dict[str, str]) -> e.Target:
        return e.Target(
            lease_id(bare[0]), int(options.get("epoch", 1)), Kind(options.get("kind", "mem")),
            int(options.get("amount", 4096)), int(options.get("offset", 0)),
        )  # fmt: skip

    def do_burn(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.burn(6, self._target(bare, options), self.now)

    def do_withdraw(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.withdraw(6, self._target(bare, options), self.now)

    def do_revoke(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        grace_ms = int(options.get("grace", 0))
        return self.core.revoke(6, self._target(bare, options), grace_ms, "preempted", self.now)

    def do_fenced(self, bare: list[str], options: dict[str, str]) -> str:
        """Its measurement fails twice, all else succeeds."""
        self.do_up(bare, options)
        self.do_release(bare, options)
        for step in (Step.QUIESCE, Step.REAP, Step.ERASE):
            self.do_done([bare[0], step.value], {})
        for _ in range(2):
            self.do_failed([bare[0], Step.MEASURE.value], {})
        self.do_credited([bare[0], "fenced"], options)
        return self.do_leases(bare, options)

    def do_fence(self, bare: list[str], options: dict[str, str]) -> str:
        view = next(x for x in self.core.leases(self.now) if x.lease_id == lease_id(bare[0]))
        assert view.fence is not None
        fence = view.fence
        lines = [
            f"{each.number}: {'clean' if each.clean else 'not clean'}{' asked' * each.asked}"
            + "".join(f" {name}={value}" for name, value in each.measured.items())
            for each in fence.findings
        ]
        due = "now" if fence.next_probe_ms is None else f"in {fence.next_probe_ms} ms"
        return "\n".join([*lines, f"{fence.probes} probes, the next {due}"])

    def do_probe(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        return self.core.probe(7, lease_id(bare[0]), self.now)

    def do_clear(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        order = ClearOrder(
            lease_id(bare[0]), NODE, options.get("incarnation", INCARNATION),
            int(options.get("epoch", 1)), options.get("nonce", "1") * 32,
            self.now.wall_ms + int(options.get("for", 1000)), "seen by eye", "spiffe://t/operator",
            "residue" in bare,
        )  # fmt: skip
        return self.core.clear(8, order, self.now)

    def do_credited(self, bare: list[str], options: dict[str, str]) -> list[Effect]:
        epoch = int(options.get("epoch", 1))
        return self.core.credited(lease_id(bare[0]), epoch, Outcome(bare[1]), self.now)


def interpreter() -> Callable[[str], str]:
    return Script()
