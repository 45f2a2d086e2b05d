"""Row G13, the node's part: a whole agent whose wall clock jumps.

The agent runs with a `time.time_ns` that adds what stands in a file. Certificates are judged by the
front and by the TLS library, which keep the right time here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grafos_core.failure import Degraded, Denied, FabricError, LeaseExpired
from grafos_core.lease import EndCause
from tests.services.nodeagent.agents import AgentUnderTest, agent_in, bound, code_of, renewed
from tests.services.nodeagent.fabric import HolderSide, eventually, fabric_in, now_ms

HOUR_MS = 3_600_000
SECONDS_MS = 10_000
"""As far back as a fresh certificate is good; beyond that an agent does not even start."""
SHIM = """
import os, time
right, path = time.time_ns, os.environ["SHIFTED_BY"]
if b"services.nodeagent.front" not in open("/proc/self/cmdline", "rb").read():
    time.time_ns = lambda: right() + int(open(path).read()) * 1_000_000
"""


class Jumping:
    """An agent, and the hand on its wall clock."""

    def __init__(self, agent: AgentUnderTest, folder: Path) -> None:
        self.agent, self._file, self._shim = agent, folder / "shift", folder / "shim"
        self._shim.mkdir()
        (self._shim / "sitecustomize.py").write_text(SHIM)
        self.jump(0)

    def jump(self, shift_ms: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(str(shift_ms))
        new.rename(self._file)

    def start(self, *, ready: bool = True) -> HolderSide:
        path = os.pathsep.join([str(self._shim), os.environ.get("PYTHONPATH", "")])
        self.agent.start(ready=ready, PYTHONPATH=path, SHIFTED_BY=str(self._file))
        return self.agent.holder()

    def closed_gates(self) -> dict[str, Any]:
        return {name: gate for name, gate in self.agent.readiness()["gates"].items() if gate}


@pytest.fixture
def jumping(tmp_path: Path) -> Iterator[Jumping]:
    with fabric_in(tmp_path) as fabric, agent_in(fabric, tmp_path) as agent:
        yield Jumping(agent, tmp_path)


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
