"""A whole agent and its warden: nothing is given that the warden does not hold already."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grafos_core.failure import FabricError
from grafos_core.lease import EndCause
from grafos_core.receipt import Outcome
from tests.chaos.onlooker import open_memories
from tests.services.nodeagent.agents import AgentUnderTest, agent_in, bound, code_of, renewed
from tests.services.nodeagent.fabric import HolderSide, eventually, fabric_in


@pytest.fixture
def own(tmp_path: Path) -> Iterator[AgentUnderTest]:
    with fabric_in(tmp_path) as fabric, agent_in(fabric, tmp_path) as agent:
        yield agent


def keepers(lease_id: str) -> set[int]:
    """The processes that have the memory of a lease open."""
    return {each.pid for each in open_memories() if each.lease_id == lease_id and each.size_bytes}


def test_whoever_is_told_of_a_bind_may_be_sure_of_the_warden(own: AgentUnderTest) -> None:
    """And a bind of which the warden does not say that it holds it is no bind."""
    own.start(fault="bind.warden:EIO:2")
    alice = own.holder()
    slip = bound(own, alice)
    assert own.child("warden") in keepers(slip.lease_id)
    unheld = own.fabric.token(alice.credentials, ttl_ms=1_000)
    code_of(FabricError, alice.bind, own.fabric.sign(unheld))
    assert keepers(unheld.lease_id) == set()
    receipt = own.fabric.ledger.receipt_of(unheld.lease_id)
    assert (receipt.cause, receipt.outcome) == (EndCause.EXPIRED, Outcome.TORNDOWN)
    assert alice.read(slip).data == bytes(16)


def test_nothing_is_bound_and_nothing_prolonged_while_no_warden_answers(
    own: AgentUnderTest,
) -> None:
    own.start()
    alice, bob = own.holder(), own.holder()
    slip = bound(own, alice, ttl_ms=20_000)
    fresh = own.fabric.token(bob.credentials)
    dead = own.child("warden")
    os.kill(dead, signal.SIGSTOP)
    asked = [
        Asked(own, fresh.lease_id, lambda: bob.bind(own.fabric.sign(fresh))),
        Asked(own, slip.lease_id, lambda: alice.extend(renewed(own, slip, ttl_ms=60_000)[1])),
    ]
    threading.Event().wait(0.5)
    assert [each.answer for each in asked] == [None, None]
    assert not read_through(bob, fresh), "it is not open either"
    eventually(lambda: all(each.answer is not None for each in asked))
    for each in asked:
        assert each.warden not in (0, dead), "somebody else holds it now"
        assert isinstance(each.answer, FabricError) or each.warden in each.keepers
    remaining_ms = alice.read(slip).remaining_ms
    assert remaining_ms > 20_000 or isinstance(asked[1].answer, FabricError)


class Asked:
    """One call in a thread of its own; who had the lease when it was answered."""

    def __init__(self, agent: AgentUnderTest, lease_id: str, call: Any) -> None:
        self.answer: Any = None
        self.warden = 0
        self.keepers: set[int] = set()
        self._agent, self._lease_id, self._call = agent, lease_id, call
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            answer = self._call()
        except FabricError as refused:
            answer = refused
        self.warden = eventually(lambda: self._agent.child("warden"))
        self.keepers, self.answer = keepers(self._lease_id), answer


def read_through(holder: HolderSide, slip: Any) -> bool:
    try:
        holder.read(slip)
    except FabricError:
        return False
    return True
