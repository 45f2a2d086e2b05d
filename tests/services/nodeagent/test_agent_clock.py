"""Row G13, the node's part, and the clocks of S8 and S11: a whole agent whose time is not right.

Wall clocks that jump, a machine that was suspended, a machine with another boottime. Of the agent's
processes the front keeps the right wall time where that jumps: it judges certificates by it.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grafos_core.failure import Degraded, Denied, FabricError, Fenced, LeaseExpired
from grafos_core.lease import EndCause, Kind
from grafos_core.receipt import Outcome
from tests.clocks import NODE, Clocks
from tests.services.nodeagent.agents import (
    AgentUnderTest,
    agent_in,
    bound,
    code_of,
    renewed,
    tried,
)
from tests.services.nodeagent.fabric import HolderSide, eventually, fabric_in, now_ms

HOUR_MS = 3_600_000
SECONDS_MS = 10_000
"""As far back as a fresh certificate is good; beyond that an agent does not even start."""
OTHER_TIME = ("unshare", "--time", "--boottime", "8640000", "--monotonic", "77777")
"""A machine that was switched on a hundred days before this one."""


class Jumping:
    """An agent, and the hand on its clocks."""

    def __init__(self, agent: AgentUnderTest, folder: Path) -> None:
        folder.mkdir()
        self.agent, self.clocks = agent, Clocks(folder)

    def jump(self, shift_ms: int) -> None:
        """So much away from the right time."""
        self.clocks.right_wall()
        self.clocks.step_wall(shift_ms, "agent", "warden")

    def start(self, *, ready: bool = True) -> HolderSide:
        environment: dict[str, Any] = dict(self.clocks.environment())
        self.agent.start(ready=ready, **environment)
        return self.agent.holder()

    def closed_gates(self) -> dict[str, Any]:
        return {name: gate for name, gate in self.agent.readiness()["gates"].items() if gate}


@pytest.fixture
def jumping(tmp_path: Path) -> Iterator[Jumping]:
    with fabric_in(tmp_path) as fabric, agent_in(fabric, tmp_path) as agent:
        yield Jumping(agent, tmp_path / "clocks")


def token_of(jumping: Jumping, holder: HolderSide, at_ms: int, **changes: Any) -> str:
    """Issued at `at_ms`, by whoever's clock."""
    fabric = jumping.agent.fabric
    times = {
        "iat_ms": at_ms // 1000 * 1000, "nbf_ms": at_ms // 1000 * 1000, "exp_ms": at_ms + 20_000,
        "lease_end_ms": now_ms() + 60_000,
    }  # fmt: skip
    return fabric.sign(fabric.token(holder.credentials, **{**times, **changes}))


@pytest.mark.parametrize("shift_ms", [HOUR_MS, -HOUR_MS])
def test_g13_no_jump_moves_the_end_of_what_is_bound(jumping: Jumping, shift_ms: int) -> None:
    alice = jumping.start()
    since = time.monotonic()
    slip = bound(jumping.agent, alice, ttl_ms=2_500)
    jumping.jump(shift_ms)
    assert 0 < alice.read(slip).remaining_ms <= 2_500
    while True:
        try:
            alice.read(slip)
        except LeaseExpired:
            break
        assert time.monotonic() < since + 4
    assert time.monotonic() - since >= 2.4
    assert jumping.agent.fabric.ledger.receipt_of(slip.lease_id).cause is EndCause.EXPIRED


def test_g13_a_clock_ahead_makes_nothing_longer_and_is_forgotten_when_it_is_right_again(
    jumping: Jumping,
) -> None:
    alice = jumping.start()
    slip = bound(jumping.agent, alice, ttl_ms=30_000)
    jumping.jump(HOUR_MS)
    late = token_of(jumping, alice, now_ms())
    assert code_of(Denied, alice.bind, late) == "TOKEN_EXPIRED"
    _, text = renewed(jumping.agent, slip, ttl_ms=60_000)
    assert code_of(FabricError, alice.extend, text) == "TOKEN_EXPIRED"
    assert 20_000 < alice.read(slip).remaining_ms <= 30_000
    jumping.jump(0)
    eventually(jumping.agent.is_ready)
    alice.bind(late)


def test_g13_a_clock_behind_binds_nothing_until_it_has_passed_the_floor_across_a_restart(
    jumping: Jumping,
) -> None:
    alice = jumping.start()
    slip = bound(jumping.agent, alice)
    jumping.jump(-HOUR_MS)
    eventually(lambda: not jumping.agent.is_ready())
    assert "clock" in str(jumping.closed_gates())
    early = token_of(jumping, alice, now_ms() - HOUR_MS)
    assert code_of(Degraded, alice.bind, early) == "CLOCK_REGRESSED"
    assert alice.read(slip).data == bytes(16), "what is bound goes on"
    jumping.agent.kill()
    jumping.jump(-SECONDS_MS)
    alice = jumping.start(ready=False)
    early = token_of(jumping, alice, now_ms() - SECONDS_MS)
    eventually(lambda: tried_code(alice, early) == "CLOCK_REGRESSED")
    assert not jumping.agent.is_ready()
    jumping.jump(0)
    eventually(jumping.agent.is_ready)
    alice.release(bound(jumping.agent, alice))


def tried_code(holder: HolderSide, text: str) -> str:
    with pytest.raises(FabricError) as refusal:
        holder.bind(text)
    return refusal.value.code


def test_a_machine_that_was_suspended_ends_what_ran_out_and_nothing_else(jumping: Jumping) -> None:
    """Waking up, nobody takes the others' silence for their death."""
    alice = jumping.start()
    short, long = (bound(jumping.agent, alice, ttl_ms=ttl_ms) for ttl_ms in (8_000, 60_000))
    processes = [jumping.agent.child(name) for name in ("front", "warden")]
    jumping.clocks.sleep(20_000, *NODE)
    assert code_of(LeaseExpired, alice.read, short) == "LEASE_EXPIRED", "at the very first look"
    assert 30_000 < alice.read(long).remaining_ms <= 40_000
    assert jumping.agent.fabric.ledger.receipt_of(short.lease_id).cause is EndCause.EXPIRED
    threading.Event().wait(1.3)  # whoever waited has woken by now
    assert alice.read(long).data == bytes(16)
    assert [jumping.agent.child(name) for name in ("front", "warden")] == processes
    assert alice.release(long).credited


@pytest.mark.root
@pytest.mark.requires("root", "unshare")
def test_a_node_with_another_boottime_keeps_the_same_hours_and_may_lose_it(
    jumping: Jumping,
) -> None:
    """Durations alone cross machines; and what a boot left is not measured by its clock."""
    agent = jumping.agent
    agent.start(under=OTHER_TIME)
    alice = agent.holder()
    kept = bound(agent, alice)
    since = time.monotonic()
    slip = bound(agent, alice, ttl_ms=1_000)
    refused = eventually(lambda: refusal_of(alice, slip), 5)
    assert (type(refused), refused.code) == (LeaseExpired, "LEASE_EXPIRED")
    assert time.monotonic() - since >= 0.99
    agent.kill()
    agent.start()  # by this machine's boottime: a hundred days earlier
    receipt = agent.fabric.ledger.receipt_of(kept.lease_id)
    assert (receipt.cause, receipt.outcome) == (EndCause.AGENT_LOST, Outcome.TORNDOWN)
    back = agent.holder(alice.credentials)
    assert code_of(Fenced, back.bind, agent.fabric.sign(kept)) == "EPOCH_BURNT"
    back.release(bound(agent, back))


def test_each_lease_that_met_its_deadline_is_counted_once_with_who_was_first(
    jumping: Jumping,
) -> None:
    """Law 5 does not depend on one of the two; and what the warden did alone is told by the next
    agent as what it was: an end at its time."""
    alice, agent = jumping.start(), jumping.agent
    slips = [bound(agent, alice, kind=kind, amount=4096 if kind is Kind.MEM else 1, ttl_ms=1_000)
             for kind in (Kind.MEM, Kind.BLOCK)]  # fmt: skip
    alice.release(bound(agent, alice))
    for slip in slips:
        assert agent.fabric.ledger.receipt_of(slip.lease_id).cause is EndCause.EXPIRED
    counts = lateness(agent)
    assert {kind: sum(by.values()) for kind, by in counts.items()} == {"mem": 1, "block": 1}

    alone = bound(agent, alice, ttl_ms=1_000)
    os.kill(agent.child("warden"), signal.SIGSTOP)  # control replaces it, but later
    assert agent.fabric.ledger.receipt_of(alone.lease_id).cause is EndCause.EXPIRED
    assert lateness(agent)["mem"].get("agent", 0) == counts["mem"].get("agent", 0) + 1

    eventually(lambda: tried(lambda: alice.release(bound(agent, alice))))
    slip, living = bound(agent, alice, ttl_ms=1_000), bound(agent, alice)
    os.kill(agent.pid, signal.SIGSTOP)
    eventually(lambda: refusal_of(alice, slip), 5)
    eventually(lambda: (agent.state / "warden" / "1.journal").stat().st_size > 0)
    agent.kill()
    alice = jumping.start()
    assert agent.fabric.ledger.receipt_of(living.lease_id).cause is EndCause.AGENT_LOST
    assert agent.fabric.ledger.receipt_of(slip.lease_id).cause is EndCause.EXPIRED
    assert lateness(agent) == {"mem": {"warden": 1}}
    assert re.search(r'overrun_seconds_bucket{by="warden",kind="mem",le="0.02"}', agent.metrics())


def lateness(agent: AgentUnderTest) -> dict[str, dict[str, int]]:
    """How many leases met their deadline, by kind and by who ended them."""
    name = "grafos_lease_deadline_overrun_seconds_count"
    found: dict[str, dict[str, int]] = {}
    for by, kind, count in re.findall(
        name + r'{by="(\w+)",kind="(\w+)"} ([0-9.]+)', agent.metrics()
    ):
        found.setdefault(kind, {})[by] = int(float(count))
    return found


def refusal_of(holder: HolderSide, slip: Any) -> FabricError | None:
    try:
        holder.read(slip)
    except FabricError as refused:
        return refused
    return None
