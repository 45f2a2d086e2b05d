"""Each law check is shown to fail on data that was made wrong on purpose, and on no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from grafos_core.chain import Chain, Record
from tests.chaos.laws import (
    Book,
    MemorySeen,
    Scene,
    Slice,
    Told,
    conserved,
    durable_first,
    every_law,
    exclusive,
    free_is_free,
    history_exclusive,
    linked,
    memories_are_gone,
    memories_belong,
    node_history_exclusive,
    proved_back,
    rising,
    same_chain,
)

INCARNATION = "1" * 32
ONE, TWO = "a" * 32, "b" * 32
Event = tuple[str, str, int, dict[str, Any]]
TOTALS = {("n1", "block"): 16, ("n1", "mem"): 8192}


def written(origin: str, *events: Event) -> list[Record]:
    chain = Chain(origin, INCARNATION, 1)
    return [
        chain.append(kind, wall_ms=n, boottime_ns=n, lease_id=lease_id, epoch=epoch, body=body)
        for n, (kind, lease_id, epoch, body) in enumerate(events, 1)
    ]


def registered() -> Event:
    return "node.registered", "", 0, {"node_id": "n1", "totals": {"block": 16, "mem": 8192}}


def granted(
    lease_id: str, epoch: int, *, offset: int = 0, amount: int = 8, kind: str = "block"
) -> Event:
    body = {
        "node_id": "n1", "incarnation": INCARNATION, "kind": kind, "amount": amount,
        "extent_offset": offset, "generation": 1,
    }  # fmt: skip
    return "lease.granted", lease_id, epoch, body


def bound(lease_id: str, epoch: int, *, offset: int = 0) -> Event:
    body = {"kind": "block", "amount": 8, "extent_offset": offset, "generation": 1}
    return "agent.bound", lease_id, epoch, body


def released(proof: Record) -> Event:
    body = {"record_number": proof.number, "record_hash": proof.hash.hex()}
    return "lease.released", proof.lease_id, proof.epoch, body


def honest() -> Scene:
    """One lease that came and went, one that lives beside where it was."""
    node = written("n1", bound(ONE, 1), ("agent.teardown_end", ONE, 1, {}), bound(TWO, 2, offset=4))
    ledger = written(
        "ledger", registered(), granted(ONE, 1), released(node[1]), granted(TWO, 2, offset=4)
    )
    held = [Slice(TWO, "n1", "block", 8, 4)]
    return Scene(
        books=[
            Book("n1", "block", 16, free=8, leased=8, ending=0, fenced=0, withheld=0),
            Book("n1", "mem", 8192, free=8192, leased=0, ending=0, fenced=0, withheld=0),
        ],
        ledger_held=held,
        node_held=held,
        memories=[],
        ledger_chain=ledger,
        node_chains={"n1": node},
        told=[Told("acquire", ONE, "n1", 1), Told("release", ONE, "n1", 1, credited=True)],
        collected={"ledger": ledger, "n1": node},
    )


def test_an_honest_scene_breaks_no_law() -> None:
    assert every_law(honest()) == []


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ({"ledger_held": [Slice(ONE, "n1", "block", 8), Slice(TWO, "n1", "block", 8, 7)]}, 1),
        ({"node_held": [Slice(TWO, "n1", "block", 8, 12)]}, 1),
        ({"memories": [MemorySeen(1, INCARNATION, ONE, 4096)]}, 1),
        ({"books": [Book("n1", "block", 16, 9, 8, 0, 0, 0)]}, 2),
        ({"books": [Book("n1", "block", 16, 16, 0, 0, 0, 0)]}, 3),
        ({"node_chains": {"n1": []}, "told": []}, 3),
        ({"told": [Told("acquire", "c" * 32, "n1", 3)]}, 6),
        ({"ledger_chain": [], "told": []}, 9),
        ({"collected": {}}, 9),
    ],
)
def test_one_wrong_thing_in_a_scene_is_found_under_its_law(
    change: dict[str, Any], law: int
) -> None:
    found = every_law(replace(honest(), **change))
    assert any(each.startswith(f"law {law}") for each in found), found


def test_memory_is_an_amount_and_may_not_exceed_the_whole() -> None:
    two_halves = [Slice(ONE, "n1", "mem", 4096), Slice(TWO, "n1", "mem", 4096)]
    assert exclusive("x", two_halves, TOTALS) == []
    assert exclusive("x", [*two_halves, Slice("c" * 32, "n1", "mem", 4096)], TOTALS)


def test_a_memory_that_was_cut_to_nothing_may_stay_open() -> None:
    assert memories_belong([MemorySeen(1, INCARNATION, ONE, 0)], []) == []
    assert memories_are_gone([MemorySeen(1, INCARNATION, ONE, 0)], {ONE}) == []


def test_bytes_of_a_lease_that_was_given_back_are_found() -> None:
    seen = [MemorySeen(1, INCARNATION, ONE, 4096)]
    assert memories_are_gone(seen, {TWO}) == []
    assert memories_are_gone(seen, {ONE})


def test_a_block_granted_before_it_came_back_is_found_in_the_history() -> None:
    good = [registered(), granted(ONE, 1), granted(TWO, 2, offset=8)]
    assert history_exclusive(written("ledger", *good)) == []
    bad = [registered(), granted(ONE, 1), granted(TWO, 2, offset=7)]
    assert "record 3" in history_exclusive(written("ledger", *bad))[0]


def test_a_node_that_binds_before_its_teardown_is_sealed_is_found() -> None:
    torn_down: Event = ("agent.teardown_end", ONE, 1, {})
    good = written("n1", bound(ONE, 1), torn_down, bound(TWO, 2))
    assert node_history_exclusive("n1", good, TOTALS) == []
    bad = written("n1", bound(ONE, 1), bound(TWO, 2), torn_down)
    assert "record 2" in node_history_exclusive("n1", bad, TOTALS)[0]


def test_a_fenced_slice_stays_taken_in_the_history() -> None:
    fenced: Event = ("agent.fenced", ONE, 1, {})
    assert node_history_exclusive("n1", written("n1", bound(ONE, 1), fenced, bound(TWO, 2)), TOTALS)
    cleared: Event = ("agent.cleared", ONE, 1, {})
    good = written("n1", bound(ONE, 1), fenced, cleared, bound(TWO, 2))
    assert node_history_exclusive("n1", good, TOTALS) == []


def test_a_negative_part_is_found_though_the_sum_is_right() -> None:
    assert conserved([Book("n1", "mem", 10, free=-2, leased=12, ending=0, fenced=0, withheld=0)])


def test_less_free_than_the_node_has_is_no_violation() -> None:
    book = Book("n1", "block", 16, free=0, leased=16, ending=0, fenced=0, withheld=0)
    assert free_is_free([book], [Slice(ONE, "n1", "block", 8)]) == []


@pytest.mark.parametrize("what", ["another epoch", "another hash", "a record that proves nothing"])
def test_a_credit_needs_the_very_record_that_proves_it(what: str) -> None:
    node = written("n1", bound(ONE, 1), ("agent.teardown_end", ONE, 1, {}))
    kind, lease_id, epoch, body = released(node[1])
    if what == "another epoch":
        epoch += 1
    elif what == "another hash":
        body["record_hash"] = "0" * 64
    else:
        kind, lease_id, epoch, body = released(node[0])
    ledger = written("ledger", (kind, lease_id, epoch, body))
    assert proved_back(written("ledger", released(node[1])), {"n1": node}) == []
    assert proved_back(ledger, {"n1": node})


def _told_of(verb: str) -> tuple[Told, list[Record], list[Record]]:
    """What was told, and the two chains that it must be found in."""
    node_kinds = {"acquire": "agent.bound", "attach": "agent.attached", "renew": "agent.extended"}
    ledger_kinds = {
        "acquire": "lease.granted", "attach": "lease.attached", "renew": "lease.renewed",
        "release": "lease.released",
    }  # fmt: skip
    ledger = written("ledger", (ledger_kinds[verb], ONE, 1, {"generation": 2}))
    node = written("n1", (node_kinds.get(verb, "agent.teardown_end"), ONE, 1, {"generation": 2}))
    hash_ = node[0].hash.hex()
    return Told(verb, ONE, "n1", 1, 2, True, 1, hash_), ledger, node


@pytest.mark.parametrize("verb", ["acquire", "attach", "renew", "release"])
def test_what_was_told_must_be_in_both_chains(verb: str) -> None:
    told, ledger, node = _told_of(verb)
    assert durable_first([told], ledger, {"n1": node}) == []
    assert durable_first([told], [], {"n1": node})
    assert durable_first([told], ledger, {"n1": []})
    assert durable_first([replace(told, epoch=2, record_number=2)], ledger, {"n1": node})


def test_a_renewal_of_another_generation_is_not_the_one_that_was_told() -> None:
    told, ledger, node = _told_of("renew")
    assert durable_first([replace(told, generation=3)], ledger, {"n1": node})


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_that_does_not_rise_is_found(epoch: int) -> None:
    assert rising(written("ledger", granted(ONE, 2), granted(TWO, epoch)))


def test_kinds_have_epochs_of_their_own() -> None:
    assert rising(written("ledger", granted(ONE, 2), granted(TWO, 1, kind="mem"))) == []


@pytest.mark.parametrize("what", ["gap", "fork", "order", "beginning"])
def test_a_chain_with_a_gap_or_a_fork_is_found(what: str) -> None:
    records = written("ledger", *[granted(ONE, n) for n in range(1, 5)])
    other = written("ledger", *[granted(TWO, n) for n in range(1, 5)])
    bad: Sequence[Record] = {
        "gap": [*records[:1], *records[2:]],
        "fork": [*records[:2], *other[2:]],
        "order": [records[1], records[0], *records[2:]],
        "beginning": records[1:],
    }[what]
    assert linked("ledger", records) == []
    assert linked("ledger", bad)


def test_a_collector_with_another_or_a_shorter_chain_is_found() -> None:
    records = written("ledger", granted(ONE, 1), granted(TWO, 2))
    assert same_chain("ledger", records, records, 2) == []
    assert same_chain("ledger", records, records[:1], 1) == []
    assert same_chain("ledger", records, records[:1], 2)
    assert same_chain("ledger", records[:1], records, 1)
    assert same_chain("ledger", records, written("ledger", granted(ONE, 1), granted(ONE, 2)), 2)
