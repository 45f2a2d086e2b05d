"""Sharing: a part of a lease in somebody else's hands, for as long as its giver likes.

    text = str(lease.share(to=reader, ops=["read"], offset=0, length=4096))      # here
    with grafos.open_share(text) as share:                                       # there
        share.mem().read(0, 12)

    Share         what was given: a text to pass on, and the way to end it
    SharedLease   what was received: a handle, and the way to pass on less of it

Rules. Giving asks nobody: the text is signed with this process's own key. It is of use to the one
that it is for, and to nobody else, so it may travel openly. Every operation goes to the node, which
looks at the share and its lease each time; nobody is given a descriptor. What is received tells of
its end when it is used next; it is not renewed: its giver gives another one.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from grafos import _clock
from grafos._block import FabricBlock
from grafos._clock import NS_PER_MS, boot_ns
from grafos._lease import LOOK_NS, OPERATION_MS_MAX, Grip, again, duration_ms
from grafos._memory import FabricMem, Memory
from grafos._node import end_of
from grafos_core import failure, share
from grafos_core.failure import FabricError
from grafos_core.holder import HolderLease
from grafos_core.share import Chain, Recipient, Scope

if TYPE_CHECKING:
    from types import TracebackType

    from grafos._builder import Source
    from grafos._connection import Fabric
    from grafos._node import NodeLine

TEXT_CHARS_MAX: Final = share.CHAIN_BYTES_MAX + 512
_ENDPOINT = re.compile(
    r"unix:/[!-~]{1,200}|virtual:[a-z0-9-]{1,63}|[A-Za-z0-9.\[\]:-]{1,255}:[0-9]+"
)
_KEY = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class ShareView:
    """One share in the tree of a lease, as its node knows it."""

    share_id: str
    parent_id: str
    """Of which it was made; empty: of the lease."""
    depth: int
    to: str
    """A holder's key, or his SPIFFE id."""
    ops: tuple[str, ...]
    offset: int
    length: int
    remaining_ms: int
    state: str
    """`open`, `ended` by its giver, or `over`."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a lease that was given to somebody. `str(share)` is the text to pass on."""

    text: str = field(repr=False)
    share_id: str
    lease_id: str
    to: str
    ops: tuple[str, ...]
    offset: int
    """In bytes, from the beginning of the lease or share that it was given of."""
    length: int
    expiry_ms: int
    """Wall clock."""
    _giver: Giver = field(repr=False, compare=False)

    def end(self) -> None:
        """Take it back, with all that was made of it. When this returns, nothing moves under it
        any more. Idempotent; also good for a share that nobody has opened yet.

        Raises:
            Disconnected: the node cannot be reached; the share lives on, to its end at most.
        """
        self._giver.end(self.share_id)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, eq=False)
class Giver:
    """Who shares: a lease, or a share of one."""

    fabric: Fabric
    node: NodeLine
    chain: Chain
    epoch: int
    by: str = ""
    """How the node calls the giver's own share; empty: it is the lease's holder."""

    def give(
        self,
        to: str,
        ops: Iterable[str] | None,
        offset: int,
        length: int | None,
        ttl: float | timedelta | None,
    ) -> Share:
        from grafos_proto.wire import es256

        mine = self.chain.scope
        for number in (offset, 0 if length is None else length):
            if type(number) is not int or number < 0:
                raise failure.of("RANGE", "offset and length: whole numbers, not negative")
        end_ms = mine.end_ms
        if ttl is not None:
            end_ms = _clock.wall_ms() + duration_ms(ttl, "ttl")
        scope = Scope(
            recipient(to),
            mine.ops if ops is None else tuple(sorted(set(ops))),
            mine.offset + offset,
            max(0, mine.length - offset) if length is None else length,
            end_ms,
        )
        given = share.narrowed(self.chain, share_id=secrets.token_hex(16), scope=scope)
        chain = share.mint(self.chain, given, es256.signer(self.fabric._provider().key))
        return Share(
            f"{chain.text}#{self.node.endpoint}", given.share_id, given.lease_id, to, scope.ops,
            offset, scope.length, scope.end_ms, self,
        )  # fmt: skip

    def end(self, share_id: str) -> None:
        try:
            self.node.end_share(self.chain, self.epoch, share_id, self.by)
        except FabricError as refused:
            if end_of(refused) is None:
                raise

    def tree(self) -> list[ShareView]:
        """What was shown to the node of this and of what was made of it."""
        found = self.node.shares(self.chain, self.epoch, self.by)
        return [
            ShareView(
                each.share_id, each.parent_id, each.depth, each.to, tuple(each.ops), each.offset,
                each.length, each.remaining_ms, each.state,
            )
            for each in found
        ]  # fmt: skip


def recipient(to: str) -> Recipient:
    """A key's thumbprint, as `fabric.holder_key` is one, or a SPIFFE id."""
    if not isinstance(to, str):
        raise failure.of("INVALID", "to: a holder's key or SPIFFE id")
    if _KEY.fullmatch(to):
        return Recipient(key=to)
    try:
        return Recipient(name=share.check_name(to))
    except FabricError:
        raise failure.of("INVALID", "to: a holder's key or SPIFFE id") from None


class SharedLease:
    """A part of somebody else's lease. Made by `open_share`; a context manager. Thread-safe."""

    __slots__ = (
        "__weakref__", "_chain", "_end", "_expiry_ms", "_fabric", "_grip", "_heard_ns", "_lock",
        "_memory", "_ops", "_size_bytes", "_target", "_until_ns",
    )  # fmt: skip
    _check_ns: Final = 0
    """Every operation looks first: it goes to the node in any case."""

    def __init__(self, fabric: Fabric, node: NodeLine, chain: Chain, opened: Any, sent_ms: int):
        self._fabric, self._chain = fabric, chain
        self._target: str = opened.share
        self._grip = Grip(node, opened.lease_id, opened.epoch, chain.root.kind.value, keep=True)
        self._size_bytes: int = opened.size_bytes
        self._ops = tuple(opened.ops)
        self._memory: Memory | None = None
        holder = HolderLease(
            opened.lease_id, remaining_ms=opened.remaining_ms, sent_ms=sent_ms,
            now_ms=_clock.boot_ms(),
        )  # fmt: skip
        self._until_ns = holder.usable_until_ms * NS_PER_MS
        self._expiry_ms = chain.scope.end_ms
        self._end: FabricError | None = None
        self._heard_ns = 0
        self._lock = threading.Lock()

    @property
    def share_id(self) -> str:
        return self._chain.lineage[-1]

    @property
    def lease_id(self) -> str:
        """Of the lease that it is of, which is another holder's."""
        return self._grip.lease_id

    @property
    def node_id(self) -> str:
        return self._grip.node_id

    @property
    def epoch(self) -> int:
        return self._grip.epoch

    @property
    def kind(self) -> str:
        return self._grip.kind

    @property
    def ops(self) -> tuple[str, ...]:
        """What may be done: `read`, `write`."""
        return self._ops

    @property
    def expiry_ms(self) -> int:
        """The end by the wall clock, for people. Its lease may end before."""
        return self._expiry_ms

    @property
    def valid(self) -> bool:
        """Whether an operation may begin now, as far as is known here; asks nobody."""
        return self._end is None and boot_ns() < self._until_ns and not self._fabric.is_forked

    def remaining_ms(self) -> int:
        """How long it may be used at most, by this machine's own clock; 0 when it is over."""
        return max(0, self._until_ns - boot_ns()) // NS_PER_MS

    def mem(self) -> FabricMem:
        """The handle to shared memory; its byte 0 is the first one of the share."""
        self._check_kind("mem")
        return FabricMem(self)

    def block(self) -> FabricBlock:
        """The handle to shared blocks; its block 0 is the first one of the share."""
        self._check_kind("block")
        return FabricBlock(self)

    def share(
        self,
        *,
        to: str,
        ops: Iterable[str] | None = None,
        offset: int = 0,
        length: int | None = None,
        ttl: float | timedelta | None = None,
    ) -> Share:
        """Pass on a part of it, as `Lease.share` does. One that was given to a name, and not to a
        key, cannot be passed on."""
        self._look()
        return self._giver().give(to, ops, offset, length, ttl)

    def shares(self) -> list[ShareView]:
        """What was made of it and has been opened, parents before children."""
        self._look()
        try:
            return self._giver().tree()
        except FabricError as refused:
            raise self._failed_operation(refused) from None

    def end(self) -> None:
        """Give it up, and what was made of it: nobody can use it from now on. Idempotent.

        Who only wants to stop using it needs to do nothing.
        """
        if self._end is None:
            self._giver().end(self.share_id)
            self._finish(failure.of("LEASE_RELEASED"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Use it no more; it can be opened again."""
        self._finish(failure.of("CLOSED", "the share"))

    def __del__(self) -> None:
        if getattr(self, "_end", self) is None and not self._fabric.is_forked:
            self._fabric._shares_left.append((self._grip.node, self._target))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a share is opened by the process that it is for: pass its text on")

    def __repr__(self) -> str:
        state = f"{self.remaining_ms()} ms left" if self._end is None else self._end.code
        return f"<SharedLease {self.share_id} of {self.lease_id} on {self.node_id}, {state}>"

    # What handles use

    def _look(self) -> None:
        """Before each operation."""
        if self._fabric.is_forked:
            raise again(failure.of("FORKED_CHILD", "open it in the child itself"), self._grip)
        now_ns = boot_ns()
        if now_ns >= self._heard_ns:
            self._heard_ns = now_ns + LOOK_NS
            self._fabric._hear()
        if self._end is None and now_ns >= self._until_ns:
            self._finish(share.over(self.lease_id, self.epoch))
        if self._end is not None:
            raise again(self._end, self._grip)

    def _verdict(self) -> FabricError:
        """Why bytes that came must not be believed: the time ran out meanwhile."""
        self._finish(share.over(self.lease_id, self.epoch))
        assert self._end is not None
        return again(self._end, self._grip)

    def _failed_operation(self, refused: FabricError) -> FabricError:
        end = end_of(refused)
        if end is None:
            return again(self._end or refused, self._grip)
        self._finish(end)
        return again(end, self._grip)

    def _operation_ms(self) -> int:
        return max(1, min(OPERATION_MS_MAX, self.remaining_ms()))

    def _finish(self, cause: FabricError) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._end, self._until_ns = cause, 0
        self._grip.node.leave_share(self._target)

    def _giver(self) -> Giver:
        return Giver(self._fabric, self._grip.node, self._chain, self.epoch, self._target)

    def _check_kind(self, kind: str) -> None:
        if self.kind != kind:
            raise failure.of("SCOPE", f"the share is of kind {self.kind}", lease_id=self.lease_id)


def open_share(text: str, *, fabric: Source | None = None) -> SharedLease:
    """A share that somebody gave to this process, from the text that he passed on.

    Args:
        fabric: the connection to use; by default the one in force.

    Raises:
        Denied: code HOLDER_MISMATCH, it is for somebody else; others: it is not what a holder of
            the lease has signed.
        LeaseExpired, Revoked, Fenced: it is over, or the lease that it is of.
        Disconnected: the node cannot be reached from here.
    """
    from grafos._connection import connection_of, default_fabric

    chain, endpoint = _read(str(text))
    connection = default_fabric() if fabric is None else connection_of(fabric)
    me = connection.identity
    if not chain.scope.to.is_met_by(key=connection.holder_key, name=me):
        raise failure.of("HOLDER_MISMATCH", "the share is for somebody else")
    return connection._open_share(chain, endpoint)


def _read(text: str) -> tuple[Chain, str]:
    """The chain and where its node is; what it says is for the node to judge."""
    if len(text) > TEXT_CHARS_MAX:
        raise failure.of("TOKEN_ENCODING", "too long")
    chain, _, endpoint = text.strip().partition("#")
    if not _ENDPOINT.fullmatch(endpoint):
        raise failure.of("TOKEN_ENCODING", "where its node is")
    return share.read_chain(chain), endpoint
