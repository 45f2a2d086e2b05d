"""The event table: what was acknowledged is there again, and what was damaged is named."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grafos_core.commands import Event
from grafos_core.failure import FabricError
from services.ledger.records import seals_over, to_records
from services.ledger.store import Store
from services.runtime import faults

RESERVE = 64 * 1024
BATCHES = (1, 3, 2, 70, 4)
COUNT = sum(BATCHES)


def opened(folder: Path) -> tuple[Store, list[Event]]:
    """The store and what it remembers; a refusal leaves nothing open."""
    events: list[Event] = []
    store = Store.open(folder, reserve_bytes=RESERVE)
    try:
        store.replay(events.append)
    except FabricError:
        store.close()
        raise
    return store, events


def event(number: int) -> Event:
    return Event("lease.denied", number, body={"number": number, "filler": "x" * 200})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five batches, acknowledged; then the ledger was killed, so that the log is not folded in."""
    folder = tmp_path_factory.mktemp("events")
    folder.chmod(0o700)
    store, _ = opened(folder)
    chain, number = store.chain(), 0
    for size in BATCHES:
        records = to_records([event(number + n) for n in range(size)], chain, number)
        store.append(records, seals_over(records, store.key))
        number += size
    copy = folder.with_name("killed")
    shutil.copytree(folder, copy)
    store.close()
    return copy


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "events"))


@pytest.fixture
def folded(folder: Path) -> Path:
    """The same, with nothing left in the log."""
    opened(folder)[0].close()
    assert not folder.joinpath("ledger.sqlite3-wal").exists()
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(FabricError) as refused:
        opened(folder)
    assert refused.value.code == "STORAGE"
    return refused.value.detail


def test_a_killed_ledgers_events_are_all_there_again(folder: Path) -> None:
    store, events = opened(folder)
    assert events == [event(number) for number in range(COUNT)]
    assert store.number == COUNT
    store.close()
    again, events = opened(folder)
    assert len(events) == COUNT
    again.close()


def test_a_page_goes_on_where_the_last_one_ended_and_ends_with_a_seal(folder: Path) -> None:
    store, _ = opened(folder)
    after, found = 0, []
    while page := store.page(after, 7):
        found += [revision for revision, _ in page]
        after = page[-1][0]
    assert found == list(range(1, COUNT + 1))
    records, seals = store.sealed_page(4)
    assert 4 + len(records) == seals[-1].number == COUNT
    store.close()


@pytest.mark.parametrize("number", [1, 2, 6, 40, COUNT])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE event SET record = flipped(record) WHERE revision = ?",
        "UPDATE event SET hash = flipped(hash) WHERE revision = ?",
        "DELETE FROM event WHERE revision = ?",
        "UPDATE event SET record = zeroblob(20) WHERE revision = ?",
        """UPDATE event SET record = (SELECT record FROM event WHERE revision = 3)
           WHERE revision = CASE ?1 WHEN 3 THEN 4 ELSE ?1 END""",
    ],
    ids=["record", "hash", "missing", "zeros", "another"],
)
def test_a_record_that_was_altered_is_named(change: str, number: int, folder: Path) -> None:
    altered(folder, change, number)
    assert refusal(folder).startswith(f"record {number}: ")


def altered(folder: Path, statement: str, *values: Any) -> None:
    connection = sqlite3.connect(folder / "ledger.sqlite3", isolation_level=None)
    connection.create_function("flipped", 1, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE seal SET signature = flipped(signature) WHERE number = ?",
        "UPDATE seal SET hash = flipped(hash) WHERE number = ?",
        "UPDATE seal SET key_id = '0000000000000000' WHERE number = ?",
    ],
    ids=["signature", "hash", "key"],
)
def test_a_seal_that_was_altered_is_named(change: str, folder: Path) -> None:
    altered(folder, change, 6)
    assert refusal(folder).startswith("record 6: ")


def test_records_without_their_last_seal_are_named(folder: Path) -> None:
    altered(folder, "DELETE FROM seal WHERE number = ?", COUNT)
    assert refusal(folder).startswith(f"record {COUNT}: it has no seal")


def test_a_whole_batch_taken_from_the_end_is_missed(folder: Path) -> None:
    """Nothing that is left contradicts itself; only `acknowledged` knows."""
    altered(folder, "DELETE FROM seal WHERE number > ?", COUNT - 4)
    altered(folder, "DELETE FROM event WHERE revision > ?", COUNT - 4)
    assert refusal(folder).startswith(f"record {COUNT - 3}: it is missing")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_log_cut_short_is_not_taken_for_a_crash(share: float, folder: Path) -> None:
    log = folder / "ledger.sqlite3-wal"
    size = log.stat().st_size
    assert size > 50_000
    with log.open("r+b") as file:
        file.truncate(int(size * share))
    assert "record " in refusal(folder)


@pytest.mark.parametrize("pages", [0, 1, 3, 6])
def test_a_table_cut_short_is_refused(pages: int, folded: Path) -> None:
    with (folded / "ledger.sqlite3").open("r+b") as file:
        file.truncate(pages * 4096)
    assert re.search("record 1: |cannot be read", refusal(folded))


def test_an_empty_table_beside_a_log_is_left_as_it_is(folder: Path) -> None:
    table, log = folder / "ledger.sqlite3", folder / "ledger.sqlite3-wal"
    table.write_bytes(b"")
    before = log.read_bytes()
    assert "empty" in refusal(folder)
    assert log.read_bytes() == before  # opening it with SQLite would have deleted it


def test_no_byte_of_the_table_can_be_another_and_change_what_is_remembered(folded: Path) -> None:
    """Bytes that SQLite does not use may change; what is remembered is then the same."""
    table = folded / "ledger.sqlite3"
    good = table.read_bytes()
    dice = random.Random(7)
    refused = 0
    for at in sorted(dice.sample(range(len(good)), 250)):
        table.write_bytes(good[:at] + bytes([good[at] ^ (1 << dice.randrange(8))]) + good[at + 1 :])
        try:
            store, events = opened(folded)
        except FabricError as error:
            assert error.code in ("STORAGE", "VERSION"), error
            refused += 1
        else:
            assert events == [event(number) for number in range(COUNT)]
            store.close()
        for leftover in ("ledger.sqlite3-wal", "ledger.sqlite3-shm", "ledger.sqlite3-journal"):
            folded.joinpath(leftover).unlink(missing_ok=True)
    assert refused > 100  # most bytes that are used are records


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "acknowledged").unlink(), "`acknowledged` is missing"),
        (lambda folder: (folder / "acknowledged").write_bytes(b"x" * 128), "is damaged"),
        (lambda folder: (folder / "acknowledged").write_bytes(b""), "`acknowledged` is missing"),
    ],
    ids=["gone", "garbage", "empty"],
)
def test_what_was_acknowledged_must_be_known(
    spoil: Callable[[Path], None], expected: str, folder: Path
) -> None:
    spoil(folder)
    assert expected in refusal(folder)


def test_another_key_beside_the_table_is_refused(folder: Path) -> None:
    (folder / "seal.key").write_bytes(b"k" * 32)
    assert "seal.key is not the key" in refusal(folder)


@pytest.mark.parametrize(("version", "older"), [(0, "the file"), (2, "this ledger")])
def test_an_unknown_schema_is_refused_and_says_who_is_too_old(
    version: int, older: str, folder: Path
) -> None:
    altered(folder, "UPDATE schema_version SET version = ?", version)
    with pytest.raises(FabricError) as refused:
        opened(folder)
    assert refused.value.code == "VERSION"
    assert f"{older} is too old" in refused.value.detail


def test_a_folder_in_use_is_refused(folder: Path) -> None:
    store, _ = opened(folder)
    with pytest.raises(FabricError) as refused:
        Store.open(folder)
    assert refused.value.detail == "another ledger runs on this folder"
    store.close()


def test_nobody_else_can_write_to_the_table_while_it_is_open(folder: Path) -> None:
    store, _ = opened(folder)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        altered(folder, "DELETE FROM event WHERE revision = ?", 1)
    store.close()


@pytest.fixture
def _disarmed() -> Any:
    yield
    faults.arm("", development=True)


@pytest.mark.usefixtures("_disarmed")
def test_a_batch_that_finds_no_room_is_written_from_the_reserve(folder: Path) -> None:
    store, _ = opened(folder)
    chain = store.chain()
    records = to_records([event(1)], chain, 1)
    faults.arm("ledger.commit:ENOSPC:1", development=True)
    store.append(records, seals_over(records, store.key))
    fullness = [store.full]
    assert (folder / "reserve").stat().st_size == 0
    store.seek_room()
    fullness.append(store.full)
    assert fullness == [True, False]
    assert (folder / "reserve").stat().st_size == RESERVE
    store.close()
    again, events = opened(folder)
    assert len(events) == COUNT + 1
    again.close()


@pytest.mark.usefixtures("_disarmed")
@pytest.mark.parametrize("fault", ["ledger.commit:EIO:1", "ledger.commit:ENOSPC"])
def test_a_batch_that_cannot_be_written_is_an_end(fault: str, folder: Path) -> None:
    store, _ = opened(folder)
    records = to_records([event(1)], store.chain(), 1)
    faults.arm(fault, development=True)
    with pytest.raises(FabricError) as refused:
        store.append(records, seals_over(records, store.key))
    assert refused.value.code == "STORAGE"
    faults.arm("", development=True)
    store.close()
    again, events = opened(folder)
    assert len(events) == COUNT
    again.close()
