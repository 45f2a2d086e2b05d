"""The collector's memory on disk: all chains in one SQLite file, written by one hand.

    audit.sqlite3   chains, records, seals, keys    acknowledged   which commit we have answered for
    own.key         the collector's own key, 0600   lock           held while a collector runs

Rules. One transaction takes the records of many writers, their seals, their heads and the evidence
against them together: that is why this is a table and not a file per chain, which would need a sync
for each and could tear between them. Nothing is acknowledged before its transaction has ended.

A transaction that found no room is undone and may come again. After any other error nothing more is
written by this process: what a failed sync has kept is not known before the next start reads it.
At start every record of every chain is verified; what is missing or altered is named, and the
collector does not start.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from grafos_core import chain, codec, failure
from grafos_core.chain import GENESIS, Chain, Record, Seal
from grafos_core.collector import Accepted
from grafos_proto.wire.credentials import make_private_directory
from services.runtime import signing, sqlite
from services.runtime.faults import fault
from services.runtime.signing import SigningKey
from services.runtime.sqlite import Mark

SCHEMA_VERSION: Final = 1
CHECKPOINT_COMMITS: Final = 256
PAGE_BYTES_MAX: Final = 192 * 1024
PAGE_RECORDS_MAX: Final = 256
OWN_ORIGIN: Final = "audit"

_TABLES: Final = (
    "CREATE TABLE schema_version (version INTEGER NOT NULL)",
    "CREATE TABLE own (incarnation TEXT NOT NULL, public_key BLOB NOT NULL)",
    "CREATE TABLE commits (count INTEGER NOT NULL)",
    """CREATE TABLE chain (id INTEGER PRIMARY KEY, origin TEXT NOT NULL, incarnation TEXT NOT NULL,
       is_current INTEGER NOT NULL, value BLOB NOT NULL, UNIQUE (origin, incarnation))""",
    """CREATE TABLE key (chain INTEGER NOT NULL, key_id TEXT NOT NULL, public_key BLOB NOT NULL,
       PRIMARY KEY (chain, key_id)) WITHOUT ROWID""",
    """CREATE TABLE record (chain INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL,
       PRIMARY KEY (chain, number)) WITHOUT ROWID""",
    """CREATE TABLE seal (chain INTEGER NOT NULL, number INTEGER NOT NULL, hash BLOB NOT NULL,
       key_id TEXT NOT NULL, signature BLOB NOT NULL, PRIMARY KEY (chain, number)) WITHOUT ROWID""",
)

Name = tuple[str, str]
"""(origin, incarnation)."""


@dataclass(slots=True)
class Batch:
    """What one transaction makes durable."""

    accepted: list[Accepted] = field(default_factory=list)
    keys: dict[Name, dict[str, bytes]] = field(default_factory=dict)
    """Public keys by id, of chains that are new."""
    pages: dict[Name, tuple[bool, list[Any]]] = field(default_factory=dict)
    """Of each chain that changed: whether it is its origin's current one, and the core's state."""
    own: tuple[Record, Seal] | None = None


class Store:
    """All chains. Used by one thread at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._path = directory, directory / "audit.sqlite3"
        self._lock = sqlite.hold_lock(directory / "lock", "collector")
        try:
            self._mark = Mark(directory / "acknowledged")
        except failure.FabricError:
            os.close(self._lock)
            raise
        self._connection: sqlite3.Connection
        self._ids: dict[Name, int] = {}
        self._commits = 0
        self.full = False
        """The last transaction found no room."""
        self.broken = ""
        """Why nothing more is written; empty: nothing is wrong."""
        self.incarnation = ""
        self.own_number, self.own_head, self.own_boot_epoch = 0, GENESIS, 0

    @classmethod
    def open(cls, directory: Path) -> Store:
        make_private_directory(directory)
        store = cls(directory)
        try:
            store._open()
        except (OSError, sqlite3.Error) as error:
            store.close()
            raise failure.of("STORAGE", f"the chains cannot be opened: {error}") from error
        except failure.FabricError:
            store.close()
            raise
        return store

    def _open(self) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        if sqlite.is_lost(self._path) or (not size and self._mark.number):
            raise failure.of("STORAGE", "the table of chains is empty and should not be")
        key_path = self._directory / "own.key"
        if self._mark.is_new and not key_path.exists():
            SigningKey.make(key_path)
        self.key = SigningKey.load(key_path)
        if not size:
            if not self._mark.is_new:
                raise failure.of("STORAGE", "the table of chains is missing")
            sqlite.make(self._path, self._format)
        self._connection = sqlite.connect(self._path)
        self._check_schema()

    def _format(self, connection: sqlite3.Connection) -> None:
        run = connection.execute
        run("BEGIN IMMEDIATE")
        for statement in _TABLES:
            run(statement)
        run("INSERT INTO schema_version VALUES (?)", (SCHEMA_VERSION,))
        run("INSERT INTO own VALUES (?, ?)", (secrets.token_hex(16), self.key.public_key))
        run("INSERT INTO commits VALUES (0)")
        run("COMMIT")

    def _check_schema(self) -> None:
        try:
            ((version,),) = self._connection.execute("SELECT version FROM schema_version")
            ((incarnation, public_key),) = self._connection.execute("SELECT * FROM own")
            ((self._commits,),) = self._connection.execute("SELECT count FROM commits")
        except (sqlite3.Error, ValueError) as error:
            raise failure.of("STORAGE", f"the collector's own data: {error}") from error
        if version != SCHEMA_VERSION:
            older = "the file" if version < SCHEMA_VERSION else "this collector"
            text = f"the chains have schema {version}, this collector {SCHEMA_VERSION}"
            raise failure.of("VERSION", f"{text}: {older} is too old")
        if public_key != self.key.public_key:
            raise failure.of("STORAGE", "own.key is not the key of these chains")
        if self._commits < self._mark.number:
            lost = self._mark.number - self._commits
            raise failure.of("STORAGE", f"the last {lost} transactions are missing")
        if self._mark.is_new and self._commits:
            raise failure.of("STORAGE", "the file `acknowledged` is missing")
        sqlite.make_durable(self._connection, self._path)
        self._mark.format()
        self.incarnation = str(incarnation)

    # start

    def load(self) -> tuple[dict[str, Any], dict[Name, dict[str, bytes]]]:
        """The core's state, and the public keys of each chain; all of it verified."""
        rows = self._connection.execute(
            "SELECT id, origin, incarnation, is_current, value FROM chain ORDER BY id"
        ).fetchall()
        pages, current, keys = [], {}, {}
        for chain_id, origin, incarnation, is_current, value in rows:
            name = (origin, incarnation)
            self._ids[name] = chain_id
            keys[name] = self.keys(name)
            head = self._verify(name, keys[name])
            if name == self.own_name:
                self.own_number, self.own_head, self.own_boot_epoch = head
                continue
            page: Any = codec.decode(value)
            if (page[2], page[3]) != head[:2]:
                _refuse(name, head[0] + 1, f"it is missing; {page[2]} were acknowledged")
            pages.append(page)
            if is_current:
                current[origin] = incarnation
        return {"chains": pages, "incarnations": current}, keys

    @property
    def own_name(self) -> Name:
        return (OWN_ORIGIN, self.incarnation)

    def own_chain(self) -> Chain:
        """The collector's own, in the next boot epoch."""
        boot_epoch = self.own_boot_epoch + 1
        return Chain(OWN_ORIGIN, self.incarnation, boot_epoch, self.own_head, self.own_number)

    def _verify(self, name: Name, keys: dict[str, bytes]) -> tuple[int, bytes, int]:
        """Number, head and boot epoch of a chain whose every record is as it was taken."""
        prev, number, before = GENESIS, 0, None
        sealed = 0
        seals = {seal.number: seal for seal in self._seals(name, 0, chain.NUMBER_MAX)}
        try:
            for data in self._records(name, 1):
                record = chain.parse(data)
                chain.check_link(record, prev=prev, number=number, before=before)
                if (record.origin, record.incarnation) != name:
                    raise failure.of("CHAIN", "it is of another chain")
                prev, number, before = record.hash, record.number, record
                if number in seals:
                    _check_seal(name, record, seals.pop(number), keys)
                    sealed = number
        except sqlite3.Error as error:
            _refuse(name, number + 1, f"it cannot be read: {error}")
        except failure.FabricError as refused:
            if refused.code == "STORAGE":
                raise
            _refuse(name, number + 1, str(refused))
        if sealed != number or seals:
            _refuse(name, sealed + 1, "it has no seal, or a seal has no record")
        return number, prev, before.boot_epoch if before else 0

    # writing

    def commit(self, batch: Batch) -> None:
        """Durable when this returns; `COLLECTOR_DISK` when it is not, and then nothing is."""
        if self.broken:
            raise failure.of("COLLECTOR_DISK", self.broken)
        try:
            self._commit(batch)
        except (sqlite3.Error, OSError) as error:
            self.full = sqlite.is_full(error)
            if not self.full:
                self.broken = "a write failed; what is on disk is known after a restart"
            self._undo()
            why = self.broken or "the disk is full"
            raise failure.of("COLLECTOR_DISK", why) from error
        self._commits += 1
        self.full = False
        fault("audit.acknowledge")
        try:
            self._mark.write(self._commits, bytes(32))
        except OSError as error:
            self.broken = "a write failed; what is on disk is known after a restart"
            raise failure.of("COLLECTOR_DISK", self.broken) from error

    def _commit(self, batch: Batch) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("UPDATE commits SET count = count + 1")
        ids = self._ids | {name: self._put_page(name, *page) for name, page in batch.pages.items()}
        for name, keys in batch.keys.items():
            self._connection.executemany(
                "INSERT OR IGNORE INTO key VALUES (?, ?, ?)",
                ((ids[name], key_id, public_key) for key_id, public_key in keys.items()),
            )
        for each in batch.accepted:
            self._put(ids[each.origin, each.incarnation], each.records, each.seals)
        if batch.own is not None:
            record, seal = batch.own
            ids[self.own_name] = self._put_page(self.own_name, True, [])
            self._connection.execute(
                "INSERT OR IGNORE INTO key VALUES (?, ?, ?)",
                (ids[self.own_name], self.key.key_id, self.key.public_key),
            )
            self._put(ids[self.own_name], [record], [seal])
        fault("audit.append")
        self._connection.execute("COMMIT")
        self._ids = ids

    def _put_page(self, name: Name, is_current: bool, page: list[Any]) -> int:
        if is_current:
            self._connection.execute("UPDATE chain SET is_current = 0 WHERE origin = ?", name[:1])
        rows = self._connection.execute(
            "INSERT INTO chain (origin, incarnation, is_current, value) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET is_current = excluded.is_current, value = excluded.value "
            "RETURNING id",
            (*name, is_current, codec.encode(page)),
        )
        return int(rows.fetchall()[0][0])

    def _put(self, chain_id: int, records: Sequence[Record], seals: Sequence[Seal]) -> None:
        self._connection.executemany(
            "INSERT INTO record VALUES (?, ?, ?)", ((chain_id, r.number, r.data) for r in records)
        )
        self._connection.executemany(
            "INSERT INTO seal VALUES (?, ?, ?, ?, ?)",
            ((chain_id, s.number, s.hash, s.key_id, s.signature) for s in seals),
        )

    def _undo(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            self.broken = f"a write failed and could not be undone: {error}"

    def maintain(self) -> None:
        """Fold the log into the table now and then."""
        if self.broken or not self._commits or self._commits % CHECKPOINT_COMMITS:
            return
        try:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            if not sqlite.is_full(error):
                self.broken = "the log could not be folded in; known after a restart"

    # reading

    def names(self) -> list[Name]:
        return sorted(self._ids)

    def keys(self, name: Name) -> dict[str, bytes]:
        rows = self._connection.execute(
            "SELECT key_id, public_key FROM key WHERE chain = ?", (self._ids[name],)
        )
        return dict(rows.fetchall())

    def lookup(self, origin: str, incarnation: str, number: int) -> bytes | None:
        chain_id = self._ids.get((origin, incarnation))
        row = self._connection.execute(
            "SELECT data FROM record WHERE chain = ? AND number = ?", (chain_id, number)
        ).fetchone()
        return None if row is None else row[0]

    def page(self, name: Name, first: int) -> tuple[list[bytes], list[Seal]]:
        """Records from this number on, as much as one message holds, and the seals over them."""
        found: list[bytes] = []
        size = 0
        rows = self._records(name, first)
        for data in rows:
            size += len(data)
            if found and (size > PAGE_BYTES_MAX or len(found) == PAGE_RECORDS_MAX):
                break
            found.append(data)
        rows.close()
        return found, self._seals(name, first - 1, first + len(found) - 1)

    def _records(self, name: Name, first: int) -> Generator[bytes, None, None]:
        cursor = self._connection.execute(
            "SELECT data FROM record WHERE chain = ? AND number >= ? ORDER BY number",
            (self._ids[name], first),
        )
        yield from (data for (data,) in cursor)

    def _seals(self, name: Name, after: int, last: int) -> list[Seal]:
        rows = self._connection.execute(
            "SELECT number, hash, key_id, signature FROM seal "
            "WHERE chain = ? AND number > ? AND number <= ? ORDER BY number",
            (self._ids[name], after, last),
        )
        return [Seal(*row) for row in rows.fetchall()]

    def close(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()
        self._mark.close()
        os.close(self._lock)


def verifier(keys: dict[str, bytes]) -> chain.VerifySeal:
    """Whether one of these keys made a signature."""

    def verify(key_id: str, message: bytes, signature: bytes) -> bool:
        public_key = keys.get(key_id)
        return public_key is not None and signing.verify(public_key, message, signature)

    return verify


def _check_seal(name: Name, record: Record, seal: Seal, keys: dict[str, bytes]) -> None:
    if seal.hash != record.hash:
        _refuse(name, record.number, "its seal is of another record")
    try:
        chain.check_seal(seal, name[1], verifier(keys))
    except failure.FabricError as refused:
        _refuse(name, record.number, str(refused))


def _refuse(name: Name, number: int, why: str) -> NoReturn:
    raise failure.of("STORAGE", f"record {number} of {name[0]}/{name[1]}: {why}")
