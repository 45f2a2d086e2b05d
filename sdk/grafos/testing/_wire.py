"""How the SDK reaches a virtual fabric: its own connection, with calls that stay in the process.

    Network      who can reach whom, and which requests and answers get lost
    NearPeer     in the place of a channel: the message goes to the core, its answer comes back
    NearLine     a node, without sockets
    NearFabric   the connection; everything else about it is `grafos.Fabric`

Rules. What goes in and out are the messages of the real protocol. A call to nobody is refused at
once, as on a unix socket; a call to who is stopped takes all the time that it may.
"""

from __future__ import annotations

import functools
import random
import sys
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from grafos import _clock
from grafos._calls import persist
from grafos._connection import Fabric
from grafos._lease import Lease
from grafos._node import NodeLine
from grafos._notice import Notice, Tell
from grafos._pulse import BEAT_MS_MAX, BEAT_MS_MIN, Pulse
from grafos.testing._agent import Agent, session_of
from grafos.testing._control import Caller, Control
from grafos.testing._device import BLOCK_BYTES
from grafos.testing._keys import hex_of
from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.spiffe import Identity
from grafos_proto.v1 import node_pb2

if TYPE_CHECKING:
    from grafos.testing._time import VirtualTime

PACKETS_MAX: Final = 256


@dataclass(frozen=True, slots=True)
class Shown:
    """Who a virtual holder is; stands where a certificate would."""

    identity: Identity
    thumbprint: str
    key: ec.EllipticCurvePrivateKey
    """What it shares with."""
    chain_pem: bytes = b"virtual"


@dataclass(slots=True)
class Network:
    """Between `holder` (this program), `control` and the nodes by their ids."""

    cuts: set[frozenset[str]] = field(default_factory=set)
    lost_requests: dict[str, int] = field(default_factory=dict)
    """Method to how many of its next requests do not arrive."""
    lost_answers: dict[str, int] = field(default_factory=dict)

    def reaches(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cuts

    def loses(self, of: dict[str, int], method: str) -> bool:
        left = of.get(method, 0)
        of[method] = max(0, left - 1)
        return left > 0


class NearPeer:
    """One service or node, as `grafos._calls.Peer` is one. Thread-safe."""

    def __init__(self, party: Party, who: Caller, place: Place) -> None:
        self._party, self._who, self._place = party, who, place

    def call(self, method: str, request: Any, timeout_ms: float) -> Any:
        """One attempt."""
        place, party = self._place, self._party
        if timeout_ms <= 0:
            raise failure.of("DEADLINE", method)
        with place.time.lock:
            if not place.network.reaches("holder", party.name) or not party.is_up():
                raise failure.of("UNREACHABLE", f"{party.name} does not answer")
            lost = place.network.loses(place.network.lost_requests, method)
        if lost:
            raise failure.of("UNREACHABLE", f"the request {method} was lost")
        if party.is_silent():
            place.time.sleep(timeout_ms / 1000)
            raise failure.of("DEADLINE", f"{method}: {party.name} is silent")
        answer = party.answer(method, place.named(request), self._who, timeout_ms)
        with place.time.lock:
            if place.network.loses(place.network.lost_answers, method):
                raise failure.of("UNREACHABLE", f"the answer to {method} was lost")
        return answer

    def ask(self, method: str, request: Any, timeout_ms: float) -> Any:
        """As often as needed and possible within `timeout_ms`."""
        return persist(
            lambda left_ms: self.call(method, request, left_ms), timeout_ms, self._place.dice.random
        )

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class Place:
    """What all calls of one fabric share."""

    time: VirtualTime
    network: Network
    dice: random.Random
    ids: dict[str, str] = field(default_factory=dict)

    def named(self, request: Any) -> Any:
        """With a request id from our dice: the SDK draws its own from nowhere."""
        if hasattr(request, "requests"):
            return type(request)(requests=[self.named(each) for each in request.requests])
        drawn = getattr(request, "request_id", "")
        if not drawn:
            return request
        with self.time.lock:
            if drawn not in self.ids:
                self.ids[drawn] = hex_of(self.dice)
        copied = type(request)()
        copied.CopyFrom(request)
        copied.request_id = self.ids[drawn]
        return copied


@dataclass(frozen=True, slots=True)
class Party:
    """Who answers."""

    name: str
    is_up: Callable[[], bool]
    is_silent: Callable[[], bool]
    answer: Callable[[str, Any, Caller, float], Any]

    @staticmethod
    def control(control: Control) -> Party:
        def answer(method: str, request: Any, who: Caller, timeout_ms: float) -> Any:
            return control.methods[method](request, who)

        return Party("control", lambda: True, lambda: False, answer)

    @staticmethod
    def node(agent: Agent, time: VirtualTime, *, shared: bool) -> Party:
        desk = Desk(agent, time, shared=shared)

        def answer(method: str, request: Any, who: Caller, timeout_ms: float) -> Any:
            return getattr(desk, method)(request, who, timeout_ms)

        return Party(agent.node_id, lambda: agent.is_up, lambda: agent.is_stopped, answer)


class Desk:
    """NodeService of a virtual node: a method for each of its questions, by their names there."""

    def __init__(self, agent: Agent, time: VirtualTime, *, shared: bool) -> None:
        self._agent, self._time, self._shared = agent, time, shared

    def Bind(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        return self._bind("bind", request, who, timeout_ms)

    def Attach(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        return self._bind("attach", request, who, timeout_ms)

    def Extend(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        token = self._agent.accept(request.token, who)
        answer = self._agent.ask("extend", who, timeout_ms, token, who.key)
        return node_pb2.ExtendResponse(
            remaining_ms=answer.remaining_ms, generation=answer.generation
        )

    def Release(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        args = (request.lease_id, request.epoch, who.key, request.credit_wait_ms)
        is_saved = getattr(request, "checkpoint", False)
        verb = "checkpoint_done" if is_saved else "release"
        answer = self._agent.ask(verb, who, timeout_ms, *args)
        with self._time.lock:
            slip = self._agent.slip(answer.receipt)
        return node_pb2.NodeReleaseResponse(receipt=slip, credited=answer.credited)

    def Detach(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        answer = self._agent.ask(
            "detach", who, timeout_ms, request.lease_id, request.epoch, who.key
        )
        return node_pb2.DetachResponse(remaining_ms=answer.remaining_ms)

    def OpenShare(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        with self._time.lock:
            entry, ops, left_ms = self._agent.show_share(request.chain, who)
        return node_pb2.OpenShareResponse(
            share=entry.digest, lease_id=entry.lease_id, epoch=entry.epoch,
            size_bytes=entry.scope.length, remaining_ms=left_ms, ops=ops,
        )  # fmt: skip

    def EndShare(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        with self._time.lock:
            by = self._agent.speaker(request.lease_id, request.epoch, request.by, who)
            where = (request.lease_id, request.epoch, request.share_id)
            ended = self._agent.shares.end(*where, by=by)
        return node_pb2.EndShareResponse(ended=len(ended))

    def ListShares(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        with self._time.lock:
            below = self._agent.speaker(request.lease_id, request.epoch, request.by, who)
            views = self._agent.shares.tree(
                request.lease_id, below=below, now_ns=self._time.boot_ns()
            )
        return node_pb2.ListSharesResponse(shares=[
            node_pb2.ShareView(
                share_id=each.share_id, parent_id=each.parent_id, depth=each.depth,
                to=str(each.scope.to), ops=each.scope.ops, offset=each.scope.offset,
                length=each.scope.length, remaining_ms=each.remaining_ms, state=each.state,
            )
            for each in views
        ])  # fmt: skip

    def Read(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        with self._time.lock:
            at, length = request.offset, request.length
            if request.share:
                at += self._agent.share_offset(who, request, "read", length)
            data = self._agent.operate(
                who, request.lease_id, request.epoch,
                lambda slice_: slice_.read(at, length), request.share,
            )  # fmt: skip
        return node_pb2.ReadResponse(data=data, checksum=zlib.crc32(data), offset=request.offset)

    def Write(self, request: Any, who: Caller, timeout_ms: float) -> Any:
        with self._time.lock:
            at = request.offset
            if request.share:
                at += self._agent.share_offset(who, request, "write", len(request.data))

            def act(slice_: Any) -> bytes:
                slice_.write(at, request.data)
                return b""

            self._agent.operate(who, request.lease_id, request.epoch, act, request.share)
        return node_pb2.WriteResponse(written=len(request.data))

    def _bind(self, verb: str, request: Any, who: Caller, timeout_ms: float) -> Any:
        token = self._agent.accept(request.token, who)
        session = session_of(who, request.session)
        bound = self._agent.ask(verb, who, timeout_ms, token, who.key, session)
        facts = bound.facts
        with self._time.lock:
            size_bytes = self._agent.slice_of(facts).size_bytes
        return node_pb2.BindResponse(
            lease_id=facts.lease_id, epoch=facts.epoch, generation=facts.generation,
            remaining_ms=bound.remaining_ms, size_bytes=size_bytes,
            block_bytes=BLOCK_BYTES if facts.kind is Kind.BLOCK else 0,
            descriptor=self._shared and facts.kind is Kind.MEM,
        )  # fmt: skip


class NearSession:
    """What a node tells one holder."""

    def __init__(self, agent: Agent, place: Place, session: str, tell: Tell) -> None:
        self._agent, self._network, self._key, self._tell = agent, place.network, session, tell
        self._lock = place.time.lock
        self._inbox: deque[Notice] = deque(maxlen=PACKETS_MAX)
        agent.sessions[session] = self._inbox

    @property
    def is_lost(self) -> bool:
        reached = self._network.reaches("holder", self._agent.node_id)
        return not reached or self._agent.sessions.get(self._key) is not self._inbox

    def poll(self) -> None:
        while self._inbox:
            self._tell(self._inbox.popleft())

    def close(self) -> None:
        with self._lock:
            if self._agent.sessions.get(self._key) is self._inbox:
                self._agent.lose_session(self._key)

    def forget(self) -> None:
        """In a forked child there is nothing to let go of."""


class NearLine(NodeLine):
    """A node that is reached without leaving the process."""

    def __init__(
        self, fabric: NearFabric, agent: Agent, place: Place, *, shared: bool, session: str
    ) -> None:
        super().__init__(
            agent.node_id, agent.endpoint, fabric._provider, session, fabric._told
        )  # fmt: skip
        self._agent, self._place, self._caller = agent, place, fabric.who
        self._peer: Any = NearPeer(Party.node(agent, place.time, shared=shared), fabric.who, place)

    def take_up(self, bound: Any) -> int | None:
        self._join()
        if not bound.descriptor:
            return None
        with self._place.time.lock:
            return self._agent.export(bound.lease_id, bound.epoch)

    def _join(self) -> None:
        with self._place.time.lock:
            session = self._session
            if session is not None and not session.is_lost:
                return
            key = session_of(self._caller, self._session_id)
            came_back = session is not None
            self._session = NearSession(self._agent, self._place, key, self._tell)
            if came_back:
                self._agent.verb("session_back", key)

    def _open_stream(self) -> None:
        """A session that broke is opened anew, if there is somebody to open it with."""
        place = self._place
        reached = place.network.reaches("holder", self.node_id)
        if reached and self._agent.is_up and not self._agent.is_stopped:
            self._join()


class NearPulse(Pulse):
    """The SDK's thread, without a thread: it beats as time is advanced."""

    is_on = False
    due_ms = 0

    def _start(self) -> None:
        self.is_on, self.due_ms = True, 0
        self._in_beat = False

    def is_quiet(self) -> bool:
        return self.is_on and self._in_beat and not self._listening

    def stop(self) -> None:
        self._stopped, self.is_on = True, False

    def beat(self) -> None:
        """If it is time."""
        if not self.is_on or self._stopped or _clock.boot_ms() < self.due_ms:
            return
        self._in_beat = True
        try:
            wait_ms = self._beat()
        finally:
            self._in_beat = False
        if not self._listening:  # nothing else wakes a thread that only renews
            waits = [lease._timeout_ms() for lease in list(self._leases)]
            wait_ms = min((each for each in waits if each is not None), default=BEAT_MS_MAX)
        self.due_ms = _clock.boot_ms() + max(BEAT_MS_MIN, wait_ms)


class NearFabric(Fabric):
    """A connection to a virtual fabric."""

    _is_virtual = True

    def __init__(
        self, who: Caller, private: ec.EllipticCurvePrivateKey, control: Control, place: Place, *,
        shared: bool, on_close: Callable[[NearFabric], None],
    ) -> None:  # fmt: skip
        self.who = who
        shown: Any = Shown(who.identity, who.key, private)
        super().__init__("virtual:control", lambda: shown, on_close=lambda: on_close(self))
        self._admission: Any = NearPeer(Party.control(control), who, place)
        self._control, self._place, self._shared = control, place, shared
        self._session = hex_of(place.dice)
        self._pulse: NearPulse = NearPulse(self)
        self.origins: dict[str, str] = {}
        """Lease to where the program acquired it."""
        self.unread: dict[str, FabricError] = {}
        """Leases that ended or are in danger, and nobody of the program has heard of it."""

    def beat(self) -> None:
        self._pulse.beat()

    def next_ms(self) -> int | None:
        """When the SDK's own thread would wake; None while it does not run, or is at it."""
        pulse = self._pulse
        return pulse.due_ms if pulse.is_on and pulse.due_ms > _clock.boot_ms() else None

    def sessions(self) -> list[tuple[str, Agent]]:
        """The sessions by the names that nodes have for them."""
        key = session_of(self.who, self._session)
        return [(key, agent) for agent in self._control.agents.values()]

    def perish(self) -> None:
        """As if the process had died: nothing is given back, nothing works any more. Idempotent."""
        for each in list(self._leases.values()):
            each._grip.keep = True  # its finalizer must not come back from the dead
            each._finish(failure.of("LEASE_RELEASED", "its process is dead"))
        self.unread.clear()
        self._abandoned.clear()
        self.close()

    def _node(self, node_id: str, endpoint: str) -> NodeLine:
        with self._lock:
            known = self._nodes.get((node_id, endpoint))
            if known is None:
                agent = self._control.agents[node_id]
                known = NearLine(
                    self, agent, self._place, shared=self._shared, session=self._session
                )
                self._nodes[(node_id, endpoint)] = known
            return known

    def _bind(self, verb: str, answer: Any, request: Any, made: Any) -> Any:
        self.origins[answer.lease.lease_id] = origin()
        return super()._bind(verb, answer, request, watched(made))

    def _queue_notice(self, notice: Notice) -> None:
        if notice.failure is not None:
            self.unread[notice.lease_id] = notice.failure
        super()._queue_notice(notice)


class Watched:
    """Of a lease, whether the program has heard how it ended. Mixed into each kind's class."""

    __slots__ = ()

    def _read(self) -> None:
        self._fabric.unread.pop(self.lease_id, None)  # type: ignore[attr-defined]


@functools.cache
def watched(made: type[Lease]) -> type[Lease]:
    """The class, with an ear: a failure counts as read once the program was told of it."""

    class Heard(Watched, made):  # type: ignore[valid-type, misc]
        __slots__ = ()

        def _look(self) -> None:
            try:
                super()._look()
            except FabricError:
                self._read()
                raise

        def _verdict(self) -> FabricError:
            self_said: FabricError = super()._verdict()
            self._read()
            return self_said

        def _failed_operation(self, refused: FabricError) -> FabricError:
            said: FabricError = super()._failed_operation(refused)
            self._read()
            return said

        def _jeopardy_or(self, refused: FabricError) -> FabricError:
            said: FabricError = super()._jeopardy_or(refused)
            self._read()
            return said

        def _deliver(self, notice: Notice) -> None:
            super()._deliver(notice)
            if self._callbacks:
                self._read()

        @property
        def status(self) -> Any:
            found = super().status
            self._read()
            return found

        @property
        def valid(self) -> bool:
            found: bool = super().valid
            self._read()
            return found

    Heard.__name__, Heard.__qualname__ = made.__name__, made.__qualname__
    Heard.__module__, Heard.__doc__ = made.__module__, made.__doc__
    return Heard


def origin() -> str:
    """Where in the program we are, for people: the innermost frame that is not the SDK's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] not in ("grafos", "concurrent", "threading", "asyncio", "contextlib"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    lanes = sys.modules.get("grafos.aio._lanes")
    return (lanes.ASKED_AT.get() if lanes is not None else "") or "a thread of the SDK"
