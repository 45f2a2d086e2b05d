"""A lease in its holder's hands: until when it may be used, what ended it, how it goes back.

    acquire ──► HELD ──a renewal fails──► in jeopardy ──► over
                 │ ▲───── renewed ───────────┘             ▲
                 └─ released, revoked, expired, fenced ────┘

Rules. An operation looks at the holder's own stop before the first byte and after the last one;
bytes that came later are given to nobody. Only an answer of the node moves the stop. Once over, a
lease stays over, and every later use raises the cause of its end. Nobody talks to the network in a
finalizer: a lease that nobody holds any more is put on a list, which the connection works off at
its next call. In a forked child every lease is dead; the parent's goes on.

Two locks. `_lock` guards what is believed and is held for microseconds; `_line` orders renewals and
the release, which talk to others. The numbers `_check_ns` and `_until_ns` are read without a lock,
each at once: an operation compares one before and the other after. Ending the lease sets both to 0.
"""

from __future__ import annotations

import enum
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn, Self

from grafos import _clock, observe
from grafos._clock import NS_PER_MS, boot_ns
from grafos._notice import Notice
from grafos._receipt import TeardownReceipt
from grafos_core import failure
from grafos_core.failure import Degraded, Disconnected, FabricError, Failure, Fenced

if TYPE_CHECKING:
    from types import TracebackType

    from grafos._connection import Fabric
    from grafos._node import NodeLine
    from grafos._share import Giver, Share, ShareView
    from grafos_core.holder import HolderLease

LOOK_NS: Final = 10 * NS_PER_MS
"""An operation looks for news of its lease this often; the fence itself needs no news."""
RENEW_MS_MAX: Final = 5_000
OPERATION_MS_MAX: Final = 10_000

_ADVICE: Final = {
    Failure.LeaseExpired: "acquire again",
    Failure.Revoked: "do not retry; ask whoever revoked it",
    Failure.Fenced: "read again what you rely on, then acquire again",
    Failure.Disconnected: "retry; the lease may still live",
    Failure.Degraded: "save your work: it ends at its deadline unless a renewal succeeds",
    Failure.Incompatible: "change the request",
    Failure.RateLimited: "retry after a while",
    Failure.InternalError: "report the incident id",
}


class LeaseStatus(enum.StrEnum):
    """What the holder believes."""

    ACTIVE = "active"
    JEOPARDY = "jeopardy"
    """It could not be renewed; its deadline stands."""
    EXPIRED = "expired"
    REVOKED = "revoked"
    FENCED = "fenced"
    RELEASED = "released"


@dataclass(slots=True)
class Grip:
    """What it takes to give a lease back; outlives the lease object."""

    node: NodeLine
    lease_id: str
    epoch: int
    kind: str
    keep: bool
    """Outlives its holder: not to be released because he forgot it or went away."""
    detached: bool = False
    """Given out of his hands: not to be released by the end of a block either."""
    taken_over: bool = False
    """The same holder has attached again: the other handle is the one to release."""
    counted: bool = False
    """Among the leases that this process holds, in its metrics."""

    @property
    def node_id(self) -> str:
        return self.node.node_id


LIVE: weakref.WeakValueDictionary[str, Lease] = weakref.WeakValueDictionary()
"""The leases of this process, for those who know only an id."""


class Lease:
    """The right to one slice of one resource until its deadline; a subclass for each kind."""

    __slots__ = (
        "__weakref__", "_callbacks", "_check_ns", "_end", "_expiry_ms", "_fabric", "_generation",
        "_grip", "_holder", "_lifetime_end_ms", "_line", "_lock", "_receipt", "_size_bytes",
        "_target", "_token", "_told_lost", "_ttl_ms", "_until_ns",
    )  # fmt: skip
    kind: ClassVar[str] = ""
    _check_ns: int
    """Boottime from which on an operation looks for news before it begins; 0: at once."""
    _until_ns: int
    """The holder's own stop, by boottime."""
    _size_bytes: int
    _expiry_ms: int
    _generation: int
    _ttl_ms: int
    _lifetime_end_ms: int | None

    def __init__(
        self, fabric: Fabric, grip: Grip, granted: Any, bound: Any, holder: HolderLease
    ) -> None:
        self._fabric, self._grip, self._holder = fabric, grip, holder
        self._generation = bound.generation
        self._size_bytes = bound.size_bytes
        self._ttl_ms = granted.ttl_ms
        self._lifetime_end_ms = granted.lifetime_end_ms or None
        self._expiry_ms = _clock.wall_ms() + bound.remaining_ms
        self._lock, self._line = threading.RLock(), threading.RLock()
        self._callbacks: list[Callable[[Notice], None]] = []
        self._end: FabricError | None = None
        self._receipt: TeardownReceipt | FabricError | None = None
        self._told_lost = False
        self._target = grip.lease_id
        """What the node is asked for by: a lease by its id, a share by what the node calls it."""
        self._token = ""
        """The one that the node took last: what is shared follows from it."""
        self._until_ns = holder.usable_until_ms * NS_PER_MS
        self._check_ns = 0
        LIVE[grip.lease_id] = self

    @property
    def lease_id(self) -> str:
        return self._grip.lease_id

    @property
    def node_id(self) -> str:
        return self._grip.node_id

    @property
    def epoch(self) -> int:
        """The number under which the node accepts operations; the next lease has a higher one."""
        return self._grip.epoch

    @property
    def generation(self) -> int:
        """Rises with each renewal and each attach."""
        return self._generation

    @property
    def ttl_ms(self) -> int:
        """As granted, which may be less than was asked for."""
        return self._ttl_ms

    @property
    def expiry_ms(self) -> int:
        """The end by the wall clock: for people and for `RenewalManager`, not for decisions."""
        return self._expiry_ms

    @property
    def lifetime_end_ms(self) -> int | None:
        """Wall clock; no renewal passes it. None: there is no such end."""
        return self._lifetime_end_ms

    def remaining_ms(self) -> int:
        """How long it may still be used, by this machine's own clock; 0 when it is over."""
        return max(0, self._until_ns - boot_ns()) // NS_PER_MS

    @property
    def valid(self) -> bool:
        """Whether an operation may begin now, by what is known and what has arrived here.

        Asks nobody, never waits, and runs no callbacks.
        """
        self._listen()
        return self._end is None and boot_ns() < self._until_ns and not self._fabric.is_forked

    @property
    def status(self) -> LeaseStatus:
        """What the holder believes, by what is known and what has arrived here; see `valid`."""
        self._listen()
        end = self._end
        if end is not None:
            return _status_of(end)
        with self._lock:
            belief = self._holder.belief(_clock.boot_ms()).value
        if belief == "over":
            return LeaseStatus.EXPIRED
        lost = belief == "jeopardy" or self._told_lost
        return LeaseStatus.JEOPARDY if lost else LeaseStatus.ACTIVE

    def on_notice(self, callback: Callable[[Notice], None]) -> None:
        """Call `callback(notice)` with whatever happens to this lease without having been asked.

        It runs from operations on a lease, from `fabric.poll()` and from `tick()`, in their thread;
        with `fabric.start()` also from the SDK's own. What it raises is logged and goes no further.
        """
        self._callbacks.append(callback)
        self._check_ns = 0

    def renew(self, ttl: float | timedelta | None = None) -> int:
        """Ask for more time; how many milliseconds there are now.

        Args:
            ttl: from now on, in seconds; by default as granted.

        Raises:
            Degraded: code JEOPARDY; nobody could be asked, or the node was silent. The deadline
                has not moved.
            LeaseExpired: it is too late, or (code LIFETIME) the lifetime allows no more.
        """
        self._renew(_ttl_ms(ttl), RENEW_MS_MAX)
        return self.remaining_ms()

    def checkpoint_done(self) -> TeardownReceipt:
        """Within the grace of a revocation: all is saved, the lease may end now. What the node says
        that it took back; `measured["revoke_stage"]` is then `checkpoint_reported`.

        Raises:
            Incompatible: code PRECONDITION; nobody revokes it, and it goes on.
            Revoked, LeaseExpired: it was over before.
            Fenced: the teardown failed; the slice is quarantined.
        """
        with self._line:
            self._look()
            try:
                receipt = self._fabric._checkpointed(self._grip)
            except Fenced as fenced:
                self._finish(failure.of("REVOKED", "its holder reported"))
                self._receipt = fenced
                raise again(fenced, self._grip) from None
            except FabricError as refused:
                raise self._failed_operation(refused) from None
            self._finish(failure.of("REVOKED", "its holder reported"))
            self._receipt = receipt
            return receipt

    def release(self) -> TeardownReceipt:
        """Give the lease back; what the node says it took back. Once done, the same answer again.

        Waits until the ledger has credited the capacity, a second at the most; `credited` says
        whether it has. The lease is over in any case, also when nobody could be told.

        Raises:
            Fenced: the teardown failed; the slice is quarantined.
        """
        self._check_not_forked()
        self._finish(failure.of("LEASE_RELEASED"))
        with self._line:
            known = self._receipt
            if isinstance(known, FabricError):
                raise again(known, self._grip)
            if known is not None and known.credited:
                return known
            if self._grip.taken_over:
                grip = self._grip
                return TeardownReceipt(
                    grip.lease_id, grip.node_id, grip.epoch, grip.kind, credited=False
                )
            try:
                receipt = self._fabric._give_back(self._grip)
            except Fenced as fenced:
                self._receipt = fenced
                raise again(fenced, self._grip) from None
            except BaseException:
                if known is None:
                    self._fabric._abandon(self._grip)
                raise
            self._receipt = receipt
            return receipt

    drop = release

    def detach(self) -> None:
        """Let the lease outlive this process: it lives to its deadline, whoever attaches.

        It still works here; but neither the end of a `with`, nor of the process, nor a handle that
        nobody holds any more gives it back. `release()` does.
        """
        with self._line:
            self._look()
            try:
                self._grip.node.detach(self.lease_id, self.epoch)
            except FabricError as refused:
                raise self._failed_operation(refused) from None
            self._grip.keep = self._grip.detached = True

    def share(
        self,
        *,
        to: str,
        ops: Iterable[str] | None = None,
        offset: int = 0,
        length: int | None = None,
        ttl: float | timedelta | None = None,
    ) -> Share:
        """Let somebody else use a part of it. Asks nobody; the other opens it by its text.

        Args:
            to: the other holder: his `fabric.holder_key`, or his SPIFFE id. Who is named by an id
                cannot pass it on.
            ops: some of "read" and "write"; by default both.
            offset: in bytes, from where on; for memory a multiple of 8, for blocks of 4096.
            length: in bytes; by default all that follows.
            ttl: for how long, in seconds; by default, and at the most, as long as the lease is
                granted now. Renewing the lease does not lengthen it.

        Raises:
            Incompatible: code RANGE; more bytes, or a longer time, than the lease has.
        """
        self._look()
        return self._giver().give(to, ops, offset, length, ttl)

    def shares(self) -> list[ShareView]:
        """What was shared of it and has been opened at the node: parents before children."""
        self._look()
        try:
            return self._giver().tree()
        except FabricError as refused:
            raise self._failed_operation(refused) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release; a block whose lease could not be taken back has not succeeded: `Fenced`."""
        if self._fabric.is_forked or self._grip.detached:
            return
        try:
            self.release()
        except FabricError as failed:
            if error is not None and not isinstance(error, Exception):
                error.add_note(f"and the lease could not be given back: {failed}")
                return  # an interruption goes first
            raise failed from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import asyncio  # slow to load, and most programs do without

        await asyncio.shield(asyncio.to_thread(self.__exit__, kind, error, trace))

    def __del__(self) -> None:
        grip = getattr(self, "_grip", None)
        if grip is None or self._end is not None or grip.keep or self._fabric.is_forked:
            return
        self._fabric._abandon(
            grip
        )  # takes no lock: the collector may run in the middle of anything
        warnings.warn(
            f"lease {grip.lease_id} was never released; it is given back at the next call",
            ResourceWarning,
            stacklevel=2,
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"lease {self.lease_id} is bound to this process: detach() it here, send its id, "
            "and attach(lease_id) there"
        )

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.lease_id} on {self.node_id}, epoch {self.epoch}, "
            f"{self.status}, {self.remaining_ms()} ms left>"
        )

    # What operations and the connection use. Not for users.

    def _giver(self) -> Giver:
        from grafos._share import Giver  # loads what most programs do without
        from grafos_core.share import read_root

        return Giver(self._fabric, self._grip.node, read_root(self._token), self.epoch)

    def _listen(self) -> None:
        """Hear notices that have arrived, without the callbacks that they are for."""
        if self._end is None and not self._fabric.is_forked:
            self._grip.node.listen()

    def _look(self) -> None:
        """Before an operation, when it has not been done for a while: is there news, is it over?"""
        self._check_not_forked()
        self._fabric._hear()
        self._tick()
        with self._lock:
            if self._end is None:
                self._check_ns = min(self._until_ns, boot_ns() + LOOK_NS)
                return
        raise again(self._end, self._grip)

    def _tick(self) -> None:
        """Let time pass for this lease: tell of jeopardy and of the end, each once."""
        if self._end is None and self._is_cut():
            self._ask_for_the_cause()
        told: list[str] = []
        with self._lock:
            if self._end is None:
                told = self._holder.tick(_clock.boot_ms())
        lost = self._grip.node.is_lost(_clock.boot_ms())
        if lost and not self._told_lost and not told:
            told = ["degraded"]
        self._told_lost = lost
        for what in told:
            if what == "expired":
                self._finish(failure.of("LEASE_EXPIRED"), tell="expired")
            else:
                self._tell_jeopardy("the node cannot be reached" if lost else "not renewed")

    def _verdict(self) -> FabricError:
        """Why an operation that moved its bytes must not be believed. May end the lease."""
        self._check_not_forked()
        self._fabric._hear()
        self._tick()
        if self._end is None:
            self._ask_for_the_cause()
        end = self._end
        if end is None:
            return again(failure.of("TORN", "the memory was cut short"), self._grip)
        return again(end, self._grip)

    def _ask_for_the_cause(self) -> None:
        try:
            cause = self._grip.node.cause_of_end(self.lease_id, self.epoch)
        except Disconnected:  # no agent, and yet the memory is gone: the warden has taken it
            cause = failure.of("AGENT_LOST")
        except FabricError as refused:
            cause = failure.of("FENCED", refused.code)
        if cause is not None:
            self._finish(cause, tell=_told_as(cause))

    def _failed_operation(self, refused: FabricError) -> FabricError:
        """What a refusal of the node means: the end of the lease, or only of this operation."""
        from grafos._node import end_of

        end = end_of(refused)
        if end is None:
            self._tick()
            return again(self._end or refused, self._grip)
        self._finish(end, tell=_told_as(end))
        return again(end, self._grip)

    def _operation_ms(self) -> int:
        """How long one operation over the wire may take: never past the lease's own end."""
        return max(1, min(OPERATION_MS_MAX, self.remaining_ms()))

    def _finish(self, cause: FabricError, tell: str = "") -> None:
        """The lease is over; the first cause stands. Idempotent."""
        with self._lock:
            if self._end is not None:
                return
            self._end = cause
            self._until_ns = self._check_ns = 0
            self._holder.ended()
            self._let_go()
            was_counted = self._grip.counted
            if was_counted:
                count_end(self._grip, _status_of(cause))
        if was_counted:
            observe.emit(
                f"lease.{_status_of(cause).value}", lease_id=self.lease_id, kind=self._grip.kind,
                epoch=self.epoch, reason=cause.code,
            )  # fmt: skip
        if tell:
            self._fabric._queue_notice(
                Notice(self.lease_id, tell, cause.code, 0, again(cause, self._grip))
            )

    def _take_memory(self, fd: int | None) -> None:
        """The descriptor that came with the lease, or that there is none."""
        raise NotImplementedError

    def _is_cut(self) -> bool:
        """Whether the fence has fallen already, as far as can be seen without asking."""
        return False

    def _let_go(self) -> None:
        """Forget descriptors; called under the lock. Idempotent."""

    def _noticed(self, notice: Notice) -> bool:
        """The node has told something about this lease; whether it is news. An end is told once."""
        if self._end is not None:
            return False
        ends = _ENDS.get(notice.kind)
        if ends is not None:
            self._finish(notice.failure or failure.of(ends, notice.reason))
        return True

    def _deliver(self, notice: Notice) -> None:
        for callback in list(self._callbacks):
            try:
                callback(notice)
            except Exception:
                import logging  # slow to load, and rarely needed

                log = logging.getLogger("grafos")
                log.exception("a callback for lease %s failed", self.lease_id)

    def _renew_due(self) -> bool:
        with self._lock:
            return self._end is None and self._holder.renew_due(_clock.boot_ms())

    def _timeout_ms(self) -> int | None:
        """How long nothing is due for this lease; None: nothing ever."""
        with self._lock:
            return None if self._end is not None else self._holder.timeout_ms(_clock.boot_ms())

    def _renew(self, ttl_ms: int, timeout_ms: int, granted: Any = None) -> None:
        """`granted`: what admission has said to it already, or what that failed with."""
        with self._line:
            self._look()
            try:
                # Half of what is left: whoever must hear of jeopardy needs the other half to act.
                self._renew_once(ttl_ms, max(1, min(timeout_ms, self.remaining_ms() // 2)), granted)
            except FabricError as refused:
                self._renewal_failed(refused)
                raise self._jeopardy_or(refused) from refused
            self._look()

    def _renew_once(self, ttl_ms: int, timeout_ms: int, granted: Any) -> None:
        self._renewal_sent()
        end_ms = _clock.boot_ms() + timeout_ms
        if granted is None:
            granted = self._fabric._renew(self.lease_id, ttl_ms, timeout_ms)
        elif isinstance(granted, FabricError):
            raise granted
        self._renewal_sent()
        try:
            answer = self._grip.node.extend(granted.token, end_ms - _clock.boot_ms())
        except FabricError as refused:
            raise self._failed_operation(refused) from None
        with self._lock:
            if self._end is not None:
                raise again(self._end, self._grip)
            self._holder.renewed(answer.remaining_ms, _clock.boot_ms())
            self._until_ns = self._holder.usable_until_ms * NS_PER_MS
            self._expiry_ms = max(self._expiry_ms, _clock.wall_ms() + answer.remaining_ms)
            self._generation, self._ttl_ms = answer.generation, granted.lease.ttl_ms
            self._token = granted.token
        observe.FabricMetrics.global_().renewals_total.inc()

    def _renewal_sent(self) -> None:
        with self._lock:
            self._holder.renewal_sent(_clock.boot_ms())

    def _renewal_failed(self, refused: FabricError) -> None:
        observe.FabricMetrics.global_().renew_failures_total.inc(label=refused.code)
        with self._lock:
            if self._end is None:
                self._holder.renewal_failed(_clock.boot_ms())
        self._tick()

    def _jeopardy_or(self, refused: FabricError) -> FabricError:
        """What `renew` raises: the cause of the end, a refusal, or that nobody answered."""
        if self._end is not None:
            return again(self._end, self._grip)
        if refused.retryable:
            return again(failure.of("JEOPARDY", refused.code), self._grip)
        return again(refused, self._grip)

    def _tell_jeopardy(self, why: str) -> None:
        failing = again(failure.of("JEOPARDY", why), self._grip)
        assert isinstance(failing, Degraded)
        observe.emit("lease.jeopardy", lease_id=self.lease_id, epoch=self.epoch, reason=why)
        self._fabric._queue_notice(Notice(self.lease_id, "degraded", why, 0, failing))

    def _check_not_forked(self) -> None:
        if self._fabric.is_forked:
            raise again(
                failure.of("FORKED_CHILD", "connect and acquire in the child itself"), self._grip
            )


def count_end(grip: Grip, status: LeaseStatus) -> None:
    """A lease that was counted when it was taken is over; each once."""
    grip.counted = False
    metrics = observe.FabricMetrics.global_()
    metrics.leases_active.dec(label=grip.kind)
    metrics.lease_ends_total.inc(label=status.value)


_ENDS: Final = {
    "revoked": "REVOKED",
    "expired": "LEASE_EXPIRED",
    "fenced": "FENCED",
    "released": "LEASE_RELEASED",
}
"""Notices that are the end, and the failure where the notice brings none."""


def _status_of(end: FabricError) -> LeaseStatus:
    if end.code == "LEASE_RELEASED":
        return LeaseStatus.RELEASED
    if end.failure is Failure.Revoked:
        return LeaseStatus.REVOKED
    return LeaseStatus.FENCED if end.failure is Failure.Fenced else LeaseStatus.EXPIRED


def _told_as(end: FabricError) -> str:
    """The notice that tells of this end."""
    return _status_of(end).value


def again(cause: FabricError, grip: Grip) -> FabricError:
    """The same failure as a new exception that names lease, epoch, code and what to do."""
    fields = cause.fields()
    fields["lease_id"] = fields["lease_id"] or grip.lease_id
    fields["epoch"] = fields["epoch"] or grip.epoch
    known = failure.CODES.get(cause.code)
    sentence = known.message if known else "refused"
    told = (
        f"{sentence} [{cause.code}], lease {fields['lease_id']} epoch {fields['epoch']} on "
        f"{grip.node_id}: {_ADVICE[cause.failure]}"
    )
    return type(cause)(told, **fields)


def not_there_yet(name: str) -> FabricError:
    """The refusal of something that a later version will have; never silently ignored."""
    return failure.of("OPTION", f"{name} is not there yet in this version")


def _ttl_ms(ttl: float | timedelta | None) -> int:
    if ttl is None:
        return 0
    return duration_ms(ttl, "ttl")


def duration_ms(value: float | timedelta, name: str) -> int:
    """Seconds or a timedelta, as whole milliseconds."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise failure.of("INVALID", f"{name}: seconds or a timedelta")
    if not 0 <= seconds <= 10**9:  # also refuses NaN
        raise failure.of("RANGE", f"{name}: seconds, not negative")
    return round(seconds * 1000)
