"""The connection of this process to one fabric: who it is, whom it asks, which leases it holds.

    grafos.connect()   GRAFOS_ENDPOINT, else the fabric of `grafos up`, else one of its own
    with connect(…):   the default inside the block
    MemBuilder()       asks the innermost block's fabric, else a process-wide `connect()`

Rules. Nothing runs in the background unless `start()` or `auto_renew()` asked for it: whatever is
waiting (notices, leases that nobody holds any more) is done at the next call, at `poll()`, at
`tick()`. Every call has a deadline. A forked child has none of it: what it inherits refuses to
work, it closes its copies and tells nobody, and the parent goes on as if there were no child.
"""

from __future__ import annotations

import atexit
import os
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from grafos import _clock, _defaults, _identity, observe
from grafos._calls import Peer, new_request_id
from grafos._cluster import description
from grafos._fences import Fence, fence_of
from grafos._lease import LIVE, Grip, Lease, LeaseStatus, count_end, duration_ms
from grafos._node import NodeLine
from grafos._notice import Notice
from grafos._pulse import Pulse
from grafos._receipt import NodeKey, TeardownReceipt, from_slip
from grafos._revocation import Revocation, revocations
from grafos._together import Together
from grafos_core import bundle, failure, lease
from grafos_core.failure import Denied, Disconnected, FabricError, Fenced, LeaseExpired, Revoked
from grafos_core.holder import HolderLease
from grafos_core.lease import LeaseState
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import admission_pb2, admission_pb2_grpc
from grafos_proto.wire import convert
from grafos_proto.wire.credentials import Credentials, Provider

if TYPE_CHECKING:
    from types import TracebackType

    from grafos._builder import Request
    from grafos._share import SharedLease
    from grafos_core.share import Chain

ANSWER_MS_MAX: Final = 10_000
"""For a decision of admission, besides the waiting that was asked for."""
EVIDENCE_MS_MAX: Final = 3_000
"""How long admission waits for fresh evidence when nobody says how long."""
RELEASE_MS_MAX: Final = 2_000
CREDIT_MS_MAX: Final = 1_000
CREDIT_PAUSE_MS: Final = 25
CLOSE_MS_MAX: Final = 3_000
CONNECT_S_DEFAULT: Final = 10.0
LIST_PAGE: Final = 1_000

L = TypeVar("L", bound=Lease)


class Fabric:
    """A connection. Thread-safe; made by `connect` or `local_fabric`."""

    _is_virtual = False
    """Whether it lives by the clock of `grafos.testing`."""

    def __init__(
        self, admission: str, provider: Provider, *, on_close: Callable[[], None] | None = None
    ) -> None:
        self._provider = provider
        self._me = provider().identity
        who = Identity(self._me.trust_domain, Role.SERVICE, None, "admission")
        self._admission = Peer(admission, provider, who, admission_pb2_grpc.AdmissionServiceStub)
        self._together = Together(lambda *call: self._admission.ask(*call))
        self.endpoint = admission
        self.is_forked = False
        self.closed = False
        self._on_close = on_close
        self._session = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._nodes: dict[tuple[str, str], NodeLine] = {}
        self._leases: weakref.WeakValueDictionary[str, Lease] = weakref.WeakValueDictionary()
        self._abandoned: deque[Grip] = deque()
        self._shares_left: deque[tuple[NodeLine, str]] = deque()
        """Shares that nobody has open any more; their finalizers take no lock."""
        self._notices: deque[Notice] = deque()
        self._pulse = Pulse(self)
        _open.add(self)

    @property
    def identity(self) -> str:
        """The SPIFFE id under which this process holds leases."""
        return str(self._me)

    @property
    def holder_key(self) -> str:
        """The thumbprint of this process's key: what others name who share something with it."""
        return self._provider().thumbprint

    @property
    def tenant(self) -> str:
        return self._me.tenant or ""

    def poll(self) -> None:
        """Do what waits: hear the nodes, give back what nobody holds, let time pass, call back."""
        self._check_usable()
        for each in list(self._leases.values()):
            each._tick()
        self._hear()
        self._give_back_abandoned()

    tick = poll

    def start(self) -> None:
        """Let the SDK's own thread poll from now on; callbacks run in it."""
        self._check_usable()
        self._pulse.listen()

    def describe(self, lease_id: str) -> lease.Lease:
        """One lease as the ledger remembers it."""
        request = admission_pb2.GetLeaseRequest(lease_id=lease.check_lease_id(lease_id))
        return convert.lease_from_proto(self._ask("Get", request, ANSWER_MS_MAX))

    def leases(
        self,
        *,
        kind: str | None = None,
        node: str = "",
        holder: str = "",
        state: str | None = None,
        prefix: str = "",
    ) -> Iterator[lease.Lease]:
        """The leases that this identity may see, as the ledger remembers them."""
        after = ""
        while True:
            request = admission_pb2.ListLeasesRequest(
                node_id=node, holder=holder, prefix=prefix, after=after, limit=LIST_PAGE
            )
            if kind is not None:
                request.kind = convert.kind_to_proto(_member(lease.Kind, kind, "kind"))
            if state is not None:
                request.state = convert.state_to_proto(_member(LeaseState, state, "state"))
            page = self._ask("List", request, ANSWER_MS_MAX)
            yield from (convert.lease_from_proto(each) for each in page.leases)
            if not page.next or page.next == after:
                return
            after = page.next

    def fences(self, *, node: str = "") -> list[Fence]:
        """Slices whose teardown failed, of leases that this identity may see: why, and since when.

        What their node has found since is for operators: `grafos fence describe`.
        """
        found = self.leases(node=node, state=LeaseState.FENCED.value)
        return [fence_of(each, _clock.wall_ms()) for each in found]

    def keys(self, *, node: str = "") -> list[NodeKey]:
        """The public keys with which receipts are verified: of all nodes, or of this one.

        Those of nodes that are gone are among them. They may be kept: whoever has a key can verify
        a receipt without the fabric, with `receipt.verify(keys)`.
        """
        answer = self._ask("Keys", admission_pb2.KeysRequest(node_id=node), ANSWER_MS_MAX)
        return [NodeKey(each.key_id, each.owner, each.use, each.public_key) for each in answer.keys]

    def revoke(
        self,
        *lease_ids: str,
        reason: str = "",
        grace: float | timedelta = 0,
        tenant: str = "",
        holder: str = "",
        holder_prefix: str = "",
        node: str = "",
        kind: str | None = None,
        key: str = "",
    ) -> list[Revocation]:
        """Take leases back: one's own, or any for an operator.

        Args:
            lease_ids: which; or choose by the other arguments, which all must fit.
            reason: recorded, and told to the holder.
            holder_prefix: whole segments of a SPIFFE id, for all processes of a user.
            grace: for how many seconds they still work, after a notice; never past their deadline.
                Ordered again, it may become shorter, and never longer.
            key: id of a signing key; the leases of which it signed a token. It signs nothing from
                then on, and no node takes what it has signed. For operators.

        Returns:
            What became of the order for each lease: the lease, or why it was refused.
        """
        chosen = {
            "tenant": tenant, "holder": holder, "holder_prefix": holder_prefix, "node": node,
            "kind": kind or "", "key": key,
        }  # fmt: skip
        named = [lease.check_lease_id(each) for each in lease_ids]
        return revocations(
            lambda request: self._ask("Revoke", request, ANSWER_MS_MAX),
            named, chosen, reason, duration_ms(grace, "grace"),
        )  # fmt: skip

    def close(self) -> None:
        """Give back what is held and not meant to outlive its holder; end all connections."""
        if self.closed or self.is_forked:
            return
        self.closed = True
        self._pulse.stop()
        end_ms = _clock.boot_ms() + CLOSE_MS_MAX
        for each in list(self._leases.values()):
            if not each._grip.keep and each._end is None and _clock.boot_ms() < end_ms:
                self._close_lease(each)
        while self._abandoned and _clock.boot_ms() < end_ms:
            self._give_back_one(self._abandoned.popleft())
        for node in self._lines():
            node.close()
        self._admission.close()
        _open.discard(self)
        if self._on_close is not None:
            self._on_close()

    def __enter__(self) -> Self:
        _defaults.enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _defaults.leave(self)
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a connection belongs to its process: connect in the other one, too")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._leases)} leases"
        return f"<Fabric {self.endpoint} as {self._me}, {state}>"

    # What builders and leases use. Not for users.

    def _acquire(self, request: Request, made: type[L]) -> L:
        """Ask admission, bind at the node, join its session. Whatever fails is given back."""
        self._before_call()
        started_ns = _clock.boot_ns()
        taken = self._bind("Bind", self._granted(request), request, made)
        _count("acquire", taken, started_ns)
        return taken

    def _granted(self, request: Request) -> Any:
        """The grant alone, and the token to bind it with."""
        message = _message_of(request)
        message.request_id = new_request_id()
        message.wait_ms, message.has_wait = request.wait_ms or 0, request.wait_ms is not None
        return self._asked("Acquire", message, _waits_ms(request.wait_ms) + ANSWER_MS_MAX)

    def _acquire_bundle(
        self, members: Sequence[tuple[Request, type[Lease]]], wait_ms: int | None
    ) -> list[Lease]:
        """Ask for all at once, then bind each. Whatever fails, all are given back."""
        self._before_call()
        started_ns = _clock.boot_ns()
        message = admission_pb2.AcquireBundleRequest(
            request_id=new_request_id(),
            members=[_message_of(request) for request, _ in members],
            wait_ms=wait_ms or 0,
            has_wait=wait_ms is not None,
        )
        answer = self._ask("AcquireBundle", message, _waits_ms(wait_ms) + ANSWER_MS_MAX)
        taken: list[Lease] = []
        try:
            for (request, made), granted in zip(members, answer.members, strict=True):
                with bundle.named(len(taken), request.kind):
                    taken.append(self._bind("Bind", granted, request, made))
        except BaseException as error:
            self._undo_bundle(taken, answer.members[len(taken) + 1 :], error)
            raise
        for each in taken:
            _count("acquire", each, started_ns)
        return taken

    def _undo_bundle(
        self, taken: Sequence[Lease], unbound: Sequence[Any], error: BaseException
    ) -> None:
        """The last first. One that cannot be taken back fences its own slice alone."""
        for granted in reversed(unbound):
            node = self._node(granted.lease.node_id, granted.node_endpoint)
            kind = convert.kind_from_proto(granted.lease.kind).value
            self._unbound(Grip(node, granted.lease.lease_id, granted.lease.epoch, kind, keep=False))
        for each in reversed(taken):
            try:
                each.release()
            except FabricError as failed:
                error.add_note(f"and lease {each.lease_id} could not be given back: {failed}")

    def _attach(self, lease_id: str, request: Request, made: type[L]) -> L:
        self._before_call()
        started_ns = _clock.boot_ns()
        message = admission_pb2.AttachRequest(request_id=new_request_id(), lease_id=lease_id)
        answer = self._ask("Attach", message, ANSWER_MS_MAX)
        kind = convert.kind_from_proto(answer.lease.kind).value
        if kind != request.kind:
            raise failure.of("SCOPE", f"the lease is of kind {kind}", lease_id=lease_id)
        taken = self._bind("Attach", answer, request, made)
        _count("attach", taken, started_ns)
        return taken

    def _renew(self, lease_id: str, ttl_ms: int, timeout_ms: float) -> Any:
        request = admission_pb2.RenewRequest(
            request_id=new_request_id(), lease_id=lease_id, ttl_ms=ttl_ms
        )
        return self._asked("Renew", request, timeout_ms)

    def _renew_many(self, lease_ids: Sequence[str], ttl_ms: int, timeout_ms: float) -> list[Any]:
        """The grant, or why there is none, of each."""
        requests = [
            admission_pb2.RenewRequest(
                request_id=new_request_id(), lease_id=lease_id, ttl_ms=ttl_ms
            )
            for lease_id in lease_ids
        ]
        try:
            return self._together.many("Renew", requests, timeout_ms)
        except FabricError as refused:
            return [refused] * len(requests)

    def _checkpointed(self, grip: Grip) -> TeardownReceipt:
        """Tell the node that all is saved; the receipt of the end that follows."""
        answer = grip.node.release(grip.lease_id, grip.epoch, checkpoint=True)
        receipt = from_slip(answer.receipt, credited=answer.credited)
        if receipt.outcome == "fenced":
            raise failure.of("QUARANTINED", lease_id=grip.lease_id, epoch=grip.epoch)
        return receipt

    def _give_back(self, grip: Grip) -> TeardownReceipt:
        """Release at the node; through admission where the node cannot be reached.

        Raises:
            Fenced: the teardown failed.
        """
        started_ns = _clock.boot_ns()
        try:
            answer = grip.node.release(grip.lease_id, grip.epoch)
        except Disconnected:
            receipt = self._settle(grip, release=True)
        except (LeaseExpired, Revoked, Denied):  # over, forgotten, or another holder's by now
            receipt = self._settle(grip, release=False)
        except Fenced as fenced:
            if fenced.code not in ("AGENT_LOST", "EPOCH_BURNT", "EPOCH_STALE"):
                raise
            receipt = self._settle(grip, release=False)
        else:
            receipt = from_slip(answer.receipt, credited=answer.credited)
        took_us = (_clock.boot_ns() - started_ns) / 1000
        observe.FabricMetrics.global_().op_latency.observe(took_us, "release")
        if receipt.outcome == "fenced":
            raise failure.of("QUARANTINED", lease_id=grip.lease_id, epoch=grip.epoch)
        return receipt

    def _abandon(self, grip: Grip) -> None:
        """To be given back at the next call. Safe in a finalizer: takes no lock, does no I/O."""
        self._abandoned.append(grip)

    def _queue_notice(self, notice: Notice) -> None:
        self._notices.append(notice)
        concerned = self._leases.get(notice.lease_id)
        if concerned is not None:
            concerned._check_ns = 0

    def _hear(self) -> None:
        """Take what the nodes have said, and run the callbacks that wait. Never waits."""
        for node in list(self._nodes.values()):
            node.poll()
        while self._shares_left:
            try:
                node, share = self._shares_left.popleft()
            except IndexError:  # another thread was faster
                break
            node.leave_share(share)
        while self._notices and not self._pulse.is_quiet():
            try:
                notice = self._notices.popleft()
            except IndexError:
                return
            concerned = self._leases.get(notice.lease_id)
            if concerned is not None:
                concerned._deliver(notice)

    def _in_child(self) -> None:
        """After a fork, in the child: let go of everything without a word."""
        self.is_forked = True
        self._together = Together(self._ask)
        self._lock = threading.Lock()
        for each in list(self._leases.values()):
            each._check_ns = each._until_ns = 0
            each._let_go()
        for node in self._nodes.values():
            node.forget()

    def _told(self, notice: Notice) -> None:
        """A session passes on a notice; from whichever thread."""
        concerned = self._leases.get(notice.lease_id)
        if concerned is not None and concerned._noticed(notice):
            self._queue_notice(notice)

    def _bind(self, verb: str, answer: Any, request: Request, made: type[L]) -> L:
        granted = answer.lease
        node = self._node(granted.node_id, answer.node_endpoint)
        grip = Grip(node, granted.lease_id, granted.epoch, request.kind, request.keep)
        grip.keep = grip.keep or granted.policy.on_holder_exit == lease.OnHolderExit.KEEP.value
        try:
            bound, sent_ms = node.bind(verb, answer.token)
            holder = HolderLease(
                grip.lease_id,
                remaining_ms=bound.remaining_ms,
                sent_ms=sent_ms,
                now_ms=_clock.boot_ms(),
            )
            taken = made(self, grip, granted, bound, holder)
            taken._token = answer.token
            taken._take_memory(None)
            before = self._leases.get(grip.lease_id)
            self._leases[grip.lease_id] = taken
            if before is not None:  # attached again by its own holder: one of the two goes on
                before._grip.taken_over = True
                before._finish(failure.of("EPOCH_STALE", "attached again in this process"))
            taken._take_memory(node.take_up(bound))
        except BaseException:
            if verb == "Bind":  # what was there before us is not ours to end
                self._unbound(grip)
            raise
        if request.auto_renew:
            self._pulse.renew(taken)
        return taken

    def _open_share(self, chain: Chain, endpoint: str) -> SharedLease:
        from grafos._share import SharedLease

        self._before_call()
        node = self._node(chain.root.node_id, endpoint)
        opened, sent_ms = node.open_share(chain.text)
        return SharedLease(self, node, chain, opened, sent_ms)

    def _unbound(self, grip: Grip) -> None:
        """A grant that was not bound: give it back now if that is quick, else at the next call."""
        half = self._leases.pop(grip.lease_id, None)
        if half is not None:
            half._finish(failure.of("LEASE_RELEASED"))
        try:
            request = admission_pb2.ReleaseRequest(
                request_id=new_request_id(), lease_id=grip.lease_id
            )
            self._asked("Release", request, RELEASE_MS_MAX)
        except FabricError:
            self._abandon(grip)
        except BaseException:
            self._abandon(grip)
            raise

    def _settle(self, grip: Grip, *, release: bool) -> TeardownReceipt:
        """What the ledger says of a lease whose node gave no receipt; released there, if asked.

        Never released if another has attached: it is not ours any more.
        """
        nothing = TeardownReceipt(
            grip.lease_id, grip.node_id, grip.epoch, grip.kind, credited=False
        )
        asked = admission_pb2.GetLeaseRequest(lease_id=grip.lease_id)
        end_ms = _clock.boot_ms() + CREDIT_MS_MAX
        try:
            found = self._admission.ask("Get", asked, RELEASE_MS_MAX)
            if found.holder_key != self._provider().thumbprint:
                return nothing
            if release and not _is_settled(found):
                request = admission_pb2.ReleaseRequest(
                    request_id=new_request_id(), lease_id=grip.lease_id
                )
                found = self._admission.ask("Release", request, RELEASE_MS_MAX).lease
            while not _is_settled(found) and _clock.boot_ms() < end_ms:
                _clock.sleep_ms(CREDIT_PAUSE_MS)
                left_ms = max(1, end_ms - _clock.boot_ms())
                found = self._admission.call("Get", asked, left_ms)
        except FabricError:
            return nothing
        state = convert.state_from_proto(found.state)
        if state is LeaseState.FENCED:
            raise failure.of(
                "QUARANTINED", found.fence_cause, lease_id=grip.lease_id, epoch=grip.epoch
            )
        if state is not LeaseState.RELEASED:
            return nothing
        return TeardownReceipt(
            grip.lease_id, grip.node_id, grip.epoch, grip.kind, credited=True, cause=found.cause
        )

    def _close_lease(self, held: Lease) -> None:
        try:
            held.release()
        except FabricError:  # it ends with this process, or at its deadline
            pass

    def _give_back_abandoned(self) -> None:
        for _ in range(len(self._abandoned)):
            try:
                grip = self._abandoned.popleft()
            except IndexError:
                return
            self._give_back_one(grip)

    def _give_back_one(self, grip: Grip) -> None:
        if grip.counted:
            count_end(grip, LeaseStatus.RELEASED)
        try:
            self._give_back(grip)
        except FabricError:  # its deadline, or the end of this process, takes it back
            pass

    def _before_call(self) -> None:
        self._check_usable()
        self._hear()
        self._give_back_abandoned()

    def _ask(self, method: str, request: Any, timeout_ms: float) -> Any:
        self._check_usable()
        return self._admission.ask(method, request, timeout_ms)

    def _asked(self, method: str, request: Any, timeout_ms: float) -> Any:
        """As `_ask`, together with what other threads ask at this moment."""
        self._check_usable()
        if self._is_virtual:  # one thread at a time, in an order that is the same each time
            return self._admission.ask(method, request, timeout_ms)
        return self._together(method, request, timeout_ms)

    def _node(self, node_id: str, endpoint: str) -> NodeLine:
        with self._lock:
            known = self._nodes.get((node_id, endpoint))
            if known is None:
                known = NodeLine(node_id, endpoint, self._provider, self._session, self._told)
                self._nodes[(node_id, endpoint)] = known
            return known

    def _lines(self) -> list[NodeLine]:
        with self._lock:
            lines = list(self._nodes.values())
            self._nodes.clear()
        return lines

    def _check_usable(self) -> None:
        if self.is_forked:
            raise failure.of("FORKED_CHILD", "connect in the child itself")
        if self.closed:
            raise failure.of("CLOSED", "the connection to the fabric")
        if _clock.is_virtual is not self._is_virtual:
            raise failure.of("INVALID", "a virtual fabric is open, whose time is not the real one")

    def _check_reachable(self, timeout_ms: float) -> None:
        self._ask("List", admission_pb2.ListLeasesRequest(limit=1), timeout_ms)


def connect(
    endpoint: str | None = None,
    *,
    tenant: str | None = None,
    identity: str | Path | Credentials | None = None,
    timeout: float | timedelta = CONNECT_S_DEFAULT,
) -> Fabric:
    """Connect to a fabric.

    Args:
        endpoint: of admission, `unix:<path>` or `<host>:<port>`. By default GRAFOS_ENDPOINT; else
            the fabric that `grafos up` runs on this machine; else one that is started for this
            process and goes with it.
        tenant: refuse unless the identity belongs to this tenant.
        identity: a folder with tls.key, tls.crt and ca.crt, by default GRAFOS_IDENTITY_DIR; where
            there is none, the identity socket of this machine's fabric is asked.
        timeout: for all of it, in seconds.

    Raises:
        Disconnected: nobody answers there.
        Denied: the identity is refused.
    """
    timeout_ms = duration_ms(timeout, "timeout")
    end_ms = _clock.boot_ms() + timeout_ms
    endpoint = endpoint or os.environ.get("GRAFOS_ENDPOINT")
    fabric = Fabric(endpoint, _identity_for(identity)) if endpoint else _found_or_embedded(identity)
    try:
        if tenant is not None and fabric.tenant != tenant:
            raise failure.of("DENIED", f"the identity belongs to tenant {fabric.tenant!r}")
        fabric._check_reachable(max(1, end_ms - _clock.boot_ms()))
    except BaseException:
        fabric.close()
        raise
    return fabric


def to_cluster(
    cluster: description.ClusterDescription,
    identity: str | Path | Credentials | None = None,
    *,
    on_close: Callable[[], None] | None = None,
) -> Fabric:
    """A connection to the fabric that `cluster` describes."""
    provider = (
        _identity_for(identity)
        if identity is not None
        else _identity.from_socket(cluster.identity_socket)
    )
    return Fabric(cluster.admission, provider, on_close=on_close)


def default_fabric() -> Fabric:
    """The innermost block's fabric, of this thread if it is in one; else the process-wide one."""
    inside = _defaults.innermost()
    if inside is not None:
        return connection_of(inside)
    global _default
    with _default_lock:
        if _default is None or _default.closed or _default.is_forked:
            _default = connect()
        return _default


def connection_of(source: Any) -> Fabric:
    """A connection is itself; a local fabric has one."""
    found = source if isinstance(source, Fabric) else getattr(source, "connection", None)
    if not isinstance(found, Fabric):
        raise failure.of("INVALID", "fabric: a connection, or a local fabric")
    return found


def _found_or_embedded(identity: str | Path | Credentials | None) -> Fabric:
    running = description.load()
    if running is not None and running.is_alive():
        return to_cluster(running, identity)
    from grafos._local import local_fabric  # starts processes, which others need not load

    own = local_fabric().start()
    try:
        return to_cluster(own.description, identity, on_close=own.close)
    except BaseException:
        own.close()
        raise


def _identity_for(identity: str | Path | Credentials | None) -> Provider:
    if isinstance(identity, Credentials):
        return _identity.fixed(identity)
    folder = identity or os.environ.get("GRAFOS_IDENTITY_DIR")
    if folder:
        return _identity.from_folder(Path(folder))
    running = description.load()
    if running is None:
        raise failure.of("IDENTITY", "no identity: set GRAFOS_IDENTITY_DIR, or pass identity=")
    return _identity.from_socket(running.identity_socket)


def _message_of(request: Request) -> admission_pb2.AcquireRequest:
    """What is asked for, without an id and without a word on waiting."""
    message = admission_pb2.AcquireRequest(
        kind=convert.kind_to_proto(lease.Kind(request.kind)),
        amount=request.amount or 0,
        ttl_ms=request.ttl_ms,
        where=dict(request.where),
    )
    if request.keep:
        message.policy.on_holder_exit = lease.OnHolderExit.KEEP.value
    message.policy.on_disconnect = request.on_disconnect
    message.policy.reconnect_ms = request.reconnect_ms
    return message


def _waits_ms(wait_ms: int | None) -> int:
    return EVIDENCE_MS_MAX if wait_ms is None else wait_ms


def _is_settled(found: Any) -> bool:
    state = convert.state_from_proto(found.state)
    return state in (LeaseState.RELEASED, LeaseState.FENCED)


def _count(verb: str, taken: Lease, started_ns: int) -> None:
    metrics = observe.FabricMetrics.global_()
    metrics.op_latency.observe((_clock.boot_ns() - started_ns) / 1000, verb)
    with taken._lock:  # a notice may end it at this very moment
        metrics.leases_total.inc()
        metrics.leases_active.inc(label=taken.kind)
        taken._grip.counted = True
        if taken._end is not None:
            count_end(taken._grip, taken.status)
    observe.emit(f"lease.{verb}d", lease_id=taken.lease_id, kind=taken.kind, epoch=taken.epoch)


E_ = TypeVar("E_", lease.Kind, LeaseState)


def _member(members: type[E_], value: str, name: str) -> E_:
    try:
        return members(value)
    except ValueError:
        raise failure.of("INVALID", f"{name}: one of {', '.join(members)}") from None


def _close_all() -> None:
    """At the end of the process: what is held is given back, what is kept is left alone."""
    for fabric in list(_open):
        fabric.close()


def _in_child() -> None:
    """The child's copies are closed, its objects dead; channels of gRPC are left as they lie, since
    taking them down would talk to threads that exist in the parent only."""
    global _default, _default_lock
    for fabric in list(_open):
        fabric._in_child()
        _parents.append(fabric)
    _open.clear()
    _defaults.clear()
    LIVE.clear()
    _default, _default_lock = None, threading.Lock()


_open: weakref.WeakSet[Fabric] = weakref.WeakSet()
_parents: list[Fabric] = []
"""In a child: what it inherited, kept from being taken down."""
_default: Fabric | None = None
_default_lock = threading.Lock()
atexit.register(_close_all)
os.register_at_fork(after_in_child=_in_child)
