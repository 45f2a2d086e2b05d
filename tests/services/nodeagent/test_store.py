"""What the agent said was durable is there after any kill and any error of the disk."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from grafos_core import failure
from grafos_core.surface import DropSegment, Slot, encode_slot
from services.nodeagent.store import Store, format_store, is_formatted
from services.runtime import faults
from tests.services.nodeagent.surface_writer import (
    BATCH_BYTES_MAX,
    BATCHES,
    CALLS_MAX,
    FULL,
    HALTED,
    INCARNATION,
    SEGMENT_BYTES,
    Writer,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    format_store(tmp_path / "state", INCARNATION, segment_bytes=SEGMENT_BYTES)
    return tmp_path / "state"


@pytest.fixture
def faulty() -> Iterator[Callable[[str], None]]:
    yield lambda text: faults.arm(text, development=True)
    faults.arm("", development=True)


def refused(action: Callable[[], object]) -> failure.FabricError:
    with pytest.raises(failure.FabricError) as caught:
        action()
    return caught.value


def written(folder: Path, count: int = BATCHES) -> int:
    """Write that many binds and close; the number of the last record."""
    writer = Writer(folder)
    last = [writer.record(epoch) for epoch in range(1, count + 1)][-1]
    writer.store.close()
    return last


def test_what_was_recorded_is_there_after_a_restart(folder: Path) -> None:
    last = written(folder)
    writer = Writer(folder)
    assert writer.chain.number == last
    assert writer.surface.slot.boot_epoch == 2
    assert set(writer.state.open_binds()) == {"ab" * 16}
    assert (folder / "surface" / "spool.1").read_bytes().strip(b"\0"), "a second segment is in use"
    assert writer.record(BATCHES + 1) == last + 1
    writer.store.close()


def test_files_are_for_their_owner_only(folder: Path) -> None:
    for path in (folder / "node.key", folder / "surface" / "head", folder / "surface" / "spool.0"):
        assert path.stat().st_mode & 0o077 == 0
    assert (folder / "surface").stat().st_mode & 0o077 == 0


def test_the_key_stays_the_same_and_signs(folder: Path) -> None:
    first = Writer(folder)
    first.store.close()
    second = Writer(folder)
    assert first.key.public_key() == second.key.public_key()
    second.store.close()


def test_segments_lie_ready_and_full_of_zeros_before_they_are_needed(folder: Path) -> None:
    writer = Writer(folder)
    for number in (0, 1, 2):
        path = folder / "surface" / f"spool.{number}"
        assert path.stat().st_size == SEGMENT_BYTES
        assert path.stat().st_blocks * 512 >= SEGMENT_BYTES
    assert writer.store.has_next(0)
    assert not writer.store.full
    writer.store.close()


def test_one_agent_at_a_time(folder: Path) -> None:
    first = Store(folder, segment_bytes=SEGMENT_BYTES)
    assert "another agent" in refused(lambda: Store(folder)).detail
    first.close()
    Store(folder).close()


def test_formatting_happens_once(folder: Path, tmp_path: Path) -> None:
    assert "already" in refused(lambda: format_store(folder, "5e" * 16)).detail
    (tmp_path / "other").mkdir()
    assert "never formatted" in refused(lambda: Store(tmp_path / "other")).detail


def test_a_lost_head_beside_a_written_spool_is_not_a_new_node(folder: Path) -> None:
    written(folder)
    (folder / "surface" / "head").unlink()
    assert "head file is missing" in refused(lambda: format_store(folder, "5e" * 16)).detail


# Damage


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_flipped_bit_in_a_record_is_refused_by_the_number_of_the_record(folder: Path) -> None:
    last = written(folder, 3)
    spool = folder / "surface" / "spool.0"
    whole = spool.read_bytes()
    for at in range(0, len(whole.rstrip(b"\0")), 97):
        damage(spool, at, bytes([whole[at] ^ 1]))
        why = refused(lambda: Writer(folder))
        assert why.code == "STORAGE"
        assert why.detail.startswith("record "), why.detail
        assert f"the head names record {last}" in why.detail
        damage(spool, at, whole[at : at + 1])
    Writer(folder).store.close()


def test_a_cut_short_spool_is_refused_by_name(folder: Path) -> None:
    last = written(folder, 3)
    used = len((folder / "surface" / "spool.0").read_bytes().rstrip(b"\0"))
    os.truncate(folder / "surface" / "spool.0", used)
    detail = refused(lambda: Writer(folder)).detail
    assert detail == f"spool.0 has {used} bytes and not {SEGMENT_BYTES}, after record {last}"
    os.truncate(folder / "surface" / "spool.0", used - 1)
    assert f"record {last} is missing or damaged" in refused(lambda: Writer(folder)).detail


def test_a_missing_segment_is_refused_by_name(folder: Path) -> None:
    written(folder)
    (folder / "surface" / "spool.1").unlink()
    assert refused(lambda: Writer(folder)).detail == "spool.1 is missing"
    (folder / "surface" / "spool.0").unlink()
    assert refused(lambda: Writer(folder)).code == "STORAGE"


def test_one_damaged_slot_is_survived_and_two_are_not(folder: Path) -> None:
    last = written(folder, 2)
    head = folder / "surface" / "head"
    newest = Writer(folder)
    serial = newest.surface.slot.serial
    newest.store.close()
    damage(head, (serial + 1) % 2 * 4096 + 100, b"\xff")
    writer = Writer(folder)
    assert writer.chain.number == last
    writer.store.close()
    damage(head, 100, b"\xff\xfe")
    damage(head, 4196, b"\xff\xfe")
    assert "no head slot is whole" in refused(lambda: Writer(folder)).detail


def test_a_head_that_is_cut_short_is_refused(folder: Path) -> None:
    os.truncate(folder / "surface" / "head", 4096)
    assert refused(lambda: Writer(folder)).code == "STORAGE"


@pytest.mark.parametrize(("version", "side"), [(2, "older"), (0, "newer")])
def test_another_version_is_refused_and_says_who_is_too_old(
    folder: Path, version: int, side: str
) -> None:
    slot = Slot(INCARNATION, 0, 0, bytes(32), bytes(32), version=version, serial=9)
    damage(folder / "surface" / "head", 4096, encode_slot(slot))
    why = refused(lambda: Writer(folder))
    assert why.code == "VERSION"
    assert f"this program is {side}" in why.detail


@pytest.mark.parametrize("what", ["open", "short", "gone"])
def test_a_key_that_is_not_right_is_refused(folder: Path, what: str) -> None:
    key = folder / "node.key"
    if what == "open":
        key.chmod(0o644)
    elif what == "short":
        os.truncate(key, 31)
    else:
        key.unlink()
    why = refused(lambda: Writer(folder))
    assert why.code == "STORAGE"
    assert "key" in why.detail


# Errors of the disk


@pytest.mark.parametrize(
    "point", ["surface.append", "surface.sync", "surface.head", "surface.head_sync"]
)
def test_an_error_halts_and_is_never_tried_again(
    folder: Path, faulty: Callable[[str], None], point: str
) -> None:
    writer = Writer(folder)
    number = writer.record(1)
    faulty(f"{point}:EIO:1")
    assert refused(lambda: writer.record(2)).code == "STORAGE"
    faults.arm("", development=True)
    assert "halted" in refused(lambda: writer.store.perform(writer.surface.note())).detail
    writer.store.close()
    assert Writer(folder).chain.number in {number, number + 1}


def test_no_room_for_the_next_segment_is_full_and_endings_still_go_on(
    folder: Path, faulty: Callable[[str], None]
) -> None:
    writer = Writer(folder)
    faulty("surface.segment:ENOSPC")
    for epoch in range(1, 20):
        if not writer.store.full:
            writer.record(epoch)
    assert writer.surface._segment == 1
    assert writer.store.has_next(1), "the reserve"
    for epoch in range(20, 40):
        if writer.surface._segment == 1:
            writer.record(epoch)
    assert writer.surface._segment == 2, "endings went on into the reserve"
    assert not writer.store.has_next(2)
    faults.arm("", development=True)
    writer.store.prepare(2)
    assert not writer.store.full
    last = writer.chain.number
    writer.store.close()
    assert Writer(folder).chain.number == last


def test_an_acknowledged_segment_goes_and_the_rest_still_starts(folder: Path) -> None:
    last = written(folder)
    writer = Writer(folder)
    effects = writer.surface.acknowledged(last - 1)
    assert effects == [DropSegment(0)]
    writer.store.perform(effects)
    assert not (folder / "surface" / "spool.0").exists()
    writer.store.close()
    writer = Writer(folder)
    assert writer.chain.number == last
    assert set(writer.state.open_binds()) == {"ab" * 16}
    writer.store.close()


# Kills and errors at every durable call of a real process


def check_what_is_left(folder: Path, status: int) -> int:
    """What was said to be durable is there, and the store goes on; the number that was said."""
    said = [line.split() for line in (folder / "said").read_text().splitlines()]
    number = max((int(n) for _, n in said), default=0)
    assert status in {-9, HALTED, FULL, 0}, "killed, or halted with a typed failure"
    assert (len(said) == BATCHES + 2) == (status in {FULL, 0})
    state = folder / "state"
    if not is_formatted(state):
        assert said == []
        format_store(state, INCARNATION, segment_bytes=SEGMENT_BYTES)
    writer = Writer(state)
    assert number <= writer.chain.number <= number + 2, "at most one batch was rolled forward"
    assert writer.record(1_000) > number
    writer.store.close()
    Writer(state).store.close()
    return number


@pytest.mark.requires("strace")
@pytest.mark.parametrize("call", ["pwrite64", "fdatasync"])
@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO", "error=ENOSPC", "retval=1"])
def test_no_fault_at_any_durable_call_loses_what_was_said(
    tmp_path: Path, call: str, fault: str
) -> None:
    if (call, fault) == ("fdatasync", "retval=1"):
        fault = "error=EDQUOT"  # a sync cannot be short
    command = [
        "strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}",
        "-e", f"inject={call}:{fault}:when={CALLS_MAX}",
        sys.executable, "-m", "tests.services.nodeagent.surface_writer", str(tmp_path), call,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/core:{ROOT}/protos"}
    subprocess.run(command, check=True, timeout=60, env=environment, cwd=ROOT)
    folders = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    statuses = [int((path / "status").read_text()) for path in folders]
    assert statuses[-1] == 0, "the series ends with the run that no fault reached"
    assert 0 not in statuses[:-1]
    assert len(statuses) > BATCHES * 2
    numbers = [
        check_what_is_left(path, status) for path, status in zip(folders, statuses, strict=True)
    ]
    assert numbers[0] == 0
    assert numbers[-1] >= BATCHES


def test_the_numbers_above_are_what_the_store_is_run_with() -> None:
    assert 4 * BATCH_BYTES_MAX <= SEGMENT_BYTES
