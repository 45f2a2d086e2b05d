"""The tokens with which machines join: each lets one named node in, once, and soon.

Rules. What is stored is the SHA-256 of a token's secret, so that the file lets nobody in. A token
is gone from the file, durably, before a certificate is signed for it: a crash in between costs a
token and never admits two. Several processes may use the file at once; a lock beside it lets one at
a time. The file carries the version of its schema, and a version that is not ours is refused, not
guessed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import select
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grafos_core import failure, spiffe
from grafos_proto.wire.credentials import read_private, write_file
from grafos_proto.wire.identity import JoinToken, parse_token

SCHEMA = 1
TOKENS_MAX = 256
"""Tokens outstanding at once; keeps the file far below what one read may take."""
TTL_MS_DEFAULT = 600_000
TTL_MS_MAX = 86_400_000
SECRET_BYTES = 24
"""192 bits: nobody guesses one within its life, at any rate."""
LOCK_TRIES_MAX, LOCK_TRY_MS = 100, 10
"""One second: those before us hold the lock for some milliseconds each."""

_Entries = dict[str, dict[str, Any]]


class JoinTokens:
    """The outstanding tokens of one authority, in its folder."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "join-tokens.json"

    def create(self, node_id: str, pin: str, *, ttl_ms: int, now_ms: int) -> str:
        """A new token for one node, good for `ttl_ms`."""
        spiffe.check_identifier(node_id, what="node id")
        if not 0 < ttl_ms <= TTL_MS_MAX:
            raise failure.of("RANGE", f"a join token lives at most {TTL_MS_MAX} ms")
        token = JoinToken(node_id, secrets.token_hex(SECRET_BYTES), pin)
        with locked(self._path):
            entries = self._load(now_ms)
            if len(entries) >= TOKENS_MAX:
                raise failure.of("RATE", "too many join tokens are outstanding")
            entries[_digest(token)] = {"node": node_id, "expires_ms": now_ms + ttl_ms}
            self._store(entries)
        return token.text()

    def consume(self, text: str, *, pin: str, now_ms: int) -> str:
        """The node that this token lets in. The token is used up when this returns.

        One refusal for all causes: who has no token learns nothing of those that exist.
        """
        token = parse_token(text)
        with locked(self._path):
            entries = self._load(now_ms)
            entry = entries.pop(_digest(token), None)
            if entry is None or token.pin != pin:
                raise failure.of("JOIN_TOKEN", "unknown, used, expired, or of another fabric")
            self._store(entries)
        return token.node_id

    def _load(self, now_ms: int) -> _Entries:
        """Those still good, by digest."""
        if not self._path.exists():
            return {}
        stored = load_schema(read_private(self._path), SCHEMA, "join tokens")
        entries: _Entries = stored.get("tokens", {})
        return {key: entry for key, entry in entries.items() if entry["expires_ms"] > now_ms}

    def _store(self, entries: _Entries) -> None:
        text = json.dumps({"schema": SCHEMA, "tokens": entries}, sort_keys=True, indent=1)
        write_file(self._path, text.encode(), mode=0o600)


def load_schema(data: bytes, schema: int, what: str) -> dict[str, Any]:
    """A JSON file of ours, if its version is the one we write."""
    try:
        stored = json.loads(data)
    except ValueError:
        raise failure.of("STORAGE", f"{what}: the file is damaged") from None
    found = stored.get("schema") if isinstance(stored, dict) else None
    if type(found) is not int:
        raise failure.of("STORAGE", f"{what}: the file has no schema version")
    if found != schema:
        side = "program" if found > schema else "file"
        raise failure.of("VERSION", f"{what}: schema {found}, expected {schema}: the {side} is old")
    return dict(stored)


@contextmanager
def locked(path: Path) -> Generator[None, None, None]:
    """Alone among the processes and threads that lock `path`, for the length of a `with`."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path.with_suffix(".lock"), flags, 0o600)
    try:
        _take(descriptor)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> None:
    for _ in range(LOCK_TRIES_MAX):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            select.select([], [], [], LOCK_TRY_MS / 1000)
    raise failure.of("NOT_READY", "another process holds the authority's lock")


def _digest(token: JoinToken) -> str:
    """Covers the node's id too: a token whose id was exchanged is a token that does not exist."""
    return hashlib.sha256(f"{token.node_id}.{token.secret}".encode("ascii")).hexdigest()
