"""A receipt against the record that it names: each thing that could be forged, forged."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from grafos_core.chain import Chain, Record
from grafos_core.evidence import judge_record
from grafos_core.failure import FabricError
from grafos_core.lease import EndCause, Kind, LeaseId
from grafos_core.node_effects import ReceiptFacts
from grafos_core.receipt import Assurance, Cleared, Outcome, TeardownReceipt

INCARNATION = "cd" * 16
FACTS = ReceiptFacts(
    LeaseId("ab" * 16), Kind.BLOCK, 7, 16, 32, Outcome.CLEARED, EndCause.CLEARED,
    Assurance.DETACHED, 1_000, 1_005, 4_711, {"measure_clean": True}, Cleared.OPERATOR,
)  # fmt: skip


def record_of(facts: ReceiptFacts, kind: str = "agent.cleared") -> Record:
    chain = Chain("n1", INCARNATION, 2, b"h" * 32, 41)
    body = facts.body() | {"operator": "ann", "reason": "looked"}
    return chain.append(
        kind, wall_ms=1, boottime_ns=1, lease_id=facts.lease_id, epoch=facts.epoch, body=body
    )


RECORD = record_of(FACTS)
GOOD = FACTS.receipt("n1", INCARNATION, 3, RECORD.number, RECORD.hash.hex())


def test_a_receipt_is_proved_by_its_record_in_this_boot_or_a_later_one() -> None:
    judge_record(GOOD, RECORD)
    judge_record(dataclasses.replace(GOOD, boot_epoch=2), RECORD)


CHANGES: dict[str, Any] = {
    "lease_id": "ac" * 16, "node_id": "n2", "incarnation": "ce" * 16, "boot_epoch": 1,
    "kind": Kind.MEM, "epoch": 8, "amount": 17, "extent_offset": 33, "cause": EndCause.RELEASE,
    "outcome": Outcome.TORNDOWN, "assurance": Assurance.FREED, "measured": {"measure_clean": False},
    "begin_ms": 999, "end_ms": 1_006, "duration_us": 4_712, "record_number": 43,
    "record_hash": "00" * 32, "cleared": Cleared.POLICY,
}  # fmt: skip


def test_every_field_of_a_receipt_is_tried() -> None:
    assert set(CHANGES) == {each.name for each in dataclasses.fields(TeardownReceipt)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_receipt_that_says_anything_else_is_refused(name: str) -> None:
    with pytest.raises(FabricError) as refused:
        judge_record(dataclasses.replace(GOOD, **{name: CHANGES[name]}), RECORD)
    assert refused.value.code == "RECEIPT"


def test_a_record_that_proves_nothing_proves_no_receipt() -> None:
    for kind in ("agent.probed", "agent.clear_begun", "lease.released"):
        other = record_of(FACTS, kind)
        receipt = dataclasses.replace(GOOD, record_hash=other.hash.hex())
        with pytest.raises(FabricError) as refused:
            judge_record(receipt, other)
        assert refused.value.detail == "its record proves nothing"
