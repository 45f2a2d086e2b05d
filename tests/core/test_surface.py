"""The durable surface: right after every power cut and kill, and shut where it cannot be right."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import chain, surface
from grafos_core.chain import BATCH_RECORDS_MAX, GENESIS, Chain, EventKind, Record, Seal
from grafos_core.failure import FabricError, InvariantViolation
from grafos_core.surface import (
    ORDER,
    DropSegment,
    Effect,
    Slot,
    Surface,
    SyncHead,
    SyncSpool,
    WriteSlot,
    WriteSpool,
)
from grafos_core.surface_state import SurfaceState
from tests.core import crash_states
from tests.core.crash_states import INCARNATION, Agent, Disk, Found, as_it_is, recovered, seal_of

U64 = st.integers(0, 2**64 - 1)
SLOTS = st.builds(
    Slot,
    incarnation=st.binary(min_size=16, max_size=16).map(bytes.hex),
    boot_epoch=U64,
    number=U64,
    head=st.binary(min_size=32, max_size=32),
    tables_hash=st.binary(min_size=32, max_size=32),
    time_floor_ms=U64,
    revocation_number=U64,
    serial=U64,
)
SLOT = Slot(INCARNATION, 1, 7, b"h" * 32, b"t" * 32, 10**12, 3, 4)


def records_of(count: int) -> list[Record]:
    written = Chain("node-1", INCARNATION, 1)
    return [written.append("agent.clock", wall_ms=i, boottime_ns=i) for i in range(count)]


def story(events_count: int = 12) -> Agent:
    """An agent that has recorded so many batches, nothing enumerated."""
    agent = Agent(Disk(), as_it_is, pieces_per_write=1)
    agent.format()
    agent.boot()
    for batch in crash_states.events()[:events_count]:
        agent.record(batch)
    return agent


def storage_detail(image: dict[int, bytes]) -> str:
    with pytest.raises(FabricError) as refused:
        recovered(image)
    assert refused.value.code == "STORAGE"
    return refused.value.detail


# Power cuts and kills, every one ---------------------------------------------------------------


def test_no_power_cut_at_any_instant_leaves_a_state_that_is_not_recovered_right() -> None:
    agent = crash_states.power_cuts()
    assert len(crash_states.events()) >= 10
    assert agent.states > 3_000
    assert agent.surface._segment == 1  # the story went over the end of a segment


def test_no_kill_followed_by_a_power_cut_leaves_a_state_that_is_not_recovered_right() -> None:
    assert crash_states.kills(after_events=range(12)) > 2_000


def is_append(effects: list[Effect]) -> bool:
    return isinstance(effects[0], WriteSpool)


def head_first(effects: list[Effect]) -> list[Effect]:
    return [*effects[2:], *effects[:2]] if is_append(effects) else effects


def slot_written_before_the_spool_is_synced(effects: list[Effect]) -> list[Effect]:
    if not is_append(effects):
        return effects
    spool, sync_spool, slot, sync_head = effects
    return [spool, slot, sync_head, sync_spool]


def spool_not_synced(effects: list[Effect]) -> list[Effect]:
    return [effect for effect in effects if not isinstance(effect, SyncSpool)]


def head_not_synced(effects: list[Effect]) -> list[Effect]:
    return effects[:-1] if is_append(effects) else effects


def one_slot(effects: list[Effect]) -> list[Effect]:
    return [dataclasses.replace(e, index=0) if isinstance(e, WriteSlot) else e for e in effects]


def not_formatted(effects: list[Effect]) -> list[Effect]:
    return effects if is_append(effects) else []


def formatted_in_one_slot(effects: list[Effect]) -> list[Effect]:
    return effects[:1] + effects[2:] if len(effects) == 3 else effects


@pytest.mark.parametrize(
    "mistake",
    [
        head_first,
        slot_written_before_the_spool_is_synced,
        spool_not_synced,
        head_not_synced,
        one_slot,
        not_formatted,
    ],
)
def test_the_enumeration_finds_a_planted_mistake(
    mistake: Callable[[list[Effect]], list[Effect]],
) -> None:
    with pytest.raises(Found):
        crash_states.power_cuts(mistake)


def test_the_enumeration_finds_that_sums_of_batches_are_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(surface, "_sums_up", lambda frame, sum_read: True)
    with pytest.raises(Found):
        crash_states.power_cuts()


def test_the_enumeration_finds_that_sums_of_slots_are_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lenient(data: bytes) -> Slot | None:
        fields = data[: surface._SLOT.size]
        if not fields.startswith(b"GRAFHEAD"):
            return None
        _, version, serial, incarnation, boot, number, head, tables, floor, k = (
            surface._SLOT.unpack(fields)
        )
        return Slot(incarnation.hex(), boot, number, head, tables, floor, k, serial, version)

    monkeypatch.setattr(surface, "decode_slot", lenient)
    with pytest.raises(Found):
        crash_states.power_cuts()


def test_the_enumeration_finds_that_the_tables_hash_stays_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin = Surface.begin_segment

    def forgetful(
        self: Surface, records: list[Record], seal: Seal, tables_hash: bytes
    ) -> list[Effect]:
        return begin(self, records, seal, self.slot.tables_hash)

    monkeypatch.setattr(Surface, "begin_segment", forgetful)
    with pytest.raises(Found):
        crash_states.power_cuts()


def is_resume(effects: list[Effect]) -> bool:
    return isinstance(effects[0], SyncSpool)


def resumed_without_syncing(effects: list[Effect]) -> list[Effect]:
    return effects[2:] if is_resume(effects) else effects


def resumed_without_a_slot(effects: list[Effect]) -> list[Effect]:
    return effects[:2] if is_resume(effects) else effects


@pytest.mark.parametrize("mistake", [resumed_without_syncing, resumed_without_a_slot])
def test_the_kills_find_a_planted_mistake(
    mistake: Callable[[list[Effect]], list[Effect]],
) -> None:
    with pytest.raises(Found):
        crash_states.kills(mistake, after_events=range(12))


# Slots -----------------------------------------------------------------------------------------


@given(SLOTS)
def test_a_slot_is_read_as_it_was_written(slot: Slot) -> None:
    data = surface.encode_slot(slot)
    assert len(data) == surface.SLOT_BYTES
    assert surface.decode_slot(data) == slot


def test_every_changed_byte_of_a_slot_is_found() -> None:
    good = surface.encode_slot(SLOT)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        assert surface.decode_slot(bytes(bad)) is None
    assert surface.decode_slot(good[:-1]) is None
    assert surface.decode_slot(b"") is None


def test_the_whole_slot_with_the_higher_serial_counts() -> None:
    old, new = surface.encode_slot(SLOT), surface.encode_slot(dataclasses.replace(SLOT, serial=5))
    torn = new[:100] + bytes(surface.SLOT_BYTES - 100)
    assert surface.newest_slot(old + new).serial == 5
    assert surface.newest_slot(new + old).serial == 5
    assert surface.newest_slot(old + torn).serial == 4
    for page in (torn + torn, bytes(surface.HEAD_BYTES), old, b""):
        with pytest.raises(FabricError) as refused:
            surface.newest_slot(page)
        assert refused.value.code == "STORAGE"


@pytest.mark.parametrize(("version", "side"), [(2, "older"), (0, "newer")])
def test_a_slot_of_another_version_says_which_side_is_too_old(version: int, side: str) -> None:
    other = surface.encode_slot(dataclasses.replace(SLOT, version=version))
    with pytest.raises(FabricError) as refused:
        surface.newest_slot(other + other)
    assert refused.value.code == "VERSION"
    assert side in refused.value.detail


# Batches ---------------------------------------------------------------------------------------


def test_batches_are_read_up_to_the_first_thing_that_is_none() -> None:
    records = records_of(5)
    one = surface.encode_batch(records[:2], seal_of(records[1]))
    two = surface.encode_batch(records[2:], seal_of(records[4]))
    for tail in (b"", bytes(100), b"GRB1\xff\xff\xff\xff", two[:-1], b"GRB1"):
        batches = list(surface.read_batches(one + two + tail))
        assert [list(batch.records) for batch in batches] == [records[:2], records[2:]]
        assert [batch.seal for batch in batches] == [seal_of(records[1]), seal_of(records[4])]
        assert batches[-1].end == len(one + two)


def test_every_changed_byte_of_a_batch_is_found() -> None:
    records = records_of(2)
    good = surface.encode_batch(records, seal_of(records[1]))
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1
        assert list(surface.read_batches(bytes(bad))) == []
    for cut in range(len(good)):
        assert list(surface.read_batches(good[:cut])) == []


def test_a_batch_has_1_to_64_records_and_the_seal_of_the_last() -> None:
    records = records_of(65)
    for wrong, seal in [
        ([], seal_of(records[0])),
        (records, seal_of(records[64])),
        (records[:2], seal_of(records[0])),
    ]:
        with pytest.raises(InvariantViolation):
            surface.encode_batch(wrong, seal)
    whole = records[:BATCH_RECORDS_MAX]
    [batch] = surface.read_batches(surface.encode_batch(whole, seal_of(whole[-1])))
    assert len(batch.records) == BATCH_RECORDS_MAX


# Appending -------------------------------------------------------------------------------------


def test_effects_come_in_the_order_that_makes_them_safe() -> None:
    agent = story(3)
    made = [agent._add(EventKind.AGENT_CLOCK, "", 0, {})]
    before = agent.surface.slot
    effects = agent.surface.append(made, seal_of(made[0]), time_floor_ms=77)
    assert tuple(type(effect) for effect in effects) == ORDER
    spool, _, slot, _ = effects
    assert isinstance(spool, WriteSpool)
    assert isinstance(slot, WriteSlot)
    [batch] = surface.read_batches(spool.data)
    assert batch.records == tuple(made)
    assert slot.index != before.serial % 2
    written = surface.decode_slot(slot.data)
    assert written == agent.surface.slot
    assert (written.number, written.head, written.time_floor_ms) == (4, made[0].hash, 77)


def test_what_does_not_follow_is_a_broken_invariant() -> None:
    agent = story(3)
    gone = agent.chain.append("agent.clock", wall_ms=1, boottime_ns=1)
    ahead = agent.chain.append("agent.clock", wall_ms=1, boottime_ns=1)
    with pytest.raises(InvariantViolation):
        agent.surface.append([ahead], seal_of(ahead))
    with pytest.raises(InvariantViolation):
        agent.surface.append([gone], seal_of(ahead))
    with pytest.raises(InvariantViolation):
        agent.surface.begin_segment([gone], seal_of(gone), b"")


def test_the_time_floor_and_the_revocation_number_only_rise() -> None:
    agent = story(1)
    agent.perform(agent.surface.note(time_floor_ms=5, revocation_number=3), judged=False)
    for lower in ({"time_floor_ms": 4}, {"revocation_number": 2}):
        with pytest.raises(InvariantViolation):
            agent.surface.note(**lower)
    slot = recovered(agent.disk.seen()).slot
    assert (slot.time_floor_ms, slot.revocation_number, slot.number) == (5, 3, 1)


def test_a_full_spool_keeps_a_reserve_and_acknowledged_segments_make_room() -> None:
    agent = story(0)
    limited, effects = surface.resume(
        recovered(agent.disk.seen()), segment_bytes=3072, segments_max=3, batch_bytes_max=768
    )
    agent.surface = limited
    agent.perform(effects, judged=False)
    agent.chain = Chain("node-1", INCARNATION, limited.slot.boot_epoch)
    assert not limited.is_full()
    while not limited.should_roll():
        agent.record([(EventKind.AGENT_CLOCK, "", 0, {})])
    agent.record([(EventKind.AGENT_CLOCK, "", 0, {})])
    assert limited.is_full()

    def go_on() -> None:
        for _ in range(100):
            agent.record([(EventKind.AGENT_CLOCK, "", 0, {})])

    with pytest.raises(FabricError) as refused:
        go_on()
    assert refused.value.code == "SPOOL_FULL"
    last = limited.slot.number
    assert limited.acknowledged(1) == []
    assert limited.acknowledged(last) == [DropSegment(0), DropSegment(1)]
    assert not limited.is_full()
    assert limited.acknowledged(last) == []


# Recovery --------------------------------------------------------------------------------------


def test_what_was_recorded_is_recovered_across_segments() -> None:
    agent = story()
    found = recovered(agent.disk.seen())
    assert (found.number, found.head) == (agent.chain.number, agent.chain.head)
    assert found.state.tables_hash() == agent.state.tables_hash()
    assert not found.rolled_forward
    assert found.slot == agent.surface.slot
    records = [record.data for batch in found.batches for record in batch.records]
    assert chain.verify(records) == (found.head, found.number)


def test_without_the_dropped_segments_the_tables_carry_the_state() -> None:
    agent = story()
    image = agent.disk.seen()
    found = surface.recover([image[1]], image[crash_states.HEAD], first_segment=1)
    assert found.number == agent.chain.number
    assert found.batches[0].records[0].number > 1
    assert found.state.tables_hash() == agent.state.tables_hash()
    assert (found.segment, found.ends) == (1, {})
    resumed, _ = surface.resume(found, segment_bytes=3072, batch_bytes_max=768)
    made = agent.chain.append("agent.clock", wall_ms=1, boottime_ns=1)
    assert resumed.append([made], seal_of(made))[0] == WriteSpool(
        1, found.offset, surface.encode_batch([made], seal_of(made))
    )


def test_one_batch_ahead_is_rolled_forward_and_two_are_not_repaired() -> None:
    agent = story(4)
    pages = [agent.disk.seen()[crash_states.HEAD]]
    for _ in range(2):
        agent.record([(EventKind.AGENT_CLOCK, "", 0, {}), (EventKind.AGENT_CLOCK, "", 0, {})])
        pages.append(agent.disk.seen()[crash_states.HEAD])
    image = agent.disk.seen()
    assert recovered(image | {crash_states.HEAD: pages[2]}).rolled_forward is False
    ahead = recovered(image | {crash_states.HEAD: pages[1]})
    assert ahead.rolled_forward
    assert (ahead.number, ahead.head) == (agent.chain.number, agent.chain.head)
    detail = storage_detail(image | {crash_states.HEAD: pages[0]})
    assert detail == "record 7 is more than one batch ahead of the head"


def test_a_head_that_names_what_the_spool_lacks_is_never_repaired() -> None:
    agent = story(6)
    image = agent.disk.seen()
    ends = [batch.end for batch in surface.read_batches(image[0])]
    for cut in ends[:-1]:
        short = image[0][:cut] + bytes(len(image[0]) - cut)
        detail = storage_detail(image | {0: short})
        assert "is missing or damaged; the head names record 7" in detail
    assert storage_detail(image | {0: bytes(3072)}).startswith("record 1 is missing")


def test_every_changed_byte_of_the_spool_is_found_and_the_record_is_named() -> None:
    agent = story(6)
    image = agent.disk.seen()
    ends = [batch.end for batch in surface.read_batches(image[0])]
    for at in range(ends[-1]):
        bad = bytearray(image[0])
        bad[at] ^= 0x40
        assert "is missing or damaged" in storage_detail(image | {0: bytes(bad)})


def test_every_changed_byte_of_the_head_leaves_the_truth_or_nothing() -> None:
    agent = story(6)
    image = agent.disk.seen()
    page = image[crash_states.HEAD]
    used = [*range(220), *range(surface.SLOT_BYTES, surface.SLOT_BYTES + 220)]
    for at in itertools.chain(used, range(300, surface.HEAD_BYTES, 397)):
        bad = bytearray(page)
        bad[at] ^= 0x40
        found = recovered(image | {crash_states.HEAD: bytes(bad)})
        assert (found.number, found.head) == (agent.chain.number, agent.chain.head)


def test_a_spool_of_another_incarnation_or_another_past_is_refused() -> None:
    agent, other = story(3), story(3)
    image = agent.disk.seen()
    foreign = Chain("node-1", "50" * 16, 1)
    made = [foreign.append("agent.formatted", wall_ms=1, boottime_ns=1)]
    wrong = surface.encode_batch(made, seal_of(made[0]))
    assert "record 1 is missing" in storage_detail(image | {0: wrong.ljust(3072, b"\0")})
    other.record([(EventKind.AGENT_CLOCK, "", 0, {"fork": 1})])
    agent.record([(EventKind.AGENT_CLOCK, "", 0, {"fork": 2})])
    forked = agent.disk.seen() | {0: other.disk.seen()[0]}
    assert storage_detail(forked) == "the head names another record 4 than the spool holds"


def test_a_state_that_is_not_the_sum_of_its_records_is_refused() -> None:
    agent = story()
    slot = dataclasses.replace(agent.surface.slot, tables_hash=b"x" * 32)
    page = surface.encode_slot(slot)
    detail = storage_detail(agent.disk.seen() | {crash_states.HEAD: page + page})
    assert detail == f"the tables before record {slot.number} are others"


def test_a_formatted_node_without_records_starts_from_nothing() -> None:
    agent = story(0)
    found = recovered(agent.disk.seen())
    assert (found.number, found.head, found.batches) == (0, GENESIS, ())
    assert found.state.tables_hash() == SurfaceState().tables_hash()
    image = story().disk.seen()
    with pytest.raises(FabricError) as refused:
        surface.recover([image[1]], agent.disk.seen()[crash_states.HEAD], first_segment=1)
    assert refused.value.detail == "the spool's first record is missing"


def test_seals_are_checked_where_the_key_is_given() -> None:
    image = story(3).disk.seen()
    asked = []

    def verify(key_id: str, message: bytes, signature: bytes) -> bool:
        asked.append(message)
        return len(asked) < 3

    with pytest.raises(FabricError) as refused:
        surface.recover([image[0]], image[crash_states.HEAD], verify=verify)
    assert refused.value.code == "SEAL_KEY"
    assert len(asked) == 3


def test_each_boot_has_the_next_boot_epoch_and_syncs_what_it_read() -> None:
    agent = story(2)
    boot_epoch = agent.surface.slot.boot_epoch
    for later in range(1, 4):
        resumed, effects = surface.resume(recovered(agent.disk.seen()))
        assert [type(effect) for effect in effects] == [SyncSpool, SyncHead, WriteSlot, SyncHead]
        agent.perform(effects, judged=False)
        assert resumed.slot.boot_epoch == boot_epoch + later
