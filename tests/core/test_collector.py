"""The collector: catalogue rows U1 to U9, and that nothing is known before it is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from grafos_core import chain, codec, collector
from grafos_core.chain import GENESIS, Chain, Record, Seal
from grafos_core.collector import Accepted, Collector, Position
from grafos_core.failure import FabricError, InvariantViolation

INCARNATION = "4f" * 16
OLD = "50" * 16


def seal(record: Record, key_id: str = "k1", incarnation: str = INCARNATION) -> Seal:
    message = chain.seal_bytes(incarnation, record.number, record.hash)
    return Seal(record.number, record.hash, key_id, sign(key_id, message))


def sign(key_id: str, message: bytes) -> bytes:
    return hashlib.sha256(key_id.encode() + message).digest()


def verify(key_id: str, message: bytes, signature: bytes) -> bool:
    return sign(key_id, message) == signature


class Desk:
    """A collector with its store, and a writer whose records come to it."""

    def __init__(self) -> None:
        self.store: dict[tuple[str, str, int], bytes] = {}
        self.collector = self.opened()
        self.collector.admit("node-1", INCARNATION, "k1")
        self.writer = Chain("node-1", INCARNATION, 1)

    def opened(self) -> Collector:
        own = Chain("audit", "aa" * 16, 1)
        return Collector(own, lambda *name: self.store.get(name))

    def written(self, count: int, **body: Any) -> list[Record]:
        return [
            self.writer.append("agent.clock", wall_ms=1, boottime_ns=1, body=body)
            for _ in range(count)
        ]

    def offer(self, records: Sequence[Record], seals: Sequence[Seal] | None = None) -> Accepted:
        return self.collector.offer(
            "node-1",
            INCARNATION,
            [record.data for record in records],
            [seal(records[-1])] if seals is None else seals,
            verify,
        )

    def keep(self, accepted: Accepted) -> None:
        for record in accepted.records:
            self.store[(record.origin, record.incarnation, record.number)] = record.data
        self.collector.stored(accepted)

    def take(self, records: Sequence[Record]) -> Accepted:
        accepted = self.offer(records)
        self.keep(accepted)
        return accepted

    def position(self) -> Position:
        return self.collector.position("node-1", INCARNATION)

    def refusal(
        self, records: Sequence[Record], seals: Sequence[Seal] | None = None
    ) -> FabricError:
        """The refusal of an offer; it changes nothing that is known."""
        before = self.position()
        with pytest.raises(FabricError) as refused:
            self.offer(records, seals)
        assert self.position() == before
        return refused.value


def rewritten(record: Record, **changes: Any) -> Record:
    value: Any = codec.decode(record.data)
    return chain.parse(codec.encode(value | {int(key[1:]): to for key, to in changes.items()}))


def test_what_is_offered_is_known_only_when_it_is_stored() -> None:
    desk = Desk()
    records = desk.written(3)
    accepted = desk.offer(records)
    assert accepted.records == tuple(records)
    assert accepted.seals == (seal(records[-1]),)
    assert desk.position() == Position(0, GENESIS)
    desk.keep(accepted)
    assert desk.position() == Position(3, records[2].hash)
    assert (accepted.number, accepted.head) == (3, records[2].hash)


def test_records_that_are_known_already_change_nothing() -> None:
    desk = Desk()
    records = desk.written(4)
    desk.take(records[:2])
    again = desk.take(records[:2])
    assert (again.number, again.records, again.seals) == (2, (), ())
    overlapping = desk.offer(records, [seal(records[1]), seal(records[3])])
    assert overlapping.records == tuple(records[2:])
    assert overlapping.seals == (seal(records[3]),)
    desk.keep(overlapping)
    assert desk.position().number == 4


def test_the_same_batch_is_not_stored_twice() -> None:
    desk = Desk()
    accepted = desk.offer(desk.written(2))
    desk.keep(accepted)
    with pytest.raises(InvariantViolation):
        desk.keep(accepted)


def test_catalogue_u1_a_gap_names_what_is_expected() -> None:
    desk = Desk()
    records = desk.written(6)
    desk.take(records[:2])
    for missing in (records[3:], [records[2], records[4]], [records[5]]):
        refused = desk.refusal(missing)
        assert refused.code == "GAP"
        if missing[0] is not records[2]:
            assert refused.details == {
                "expected_number": "3",
                "expected_head": records[1].hash.hex(),
            }
    assert desk.take(records[2:]).number == 6


def test_catalogue_u3_a_fork_keeps_both_and_quarantines_that_chain_alone() -> None:
    desk, other = Desk(), Desk()
    desk.collector.admit("node-2", INCARNATION, "k1")
    records = desk.written(3)
    desk.take(records)
    other.written(1)
    forged = other.written(2, other="story")
    refused = desk.refusal(forged)
    assert (refused.code, refused.status) == ("FORK", "DATA_LOSS")
    [fork] = desk.collector.forks()
    assert (fork.number, fork.known, fork.offered) == (2, records[1].data, forged[0].data)
    assert fork.seal == seal(forged[-1])
    assert desk.collector.quarantine("node-1", INCARNATION) == "FORK"
    assert desk.refusal(desk.written(1)).code == "FORK"
    assert desk.refusal(records).code == "FORK"
    assert desk.collector.quarantine("node-2", INCARNATION) == ""


def test_without_the_key_nobody_can_have_a_chain_quarantined() -> None:
    desk, other = Desk(), Desk()
    desk.take(desk.written(2))
    forged = other.written(2, other="story")
    assert desk.refusal(forged, [seal(forged[-1], "k2")]).code == "SEAL_KEY"
    assert desk.collector.forks() == []
    assert desk.take(desk.written(1)).number == 3


def test_catalogue_u4_what_does_not_link_is_refused() -> None:
    desk = Desk()
    records = desk.written(4)
    desk.take(records[:2])
    wrong_link = rewritten(records[2], _7=b"x" * 32)
    assert desk.refusal([wrong_link]).code == "CHAIN"
    assert desk.refusal([records[2], wrong_link]).code == "CHAIN"
    assert desk.refusal([rewritten(records[2], _4=0)], [seal(records[2])]).code == "CHAIN"
    assert desk.refusal([rewritten(records[2], _4=2**63)], [seal(records[2])]).code == "CHAIN"
    assert desk.refusal([rewritten(records[2], _4=2**64 - 1)], [seal(records[2])]).code == "CHAIN"
    assert desk.refusal([rewritten(records[0], _7=b"x" * 32)]).code == "CHAIN"
    assert desk.refusal([rewritten(records[2], _7=GENESIS)]).code == "CHAIN"
    assert desk.refusal([rewritten(records[2], _1="node-2")]).code == "CHAIN"
    assert desk.refusal([rewritten(records[2], _3=0)]).code == "CHAIN"
    hash_mismatch = Seal(3, records[3].hash, "k1", seal(records[3]).signature)
    assert desk.refusal([records[2]], [hash_mismatch]).code == "CHAIN"
    assert desk.refusal([records[2]], [seal(records[2])] * 2).code == "CHAIN"
    assert desk.refusal(records[2:], [seal(records[1]), seal(records[3])]).code == "CHAIN"
    assert desk.take(records[2:]).number == 4


def test_catalogue_u5_a_seal_by_another_key_is_refused() -> None:
    desk = Desk()
    desk.collector.admit("node-2", INCARNATION, "k9")
    records = desk.written(3)
    good = seal(records[-1])
    bad = [
        Seal(3, good.hash, "k1", b"x" * 32),
        seal(records[-1], "unknown"),
        seal(records[-1], "k9"),
        seal(records[-1], incarnation=OLD),
    ]
    for wrong in bad:
        refused = desk.refusal(records, [wrong])
        assert (refused.code, refused.status) == ("SEAL_KEY", "PERMISSION_DENIED")
    assert desk.refusal(records, []).code == "SEAL_KEY"
    assert desk.refusal(records, [seal(records[0])]).code == "SEAL_KEY"


def test_catalogue_u5_a_retired_key_seals_nothing_later() -> None:
    desk = Desk()
    records = desk.written(4)
    desk.take(records[:1])
    desk.collector.admit("node-1", INCARNATION, "k2")
    desk.collector.retire("node-1", INCARNATION, "k1", last_number=2)
    assert desk.refusal(records[1:3], [seal(records[2], "k1")]).code == "SEAL_KEY"
    late = desk.offer(records[1:2], [seal(records[1], "k1")])
    desk.keep(late)
    desk.keep(desk.offer(records[2:], [seal(records[3], "k2")]))
    with pytest.raises(InvariantViolation):
        desk.collector.retire("node-1", INCARNATION, "k7", last_number=1)


def test_catalogue_u5_an_old_incarnation_grows_no_more() -> None:
    desk = Desk()
    desk.take(desk.written(2))
    desk.collector.admit("node-1", OLD, "k1")
    assert desk.refusal(desk.written(1)).code == "SEAL_KEY"
    with pytest.raises(FabricError) as refused:
        desk.collector.announce("node-9", INCARNATION, 0, GENESIS)
    assert refused.value.code == "SEAL_KEY"
    assert desk.collector.position("node-9", INCARNATION) == Position(0, GENESIS)


def test_catalogue_u6_records_in_another_encoding_are_refused() -> None:
    desk = Desk()
    [record] = desk.written(1)
    for bad in (b"", b"\x9f\xff", record.data + b"\0", record.data[:-1], b"\xa0"):
        with pytest.raises(FabricError) as refused:
            desk.collector.offer("node-1", INCARNATION, [bad], [seal(record)], verify)
        assert refused.value.code == "ENCODING"


def test_catalogue_u8_a_writer_behind_what_it_was_told_was_rolled_back() -> None:
    desk = Desk()
    records = desk.written(3)
    desk.take(records)
    announce = desk.collector.announce
    assert announce("node-1", INCARNATION, 3, records[2].hash) == desk.position()
    assert announce("node-1", INCARNATION, 9, b"x" * 32) == desk.position()
    with pytest.raises(FabricError) as refused:
        announce("node-1", INCARNATION, 2, records[1].hash)
    assert (refused.value.code, refused.value.status) == ("ROLLBACK", "FAILED_PRECONDITION")
    assert refused.value.details["known_number"] == "3"
    assert desk.collector.quarantine("node-1", INCARNATION) == "ROLLBACK"
    assert desk.refusal(desk.written(1)).code == "ROLLBACK"


def test_another_head_at_the_number_acknowledged_is_a_fork() -> None:
    desk = Desk()
    desk.take(desk.written(2))
    with pytest.raises(FabricError) as refused:
        desk.collector.announce("node-1", INCARNATION, 2, b"x" * 32)
    assert refused.value.code == "FORK"


def test_catalogue_u9_what_could_not_be_stored_is_offered_again() -> None:
    desk = Desk()
    records = desk.written(2)
    desk.offer(records)  # the disk was full: `stored` is never called
    assert desk.position().number == 0
    assert desk.take(records).number == 2


def test_offers_are_bounded() -> None:
    desk = Desk()
    records = desk.written(collector.RECORDS_MAX + 1)
    assert desk.refusal(records).code == "RANGE"
    with pytest.raises(FabricError) as refused:
        desk.collector.offer("node-1", INCARNATION, [], [], verify)
    assert refused.value.code == "EMPTY"
    assert desk.take(records[:-1]).number == collector.RECORDS_MAX


def test_a_pruned_record_cannot_be_compared_and_is_refused() -> None:
    desk = Desk()
    records = desk.written(2)
    desk.take(records)
    desk.store.clear()
    assert desk.refusal(records).code == "CHAIN"
    assert desk.take(desk.written(1)).number == 3


def test_the_collector_countersigns_each_head_once_in_a_chain_of_its_own() -> None:
    desk = Desk()
    assert desk.collector.countersign(1, 1) is None
    records = desk.written(2)
    desk.take(records)
    record = desk.collector.countersign(7, 8)
    assert record is not None
    assert record.body == {"heads": [["node-1", bytes.fromhex(INCARNATION), 2, records[1].hash]]}
    assert desk.collector.head == Position(0, GENESIS)
    assert desk.collector.countersign(7, 8) == record  # not stored yet
    desk.collector.countersigned(record)
    assert desk.collector.head == Position(1, record.hash)
    assert desk.collector.countersign(7, 8) is None
    desk.take(desk.written(1))
    second = desk.collector.countersign(9, 9)
    assert second is not None
    assert chain.verify([record.data, second.data]) == (second.hash, 2)


def test_many_heads_take_several_countersigning_records() -> None:
    desk = Desk()
    for i in range(collector.HEADS_MAX + 5):
        origin = f"n{i}"
        desk.collector.admit(origin, INCARNATION, "k1")
        record = Chain(origin, INCARNATION, 1).append("agent.clock", wall_ms=1, boottime_ns=1)
        desk.keep(
            desk.collector.offer(origin, INCARNATION, [record.data], [seal(record)], verify)
        )  # fmt: skip
    counts = []
    while (made := desk.collector.countersign(1, 1)) is not None:
        counts.append(len(made.body["heads"]))
        desk.collector.countersigned(made)
    assert counts == [collector.HEADS_MAX, 5]


def test_a_collector_goes_on_from_its_state() -> None:
    desk, other = Desk(), Desk()
    desk.take(desk.written(2))
    desk.collector.admit("node-2", INCARNATION, "k2")
    desk.collector.retire("node-2", INCARNATION, "k2", last_number=5)
    desk.refusal(other.written(1, other="story"))
    state = desk.collector.state()
    read_back: Any = codec.decode(codec.encode(state))
    again = desk.opened()
    again.restore(read_back)
    assert again.state() == state
    assert again.forks() == desk.collector.forks()
    assert again.quarantine("node-1", INCARNATION) == "FORK"
    assert again.position("node-1", INCARNATION) == desk.position()
    with pytest.raises(InvariantViolation):
        again.restore(read_back)


def test_a_store_that_does_not_hold_what_is_known_is_refused() -> None:
    desk = Desk()
    records = desk.written(2)
    desk.take(records)
    state = desk.collector.state()
    desk.store[("node-1", INCARNATION, 2)] = records[0].data
    with pytest.raises(FabricError) as refused:
        desk.opened().restore(state)
    assert refused.value.code == "STORAGE"


class AnyOrder(RuleBasedStateMachine):
    """Offers of any part of a chain, repeated, reordered, stored or not, over restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.records: list[Record] = []
        self.known = 0

    @rule(count=st.integers(1, 4))
    def write(self, count: int) -> None:
        self.records += self.desk.written(count)

    @rule(first=st.integers(0, 12), count=st.integers(1, 6), is_stored=st.booleans())
    def offer(self, first: int, count: int, is_stored: bool) -> None:
        part = self.records[first : first + count]
        if not part:
            return
        try:
            accepted = self.desk.offer(part)
        except FabricError as refused:
            assert refused.code == "GAP"
            assert first > self.known
            return
        assert first <= self.known
        if is_stored:
            self.desk.keep(accepted)
            self.known = max(self.known, first + len(part))

    @rule()
    def restart(self) -> None:
        state = self.desk.collector.state()
        self.desk.collector = self.desk.opened()
        self.desk.collector.restore(state)

    @invariant()
    def what_is_known_is_a_prefix_of_what_was_written(self) -> None:
        position = self.desk.position()
        assert position.number == self.known == len(self.desk.store)
        assert position.head == (self.records[self.known - 1].hash if self.known else GENESIS)
        assert not self.desk.collector.forks()


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAnyOrder = AnyOrder.TestCase
