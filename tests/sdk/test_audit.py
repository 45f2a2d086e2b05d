"""A chain of one's own: linked, sealed, and refused where a byte is wrong."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from grafos import Denied, FabricError, Fenced, Incompatible
from grafos.audit import (
    Anchor,
    AuditEvent,
    AuditEventData,
    AuditEventKind,
    ChainAssembler,
    Collector,
    DurableAnchor,
    Ed25519Signer,
    NullSigner,
    PreemptionReason,
    SealedRecord,
)
from grafos_core import chain
from grafos_core.spiffe import Identity, Role

WHO = Identity("test.local", Role.HOLDER, "acme", "worker")


def event(sequence: int | None = None, **changes: object) -> AuditEvent:
    fields: dict[str, object] = {
        "kind": AuditEventKind.LeasePreempted, "identity": WHO, "sequence": sequence,
        "reason": PreemptionReason.QuotaPressure, "timestamp": 1_700_000_000_000,
    }  # fmt: skip
    return AuditEvent(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def signer() -> Ed25519Signer:
    return Ed25519Signer()


@pytest.fixture
def assembler(signer: Ed25519Signer) -> ChainAssembler:
    return ChainAssembler(None, signer)


@pytest.fixture
def records(assembler: ChainAssembler) -> list[SealedRecord]:
    return [assembler.seal(event()) for _ in range(5)]


class TestWriting:
    def test_each_record_links_to_the_one_before(self, records: list[SealedRecord]) -> None:
        assert records[0].prev_event_hash == chain.GENESIS
        for before, after in pairwise(records):
            assert after.prev_event_hash == before.current_event_hash
        assert [each.sequence for each in records] == [1, 2, 3, 4, 5]

    def test_a_record_says_what_the_event_said(self, assembler: ChainAssembler) -> None:
        record = assembler.seal(event(1))
        assert record.kind is AuditEventKind.LeasePreempted
        assert record.identity == "spiffe://test.local/tenant/acme/holder/worker"
        assert record.reason is PreemptionReason.QuotaPressure
        assert record.timestamp == 1_700_000_000_000
        data = AuditEventData.EdgeRewritten(edge_id=3, edge_record_bytes=b"\x80")
        edge = assembler.seal(
            event(kind=AuditEventKind.EdgeRewritten, event_data=data, reason=None)
        )
        assert (edge.event_data, edge.reason) == (data, None)
        about = AuditEventData.Lease("ab" * 16, 7)
        assert assembler.seal(event(event_data=about)).event_data == about

    def test_it_is_the_fabrics_own_chain(self, records: list[SealedRecord]) -> None:
        head, number = chain.verify(each.record.data for each in records)
        assert (head, number) == (records[-1].current_event_hash, 5)

    @pytest.mark.parametrize("sequence", [0, 1, 3, 99, -1])
    def test_a_sequence_that_is_not_the_next_is_refused_and_nothing_moves(
        self, assembler: ChainAssembler, sequence: int
    ) -> None:
        first = assembler.seal(event(1))
        with pytest.raises(Incompatible) as refused:
            assembler.seal(event(sequence))
        assert refused.value.code == "GAP"
        assert assembler.seal(event(2)).prev_event_hash == first.current_event_hash

    def test_content_that_cannot_be_recorded_is_refused_and_nothing_moves(
        self, assembler: ChainAssembler
    ) -> None:
        data = AuditEventData.EdgeRewritten(1, bytes(70_000))
        with pytest.raises(Incompatible):
            assembler.seal(event(event_data=data))
        assert assembler.seal(event(1)).sequence == 1

    def test_a_chain_goes_on_from_its_anchor(
        self, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        last = records[-1]
        for anchor in (last, Anchor(last.current_event_hash, 5), last.current_event_hash):
            after = ChainAssembler(anchor, signer).seal(event(6))
            assert after.prev_event_hash == last.current_event_hash
        collector = Collector([signer.public_key])
        for each in [*records, after]:
            collector.append(each)

    def test_after_a_bare_hash_the_first_event_says_its_number(
        self, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        with pytest.raises(Fenced, match="states its sequence"):
            ChainAssembler(records[-1].current_event_hash, signer).seal(event())

    def test_threads_write_one_chain(self, signer: Ed25519Signer) -> None:
        assembler = ChainAssembler(None, signer)
        found: list[SealedRecord] = []

        def write() -> None:
            for _ in range(20):
                found.append(assembler.seal(event()))

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        collector = Collector([signer.public_key])
        for each in sorted(found, key=lambda record: record.sequence):
            collector.append(each)
        assert collector.anchor.number == 80


class TestReading:
    def collect(self, signer: Ed25519Signer, records: list[SealedRecord]) -> Collector:
        collector = Collector([signer.public_key])
        for each in records:
            collector.append(each)
        return collector

    def test_a_whole_chain_is_taken(
        self, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        collector = self.collect(signer, records)
        assert collector.records == records
        assert collector.counts_by_kind() == {AuditEventKind.LeasePreempted: 5}
        lines = [json.loads(line) for line in collector.export()]
        assert [line["sequence"] for line in lines] == [1, 2, 3, 4, 5]
        assert lines[1]["prev_event_hash"] == lines[0]["current_event_hash"]

    def test_a_gap_is_refused_and_says_what_is_missing(
        self, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        collector = self.collect(signer, records[:2])
        with pytest.raises(Incompatible) as gap:
            collector.append(records[3])
        assert gap.value.code == "GAP"
        assert gap.value.details["expected_number"] == "3"
        collector.append(records[2])
        assert collector.anchor == Anchor(records[2].current_event_hash, 3)

    def test_the_same_record_twice_is_refused(
        self, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        collector = self.collect(signer, records)
        with pytest.raises(Fenced):
            collector.append(records[4])

    def test_another_record_of_a_number_is_a_fork(
        self, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        collector = self.collect(signer, records)
        other = ChainAssembler(records[1], signer).seal(event(3, timestamp=1))
        with pytest.raises(Fenced) as fork:
            collector.append(other)
        assert fork.value.code == "FORK"

    def test_every_flipped_bit_of_a_record_is_seen(
        self, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        collector = self.collect(signer, records[:2])
        data = records[2].to_bytes()
        for index in range(len(data)):
            for bit in (1, 128):
                flipped = data[:index] + bytes([data[index] ^ bit]) + data[index + 1 :]
                with pytest.raises(FabricError):
                    collector.append(SealedRecord.from_bytes(flipped))
        collector.append(SealedRecord.from_bytes(data))

    def test_a_record_that_lies_about_its_bytes_is_refused(
        self, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        collector = self.collect(signer, records[:2])
        lie = replace(records[2], record=replace(records[2].record, wall_ms=1))
        with pytest.raises(Fenced, match="differ"):
            collector.append(lie)

    @pytest.mark.parametrize("other", [Ed25519Signer(), NullSigner()])
    def test_a_seal_of_another_key_is_refused(
        self, signer: Ed25519Signer, records: list[SealedRecord], other: Ed25519Signer
    ) -> None:
        with pytest.raises(Denied) as refused:
            Collector([signer.public_key]).append(ChainAssembler(None, other).seal(event(1)))
        assert refused.value.code == "SEAL_KEY"

    def test_without_keys_only_the_links_are_checked(self) -> None:
        assembler, collector = ChainAssembler(None, NullSigner()), Collector()
        collector.append(assembler.seal(event(1)))
        collector.append(assembler.seal(event(2)))
        assert collector.anchor.number == 2


class TestAnchors:
    def test_it_survives(self, tmp_path: Path, records: list[SealedRecord]) -> None:
        path = tmp_path / "anchor"
        DurableAnchor(path).set_audit_anchor(records[0].current_event_hash)
        assert DurableAnchor(path).audit_anchor() == Anchor(records[0].current_event_hash)
        DurableAnchor(path).set_audit_anchor(records[1])
        assert DurableAnchor(path).audit_anchor() == Anchor(records[1].current_event_hash, 2)
        assert [each.name for each in tmp_path.iterdir()] == ["anchor"]

    def test_without_a_path_it_is_kept_in_memory(self, records: list[SealedRecord]) -> None:
        durable = DurableAnchor()
        assert durable.audit_anchor() == Anchor(number=0)
        durable.set_audit_anchor(records[0])
        assert durable.audit_anchor().number == 1

    def test_every_flipped_byte_of_the_file_is_seen(
        self, tmp_path: Path, records: list[SealedRecord]
    ) -> None:
        path = tmp_path / "anchor"
        DurableAnchor(path).set_audit_anchor(records[2])
        data = path.read_bytes()
        for index in range(len(data) - 1):  # the last one is the end of the line
            path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
            with pytest.raises(Fenced):
                DurableAnchor(path)
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(Fenced):
            DurableAnchor(path)

    def test_it_is_synced_before_it_counts(
        self, tmp_path: Path, records: list[SealedRecord], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        durable = DurableAnchor(tmp_path / "anchor")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(Fenced) as refused:
            durable.set_audit_anchor(records[0])
        assert refused.value.code == "STORAGE"
        assert durable.audit_anchor() == Anchor(number=0)
        assert not (tmp_path / "anchor").exists()

    def test_a_collector_moves_its_anchor_with_every_record_and_goes_on_from_it(
        self, tmp_path: Path, signer: Ed25519Signer, records: list[SealedRecord]
    ) -> None:
        path = tmp_path / "anchor"
        first = Collector([signer.public_key], durable=DurableAnchor(path))
        first.append(records[0])
        first.append(records[1])
        with pytest.raises(Incompatible):
            first.append(records[3])
        second = Collector([signer.public_key], durable=DurableAnchor(path))
        assert second.anchor.number == 2
        with pytest.raises(Fenced):
            second.append(records[1])
        second.append(records[2])

    @pytest.mark.parametrize("wrong", [b"", b"short", b"x" * 33])
    def test_an_anchor_has_32_bytes(self, wrong: bytes, signer: Ed25519Signer) -> None:
        with pytest.raises(Fenced):
            ChainAssembler(wrong, signer)
