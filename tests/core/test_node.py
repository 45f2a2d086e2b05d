"""The node agent's core against its golden scripts, and against everything at once, at random.

Everything at once is node_world.py: long walks by seed, and short ones that Hypothesis shrinks.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from grafos_core.failure import InvariantViolation
from grafos_core.node import Limits, NodeCore
from grafos_core.node_effects import BoundFacts, FenceFacts, Instant, ReceiptFacts, Recovered
from tests.core.node_script import INCARNATION, NODE, WALL_MS, Script, token
from tests.core.node_world import ACTIONS, CAPACITIES, World, walk
from tests.golden import run_golden, scripts

HERE = Path(__file__).resolve().parent
WALKS, STEPS = 40, 150


@pytest.mark.parametrize("path", scripts(HERE, "node"), ids=lambda path: path.stem)
def test_the_node_answers_as_written_down(path: Path) -> None:
    run_golden(path, Script())


def test_time_that_goes_back_halts_the_node() -> None:
    script = Script()
    script("node\nat 10\ntick\nat 9")
    with pytest.raises(InvariantViolation):
        script("tick")


def test_facts_survive_their_record() -> None:
    facts = BoundFacts.of_token(token("a", {"exit": "keep", "stop": "5"}, Instant(0, WALL_MS)))
    assert BoundFacts.of_body(facts.lease_id, facts.epoch, facts.body()) == facts
    receipt = FenceFacts.of_cause(facts, "erase: EIO").receipt
    assert ReceiptFacts.of_body(facts.lease_id, facts.epoch, receipt.body()) == receipt


def test_the_memory_of_ended_leases_is_bounded() -> None:
    script = Script()
    now = Instant(0, WALL_MS)
    script.core = NodeCore(
        NODE, INCARNATION, CAPACITIES, Recovered(), now, Limits(leases_max=2, ended_max=2)
    )
    script.core.start(now)
    script._ready()
    for number, name in enumerate("abcdef", start=1):
        script(f"up {name} epoch={number}\nrelease {name} epoch={number}\nended {name}")
        script(f"credited {name} torndown epoch={number}")
    assert script("release a") == "Answer Denied NOT_FOUND"
    assert script("release f epoch=6") == "Answer released, credited True"


@pytest.mark.parametrize("seed", range(WALKS))
def test_the_laws_hold_on_a_long_walk_and_nothing_is_stuck_after_it(seed: int) -> None:
    walk(seed, STEPS)


class NodeMachine(RuleBasedStateMachine):
    """The same world, in the hands of Hypothesis, which finds short ways to break it."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(name=st.sampled_from(ACTIONS), dice=st.randoms(use_true_random=False))
    def act(self, name: str, dice: random.Random) -> None:
        self.world.act(name, dice)


NodeMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40)
TestTheLawsHoldWhateverHappens = NodeMachine.TestCase
