"""The ledger's memory on disk: one table of sealed events, written by one hand.

    ledger.sqlite3   events, seals, schema version     acknowledged   how far we have answered
    seal.key         the key of the seals, 0600        reserve        room for when the disk is full
    lock             held while a ledger runs

Rules. One connection, write-ahead log, synced in full: nothing that `append` returned for is lost.
At start every record is verified before anything is served: number, link, hash, seal. What is
missing or altered is named and the ledger does not start; it never guesses and never repairs.
A log cut short looks to SQLite like a crash, so `acknowledged` remembers beside it, in two slots
written in turn after each commit, which record we have answered for. That file needs no sync: it
is never ahead of the table, and it need not be abreast of it.

A full disk ends grants, not the ledger: `reserve` was allocated beforehand and is given up, so that
renewals, releases, credits and fences go on. Any other failure of a write halts; a failed sync is
never tried again.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from grafos_core import chain, failure
from grafos_core.chain import GENESIS, Chain, Record, Seal
from grafos_core.commands import Event
from grafos_proto.wire.credentials import make_private_directory
from services.ledger.records import ORIGIN, to_event
from services.runtime import signing, sqlite
from services.runtime.faults import fault
from services.runtime.signing import SigningKey
from services.runtime.sqlite import Mark, is_full

SCHEMA_VERSION: Final = 1
RESERVE_BYTES: Final = 16 * 1024 * 1024
"""Room for about 10,000 events, and the log, after the disk is full."""
CHECKPOINT_COMMITS: Final = 256
"""Keeps the log near 8 MiB, which is half of the reserve."""
PAGE_BYTES_MAX: Final = 160 * 1024
"""Of records read at a time: fits into one message to watchers and to the collector."""

_TABLES: Final = (
    "CREATE TABLE schema_version (version INTEGER NOT NULL)",
    "CREATE TABLE chain (incarnation TEXT NOT NULL, public_key BLOB NOT NULL)",
    "CREATE TABLE event (revision INTEGER PRIMARY KEY, record BLOB NOT NULL, hash BLOB NOT NULL)",
    """CREATE TABLE seal (number INTEGER PRIMARY KEY, hash BLOB NOT NULL, key_id TEXT NOT NULL,
       signature BLOB NOT NULL)""",
)


class Store:
    """The event table of one ledger. Used by one thread at a time."""

    def __init__(self, directory: Path, reserve_bytes: int) -> None:
        self._directory, self._reserve_bytes = directory, reserve_bytes
        self._path = directory / "ledger.sqlite3"
        self._reserve = directory / "reserve"
        self._lock = sqlite.hold_lock(directory / "lock", "ledger")
        try:
            self._acknowledged = Mark(directory / "acknowledged")
        except failure.FabricError:
            os.close(self._lock)
            raise
        self._connection: sqlite3.Connection
        self._commits = 0
        self.full = False
        """The disk is full: the reserve is in use and nothing new may be promised."""
        self.incarnation = ""
        self.boot_epoch = 0
        """Of the last record that was there at start."""
        self.number, self.head = 0, GENESIS

    @classmethod
    def open(cls, directory: Path, *, reserve_bytes: int = RESERVE_BYTES) -> Store:
        """The table in this folder, made now if there is none. `replay` must come next."""
        make_private_directory(directory)
        store = cls(directory, reserve_bytes)
        try:
            fault("ledger.open")
            store._open()
        except (OSError, sqlite3.Error) as error:
            store.close()
            raise failure.of("STORAGE", f"record 1: the table cannot be opened: {error}") from error
        except failure.FabricError:
            store.close()
            raise
        return store

    def _open(self) -> None:
        self._keep_reserve()
        size = self._path.stat().st_size if self._path.exists() else 0
        if sqlite.is_lost(self._path) or (not size and self._acknowledged.number):
            raise failure.of("STORAGE", "record 1: the event table is empty and should not be")
        if self._acknowledged.is_new and not (self._directory / "seal.key").exists():
            SigningKey.make(self._directory / "seal.key")
        self.key = SigningKey.load(self._directory / "seal.key")
        if not size:
            if not self._acknowledged.is_new:
                raise failure.of("STORAGE", "record 1: the event table is missing")
            sqlite.make(self._path, self._format)
        self._connection = sqlite.connect(self._path)
        self._check_schema()

    def _format(self, connection: sqlite3.Connection) -> None:
        run = connection.execute
        run("BEGIN IMMEDIATE")
        for statement in _TABLES:
            run(statement)
        run("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION,))
        run("INSERT INTO chain VALUES (?, ?)", (secrets.token_hex(16), self.key.public_key))
        run("COMMIT")

    def _check_schema(self) -> None:
        try:
            ((version,),) = self._connection.execute("SELECT version FROM schema_version")
            ((incarnation, public_key),) = self._connection.execute("SELECT * FROM chain")
        except (sqlite3.Error, ValueError) as error:
            raise failure.of("STORAGE", f"the event table's own data: {error}") from error
        if version != SCHEMA_VERSION:
            older = "the file" if version < SCHEMA_VERSION else "this ledger"
            text = f"the event table has schema {version}, this ledger {SCHEMA_VERSION}"
            raise failure.of("VERSION", f"{text}: {older} is too old")
        if public_key != self.key.public_key:
            raise failure.of("STORAGE", "seal.key is not the key of this event table")
        self.incarnation = str(incarnation)

    # start

    def replay(self, apply: Callable[[Event], None]) -> None:
        """Verify every record, and give each as an event, in order."""
        check = _Verification(self.incarnation, self.key, self._seals())
        kept = self._acknowledged
        try:
            fault("ledger.replay")
            rows = self._connection.execute(
                "SELECT revision, record, hash FROM event ORDER BY revision"
            )
            for revision, data, hash in rows:
                record = check.next(revision, data, hash)
                if record.number == kept.number and record.hash != kept.hash:
                    check.refuse(record.number, "it is not the one that was acknowledged")
                self._apply(apply, record)
        except (sqlite3.Error, OSError) as error:
            check.refuse(check.number + 1, f"it cannot be read: {error}")
        check.finish()
        if check.number < kept.number:
            check.refuse(check.number + 1, f"it is missing; {kept.number} were acknowledged")
        if kept.is_new and check.number:
            check.refuse(check.number, "the file `acknowledged` is missing")
        sqlite.make_durable(self._connection, self._path)
        kept.format()
        self.number, self.head, self.boot_epoch = check.number, check.head, check.boot_epoch

    def _apply(self, apply: Callable[[Event], None], record: Record) -> None:
        try:
            apply(to_event(record))
        except (failure.InvariantViolation, KeyError, TypeError, ValueError) as error:
            text = f"record {record.number}: {record.kind} does not follow: {error}"
            raise failure.of("STORAGE", text) from error

    def _seals(self) -> dict[int, Seal]:
        try:
            rows = self._connection.execute("SELECT number, hash, key_id, signature FROM seal")
            return {number: Seal(number, *rest) for number, *rest in rows}
        except sqlite3.Error as error:
            raise failure.of("STORAGE", f"the seals cannot be read: {error}") from error

    def chain(self) -> Chain:
        """The writing end, in the next boot epoch."""
        return Chain(ORIGIN, self.incarnation, self.boot_epoch + 1, self.head, self.number)

    # writing

    def append(self, records: Sequence[Record], seals: Sequence[Seal]) -> None:
        """Durable when this returns. Raises `STORAGE` when it may not be: halt then."""
        try:
            self._commit(records, seals)
        except (sqlite3.Error, OSError) as error:
            if not is_full(error) or not self._give_up_reserve():
                raise failure.of("STORAGE", f"a batch was not committed: {error}") from error
            try:
                self._commit(records, seals)  # nothing was synced before: no sync is repeated
            except (sqlite3.Error, OSError) as again:
                raise failure.of("STORAGE", f"the reserve did not help: {again}") from again
        self.number, self.head = records[-1].number, records[-1].hash
        fault("ledger.committed")
        self._acknowledged.write(self.number, self.head)

    def _commit(self, records: Sequence[Record], seals: Sequence[Seal]) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany(
            "INSERT INTO event VALUES (?, ?, ?)", ((r.number, r.data, r.hash) for r in records)
        )
        self._connection.executemany(
            "INSERT INTO seal VALUES (?, ?, ?, ?)",
            ((s.number, s.hash, s.key_id, s.signature) for s in seals),
        )
        fault("ledger.commit")
        self._connection.execute("COMMIT")
        self._commits += 1

    def maintain(self) -> None:
        """Fold the log into the table now and then. Call it when nobody waits."""
        if self._commits < CHECKPOINT_COMMITS:
            return
        self._commits = 0
        try:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            if not is_full(error) or not self._give_up_reserve():
                raise failure.of("STORAGE", f"the log was not folded in: {error}") from error

    def seek_room(self) -> None:
        """While the disk is full: see whether the reserve can be had again."""
        if self.full:
            self._keep_reserve()

    def _keep_reserve(self) -> None:
        descriptor = os.open(self._reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._reserve_bytes)
            self.full = False
        except OSError as error:
            if not is_full(error):
                raise
            os.ftruncate(descriptor, 0)
            self.full = True
        finally:
            os.close(descriptor)

    def _give_up_reserve(self) -> bool:
        """False: it was given up before."""
        given = self._reserve.exists() and self._reserve.stat().st_size > 0
        os.truncate(self._reserve, 0)
        self.full = True
        return given

    # reading

    def page(self, after: int, count_max: int = 256) -> list[tuple[int, bytes]]:
        """Records that follow `after`: (revision, bytes); at least one where there is one."""
        found: list[tuple[int, bytes]] = []
        size = 0
        rows = self._connection.execute(
            "SELECT revision, record FROM event WHERE revision > ? ORDER BY revision LIMIT ?",
            (after, count_max),
        )
        for revision, data in rows:
            size += len(data)
            if found and size > PAGE_BYTES_MAX:
                break
            found.append((revision, data))
        rows.close()
        return found

    def sealed_page(self, after: int) -> tuple[list[bytes], list[Seal]]:
        """Records that follow `after`, ending with a sealed one, and their seals."""
        page = self.page(after)
        if not page:
            return [], []
        rows = self._connection.execute(
            "SELECT number, hash, key_id, signature FROM seal "
            "WHERE number > ? AND number <= ? ORDER BY number",
            (after, page[-1][0]),
        )
        seals = [Seal(*row) for row in rows]
        failure.invariant(bool(seals), "what a seal covers does not fit into a page")
        return [data for number, data in page if number <= seals[-1].number], seals

    def last_seal(self) -> Seal | None:
        """Over the last record; None where there is none yet."""
        rows = self._connection.execute(
            "SELECT number, hash, key_id, signature FROM seal ORDER BY number DESC LIMIT 1"
        ).fetchall()
        return Seal(*rows[0]) if rows else None

    def close(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()
        self._acknowledged.close()
        os.close(self._lock)


@dataclass(slots=True)
class _Verification:
    """Walks the chain from its first record, and names the first that is not as it was written."""

    incarnation: str
    key: SigningKey
    seals: dict[int, Seal]
    number: int = 0
    head: bytes = GENESIS
    boot_epoch: int = 0
    unsealed: int = 0
    _before: Record | None = None

    def next(self, revision: int, data: bytes, hash: bytes) -> Record:
        expected = self.number + 1
        if revision != expected:
            self.refuse(expected, "it is missing")
        try:
            record = chain.parse(data)
            chain.check_link(record, prev=self.head, number=self.number, before=self._before)
        except (failure.FabricError, TypeError) as refused:
            self.refuse(expected, str(refused))
        if (record.origin, record.incarnation) != (ORIGIN, self.incarnation):
            self.refuse(expected, "it is of another chain")
        if record.hash != hash:
            self.refuse(expected, "its hash is not the one beside it")
        self.number, self.head, self._before = record.number, record.hash, record
        self.boot_epoch = record.boot_epoch
        self._check_seal(record)
        return record

    def _check_seal(self, record: Record) -> None:
        seal = self.seals.pop(record.number, None)
        if seal is None:
            self.unsealed += 1
            return
        self.unsealed = 0
        try:
            if seal.hash != record.hash:
                self.refuse(record.number, "its seal is of another record")
            chain.check_seal(seal, self.incarnation, self._verify)
        except (failure.FabricError, TypeError) as refused:
            self.refuse(record.number, str(refused))

    def finish(self) -> None:
        if self.seals:
            self.refuse(self.number + 1, "it is missing, a seal over it is there")
        if self.unsealed:
            self.refuse(self.number, "it has no seal")

    def refuse(self, number: int, why: str) -> NoReturn:
        raise failure.of("STORAGE", f"record {number}: {why}")

    def _verify(self, key_id: str, message: bytes, signature: bytes) -> bool:
        return key_id == self.key.key_id and signing.verify(self.key.public_key, message, signature)
