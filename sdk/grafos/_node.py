"""One node as this process sees it: what it is asked, and the session that stays open to it.

Rules. Bytes that came back are looked at before they are believed: their number, their place, their
checksum. Which of the node's answers mean that a lease is over is written once, in `end_of`; what
the ledger has a code of its own for is called by that code, whoever said it (`in_one_voice`). There
is one `NodeLine` per node and process; it starts nothing before the first lease is bound.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from grafos import _clock
from grafos._calls import Peer, new_request_id
from grafos._dataport import DataPort, PortDown
from grafos._dataport_ways import Connect, connect_tls, connect_unix, first_of
from grafos._notice import Notice
from grafos._session import LocalSession, Session, StreamSession
from grafos_core import failure
from grafos_core.failure import Denied, Disconnected, FabricError, Fenced, LeaseExpired, Revoked
from grafos_core.lease import EndCause
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import node_pb2, node_pb2_grpc
from grafos_proto.wire.credentials import Provider

if TYPE_CHECKING:
    from grafos_core.share import Chain

CHUNK_BYTES_MAX: Final = 196_608
"""Of one call: the node refuses more. A multiple of a block."""
BIND_MS_MAX: Final = 10_000
RELEASE_MS_MAX: Final = 8_000
"""A teardown takes 5 s at the most, then it has failed; the credit is waited for 1 s more."""
UNREACHABLE_MS, UNREACHABLE_PAUSE_MS = 200, 40
"""A front that is being restarted is back in about that time."""
CREDIT_WAIT_MS: Final = 1_000
DETACH_MS_MAX: Final = 5_000
CAUSE_MS_MAX: Final = 1_000
LOST_MS_MAX: Final = 500
"""A session that is lost for longer is told of: the lease is in jeopardy."""
_ENDED_BY: Final = frozenset(each.value for each in EndCause if each is not EndCause.CLEARED)
_TO_THE_STREAM: Final = frozenset({"HOLDER_MISMATCH", "UNREACHABLE", "DEADLINE", "VERSION"})
"""Refusals of a socket that may be another node's, or that has gone."""


class NodeLine:
    """Calls to one node's front, and the session with it. Thread-safe."""

    def __init__(
        self,
        node_id: str,
        endpoint: str,
        provider: Provider,
        session: str,
        tell: Callable[[Notice], None],
    ) -> None:
        self.node_id, self.endpoint = node_id, endpoint
        domain = provider().identity.trust_domain
        self._who = Identity(domain, Role.NODE, None, node_id)
        self._provider = provider
        self._peer = Peer(endpoint, provider, self._who, node_pb2_grpc.NodeServiceStub)
        self._session_id = session
        self._tell: Callable[[Notice], None] = lambda notice: tell(_in_one_voice(notice))
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._port: DataPort | None = None
        self._ways: list[Connect] = []
        """To the port, the quicker one first."""
        self._lost_since_ms: int | None = None
        self._shared: dict[str, tuple[str, str]] = {}
        """What the node calls a share, to the lease that it is of and its chain."""
        self._sharing: Counter[str] = Counter()
        """Of these, how many have it open here."""

    def bind(self, verb: str, token: str) -> tuple[Any, int]:
        """`Bind` or `Attach`: the answer, and when its request was sent, by boottime."""
        request = node_pb2.BindRequest(token=token, session=self._session_id, push=True)
        sent_ms = _clock.boot_ms()
        answer = self._peer.ask(verb, request, BIND_MS_MAX)
        if answer.pushed and not self._has_come(answer.lease_id):
            request.push = False  # the session broke on the way: ask again, and come for it
            sent_ms = _clock.boot_ms()
            answer = self._peer.ask(verb, request, BIND_MS_MAX)
        return answer, sent_ms

    def _has_come(self, lease_id: str) -> bool:
        session = self._session
        return isinstance(session, LocalSession) and session.await_pushed(lease_id)

    def extend(self, token: str, timeout_ms: float) -> Any:
        request = node_pb2.ExtendRequest(token=token, session=self._session_id)
        return self._peer.ask("Extend", request, timeout_ms)

    def release(self, lease_id: str, epoch: int, *, checkpoint: bool = False) -> Any:
        """The answer with the receipt; a node that is not there is not waited for."""
        request = node_pb2.NodeReleaseRequest(
            request_id=new_request_id(),
            lease_id=lease_id,
            epoch=epoch,
            credit_wait_ms=CREDIT_WAIT_MS,
            checkpoint=checkpoint,
        )
        if self._port is not None:
            self._port.close_lease(lease_id)
        impatient_ms = _clock.boot_ms() + UNREACHABLE_MS
        while True:
            try:
                return self._peer.call("Release", request, RELEASE_MS_MAX)
            except Disconnected as refused:
                if refused.code == "DEADLINE" or _clock.boot_ms() >= impatient_ms:
                    raise
            except Fenced as refused:
                raise in_one_voice(refused) from None
            _clock.sleep_ms(UNREACHABLE_PAUSE_MS)

    def detach(self, lease_id: str, epoch: int) -> None:
        request = node_pb2.DetachRequest(lease_id=lease_id, epoch=epoch)
        self._peer.ask("Detach", request, DETACH_MS_MAX)

    def open_share(self, chain: str) -> tuple[Any, int]:
        """Show a share: the answer, and when it was asked for, by boottime."""
        sent_ms = _clock.boot_ms()
        request = node_pb2.OpenShareRequest(chain=chain)
        opened = self._peer.ask("OpenShare", request, BIND_MS_MAX)
        with self._lock:
            self._shared[opened.share] = opened.lease_id, chain
            self._sharing[opened.share] += 1
        self._find_port(opened)
        if self._port is not None:
            self._port.add_share(opened.share, chain)
        return opened, sent_ms

    def leave_share(self, target: str) -> None:
        """One of those who have it open needs it no more. Does no I/O."""
        with self._lock:
            self._sharing[target] -= 1
            if self._sharing[target] > 0:
                return
            del self._sharing[target]
            self._shared.pop(target, None)
        if self._port is not None:
            self._port.leave_share(target)

    def end_share(self, giver: Chain, epoch: int, share_id: str, by: str) -> None:
        """`by`: what the node calls the share that `giver` ends with; empty: it is a lease's."""
        request = node_pb2.EndShareRequest(
            lease_id=giver.root.lease_id, epoch=epoch, share_id=share_id, by=by
        )
        self._ask_about(giver.text if by else "", "EndShare", request, RELEASE_MS_MAX)

    def shares(self, giver: Chain, epoch: int, by: str) -> Any:
        """As `end_share`: what is below it."""
        request = node_pb2.ListSharesRequest(lease_id=giver.root.lease_id, epoch=epoch, by=by)
        chain = giver.text if by else ""
        return self._ask_about(chain, "ListShares", request, DETACH_MS_MAX).shares

    def _named(self, target: str) -> dict[str, str]:
        """How a lease, or a share by what the node calls it, is named in a call."""
        shared = self._shared.get(target)
        if shared is None:
            return {"lease_id": target}
        return {"lease_id": shared[0], "share": target}

    def _chain(self, target: str) -> str:
        """Of a share, by what the node calls it; empty for a lease."""
        return self._shared.get(target, ("", ""))[1]

    def _ask_about(self, chain: str, method: str, request: Any, timeout_ms: float) -> Any:
        """A front that was started again has not seen a share: its chain is shown once more."""
        end_ms = _clock.boot_ms() + timeout_ms
        try:
            return self._peer.ask(method, request, timeout_ms)
        except Denied as refused:
            if not chain or refused.code != "NOT_FOUND":
                raise
        again = node_pb2.OpenShareRequest(chain=chain)
        self._peer.ask("OpenShare", again, end_ms - _clock.boot_ms())
        return self._peer.ask(method, request, end_ms - _clock.boot_ms())

    def read(
        self, lease_id: str, epoch: int, *, offset: int, length: int, timeout_ms: float
    ) -> bytes:
        """`length` bytes, by the port or in as many calls as it takes."""
        end_ms, parts = _clock.boot_ms() + timeout_ms, []
        port = self._port
        if port is not None and port.is_up:
            try:
                return port.read(lease_id, epoch, offset, length, timeout_ms)
            except PortDown:
                pass  # the calls below reach the node, or say that nothing does
        chain = self._chain(lease_id)
        for at in range(offset, offset + length, CHUNK_BYTES_MAX):
            wanted = min(CHUNK_BYTES_MAX, offset + length - at)
            request = node_pb2.ReadRequest(
                **self._named(lease_id), epoch=epoch, offset=at, length=wanted
            )
            answer = self._ask_about(chain, "Read", request, end_ms - _clock.boot_ms())
            if len(answer.data) != wanted or answer.offset != at:
                raise failure.of("LENGTH", "the node's answer", lease_id=lease_id, epoch=epoch)
            if zlib.crc32(answer.data) != answer.checksum:
                raise failure.of("CHECKSUM", "the node's answer", lease_id=lease_id, epoch=epoch)
            parts.append(answer.data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(
        self,
        lease_id: str,
        epoch: int,
        *,
        offset: int,
        data: bytes | memoryview,
        timeout_ms: float,
        flush: bool = False,
    ) -> None:
        """All of `data`, by the port or in as many calls as it takes; at last `flush`."""
        end_ms, view = _clock.boot_ms() + timeout_ms, memoryview(data)
        port = self._port
        if port is not None and port.is_up:
            try:
                port.write(
                    lease_id, epoch, offset=offset, data=data, timeout_ms=timeout_ms, flush=flush
                )
                return
            except PortDown:
                pass
        chain = self._chain(lease_id)
        for start in range(0, max(1, len(view)), CHUNK_BYTES_MAX):
            part = bytes(view[start : start + CHUNK_BYTES_MAX])
            request = node_pb2.WriteRequest(
                **self._named(lease_id),
                epoch=epoch,
                offset=offset + start,
                data=part,
                length=len(part),
                checksum=zlib.crc32(part),
                has_checksum=True,
                flush=flush and start + CHUNK_BYTES_MAX >= len(view),
            )
            answer = self._ask_about(chain, "Write", request, end_ms - _clock.boot_ms())
            if answer.written != len(part):
                raise failure.of("LENGTH", "the node's answer", lease_id=lease_id, epoch=epoch)

    def read_into(
        self, lease_id: str, epoch: int, *, offset: int, view: memoryview, timeout_ms: float
    ) -> None:
        """As `read`. After a failure there may be something in `view`."""
        port, end_ms = self._port, _clock.boot_ms() + timeout_ms
        if port is not None and port.is_up:
            try:
                port.readinto(lease_id, epoch, offset=offset, view=view, timeout_ms=timeout_ms)
                return
            except PortDown:
                pass
        left_ms = end_ms - _clock.boot_ms()
        view[:] = self.read(lease_id, epoch, offset=offset, length=len(view), timeout_ms=left_ms)

    @property
    def port(self) -> DataPort | None:
        """The data port, while it can be had."""
        port = self._port
        return port if port is not None and port.is_up else None

    def need_port(self) -> DataPort:
        """For operations that calls do not have."""
        port = self._port
        if port is None:
            raise failure.of("OPTION", "the node has no data port for this")
        return port

    def cause_of_end(self, lease_id: str, epoch: int) -> FabricError | None:
        """Why a lease does not work any more, as the node says; None: it knows of no end.

        Raises:
            Disconnected: the node does not answer.
        """
        request = node_pb2.ReadRequest(lease_id=lease_id, epoch=epoch, offset=0, length=0)
        try:
            self._peer.call("Read", request, CAUSE_MS_MAX)
        except FabricError as refused:
            end = end_of(refused)
            if end is None:
                raise
            return end
        return None

    def take_up(self, bound: Any) -> int | None:
        """Join the session with a lease bound just now; its descriptor, where it is given out."""
        self._find_port(bound)
        if bound.handover_path and os.path.exists(bound.handover_path):
            try:
                return self._hand_over(bound)
            except FabricError as refused:
                if refused.code not in _TO_THE_STREAM:
                    raise
        self._open_stream()
        return None

    def listen(self) -> None:
        """Pass on what has arrived from the node. Sends nothing, opens nothing, never waits."""
        session = self._session
        if session is not None:
            session.poll()

    def poll(self) -> None:
        """Pass on what the node has said; open a broken session anew. Never waits."""
        session = self._session
        if session is None:
            return
        session.poll()
        if not session.is_lost:
            self._lost_since_ms = None
            return
        if self._lost_since_ms is None:
            self._lost_since_ms = _clock.boot_ms()
        self._open_stream()

    def is_lost(self, now_ms: int) -> bool:
        """Whether the session has been broken for a while."""
        return self._lost_since_ms is not None and now_ms - self._lost_since_ms >= LOST_MS_MAX

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
        if self._port is not None:
            self._port.close()
        self._peer.close()

    def forget(self) -> None:
        """In a forked child."""
        if self._port is not None:
            self._port.forget()
        if self._session is not None:
            self._session.forget()

    def _find_port(self, bound: Any) -> None:
        """Where bytes may go without calls; nothing is opened before there are any."""
        connects = []
        if bound.data_path and os.path.exists(bound.data_path):
            connects.append(connect_unix(bound.data_path, self._provider, self._who))
        if bound.data_port:
            host = self.endpoint.rpartition(":")[0].strip("[]")
            connects.append(connect_tls(host, bound.data_port, self._provider, self._who))
        with self._lock:
            if connects and self._port is None:
                self._ways, self._port = connects, DataPort(first_of(*connects))
                for target, (_, chain) in self._shared.items():
                    self._port.add_share(target, chain)

    def _hand_over(self, bound: Any) -> int | None:
        """By the socket. The stream that stands is let go once its successor does."""
        with self._lock:
            before = self._session
            if not isinstance(before, LocalSession) or before.is_lost:
                self._session = LocalSession(bound.handover_path, self._session_id, self._tell)
            session = self._session
        assert isinstance(session, LocalSession)
        try:
            descriptor = session.hand_over(bound.lease_id, bound.handover_secret)
        except FabricError:
            with self._lock:
                if isinstance(before, StreamSession) and self._session is session:
                    self._session = before
            raise
        if before is not None and before is not session:
            before.close()
        return descriptor

    def _open_stream(self) -> None:
        with self._lock:
            if isinstance(self._session, StreamSession):
                return
            request = node_pb2.NoticesRequest(session=self._session_id)
            if self._session is not None:
                self._session.close()
            self._session = StreamSession(
                self.node_id, lambda: self._peer.stream("Notices", request), self._tell
            )


def in_one_voice(refused: FabricError) -> FabricError:
    """A failed teardown is `QUARANTINED`, as the ledger calls it. The node says `FENCED`, as of a
    lease that another holder has taken up, but names beside it how the lease had ended."""
    if refused.code != "FENCED" or refused.cause not in _ENDED_BY:
        return refused
    return failure.of(
        "QUARANTINED", refused.detail, lease_id=refused.lease_id, epoch=refused.epoch,
        cause=refused.cause,
    )  # fmt: skip


def _in_one_voice(notice: Notice) -> Notice:
    said = notice.failure
    return notice if said is None else replace(notice, failure=in_one_voice(said))


def end_of(refused: FabricError) -> FabricError | None:
    """What a node's refusal says about the end of a lease that it had bound for us; None: nothing.

    A node that does not know a lease any more has lost it together with its agent.
    """
    if isinstance(refused, LeaseExpired | Revoked | Fenced):
        return in_one_voice(refused)
    if isinstance(refused, Denied) and refused.code in ("NOT_FOUND", "HOLDER_MISMATCH"):
        return failure.of("AGENT_LOST", "the node does not know the lease any more")
    return None
