"""The shares of this node's leases, as the front serves them: shown once, then used like leases.

    show   a chain: proved slip by slip, held against the lease that is open here, entered
    find   what was shown, by its name, for the one who showed it
    end    struck out here and, so that the next front knows, at control; then nothing moves

Rules. What a share may do is the least of what its chain says and what is bound here. Its storage
is a window on its lease's, never the descriptor: no share has one. The root's signature is for
control to prove, which has the keys; that was done is remembered by the root's hash. Who has not
proved a chain learns nothing of its lease, not even that it is over.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from grafos_core import failure, jws
from grafos_core.lease import check_lease_id
from grafos_core.share import Chain, judge, read_root, verify_chain
from grafos_core.sharebook import Entry, ShareBook, View
from grafos_core.token import LeaseToken
from grafos_proto.wire import es256
from services.nodeagent.datapath import LeaseTable, MemoryStorage, OpenLease, Storage
from services.runtime.clock import Clock

ROOTS_MAX: Final = 4_096
"""Roots that control has proved; of one that gave way it is asked again."""

ProveRoot = Callable[[str], None]
"""Refuses a token that is not admission's, or not for this node. Its time is no matter here."""


class Shares:
    """Thread-safe."""

    def __init__(self, table: LeaseTable, prove_root: ProveRoot, clock: Clock) -> None:
        self._table, self._prove_root, self._clock = table, prove_root, clock
        self._lock = threading.Lock()
        self._book = ShareBook()
        self._roots: OrderedDict[bytes, LeaseToken] = OrderedDict()

    def show(self, text: str, *, key: str, name: str) -> OpenLease:
        """The share of a chain as a lease of its own, for the caller with this key and name."""
        chain = verify_chain(text, read_root=self._root, verify=es256.verify)
        whole = self._whole(chain.root.lease_id, chain.root.epoch, chain.root.holder_thumbprint)
        now_ms = self._clock.wall_ms()
        judge(chain, key=key, name=name, now_ms=now_ms)
        _check_fits(chain, whole)
        with self._lock:
            entry = self._book.show(chain, key=key, now_ms=now_ms, now_ns=self._clock.boot_ns())
        return _narrowed(whole, entry)

    def find(self, lease_id: str, epoch: int, digest: str, key: str) -> OpenLease:
        """What was shown by who has this key, as it is of the lease that is open now."""
        with self._lock:
            entry = self._book.find(lease_id, digest, key)
        return _narrowed(self._whole(lease_id, epoch, entry.holder_key), entry)

    def end(self, lease_id: str, epoch: int, share_id: str, by: str) -> list[Entry]:
        """Strike one out, in the name of the share `by` or, if empty, of the lease; what ended."""
        with self._lock:
            return self._book.end(lease_id, epoch, share_id, by=by)

    def speaker(self, lease_id: str, epoch: int, digest: str, key: str) -> str:
        """In the name of which share somebody speaks; empty: of the lease itself.

        Raises:
            FabricError: it is not his.
        """
        if not digest:
            self._whole(lease_id, epoch, key)
            return ""
        with self._lock:
            entry = self._book.find(check_lease_id(lease_id), digest, key)
        self._whole(lease_id, epoch, entry.holder_key)
        end = entry.end(self._clock.boot_ns())
        if end is not None:
            raise end
        return entry.share_id

    def tree(self, lease_id: str, below: str) -> list[View]:
        with self._lock:
            return self._book.tree(lease_id, below=below, now_ns=self._clock.boot_ns())

    def learn(self, lease_id: str, epoch: int, ended: Sequence[tuple[str, str]]) -> None:
        """What a front before this one had ended."""
        with self._lock:
            for share_id, by in ended:
                self._book.end(lease_id, epoch, share_id, by=by)

    def forget(self, lease_id: str) -> None:
        """The lease is over."""
        with self._lock:
            self._book.forget(lease_id)

    def _whole(self, lease_id: str, epoch: int, holder_key: str) -> OpenLease:
        whole = self._table.find(lease_id, holder_key)
        if whole.epoch != epoch:
            raise failure.of("EPOCH_STALE", lease_id=lease_id, epoch=whole.epoch)
        return whole

    def _root(self, token: str) -> LeaseToken:
        digest = hashlib.sha256(jws.as_ascii(token)).digest()
        with self._lock:
            known = self._roots.get(digest)
            if known is not None:
                self._roots.move_to_end(digest)
                return known
        self._prove_root(token)
        read = read_root(token).root
        with self._lock:
            self._roots[digest] = read
            while len(self._roots) > ROOTS_MAX:
                self._roots.popitem(last=False)
        return read


class MemoryWindow(MemoryStorage):
    """A part of a lease's memory. Whoever changes words here and there has one lock."""

    def __init__(self, whole: MemoryStorage, base: int) -> None:
        self._whole, self._base = whole, base

    def read(self, offset: int, length: int) -> bytes:
        return self._whole.read(self._base + offset, length)

    def read_into(self, offset: int, view: memoryview) -> None:
        self._whole.read_into(self._base + offset, view)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._whole.write(self._base + offset, data)

    def swap(self, offset: int, expected: int, new: int) -> int:
        return self._whole.swap(self._base + offset, expected, new)

    def add(self, offset: int, amount: int) -> int:
        return self._whole.add(self._base + offset, amount)

    def close(self) -> None:
        """The lease's own storage is closed when the lease ends."""


class Window:
    """A part of a lease's storage that is no memory."""

    def __init__(self, whole: Storage, base: int) -> None:
        self._whole, self._base = whole, base

    def read(self, offset: int, length: int) -> bytes:
        return self._whole.read(self._base + offset, length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._whole.write(self._base + offset, data)

    def flush(self) -> None:
        self._whole.flush()

    def raise_deadline(self, deadline_ms: int) -> None:
        """The lease's own is raised."""

    def close(self) -> None:
        """As that of memory."""


def _check_fits(chain: Chain, whole: OpenLease) -> None:
    """A token that says more than what was bound here is not admission's usual one."""
    if chain.scope.range_end > whole.size_bytes or chain.root.kind is not whole.kind:
        jws.refuse("TOKEN_CLAIM", "more than is bound")


def _narrowed(whole: OpenLease, entry: Entry) -> OpenLease:
    """The lease as a share of it has it: the cause of its end is still for the lease's holder."""
    scope, storage = entry.scope, whole.storage
    window: Storage = (
        MemoryWindow(storage, scope.offset)
        if isinstance(storage, MemoryStorage)
        else Window(storage, scope.offset)
    )
    return replace(
        whole,
        size_bytes=scope.length,
        ops=whole.ops & frozenset(scope.ops),
        storage=window,
        descriptor=False,
        handed=False,
        session="",
        share=entry,
        whole=whole,
    )
