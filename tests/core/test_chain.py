"""The audit chain: linked, bounded, and no byte of it can change unseen."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import chain, codec
from grafos_core.chain import GENESIS, Chain, EventKind, Record, Seal, SealPolicy
from grafos_core.failure import FabricError, InvariantViolation

INCARNATION = "0123456789abcdef" * 2
OTHER = "f" * 32


def chain_of(count: int, *, boot_epoch: int = 1) -> tuple[Chain, list[Record]]:
    written = Chain("node-1", INCARNATION, boot_epoch)
    return written, [
        written.append(
            EventKind.AGENT_BOUND,
            wall_ms=1_800_000_000_000 + i,
            boottime_ns=10**9 * i,
            lease_id=f"{i:032x}",
            epoch=i,
            body={"amount": i, "note": "é"},
        )
        for i in range(count)
    ]


def code_of(*records: bytes, prev: bytes = GENESIS, number: int = 0) -> str:
    try:
        chain.verify(records, prev=prev, number=number)
    except FabricError as refused:
        return refused.code
    return "accepted"


def rewritten(record: Record, **changes: Any) -> bytes:
    """The record with other fields, by key; canonical, but no chain wrote it."""
    value: Any = codec.decode(record.data)
    return codec.encode(value | {int(key[1:]): to for key, to in changes.items()})


def test_a_record_is_read_as_it_was_written() -> None:
    _, records = chain_of(3)
    assert [chain.parse(record.data) for record in records] == records
    assert [record.number for record in records] == [1, 2, 3]
    assert records[0].prev_hash == GENESIS
    assert records[1].prev_hash == records[0].hash


def test_a_hash_is_sha256_in_a_domain_of_its_own() -> None:
    _, [record] = chain_of(1)
    assert record.hash == hashlib.sha256(b"grafos-chain-v1\0" + record.data).digest()


def test_the_bytes_of_a_record_do_not_depend_on_the_machine() -> None:
    record = Chain("n", "00" * 16, 1).append("agent.ready", wall_ms=1, boottime_ns=2)
    assert record.data.hex() == (
        "ab01616e0250" + "00" * 16 + "03010401050106020758" + "20" + "00" * 32
        + "086b6167656e742e7265616479" + "0960" + "0a00" + "0ba0"
    )  # fmt: skip


@given(st.integers(0, 12), st.integers(0, 12))
def test_every_prefix_verifies_and_the_rest_follows_from_its_head(total: int, cut: int) -> None:
    _, records = chain_of(total)
    data = [record.data for record in records]
    cut = min(cut, total)
    head, number = chain.verify(data[:cut])
    assert number == cut
    assert chain.verify(data[cut:], prev=head, number=number) == chain.verify(data)


def test_a_chain_goes_on_from_where_it_was_left() -> None:
    first, records = chain_of(2)
    second = Chain("node-1", INCARNATION, 2, first.head, first.number)
    after = second.append("agent.started", wall_ms=1, boottime_ns=1)
    assert chain.verify([r.data for r in [*records, after]]) == (second.head, 3)


def test_a_draft_moves_the_chain_only_when_it_is_taken() -> None:
    written, _ = chain_of(1)
    before = (written.head, written.number)
    draft = written.draft("agent.ready", wall_ms=1, boottime_ns=1)
    assert (written.head, written.number) == before
    written.advance(draft)
    assert (written.head, written.number) == (draft.hash, 2)
    with pytest.raises(InvariantViolation):
        written.advance(draft)


def test_every_changed_byte_is_found() -> None:
    _, records = chain_of(3)
    data = [record.data for record in records]
    for at in range(len(data[1])):
        for bit in (1, 0x80):
            bad = bytearray(data[1])
            bad[at] ^= bit
            assert code_of(data[0], bytes(bad), data[2]) in {"CHAIN", "GAP", "ENCODING"}
            # Without a next record the head differs: that is what a seal is for.
            try:
                head, _ = chain.verify([data[0], bytes(bad)])
            except FabricError:
                continue
            assert head != records[1].hash


def test_catalogue_u1_a_gap_names_the_record_that_is_expected() -> None:
    _, records = chain_of(4)
    with pytest.raises(FabricError) as refused:
        chain.verify([records[0].data, records[2].data])
    assert refused.value.code == "GAP"
    assert refused.value.details == {
        "expected_number": "2",
        "expected_head": records[0].hash.hex(),
    }


def test_catalogue_u4_wrong_links_and_numbers_are_refused() -> None:
    _, records = chain_of(3)
    first, second = records[0], records[1]
    assert code_of(first.data, rewritten(second, _7=OTHER_HASH)) == "CHAIN"
    assert code_of(first.data, first.data) == "CHAIN"
    assert code_of(rewritten(first, _4=0)) == "CHAIN"
    assert code_of(rewritten(first, _4=0), rewritten(first, _4=0)) == "CHAIN"
    assert code_of(rewritten(first, _4=2**63)) == "CHAIN"
    assert code_of(rewritten(first, _4=2**64 - 1)) == "CHAIN"
    assert code_of(first.data, rewritten(second, _1="node-2")) == "CHAIN"
    assert code_of(first.data, rewritten(second, _2=b"\xff" * 16)) == "CHAIN"
    assert code_of(first.data, rewritten(second, _3=0)) == "CHAIN"


OTHER_HASH = hashlib.sha256(b"other").digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"_1": "Node 1"},
        {"_1": ""},
        {"_1": 7},
        {"_2": b"\0" * 15},
        {"_2": INCARNATION},
        {"_3": -1},
        {"_3": True},
        {"_3": 2**63},
        {"_4": -1},
        {"_4": "1"},
        {"_5": -1},
        {"_6": 2**63},
        {"_7": b"\0" * 31},
        {"_8": "Agent.Bound"},
        {"_8": ""},
        {"_8": "a" * 65},
        {"_9": "a" * 65},
        {"_9": None},
        {"_10": -1},
        {"_11": []},
        {"_12": 0},
        {"_11": {"pad": b"\0" * chain.RECORD_BYTES_MAX}},
    ],
)
def test_catalogue_u6_a_record_has_exactly_its_fields_types_and_bounds(
    changes: dict[str, Any],
) -> None:
    _, [record] = chain_of(1)
    assert code_of(rewritten(record, **changes)) == "ENCODING"


@pytest.mark.parametrize("missing", range(1, 12))
def test_a_record_without_a_field_is_refused(missing: int) -> None:
    _, [record] = chain_of(1)
    value: Any = codec.decode(record.data)
    del value[missing]
    assert code_of(codec.encode(value)) == "ENCODING"
    assert code_of(codec.encode([])) == "ENCODING"


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "UPPER"},
        {"lease_id": "a" * 65},
        {"epoch": 2**64},
        {"wall_ms": -1},
        {"boottime_ns": 2**63},
        {"body": {"x": 1.5}},
        {"body": {"pad": b"\0" * chain.RECORD_BYTES_MAX}},
    ],
)
def test_what_could_not_be_read_back_is_not_written(fields: dict[str, Any]) -> None:
    written, _ = chain_of(1)
    before = (written.head, written.number)
    good: dict[str, Any] = {"kind": "agent.ready", "wall_ms": 1, "boottime_ns": 1}
    with pytest.raises(FabricError) as refused:
        written.append(**(good | fields))
    assert refused.value.code == "ENCODING"
    assert (written.head, written.number) == before


@pytest.mark.parametrize(("origin", "incarnation"), [("Node", INCARNATION), ("n", "12"), ("", "")])
def test_a_chain_has_a_well_formed_origin(origin: str, incarnation: str) -> None:
    with pytest.raises(FabricError) as refused:
        Chain(origin, incarnation, 1)
    assert refused.value.code == "IDENTIFIER"


def test_a_head_without_records_is_a_broken_invariant() -> None:
    with pytest.raises(InvariantViolation):
        Chain("n", INCARNATION, 1, OTHER_HASH, 0)
    with pytest.raises(InvariantViolation):
        Chain("n", INCARNATION, 1, GENESIS, 5)
    with pytest.raises(InvariantViolation):
        Chain("n", INCARNATION, 1, OTHER_HASH, chain.NUMBER_MAX).append(
            "agent.ready", wall_ms=1, boottime_ns=1
        )


def signed(incarnation: str, number: int, hash: bytes, key: bytes = b"k") -> Seal:
    message = chain.seal_bytes(incarnation, number, hash)
    return Seal(number, hash, "k1", hashlib.sha256(key + message).digest())


def verify_with(key_id: str, message: bytes, signature: bytes) -> bool:
    return key_id == "k1" and hashlib.sha256(b"k" + message).digest() == signature


def test_a_seal_holds_for_its_record_incarnation_and_key_alone() -> None:
    good = signed(INCARNATION, 5, OTHER_HASH)
    chain.check_seal(good, INCARNATION, verify_with)
    bad = [
        (good, OTHER),
        (Seal(6, good.hash, "k1", good.signature), INCARNATION),
        (Seal(5, GENESIS, "k1", good.signature), INCARNATION),
        (Seal(5, good.hash, "k2", good.signature), INCARNATION),
        (Seal(5, good.hash, "k1", b""), INCARNATION),
        (signed(INCARNATION, 5, OTHER_HASH, b"other"), INCARNATION),
    ]
    for seal, incarnation in bad:
        with pytest.raises(FabricError) as refused:
            chain.check_seal(seal, incarnation, verify_with)
        assert refused.value.code == "SEAL_KEY"


@pytest.mark.parametrize(("number", "hash"), [(0, GENESIS), (2**63, GENESIS), (1, b"short")])
def test_a_seal_that_names_no_record_is_refused(number: int, hash: bytes) -> None:
    with pytest.raises(FabricError) as refused:
        chain.check_seal(Seal(number, hash, "k1", b""), INCARNATION, verify_with)
    assert refused.value.code == "CHAIN"


def test_seals_are_due_by_count_by_age_and_when_somebody_waits() -> None:
    policy = SealPolicy(records_max=3, interval_ms=1_000)
    quiet = "agent.clock"
    assert not policy.due([], oldest_ms=0, now_ms=10**9)
    assert not policy.due([quiet, quiet], oldest_ms=5_000, now_ms=5_999)
    assert policy.due([quiet, quiet], oldest_ms=5_000, now_ms=policy.due_at_ms(5_000))
    assert policy.due([quiet] * 3, oldest_ms=5_000, now_ms=5_000)
    for kind in ("agent.bound", "agent.teardown_end", EventKind.AGENT_FENCED):
        assert policy.due([quiet, kind], oldest_ms=5_000, now_ms=5_000)
    assert not policy.due([EventKind.AGENT_TEARDOWN_BEGIN], oldest_ms=5_000, now_ms=5_000)


@pytest.mark.parametrize("wrong", [{"records_max": 0}, {"records_max": 65}, {"interval_ms": 0}])
def test_a_seal_policy_stays_within_a_batch(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvariantViolation):
        SealPolicy(**wrong)
