"""The simulated ledger and admission: the real Lessor and placement, on a disk that survives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grafos_core import commands as c
from grafos_core import packing, placement
from grafos_core.lease import (
    IN_GRACE,
    TOKEN_MS_DEFAULT,
    USABLE,
    EndCause,
    Kind,
    Lease,
    LeaseId,
    LeaseState,
    NodeId,
    OnDisconnect,
    Policy,
    RevokeStage,
    TenantId,
)
from grafos_core.lessor import Lessor
from grafos_core.quota import Limit
from grafos_core.receipt import TeardownReceipt
from grafos_core.token import LeaseToken, audience_of
from services.ledger.wall import LedgerTime
from services.runtime.clock import Instant
from tests.sim.world import WALL_START_MS, Clock, LawBroken, World

if TYPE_CHECKING:
    from tests.sim.holder import Holder
    from tests.sim.node import Node

ISSUER = "spiffe://sim/service/admission"
TICK_MS = 200
REVOCABLE = {RevokeStage.ACTIVE, *IN_GRACE}
TENANTS = (TenantId("red"), TenantId("blue"))


class Ledger:
    def __init__(self, world: World) -> None:
        self.world, self.clock = world, Clock(world)
        self.up = True
        self.lessor = Lessor()
        self.durable: list[c.Event] = []
        self.nodes: dict[NodeId, Node] = {}
        self.listeners: dict[str, Holder] = {}
        """Who hears of what happens in a session."""
        self.time = LedgerTime(0)
        self.true_ends: dict[tuple[LeaseId, int], tuple[int, int]] = {}
        """By lease and generation: the end that was granted, in true time, and how wrong the
        ledger's time was then."""
        self._numbers = 0
        self.key_id = ""
        """With which admission signs."""
        self._keys: list[str] = []
        self._dead_keys: set[str] = set()
        """Revoked, with everything that they signed."""
        self._signed: dict[str, set[LeaseId]] = {}
        """By key, what tokens it has signed, as whoever holds them knows."""
        self._new_key()
        for tenant in TENANTS:
            self._do(c.SetQuota(tenant, Kind.MEM, Limit(20 * 4096, 12)))
        world.after(0, self._tick)
        world.after(world.dice.randint(1_000, 9_000), self._suffer)
        world.after(500, self._operate)

    @property
    def now_ms(self) -> int:
        """The ledger's wall clock, kept from going back and from leaping."""
        return max(self._read(), self.lessor.state.now_ms)

    def _read(self) -> int:
        return self.time.read(Instant(self.clock.boot_ms(), self.clock.wall_ms()))

    def _may_promise(self) -> bool:
        self._read()
        return self.up and not self.time.why

    def _do(self, command: c.Command) -> c.Step:
        step = self.lessor.handle(command, self.now_ms)
        self._store(step)
        return step

    def _store(self, step: c.Step) -> None:
        """Durable before anybody hears of it."""
        self.durable += step.events
        for event in step.events:
            self.world.tell("ledger", event.kind, event.lease_id[:6], event.epoch)
            self.world.count(event.kind)
            signed = {event.body.get("key_id"), *event.body.get("key_ids", ())}
            if event.kind.startswith("lease.") and signed & self._dead_keys:
                raise LawBroken(f"law 8: {event.kind} under a key that is revoked")
            if event.kind == "lease.granted":
                self._fresh(event)
            if event.kind in ("lease.granted", "lease.renewed", "lease.attached"):
                self._note_end(event)
        for node_id in step.nodes:
            self._push(node_id)

    def _fresh(self, event: c.Event) -> None:
        """Law 8: nothing is granted on a node that was not heard, truly, within 3 s and a bit."""
        node = self.nodes[NodeId(event.body["node_id"])]
        node.check_heard_lately()

    def _note_end(self, event: c.Event) -> None:
        lease_id, body = LeaseId(event.lease_id), event.body
        generation = body["generation"]
        error_ms = event.at_ms - WALL_START_MS - self.world.now_ms
        ttl_ms = body.get("ttl_ms")
        if ttl_ms is not None and body["end_ms"] == event.at_ms + ttl_ms:
            self.true_ends[lease_id, generation] = self.world.now_ms + ttl_ms, error_ms
        else:
            self.true_ends[lease_id, generation] = self.true_ends[lease_id, generation - 1]

    def _push(self, node_id: NodeId) -> None:
        node = self.nodes[node_id]
        for obligation in self.lessor.obligations(node_id):
            self.world.send("ledger", node_id, node.oblige, obligation, self.now_ms)

    # calls

    def acquire(self, ask: placement.Request, holder: Any, ttl_ms: int, policy: Policy) -> None:
        """Admission and ledger in one: decide, commit, mint, answer."""
        if not self._may_promise():
            return
        decision = placement.evaluate(ask, self.lessor.nodes(self.now_ms))
        if not isinstance(decision, placement.Admit):
            self.world.count("denied")
            return
        lease_id = self._new_id()
        step = self._do(
            c.Grant(
                ask.request_id, lease_id, holder.tenant, holder.name, holder.key, ask.kind,
                decision.node_id, decision.incarnation, decision.amount, ttl_ms, None,
                TOKEN_MS_DEFAULT, policy, key_id=self.key_id,
            )
        )  # fmt: skip
        if step.lease is not None:
            self._answer(holder, holder.granted, step.lease)

    def acquire_all(
        self, asks: list[placement.Request], request_id: str, holder: Any, ttl_ms: int
    ) -> None:
        """A bundle: all or none, also where its nodes are fuller by now than admission thinks."""
        if not self._may_promise():
            return
        nodes = self.lessor.nodes(self.now_ms)
        places: Any = packing.place_all(asks, nodes)
        if isinstance(places, packing.NoPlace):
            guesses = [placement.evaluate(ask, nodes) for ask in asks]
            if not all(isinstance(each, placement.Admit) for each in guesses):
                return
            places = guesses
        step = self._do(
            c.GrantBundle(
                request_id,
                tuple(
                    c.Grant(
                        ask.request_id, self._new_id(), holder.tenant, holder.name, holder.key,
                        ask.kind, place.node_id, place.incarnation, place.amount, ttl_ms, None,
                        TOKEN_MS_DEFAULT, ask.policy, key_id=self.key_id,
                    )
                    for ask, place in zip(asks, places, strict=True)
                ),
            )
        )  # fmt: skip
        self.world.count("bundles_refused" if step.failure else "bundles")
        for lease in step.leases:
            self._answer(holder, holder.granted, lease)

    def _new_id(self) -> LeaseId:
        self._numbers += 1
        return LeaseId(f"{self._numbers:06x}" + f"{self.world.dice.getrandbits(104):026x}")

    def renew(self, request_id: str, holder: Any, lease_id: LeaseId, ttl_ms: int) -> None:
        if self.up:
            step = self._do(
                c.Renew(request_id, lease_id, ttl_ms, holder.tenant, holder.name, self.key_id)
            )
            if step.lease is not None and step.failure is None:
                self._answer(holder, holder.renewal_granted, step.lease)

    def attach(self, request_id: str, holder: Any, lease_id: LeaseId) -> None:
        if self._may_promise():
            step = self._do(
                c.Attach(
                    request_id, lease_id, holder.tenant, holder.name, holder.key, TOKEN_MS_DEFAULT,
                    self.key_id,
                )
            )  # fmt: skip
            if step.lease is not None and step.failure is None:
                self._answer(holder, holder.attach_granted, step.lease)

    def release(self, request_id: str, holder: Any, lease_id: LeaseId) -> None:
        if self.up:
            self._do(
                c.End(request_id, lease_id, EndCause.RELEASE, holder.name, tenant=holder.tenant,
                      holder=holder.name)
            )  # fmt: skip

    def register(self, ask: c.Register, answer: Callable[..., None]) -> None:
        if not self.up:
            return
        step = self._do(ask)
        if step.failure is None:
            owed = self.lessor.obligations(ask.node_id)
            strangers = self.lessor.strangers(ask.node_id)
            wants_live = self.lessor.wants_live(ask.node_id)
            self.world.send("ledger", ask.node_id, answer, owed, strangers, wants_live, self.now_ms)

    def bound(self, report: c.ReportBound) -> None:
        if self.up:
            self._do(report)

    def credit(self, credit: c.Credit, answer: Callable[..., None]) -> None:
        if not self.up:
            return
        self._check_was_not_kept(credit.receipt)
        step = self._do(credit)
        refused = step.failure.code if step.failure else ""
        receipt = credit.receipt
        self.world.send(
            "ledger", receipt.node_id, answer, receipt.lease_id, receipt.epoch, receipt.outcome,
            refused,
        )  # fmt: skip

    def _check_was_not_kept(self, receipt: TeardownReceipt) -> None:
        lease = self.lessor.state.find(LeaseId(receipt.lease_id))
        if receipt.cause is not EndCause.DISCONNECTED or lease is None:
            return
        self.world.count("disconnected")
        policy = lease.policy
        if policy.on_disconnect is OnDisconnect.KEEP and policy.stop_after_ms is None:
            raise LawBroken(f"law 5: {lease.lease_id[:6]} was to be kept, and ended disconnected")

    def _answer(self, holder: Any, call: Callable[..., None], lease: Lease) -> None:
        self.world.send("ledger", holder.name, call, lease, self.mint(lease))

    def mint(self, lease: Lease) -> LeaseToken:
        self._signed.setdefault(self.key_id, set()).add(lease.lease_id)
        now_ms = self.clock.wall_ms()
        return LeaseToken(
            issuer=ISSUER, subject=lease.holder,
            audience=audience_of(lease.node_id, lease.incarnation),
            jti=f"{self.world.dice.getrandbits(128):032x}", iat_ms=now_ms // 1000 * 1000,
            nbf_ms=now_ms // 1000 * 1000, exp_ms=min(now_ms + TOKEN_MS_DEFAULT, lease.end_ms),
            holder_thumbprint=lease.holder_key, lease_id=lease.lease_id, kind=lease.kind,
            amount=lease.amount, extent_offset=lease.extent_offset, ops=("read", "write"),
            epoch=lease.epoch, generation=lease.generation, ttl_ms=lease.ttl_ms,
            lease_end_ms=lease.end_ms, policy=lease.policy,
        )  # fmt: skip

    # time, authority and bad luck

    def _tick(self) -> None:
        if self.up:
            self._store(self.lessor.tick(self.now_ms))
        self.world.after(TICK_MS, self._tick)

    def _operate(self) -> None:
        """An operator revokes now and then, also what is being revoked, and clears fences."""
        if self.up:
            if self.world.chance(self.world.rates.revoke * 2):
                self._new_key()
            if self.world.chance(self.world.rates.revoke):
                self._revoke_key(self.world.dice.choice(self._keys[-2:]))
            leases = sorted(self.lessor.state.leases.values(), key=lambda lease: lease.lease_id)
            live = (LeaseState.ACTIVE, LeaseState.ENDING)
            active = [x for x in leases if x.state in live and x.stage in REVOCABLE]
            if active and self.world.chance(self.world.rates.revoke * 1.5):
                lease = self.world.dice.choice(active)
                grace_ms = self.world.dice.choice([0, 500, 3_000, 10_000])
                self._do(c.End("op", lease.lease_id, EndCause.REVOKED, "op", "why", grace_ms))
            for lease in leases:
                haste = self.world.rates.operator
                if lease.state is LeaseState.FENCED and self.world.dice.random() < haste:
                    nonce = f"{self.world.dice.getrandbits(128):032x}"
                    residue = self.world.dice.random() < 0.2
                    self._do(c.ClearFence("op", lease.lease_id, "looked", residue, "op", nonce))
        self.world.after(1_000, self._operate)

    def _new_key(self) -> None:
        self.key_id = f"k{len(self._keys)}"
        self._keys.append(self.key_id)
        key = c.PublishedKey(self.key_id, "admission", "lease", bytes(32))
        self._do(c.PublishKey(key))

    def _revoke_key(self, key_id: str) -> None:
        """The key first; then, in a command of its own, what it signed. Admission hears of it."""
        self._do(c.RevokeKey(key_id, "seen elsewhere", "op"))
        self.world.after(self.world.dice.randint(1, 300), self._end_signed, key_id)
        self.world.after(self.world.dice.randint(1, 600), self._hear_of_revoked, key_id)

    def _hear_of_revoked(self, key_id: str) -> None:
        if not self.up:
            self.world.after(200, self._hear_of_revoked, key_id)
        elif key_id == self.key_id:
            self._new_key()

    def _end_signed(self, key_id: str) -> None:
        if not self.up:
            self.world.after(200, self._end_signed, key_id)
            return
        leases = sorted(self.lessor.state.leases.values(), key=lambda lease: lease.lease_id)
        for lease in leases:
            if key_id in lease.key_ids and (lease.state in USABLE or lease.stage in IN_GRACE):
                self.world.count("ended_with_its_key")
                self._do(c.End("op", lease.lease_id, EndCause.REVOKED, "op", "its key"))
        self._dead_keys.add(key_id)
        for lease_id in sorted(self._signed.get(key_id, set())):
            known = self.lessor.state.leases.get(lease_id)
            if known is not None and known.state in USABLE:
                raise LawBroken(f"S14: {lease_id[:6]} lives on, a revoked key signed for it")

    def _suffer(self) -> None:
        if self.up and self.world.chance(self.world.rates.ledger_crash):
            self.world.tell("ledger crashes")
            self.up = False
            self.world.after(self.world.dice.randint(50, 6_000), self._recover)
        self.clock.suffer()
        self.world.after(self.world.dice.randint(1_000, 9_000), self._suffer)

    def _recover(self) -> None:
        self.lessor = Lessor()
        for event in self.durable:
            self.lessor.replay(event)
        self.clock.set_right()  # whoever starts it looks at the clock: a leap is believed then
        self.time = LedgerTime(self.lessor.state.now_ms)
        self._read()
        self.up = True
        self.world.tell("ledger is back")
