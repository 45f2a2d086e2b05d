"""The lease protocol is safe in every reachable state, and unsafe without each of its defences."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.model import __main__ as program
from tests.model.clock_model import ClockModel, Timing
from tests.model.key_model import KeyCare, KeyModel
from tests.model.lease_model import LAW_3, SLOT, Defences, LeaseModel
from tests.model.revoke_model import Grace, RevokeModel
from tests.model.search import Action, Step, World, follow, search
from tests.model.variants import VARIANTS, Run, Variant, counterexamples, plain, run

TO_CREDIT: tuple[Action, ...] = (
    ("grant", (1,)),
    ("mint", (1,)),
    ("bind", (1,)),
    ("guard", (1,)),
    ("hand_over", (1,)),
    ("operate", (1,)),
    ("bound", (1,)),
    ("operation_lands", (1,)),
    ("mark_dead", (1,)),
    ("quiesce", (1,)),
    ("erase", (1,)),
    ("measure", (1,)),
    ("seal", (1,)),
    ("expire", (1,)),
    ("credit", (1, 1)),
)

LEDGER = ["grant", "mint", "bound", "burn", "expire", "unconfirmed", "credit", "fence_recorded"]
BINDING = ["bind", "guard", "hand_over", "bind_fails", "burnt", "operate", "operation_lands"]
TEARDOWN = [
    "mark_dead",
    "quiesce",
    "erase",
    "erase_leaves_bytes",
    "measure",
    "measure_fails",
    "seal",
]
FAULTS = ["fence", "clear", "agent_crash", "agent_start", "warden_takes_back"]
LEASE_VERBS = {*LEDGER, *BINDING, *TEARDOWN, *FAULTS}
CLOCK_VERBS = {
    *["tick", "grant", "renew", "credit", "bind", "extend", "extend_answer_lost", "operate"],
    *["expire", "release", "seal", "burnt", "agent_crash"],
}
REVOKE_VERBS = {
    *["order", "hear", "report", "tick", "operate", "operation_lands", "renew"],
    *["checkpoint_done", "grace_over", "deadline", "quiesce", "measure"],
}
KEY_VERBS = {
    *["begin", "finish", "change_key", "grant", "renew", "mint", "ask_again", "hear", "forge"],
}


@functools.cache
def done(variant: Variant) -> Run:
    """Each world is searched once, however many tests look at what was found."""
    return run(variant)


def marked(variant: Variant) -> Any:
    marks = [pytest.mark.slow] if variant.heavy else []
    return pytest.param(variant, id=variant.label, marks=marks)


@pytest.mark.parametrize("variant", [marked(variant) for variant in VARIANTS])
def test_each_variant_has_its_verdict(variant: Variant) -> None:
    verdict = done(variant).verdict
    assert verdict.broken == variant.breaks, verdict.trace


def test_every_defence_is_taken_away_in_some_variant() -> None:
    """A defence that no variant removes has never been shown to be needed."""
    kinds = (Defences, Timing, Grace, KeyCare)
    unproved = {name for kind in kinds for name in kind.__dataclass_fields__}
    unproved.discard("last_tick")
    for variant in VARIANTS:
        has = variant.world._has  # type: ignore[attr-defined]
        usual = type(has)()
        fields = type(has).__dataclass_fields__
        unproved -= {name for name in fields if getattr(has, name) != getattr(usual, name)}
    assert unproved == set()


@pytest.mark.parametrize(
    ("label", "verbs"),
    [
        ("slot: all defences", LEASE_VERBS),
        ("amount: all defences, two leases at once", LEASE_VERBS - {"operation_lands"}),
        ("clock: all defences, renewals", CLOCK_VERBS),
        ("revocation: all defences", REVOKE_VERBS),
        ("key: all defences", KEY_VERBS),
    ],
)
def test_nothing_is_safe_only_because_it_never_happens(label: str, verbs: set[str]) -> None:
    verdict = done(next(variant for variant in VARIANTS if variant.label == label)).verdict
    assert verdict.safe
    assert verdict.verbs == verbs


def test_a_whole_life_ends_with_its_capacity_back() -> None:
    world = LeaseModel(SLOT, Defences())
    end, broken = follow(world, world.first_states()[0], TO_CREDIT)
    assert broken == ""
    assert ("grant", (2,)) in {action for action, _, _ in world.steps(end)}


def test_a_log_that_credits_before_the_seal_is_refused() -> None:
    world = LeaseModel(SLOT, Defences())
    hasty = tuple(action for action in TO_CREDIT if action[0] != "seal")
    with pytest.raises(ValueError, match="credit"):
        follow(world, world.first_states()[0], hasty)


@pytest.mark.parametrize(
    "world",
    [
        LeaseModel(SLOT, Defences()),
        ClockModel(Timing(last_tick=5)),
        RevokeModel(Grace()),
        KeyModel(KeyCare()),
    ],
)
def test_an_action_leads_to_one_state_so_a_log_tells_where_it_is(world: World[Any]) -> None:
    seen = set(world.first_states())
    waiting = list(seen)
    while waiting:
        state = waiting.pop()
        actions = [action for action, _, _ in world.steps(state)]
        assert len(actions) == len(set(actions))
        new = {after for _, after, _ in world.steps(state)} - seen
        seen |= new
        waiting.extend(new)


LIGHT_AND_BROKEN = [marked(v) for v in VARIANTS if v.breaks and not v.heavy]


@pytest.mark.parametrize("variant", LIGHT_AND_BROKEN)
def test_a_counterexample_replays_and_breaks_its_law_at_its_last_step(variant: Variant) -> None:
    verdict = done(variant).verdict
    *before, last = verdict.trace
    start = verdict.start
    assert follow(variant.world, start, before, variant.ignored)[1] == ""
    assert follow(variant.world, start, [*before, last], variant.ignored)[1] == variant.breaks


def test_counterexamples_are_plain_enough_for_json() -> None:
    chosen = [v for v in VARIANTS if v.label in ("slot: all defences", "slot: clear without proof")]
    (example,) = counterexamples(chosen)
    back = json.loads(json.dumps(plain(example)))
    assert back["broken"] == LAW_3
    assert [(verb, tuple(args)) for verb, args in back["actions"]] == list(example.actions)
    assert ("clear", (1,)) in example.actions
    assert back["start"]["up"] is True


class Corridor:
    """Rooms 0 to 9, one step or three at a time; room 7 is forbidden, and so is leaving room 5."""

    def first_states(self) -> list[int]:
        return [0]

    def steps(self, state: int) -> Iterator[Step[int]]:
        law = "never leave room 5" if state == 5 else ""
        for length in (1, 3):
            if state + length < 10:
                yield ("walk", (length,)), state + length, law

    def broken_laws(self, state: int) -> Iterator[str]:
        if state == 7:
            yield "room 7"


def test_the_search_reports_a_shortest_way() -> None:
    assert search(Corridor(), frozenset({"never leave room 5"})).trace == (
        ("walk", (1,)),
        ("walk", (3,)),
        ("walk", (3,)),
    )


def test_a_deed_can_break_a_law_as_well_as_a_room() -> None:
    verdict = search(Corridor(), frozenset({"room 7"}))
    assert verdict.broken == "never leave room 5"
    assert sum(length for _, (length,) in verdict.trace[:-1]) == 5


def test_a_search_without_a_broken_law_has_seen_every_room() -> None:
    verdict = search(Corridor(), frozenset({"room 7", "never leave room 5"}))
    assert verdict.safe
    assert verdict.states_count == 10
    assert verdict.trace == ()


def test_the_exit_status_counts_the_wrong_verdicts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = LeaseModel(SLOT, Defences(clear_proves=False))
    right, wrong = Variant("right", world, LAW_3), Variant("wrong", world, "")
    monkeypatch.setattr(program, "VARIANTS", (right, wrong, wrong))
    assert program.main(["-v"]) == 2
    assert "EXPECTED safe" in capsys.readouterr().out
