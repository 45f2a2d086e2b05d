"""What the front does for control, and what it asks of it: the two directions of one link.

    control → open    take a lease up, with its descriptors or its key      → opened
              shut    forget it; say what is still in flight after 250 ms   → shut
              shares_ended   shares that a front before this one ended
              ended   leases that are gone, and why, for those who still ask
              notice  news for a session
              raise   the deadline of an open lease has moved
            serve   everything is opened: let holders in
              stop    take no new calls, finish those in flight             → stopped
    front → bind attach extend release detach   a holder's request, passed on with his name
            holder  a local process has come with its secret; answered once the lease is exported
            session_back session_lost           the connections of a holder
            share_root                          a token that somebody shows as the root of a chain
            share_ended                         remembered for the front after this one
            device_failed                       a lease's bytes cannot be read or written

Rules. What control says is done in the order in which it came, so that a lease is open here before
its holder hears that it is bound. Whoever has to wait for operations in flight waits elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from services.nodeagent.datapath import (
    DataPath,
    Ended,
    LeaseTable,
    MemoryStorage,
    OpenLease,
    Storage,
)
from services.nodeagent.handover import Offer, own_description
from services.nodeagent.ipc import Link, LinkClosed, Message, close_all
from services.nodeagent.sessions import News, Sessions
from services.nodeagent.shares import Shares

SHUTTERS: Final = 4
HOLDER_MS_MAX: Final = 2_000
ANSWER_MS: Final = 2_000
"""Control answers what it does not have to write down in about a millisecond."""


@dataclass(frozen=True, slots=True)
class ControlLine:
    """The front's questions and reports to control. Thread-safe."""

    link: Link
    table: LeaseTable

    def ask(self, op: str, timeout_ms: int, **fields: Any) -> dict[str, Any]:
        """Control's answer; its refusals are raised."""
        try:
            answer, fds = self.link.request({"op": op, **fields}, timeout_ms=timeout_ms)
        except LinkClosed:
            raise failure.of("RETRY_LATER", "the node agent is going down") from None
        close_all(fds)
        if "failure" in answer:
            raise refusal_of(answer["failure"])
        return answer

    def session_back(self, session: str) -> None:
        self._report({"op": "session_back", "session": session})

    def session_lost(self, session: str) -> None:
        self._report({"op": "session_lost", "session": session})

    def device_failed(self, lease_id: str, why: str) -> None:
        self._report({"op": "device_failed", "lease": lease_id, "why": why})

    def prove_root(self, token: str) -> None:
        self.ask("share_root", ANSWER_MS, token=token)

    def share_ended(self, lease_id: str, epoch: int, share_id: str, by: str) -> None:
        """Returns when it will not be forgotten."""
        fields = {"lease": lease_id, "epoch": epoch, "share": share_id, "by": by}
        self.ask("share_ended", ANSWER_MS, **fields)

    def hand_over(self, offer: Offer, pidfd: int) -> int | None:
        """A descriptor of the holder's own, once control knows of him; None if there is none."""
        lease = self.table.find(offer.lease_id, offer.holder_key)
        if lease.handed:
            return _own_descriptor(lease)
        exported = lease.descriptor and isinstance(lease.storage, MemoryStorage)
        question = {"op": "holder", "session": lease.session, "lease": offer.lease_id}
        try:
            answer, fds = self.link.request(
                {**question, "exported": exported}, [pidfd], HOLDER_MS_MAX
            )
        except LinkClosed:
            raise failure.of("RETRY_LATER", "the node agent is going down") from None
        close_all(fds)
        if "failure" in answer:
            raise refusal_of(answer["failure"])
        return _own_descriptor(lease) if exported else None

    def descriptor_for(self, lease_id: str, holder_key: str) -> int | None:
        """One that may be sent at once, since control knows who gets it; None: he has to come."""
        try:
            lease = self.table.find(lease_id, holder_key)
        except FabricError:  # over by now: his first operation says why
            return None
        return _own_descriptor(lease) if lease.handed else None

    def _report(self, message: Message) -> None:
        try:
            self.link.send(message)
        except LinkClosed:
            pass  # control is gone, and this process ends with it


@dataclass(slots=True)
class FrontDesk:
    """Does what control says. `handle` is for the one thread that reads the link."""

    line: ControlLine
    data: DataPath
    sessions: Sessions
    block_storage: Callable[[Message, list[int]], Storage]
    stop: Callable[[], None]
    shares: Shares
    serve: threading.Event = field(default_factory=threading.Event)
    """Set when everything that is open has been opened here."""
    _shutters: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(SHUTTERS, thread_name_prefix="shut")
    )

    def handle(self, message: Message, fds: list[int]) -> None:
        op = message["op"]
        if op == "open":
            self._open(message, fds)
            return
        close_all(fds)
        if op == "shut":
            self._shut(message)
        elif op == "ended":
            for each in message["leases"]:
                self._remember(each["lease"], each)
        elif op == "shares_ended":
            self.shares.learn(message["lease"], message["epoch"], message["ended"])
        elif op == "notice":
            self.sessions.tell(message["session"], news_of(message))
        elif op == "raise":
            self._raise(message)
        elif op == "serve":
            self.serve.set()
        elif op == "stop":
            self._shutters.submit(self._stop, message)

    def _open(self, message: Message, fds: list[int]) -> None:
        kind = Kind(message["kind"])
        storage = self._storage(kind, message, fds)
        lease = OpenLease(
            lease_id=message["lease"],
            slot=message["slot"],
            epoch=message["epoch"],
            generation=message["generation"],
            kind=kind,
            size_bytes=message["size_bytes"],
            holder_key=message["holder_key"],
            deadline_ms=message["deadline_ms"],
            session=message["session"],
            descriptor=message["descriptor"],
            ops=frozenset(message["ops"]),
            storage=storage,
            handed=message["handed"],
        )
        self.line.table.open(lease)
        self.line.link.reply(message, {"op": "opened"})

    def _storage(self, kind: Kind, message: Message, fds: list[int]) -> Storage:
        """Of a lease that is open already, under a lower generation, the one in use."""
        known = self.line.table.opened(message["lease"])
        if known is not None and known.epoch == message["epoch"]:
            close_all(fds)
            known.storage.raise_deadline(message["deadline_ms"])
            return known.storage
        return MemoryStorage(fds[0]) if kind is Kind.MEM else self.block_storage(message, fds)

    def _raise(self, message: Message) -> None:
        lease = self.line.table.opened(message["lease"])
        if lease is not None:
            lease.deadline_ms = max(lease.deadline_ms, message["deadline_ms"])
            lease.storage.raise_deadline(lease.deadline_ms)

    def _shut(self, message: Message) -> None:
        self._remember(message["lease"], message)
        lease = self.line.table.shut(message["lease"])
        self.shares.forget(message["lease"])
        if lease is None:
            self.line.link.reply(message, {"op": "shut", "in_flight": 0})
            return
        if self.data.in_flight(lease.slot) == 0:
            self._shut_when_quiet(message, lease)  # nothing to wait for
        else:
            self._shutters.submit(self._shut_when_quiet, message, lease)

    def _shut_when_quiet(self, message: Message, lease: OpenLease) -> None:
        in_flight = self.data.wait_quiet(lease.slot)
        if in_flight == 0:
            lease.storage.close()
        try:
            self.line.link.reply(message, {"op": "shut", "in_flight": in_flight})
        except LinkClosed:
            pass

    def _stop(self, message: Message) -> None:
        self.stop()
        try:
            self.line.link.reply(message, {"op": "stopped"})
        except LinkClosed:
            pass

    def _remember(self, lease_id: str, fields: Message) -> None:
        if fields.get("failure"):
            ended = Ended(fields["holder_key"], refusal_of(fields["failure"]))
            self.line.table.remember(lease_id, ended)


def _own_descriptor(lease: OpenLease) -> int:
    assert isinstance(lease.storage, MemoryStorage)
    return own_description(lease.storage.descriptor)


def news_of(message: Message) -> News:
    cause = message.get("failure")
    return News(
        lease_id=message["lease"],
        kind=message["kind"],
        reason=message["reason"],
        grace_ms=message["grace_ms"],
        cause=refusal_of(cause) if cause else None,
    )


def refusal_of(fields: dict[str, Any]) -> FabricError:
    """A failure that came over the link."""
    rest = dict(fields)
    return failure.from_fields(rest.pop("class"), rest)


def failure_message(cause: FabricError) -> dict[str, Any]:
    """A failure as it goes over the link."""
    return {"class": type(cause).__name__, **cause.fields()}
