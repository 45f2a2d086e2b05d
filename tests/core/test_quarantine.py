"""The record of a fence: when it is looked at, and what of that is written down."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core.chain import Chain, Record
from grafos_core.codec import encode
from grafos_core.lease import EndCause, Kind, LeaseId
from grafos_core.node_effects import ReceiptFacts
from grafos_core.quarantine import (
    FINDINGS_MAX,
    PROBE_MS_MAX,
    PROBE_MS_MIN,
    UNCHANGED_MS_MAX,
    Finding,
    Quarantine,
)
from grafos_core.receipt import Assurance, Outcome
from grafos_core.recollection import Recollection
from grafos_core.surface_state import SurfaceState

LEASE = LeaseId("ab" * 16)


def look(known: Quarantine, now_ms: int, measured: Any, *, clean: bool = True, asked: bool = False):  # type: ignore[no-untyped-def]
    return known.found(measured, now_ms, at_ms=now_ms, clean=clean, asked=asked)


def test_pauses_double_from_five_seconds_to_five_minutes() -> None:
    known = Quarantine(0)
    pauses = [known.pause_ms() for _ in range(40)]
    assert pauses[:7] == [5_000, 10_000, 20_000, 40_000, 80_000, 160_000, 300_000]
    assert set(pauses[6:]) == {PROBE_MS_MAX}
    known.hasten()
    assert known.pause_ms() == PROBE_MS_MIN


def test_only_what_is_new_is_written_down_and_all_is_counted() -> None:
    known = Quarantine(0)
    assert look(known, 0, {"st_size": 4096}, clean=False) is not None
    assert look(known, 1, {"st_size": 4096}, clean=False) is None
    assert look(known, 2, {"st_size": 8192}, clean=False) is not None
    assert look(known, 3, {"st_size": 8192}, clean=True) is not None
    assert look(known, 4, {"st_size": 8192}, clean=True) is None
    assert look(known, 5, {"st_size": 8192}, clean=True, asked=True) is not None
    assert known.probes == 6
    assert known.latest == known.findings[-1]


def test_once_an_hour_it_is_written_down_though_nothing_changed() -> None:
    known = Quarantine(0)
    written = [now_ms for now_ms in range(0, 24 * 3_600_000, 300_000) if look(known, now_ms, {})]
    assert len(written) == 24
    assert {after - before for before, after in itertools.pairwise(written)} == {UNCHANGED_MS_MAX}


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=40))
def test_the_record_is_bounded_and_in_order(looks: list[tuple[int, bool, bool]]) -> None:
    known = Quarantine(0)
    for now_ms, (size, clean, asked) in enumerate(looks):
        look(known, now_ms, {"size": size}, clean=clean, asked=asked)
        known.check()
    assert len(known.findings) <= FINDINGS_MAX
    assert known.probes == len(looks)


def fenced_records(*findings: Finding) -> list[Record]:
    chain = Chain("n1", "cd" * 16, 1)
    receipt = ReceiptFacts(
        LEASE, Kind.MEM, 1, 4096, 0, Outcome.FENCED, EndCause.RELEASE, Assurance.NONE, 5, 6, 7,
        {"cause": "measure: EIO"},
    )  # fmt: skip
    events: list[tuple[str, dict[str, Any]]] = [("agent.fenced", receipt.body() | {"cause": "io"})]
    events += [("agent.probed", each.body()) for each in findings]
    return [
        chain.append(kind, wall_ms=1, boottime_ns=1, lease_id=LEASE, epoch=1, body=body)
        for kind, body in events
    ]


def recalled(records: list[Record]) -> tuple[Finding, ...]:
    class Batch:
        def __init__(self) -> None:
            self.records = records

    state = SurfaceState()
    for record in records:
        state.fold(record)
    (fence,) = Recollection(state, [Batch()]).recovered([Kind.MEM], 0).fences
    return fence.findings


def test_what_was_found_is_known_after_a_restart_the_last_few_and_the_count() -> None:
    found = [Finding(at, at % 2 == 0, False, {"size": at}, 10 + at) for at in range(6)]
    kept = recalled(fenced_records(*found))
    assert kept == tuple(found[-FINDINGS_MAX:])
    known = Quarantine(0, kept, kept[-1].number)
    assert look(known, 0, {"size": 9}) is not None
    assert known.findings[-1].number == 16


def test_a_finding_of_an_older_version_is_read() -> None:
    body = {"clean": True, "measured": {}, "at_ms": 7}
    assert Finding.of_body(body) == Finding(7, True, True, {}, 0)


@pytest.mark.parametrize("asked", [True, False])
def test_a_finding_can_be_written_as_it_is(asked: bool) -> None:
    body = Finding(1, True, asked, {"a": 1, "b": "x", "c": True}, 3).body()
    assert encode(body)
    assert Finding.of_body(body).body() == body
