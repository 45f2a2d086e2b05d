"""The agent's book: what it still knows after a restart, and what it may throw away."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grafos_core.gate import Gate
from grafos_core.lease import EndCause, Kind, LeaseId, Policy
from grafos_core.node_effects import BoundFacts, Instant, ReceiptFacts
from grafos_core.receipt import Assurance, Outcome
from services.nodeagent.book import Book, Event
from services.nodeagent.store import Store, format_store

INCARNATION = "ab" * 16
SEGMENT_BYTES, BATCH_BYTES = 16_384, 4_096
NOW = Instant(1_000, 2_000)
KINDS = (Kind.MEM, Kind.BLOCK)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[], Book]:
    """Opens the book; called again, as the next boot would."""
    format_store(tmp_path, INCARNATION, segment_bytes=SEGMENT_BYTES)
    books: list[Book] = []

    def again() -> Book:
        if books:
            books[-1].close()
        store = Store(tmp_path, segment_bytes=SEGMENT_BYTES, batch_bytes_max=BATCH_BYTES)
        books.append(Book(store, "n1"))
        return books[-1]

    return again


def facts(number: int, **changes: Any) -> BoundFacts:
    plain = BoundFacts(
        LeaseId(f"{number:032x}"), Kind.MEM, number, 1, 4096, 0, "spiffe://t/x", "k" * 43, 9_999,
        Policy(reconnect_ms=77),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def receipt(bound: BoundFacts, outcome: Outcome) -> ReceiptFacts:
    return ReceiptFacts(
        bound.lease_id, bound.kind, bound.epoch, bound.amount, bound.extent_offset, outcome,
        EndCause.RELEASE, Assurance.FREED, 1, 2, 3, {"measure_clean": True},
    )  # fmt: skip


def event(kind: str, bound: BoundFacts, body: dict[str, Any]) -> Event:
    return (kind, bound.lease_id, bound.epoch, body)


def ended(bound: BoundFacts, kind: str, outcome: Outcome) -> Event:
    return event(kind, bound, receipt(bound, outcome).body())


def a_life(bound: BoundFacts) -> tuple[Event, Event]:
    return (
        event("agent.bound", bound, bound.body()),
        ended(bound, "agent.teardown_end", Outcome.TORNDOWN),
    )


def append(book: Book, *events: Event) -> None:
    book.append(events, now=NOW, time_floor_ms=0)


def test_an_open_bind_is_known_after_a_restart_with_its_policy(opened: Callable[[], Book]) -> None:
    book, bound = opened(), facts(1)
    append(book, event("agent.bound", bound, bound.body()))
    append(book, event("agent.extended", bound, {"generation": 2, "lease_end_ms": 12_000}))
    later = dataclasses.replace(bound, generation=2, lease_end_ms=12_000)
    recovered = opened().recollection.recovered(KINDS, 0)
    assert recovered.open_binds == (later,)
    assert recovered.epochs[Kind.MEM].refusal(1) == "EPOCH_BURNT"  # type: ignore[call-arg]


def test_an_epoch_that_a_gate_has_used_is_not_in_the_book_before_its_record(
    opened: Callable[[], Book], tmp_path: Path
) -> None:
    """Else the tables of a segment that begins in between say more than the records before it, and
    the next boot takes the book for a broken one."""
    book = opened()
    gate = Gate(
        "n1", INCARNATION, dict.fromkeys(KINDS, 64), book.recollection.recovered(KINDS, 0).epochs
    )
    number = 0
    while not (tmp_path / "surface" / "spool.3").exists():
        number += 1
        bound = facts(number)
        gate.burn(Kind.MEM, number, 0, 1)
        append(book, event("agent.bound", bound, bound.body()))
    assert opened().number > number


def test_a_receipt_is_owed_until_the_ledger_has_credited_it(opened: Callable[[], Book]) -> None:
    book, bound = opened(), facts(1)
    append(book, event("agent.bound", bound, bound.body()))
    append(book, ended(bound, "agent.teardown_end", Outcome.TORNDOWN))
    book = opened()
    recovered = book.recollection.recovered(KINDS, 0)
    assert recovered.receipts == (receipt(bound, Outcome.TORNDOWN),)
    assert recovered.open_binds == ()
    number, record_hash = book.recollection.proofs[bound.lease_id]
    assert (number, len(record_hash)) == (2, 64)
    append(book, event("agent.credited", bound, {"outcome": "torndown"}))
    assert opened().recollection.recovered(KINDS, 0).receipts == ()


def test_a_fence_outlives_its_credit_and_ends_with_its_clear(opened: Callable[[], Book]) -> None:
    book, bound = opened(), facts(1)
    append(book, event("agent.bound", bound, bound.body()))
    body = receipt(bound, Outcome.FENCED).body() | {"cause": "erase: EIO"}
    append(book, event("agent.fenced", bound, body))
    append(book, event("agent.credited", bound, {"outcome": "fenced"}))
    append(book, event("agent.clear_begun", bound, {"nonce": "ef" * 16}))
    book = opened()
    (fence,) = book.recollection.recovered(KINDS, 0).fences
    assert (fence.bound, fence.nonces) == (bound, ("ef" * 16,))
    append(book, ended(bound, "agent.cleared", Outcome.CLEARED))
    recovered = opened().recollection.recovered(KINDS, 0)
    assert (recovered.fences, [each.outcome for each in recovered.receipts]) == (
        (), [Outcome.CLEARED],
    )  # fmt: skip


def test_what_the_collector_has_may_go_but_not_what_recovery_needs(
    opened: Callable[[], Book], tmp_path: Path
) -> None:
    book, kept = opened(), facts(1)
    append(book, event("agent.bound", kept, kept.body()))
    for number in range(2, 150):
        other = facts(number)
        append(book, event("agent.bound", other, other.body()))
        append(book, ended(other, "agent.teardown_end", Outcome.TORNDOWN))
        append(book, event("agent.credited", other, {"outcome": "torndown"}))
    segments = tmp_path / "surface"
    book.acknowledged(book.number)
    assert (segments / "spool.0").exists(), "it holds a bind that is not proved back"
    append(book, ended(kept, "agent.teardown_end", Outcome.TORNDOWN))
    append(book, event("agent.credited", kept, {"outcome": "torndown"}))
    book.acknowledged(book.number)
    assert not (segments / "spool.0").exists()
    recovered = opened().recollection.recovered(KINDS, 0)
    assert (recovered.open_binds, recovered.receipts) == ((), ())


def test_the_collector_is_given_every_record_once_in_order(opened: Callable[[], Book]) -> None:
    book = opened()
    for number in range(1, 60):
        append(book, *a_life(facts(number)))
    book = opened()
    for number in range(60, 120):
        append(book, *a_life(facts(number)))
    seen: list[int] = []
    while batches := book.batches_after(seen[-1] if seen else 0, 7):
        seen += [record.number for batch in batches for record in batch.records]
    assert seen == list(range(1, book.number + 1))


def test_records_that_gathered_share_one_write(opened: Callable[[], Book]) -> None:
    book = opened()
    many = [facts(number) for number in range(1, 6)]
    append(book, *(event("agent.bound", each, each.body()) for each in many))
    (batch,) = book.batches_after(0, 10)
    assert len(batch.records) == 5
