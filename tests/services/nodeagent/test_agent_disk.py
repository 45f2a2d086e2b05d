"""A whole node agent whose own disk is full: nothing new is bound, all that is bound can end.

The disk is a small tmpfs, and the agent's spool is written nearly to the end of its segment before
the agent starts, so that the next segment and its reserve are wanted soon.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from grafos_core.failure import Degraded, Fenced
from grafos_core.lease import EndCause, Kind, OnHolderExit, Policy
from grafos_core.node_effects import Instant
from grafos_core.receipt import Outcome
from grafos_core.surface import BATCH_BYTES_MAX
from services.nodeagent.book import Book
from services.nodeagent.store import SEGMENT_BYTES, Store, format_store
from tests.services.nodeagent.agents import (
    BLOCK_BYTES,
    AgentUnderTest,
    agent_in,
    bound,
    code_of,
    renewed,
)
from tests.services.nodeagent.fabric import HolderSide, eventually, fabric_in, now_ms

DISK_BYTES = 3 * SEGMENT_BYTES + BLOCK_BYTES + (1 << 20) + SEGMENT_BYTES
"""What a new agent takes, and one more segment."""
RECORD_BYTES = 60_000
CYCLES_MAX = 200


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentUnderTest]:
    with fabric_in(tmp_path) as fabric:
        state = tmp_path / "s"
        state.mkdir(mode=0o700)
        options = f"size={DISK_BYTES},mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(state)], check=True)
        try:
            write_a_segment(state)
            with agent_in(fabric, tmp_path) as made:
                yield made
        finally:
            subprocess.run(["umount", "-l", str(state)], check=True)


def write_a_segment(state: Path) -> None:
    format_store(state, secrets.token_hex(16))
    book = Book(Store(state), "n1")
    left_bytes = SEGMENT_BYTES - BATCH_BYTES_MAX
    while left_bytes > 2 * RECORD_BYTES:
        text = "x" * RECORD_BYTES
        book.append([("agent.noted", "", 0, {"text": text})], now=now(), time_floor_ms=0)
        left_bytes -= RECORD_BYTES
    book.close()


def now() -> Instant:
    return Instant(1, now_ms())


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler


def bind_until_refused(agent: AgentUnderTest, holder: HolderSide) -> str:
    for _ in range(CYCLES_MAX):
        try:
            slip = bound(agent, holder)
        except Degraded as refused:
            return refused.code
        holder.release(slip)
    return ""


@pytest.mark.root
@pytest.mark.requires("mount", "umount")
def test_a9_a_full_disk_refuses_new_binds_and_nothing_else_until_there_is_room(
    agent: AgentUnderTest,
) -> None:
    agent.start(fault="block.write:EIO:5")  # beyond what the self-test writes
    alice = agent.holder()
    kept = [bound(agent, alice) for _ in range(2)]
    breaks = bound(agent, alice, kind=Kind.BLOCK, amount=4)
    lasting = bound(agent, alice, policy=Policy(on_holder_exit=OnHolderExit.KEEP))
    filler = fill(agent.state)
    assert bind_until_refused(agent, alice) == "SPOOL_FULL"
    gates = agent.readiness()["gates"]
    assert any("persistence" in str(gate) for gate in gates)

    alice.write(kept[0], 0, b"mine")
    later, text = renewed(agent, kept[0], ttl_ms=50_000)
    assert alice.extend(text).generation == 2
    assert alice.read(later, 0, 4).data == b"mine"
    for slip in (later, kept[1]):
        assert alice.release(slip).credited
        assert agent.fabric.ledger.receipt_of(slip.lease_id).outcome is Outcome.TORNDOWN
    for _ in range(4):
        alice.write(breaks, 0, bytes(4096))
    assert code_of(Fenced, alice.write, breaks, 0, bytes(4096)) == "IO"
    assert agent.fabric.ledger.receipt_of(breaks.lease_id).outcome is Outcome.FENCED

    agent.kill()
    agent.start(ready=False)
    receipt = agent.fabric.ledger.receipt_of(lasting.lease_id)
    assert (receipt.outcome, receipt.cause) == (Outcome.TORNDOWN, EndCause.AGENT_LOST)
    assert agent.leases()[breaks.lease_id].stage == "fenced"
    back = agent.holder(alice.credentials)
    eventually(lambda: bind_until_refused(agent, back) == "SPOOL_FULL")

    filler.unlink()
    eventually(agent.is_ready)
    back.release(bound(agent, back))
