"""A simulated program that holds leases: honest, lazy, stalled, dead or hostile by its seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grafos_core import bundle, placement
from grafos_core.failure import FabricError
from grafos_core.holder import HolderLease, RenewalPolicy
from grafos_core.lease import (
    EndCause,
    Kind,
    Lease,
    LeaseId,
    NodeId,
    OnDisconnect,
    OnHolderExit,
    Policy,
)
from grafos_core.node_effects import Bound, Extended, Released
from grafos_core.token import LeaseToken
from tests.sim.ledger import TENANTS, Ledger
from tests.sim.world import Clock, LawBroken, World

if TYPE_CHECKING:
    from tests.sim.node import Node

LEASES_MAX = 5


@dataclass(slots=True)
class Held:
    lease: Lease
    token: LeaseToken
    belief: HolderLease | None = None
    keep: bool = False
    stubborn: bool = False
    """Goes on as if it had not been warned."""


class Holder:
    def __init__(
        self, world: World, ledger: Ledger, nodes: dict[NodeId, Node], number: int
    ) -> None:
        self.world, self.ledger, self.nodes = world, ledger, nodes
        self.clock = Clock(world)
        self.tenant = TENANTS[number % len(TENANTS)]
        self.number, self.life, self._asked = number, 0, 0
        self.kept: list[LeaseId] = []
        self.old_tokens: list[LeaseToken] = []
        self.held: dict[LeaseId, Held] = {}
        self._be_born()
        world.after(world.dice.randint(0, 1_000), self._act)

    def _be_born(self) -> None:
        """A new process of the same user: another name at the end, another key."""
        self.life += 1
        self.name = f"spiffe://sim/tenant/{self.tenant}/holder/h{self.number}/{self.life}"
        self.key = f"key-{self.number}-{self.life}"
        self.session = f"{self.number:016x}{self.life:016x}"
        self.held = {}
        self.ledger.listeners[self.session] = self

    def _request(self) -> str:
        self._asked += 1
        return f"q{self.number}-{self._asked}"

    def _act(self) -> None:
        dice, rates = self.world.dice, self.world.rates
        if self.world.calm:
            self._finish()
        elif self.world.chance(rates.holder_exit * 0.2):
            self._die()
        elif self.world.chance(rates.holder_stall * 0.2):
            self.world.after(dice.randint(1_000, 15_000), self._act)
            return
        else:
            if self.world.chance(rates.hang_up * 0.2):
                self._hang_up()
            self._work()
        self.world.after(dice.randint(1, 400), self._act)

    def _hang_up(self) -> None:
        """Its connections break, and are opened anew some time later; what it holds it still uses,
        by calls."""
        self.world.count("hang_ups")
        for node in self.nodes.values():
            self.world.after(self.world.dice.randint(0, 20), node.hang_up, self.session)
        pause_ms = self.world.dice.choice([300, 3_000, 12_000])
        self.world.after(pause_ms, self._come_back, self.life)

    def _come_back(self, life: int) -> None:
        if life == self.life:
            for node in self.nodes.values():
                node.join(self.session)

    def _work(self) -> None:
        dice = self.world.dice
        if self.world.chance(self.world.rates.hostile * 0.3) and self.old_tokens:
            self._replay(dice.choice(self.old_tokens))
        if len(self.held) < LEASES_MAX and dice.random() < 0.3:
            self._acquire()
        if len(self.held) < LEASES_MAX and dice.random() < 0.02:
            self._acquire_all()
        if self.kept and dice.random() < 0.3:
            self._ask("ledger", self.ledger.attach, self._request(), self, self.kept.pop())
        for held in list(self.held.values()):
            self._use(held)

    def _acquire(self) -> None:
        dice = self.world.dice
        kind = dice.choice([Kind.MEM, Kind.BLOCK])
        amount = dice.randint(1, 5) * (4096 if kind is Kind.MEM else 1)
        keep = dice.random() < 0.2
        policy = Policy(
            on_holder_exit=OnHolderExit.KEEP if keep else OnHolderExit.RELEASE,
            reconnect_ms=dice.choice([500, 5_000]),
            stop_after_ms=dice.choice([None, None, 3_000]),
            on_disconnect=dice.choice(list(OnDisconnect)),
        )
        ask = placement.Request(self._request(), kind, amount, policy)
        ttl_ms = dice.choice([1_000, 3_000, 10_000, 30_000])
        self._ask("ledger", self.ledger.acquire, ask, self, ttl_ms, policy)

    def _acquire_all(self) -> None:
        """Two or three things at once, now and then more than there is."""
        dice, request_id = self.world.dice, self._request()
        asks = []
        for index in range(dice.randint(2, 3)):
            kind = dice.choice([Kind.MEM, Kind.BLOCK])
            amount = dice.randint(1, 6) * (4096 if kind is Kind.MEM else 1)
            asks.append(placement.Request(bundle.member_id(request_id, index), kind, amount))
        ttl_ms = dice.choice([1_000, 3_000, 10_000])
        self._ask("ledger", self.ledger.acquire_all, asks, request_id, self, ttl_ms)

    def _ask(self, where: str, call: Any, *args: Any) -> None:
        self.world.send(self.name, where, call, *args)

    def granted(self, lease: Lease, token: LeaseToken) -> None:
        if lease.holder != self.name or lease.lease_id in self.held:
            return
        self.held[lease.lease_id] = Held(lease, token)
        self.old_tokens.append(token)
        self._bind(lease, token, self.nodes[lease.node_id].bind)

    def attach_granted(self, lease: Lease, token: LeaseToken) -> None:
        if lease.holder != self.name:
            return
        self.held[lease.lease_id] = Held(lease, token)
        self._bind(lease, token, self.nodes[lease.node_id].attach)

    def _bind(self, lease: Lease, token: LeaseToken, call: Any) -> None:
        sent_ms, life = self.clock.boot_ms(), self.life

        def answered(result: Any) -> None:
            self.world.send(
                lease.node_id, self.name, self._bound, lease.lease_id, result, sent_ms, life
            )

        self._ask(lease.node_id, call, token, self.key, self.session, answered)

    def _bound(self, lease_id: LeaseId, result: Any, sent_ms: int, life: int) -> None:
        held = self.held.get(lease_id)
        if life != self.life or held is None:
            return
        if isinstance(result, Bound) and held.belief is None:
            self.world.count("bound")
            held.belief = HolderLease(
                lease_id, remaining_ms=result.remaining_ms, sent_ms=sent_ms,
                now_ms=self.clock.boot_ms(), policy=RenewalPolicy(),
            )  # fmt: skip
        elif isinstance(result, FabricError) and result.code != "LEASE_BOUND":
            self.world.count(f"bind_{result.code}")
            self.held.pop(lease_id, None)

    def _use(self, held: Held) -> None:
        lease, belief, dice = held.lease, held.belief, self.world.dice
        now_ms = self.clock.boot_ms()
        if belief is None:
            if dice.random() < 0.02:
                self.held.pop(lease.lease_id, None)
            return
        belief.tick(now_ms)
        if not belief.usable(now_ms):
            if self.world.chance(self.world.rates.hostile) and dice.random() < 0.5:
                self._operate(held)
            else:
                self.held.pop(lease.lease_id, None)
            return
        self.check_belief(held)
        draw = dice.random()
        if draw < 0.5 or held.stubborn:
            self._operate(held)
        elif draw < 0.6:
            self._release(held)
        elif draw < 0.62:
            held.keep = True
            self._ask(lease.node_id, self.nodes[lease.node_id].detach, lease.lease_id,
                      lease.epoch, self.key)  # fmt: skip
        if belief.renew_due(now_ms):
            belief.renewal_sent(now_ms)
            ttl_ms = dice.choice([lease.ttl_ms, 1_000, 20_000])
            self._ask("ledger", self.ledger.renew, self._request(), self, lease.lease_id, ttl_ms)
            self.world.after(700, self._give_up_renewal, lease.lease_id, self.life, now_ms)

    def check_belief(self, held: Held) -> None:
        """S9: while a holder believes, its node has not let the lease run out."""
        node, lease = self.nodes[held.lease.node_id], held.lease
        if node.core is None:
            return
        cell = next((x for x in node.cells.values() if x.lease_id == lease.lease_id), None)
        if cell is not None and node.clock.boot_ms() >= cell.deadline_ms:
            raise LawBroken(
                f"S9: {self.name} believes in {lease.lease_id[:6]}, its node expired it"
            )
        known = node.core._leases.get(lease.lease_id)
        if known is not None and known.epoch == lease.epoch and known.cause is EndCause.EXPIRED:
            raise LawBroken(f"S9: {lease.lease_id[:6]} was expired before the time it was told")

    def _operate(self, held: Held) -> None:
        node = self.nodes[held.lease.node_id]
        self._ask(
            held.lease.node_id, node.operate, held.lease.lease_id, held.lease.epoch, lambda: None
        )

    def _give_up_renewal(self, lease_id: LeaseId, life: int, sent_ms: int) -> None:
        held = self.held.get(lease_id)
        belief = held.belief if held is not None and life == self.life else None
        if belief is not None and belief._asked_ms == sent_ms:
            belief.renewal_failed(self.clock.boot_ms())

    def renewal_granted(self, lease: Lease, token: LeaseToken) -> None:
        """The ledger has agreed; only the node's answer moves our own stop."""
        held, life = self.held.get(lease.lease_id), self.life
        asked_ms = held.belief._asked_ms if held is not None and held.belief else None
        if held is None or held.belief is None or token.holder_thumbprint != self.key:
            return
        self.old_tokens.append(token)

        def answered(result: Any) -> None:
            self.world.send(
                lease.node_id, self.name, self._extended, lease.lease_id, result, life, asked_ms
            )

        self._ask(lease.node_id, self.nodes[lease.node_id].extend, token, self.key, self.session,
                  answered)  # fmt: skip

    def _extended(self, lease_id: LeaseId, result: Any, life: int, asked_ms: int | None) -> None:
        """An answer that comes late, or twice, is for what was asked then and for nothing since."""
        held = self.held.get(lease_id)
        if life != self.life or held is None or held.belief is None:
            return
        if asked_ms is None or held.belief._asked_ms != asked_ms:
            return
        if isinstance(result, Extended):
            held.belief.renewed(result.remaining_ms, self.clock.boot_ms())
            self.world.count("extended")

    def _release(self, held: Held) -> None:
        lease = held.lease
        self.held.pop(lease.lease_id, None)
        if self.world.dice.random() < 0.2:
            self._ask("ledger", self.ledger.release, self._request(), self, lease.lease_id)
            return

        def answered(result: Any) -> None:
            self.world.count("released" if isinstance(result, Released) else "release_refused")

        self._ask(lease.node_id, self.nodes[lease.node_id].release, lease.lease_id, lease.epoch,
                  self.key, answered)  # fmt: skip

    def warned(self, lease_id: LeaseId, grace_ms: int) -> None:
        """Some save their work and say so, in time or too late; others go on in silence."""
        held = self.held.get(lease_id)
        if held is None:
            return
        held.stubborn = held.stubborn or self.world.dice.random() < 0.5
        if not held.stubborn:
            delay_ms = self.world.dice.randint(0, grace_ms + 600)
            self.world.after(delay_ms, self._report, lease_id, self.life)

    def _report(self, lease_id: LeaseId, life: int) -> None:
        held = self.held.pop(lease_id, None)
        if held is None or life != self.life:
            return
        node = self.nodes[held.lease.node_id]
        self._ask(node.node_id, node.checkpoint_done, lease_id, held.lease.epoch, self.key,
                  self._reported)  # fmt: skip

    def _reported(self, result: Any) -> None:
        if isinstance(result, Released):
            self.world.count(str(result.receipt.measured.get("revoke_stage", "no_revocation")))

    def _replay(self, token: LeaseToken) -> None:
        """An old token again, from wherever it was kept."""
        node = self.nodes[NodeId(token.node_id)]
        self._ask(node.node_id, node.bind, token, token.holder_thumbprint, self.session,
                  lambda _: None)  # fmt: skip
        self._ask(node.node_id, node.operate, LeaseId(token.lease_id), token.epoch, lambda: None)

    def _die(self) -> None:
        self.world.count("holder_deaths")
        self.kept += [held.lease.lease_id for held in self.held.values() if held.keep]
        session = self.session
        for node in self.nodes.values():
            self.world.after(self.world.dice.randint(0, 20), node.holder_exited, session)
        self._be_born()

    def _finish(self) -> None:
        for held in list(self.held.values()):
            self._release(held)
