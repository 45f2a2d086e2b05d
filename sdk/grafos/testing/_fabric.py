"""The virtual fabric itself: what a test opens, and how it makes things go wrong.

A fault is put in force by a method here and takes effect in the cores: a teardown that is told to
fail is fenced by the agent's own rules, a killed node's leases are taken back by its warden. Most
faults last until they are taken back; as a context manager they last for the block.
"""

from __future__ import annotations

import gc
import hashlib
import random
import weakref
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from cryptography.hazmat.primitives.asymmetric import ec

from grafos._block import BLOCK_BYTES, BlockBuilder
from grafos._cluster.layout import parse_size
from grafos._connection import Fabric, _open
from grafos._lease import Lease, duration_ms
from grafos._memory import MemBuilder
from grafos._revocation import Revocation, revocations
from grafos.testing._agent import Agent
from grafos.testing._control import TRUST_DOMAIN, Caller, Control
from grafos.testing._time import TIME, VirtualTime
from grafos.testing._wire import NearFabric, Network, Place
from grafos_core import failure
from grafos_core import lease as core
from grafos_core.books import BookView
from grafos_core.lease import Kind, LeaseState
from grafos_core.quota import UNLIMITED, Limit
from grafos_core.spiffe import Identity, Role
from grafos_core.teardown import Step
from grafos_proto.wire import certificates

if TYPE_CHECKING:
    from grafos.testing._leaks import Leak

NODES_MAX: Final = 64
MEMORY_DEFAULT: Final = "256MiB"
BLOCKS_DEFAULT: Final = "64MiB"
USER: Final = "uid-1000"
"""Whose processes hold leases here unless a test says otherwise."""

opened: weakref.WeakSet[VirtualFabric] = weakref.WeakSet()
"""Those in use, for the leak kit."""
closing: list[Callable[[VirtualFabric], None]] = []
"""Asked about each fabric before it is closed."""


class Fault:
    """Something that is wrong; `end()`, or the end of a `with`, makes it right again."""

    def __init__(self, what: str, end: Callable[[], None]) -> None:
        self._what, self._end = what, end
        self.is_over = False

    def end(self) -> None:
        """Idempotent."""
        if not self.is_over:
            self.is_over = True
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def __repr__(self) -> str:
        return f"<Fault {self._what}{', over' if self.is_over else ''}>"


class VirtualFabric:
    """Nodes `n1`, `n2`, …, a control plane and a connection, in this process. Made by `fabric`."""

    def __init__(
        self, *, nodes: int, memory_bytes: int, block_bytes: int, seed: int, shared: bool,
        labels: Mapping[str, Mapping[str, str]],
    ) -> None:  # fmt: skip
        if not 1 <= nodes <= NODES_MAX:
            raise failure.of("RANGE", f"nodes: 1 to {NODES_MAX}")
        self.seed = seed
        self._dice = random.Random(seed)
        self._network = Network()
        self._shared = shared
        self._place = Place(TIME, self._network, self._dice)
        self._control = Control(TIME, self._dice)
        self._connections: list[NearFabric] = []
        self.connections_ever: list[NearFabric] = []
        """Closed ones among them: what they left behind is still theirs."""
        self._processes = 0
        self._connection: NearFabric | None = None
        self._is_open = False
        self._is_entered = False
        self.neighbours: set[str] = set()
        """Leases of `exhaust`, which are nobody's leak."""
        capacities = {
            Kind.MEM: memory_bytes // core.Kind.MEM.granule * core.Kind.MEM.granule,
            Kind.BLOCK: block_bytes // BLOCK_BYTES,
        }
        offered = {kind: amount for kind, amount in capacities.items() if amount > 0}
        for number in range(1, nodes + 1):
            node_id = f"n{number}"
            self._control.agents[node_id] = Agent(
                node_id, offered, labels.get(node_id, {}), time=TIME, control=self._control,
                network=self._network, dice=self._dice,
            )  # fmt: skip

    # Life

    def start(self) -> Self:
        """Start all nodes and put the virtual clock in force. Idempotent.

        Raises:
            Incompatible: this process holds leases of a real fabric, whose time must not stop.
        """
        if self._is_open:
            return self
        _refuse_beside_a_real_one()
        self._is_open = True
        TIME.join(self)
        with TIME.lock:
            self._control.start()
            for agent in self._control.agents.values():
                agent.start()
        opened.add(self)
        return self

    def close(self) -> None:
        """Give everything back and let the clock go. Idempotent."""
        if not self._is_open:
            return
        try:
            for each in list(closing):
                each(self)
        finally:
            for connection in list(self._connections):
                connection.close()
            for connection in self.connections_ever:
                connection.perish()  # what was kept ends with the fabric's time
            self._is_open = False
            opened.discard(self)
            TIME.leave(self)
            for agent in self._control.agents.values():
                agent.close()

    def __enter__(self) -> Self:
        self.start()
        self.connection.__enter__()
        self._is_entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from grafos import _defaults

        if self._is_entered and self._connection is not None:
            _defaults.leave(self._connection)
        self.close()

    def __repr__(self) -> str:
        state = "" if self._is_open else ", closed"
        return f"<VirtualFabric {', '.join(self.nodes)}, seed {self.seed}{state}>"

    # Looking

    @property
    def connection(self) -> Fabric:
        """This program's connection, the default of every builder in the `with` block."""
        if self._connection is None or self._connection.closed:
            self._connection = self._connected(Identity(
                TRUST_DOMAIN, Role.HOLDER, "default", self._another_process()
            ))  # fmt: skip
        return self._connection

    @property
    def clock(self) -> VirtualTime:
        return TIME

    @property
    def now_ms(self) -> int:
        """Wall clock, as `lease.expiry_ms` counts."""
        return TIME.now_ms

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(self._control.agents)

    def advance(self, duration: float | timedelta) -> None:
        """Let time pass, in seconds; whatever falls due meanwhile happens, each at its instant."""
        TIME.advance(duration_ms(duration, "advance") / 1000)

    def connect(self, holder: str | None = None, *, tenant: str = "default") -> Fabric:
        """Another process: of the same user, or of this holder."""
        name = self._another_process() if holder is None else holder
        return self._connected(Identity(TRUST_DOMAIN, Role.HOLDER, tenant, name))

    def leases(self, *, state: str | None = None) -> list[core.Lease]:
        """What is charged now, of all holders, as the ledger has it."""
        with TIME.lock:
            found = self._control.lessor.state.leases.values()
            return sorted(
                (lease for lease in found if state in (None, lease.state)),
                key=lambda lease: (lease.granted_at_ms, lease.lease_id),
            )

    def fences(self) -> list[core.Lease]:
        """What is quarantined: each with its cause and evidence."""
        return self.leases(state=LeaseState.FENCED)

    def capacity(self, node: str, kind: str = "mem") -> BookView:
        """A node's book of one kind: total, free, leased, ending, fenced."""
        with TIME.lock:
            self._agent(node)
            view = self._control.lessor.node_view(core.NodeId(node), TIME.now_ms)
            return view.books[Kind(kind)]

    def leaks(self) -> list[Leak]:
        """What is left behind: see `grafos.testing.leaks`."""
        from grafos.testing._leaks import leaks

        return leaks(self)

    def check(self) -> None:
        """Assert every law that the ledger and the nodes can see."""
        with TIME.lock:
            self._control.lessor.check()
            for agent in self._control.agents.values():
                if agent.core is not None:
                    agent.core.check()

    # Harming nodes

    def kill_node(self, node: str) -> Fault:
        """The agent dies. Its warden takes everything back at once; nothing answers there any more.

        The ledger misses it after three seconds. Ends with `start_node`.
        """
        with TIME.lock:
            self._agent(node).kill()
        return Fault(f"{node} is killed", lambda: self.start_node(node))

    def start_node(self, node: str) -> None:
        """Start a killed agent: it recalls its records, and proves back what was bound."""
        with TIME.lock:
            agent = self._agent(node)
            if not agent.is_up:
                agent.start()

    def stop_node(self, node: str) -> Fault:
        """The agent is stopped, as by SIGSTOP; the warden is not, and gives it up after 5 s."""
        with TIME.lock:
            self._agent(node).is_stopped = True
        return Fault(f"{node} is stopped", lambda: self.continue_node(node))

    def continue_node(self, node: str) -> None:
        """Let a stopped agent run on."""
        with TIME.lock:
            agent = self._agent(node)
            if agent.is_stopped:
                agent.resume()
                agent.beat()
                agent.wake()

    def partition(self, one: str, other: str) -> Fault:
        """Cut two parties off from each other: `holder` (this program), `control`, or a node."""
        for party in (one, other):
            if party not in ("holder", "control"):
                self._agent(party)
        cut = frozenset((one, other))
        with TIME.lock:
            self._network.cuts.add(cut)
            if "holder" in cut:
                for node in cut & set(self.nodes):
                    agent = self._agent(node)
                    for session in list(agent.sessions):
                        agent.lose_session(session)
        return Fault(f"{one} and {other} are cut off", lambda: self._heal(cut))

    def _heal(self, cut: frozenset[str]) -> None:
        with TIME.lock:
            self._network.cuts.discard(cut)
            for agent in self._control.agents.values():
                agent.beat()

    def fail_teardown(self, node: str, step: str = "erase", *, times: int | None = None) -> Fault:
        """Let a step of each teardown fail: `reap`, `erase` or `measure`. The node then fences.

        Args:
            times: how often; each step is tried twice. By default until the fault ends.
        """
        which, agent = Step(step), self._agent(node)
        if which is Step.QUIESCE:
            raise failure.of("INVALID", "step: reap, erase or measure")
        agent.failing[which] = times
        return Fault(f"{node} fails to {step}", lambda: agent.failing.update({which: 0}))

    def fail_bind(self, node: str, *, times: int = 1) -> Fault:
        """Let the device refuse the next leases, after the ledger has granted them."""
        agent = self._agent(node)
        agent.failing_binds = times
        return Fault(f"{node} fails to bind", lambda: setattr(agent, "failing_binds", 0))

    # Harming calls

    def lose_answers(self, method: str, *, times: int = 1) -> Fault:
        """The next calls of this method take effect, and the answer is lost on the way."""
        return self._lose(self._network.lost_answers, method, times)

    def lose_requests(self, method: str, *, times: int = 1) -> Fault:
        """The next calls of this method do not arrive."""
        return self._lose(self._network.lost_requests, method, times)

    def _lose(self, of: dict[str, int], method: str, times: int) -> Fault:
        with TIME.lock:
            of[method] = times
        return Fault(f"{method} is lost {times} times", lambda: of.update({method: 0}))

    # Authority and others

    def revoke(
        self,
        lease: str | Lease | None = None,
        reason: str = "",
        grace: float | timedelta = 0,
        **chosen: str,
    ) -> list[Revocation]:
        """As an operator: with a warning and some time, or at once.

        One lease, or all that are chosen by `tenant`, `holder`, `holder_prefix`, `node`, `kind` or
        `key`, as with `Fabric.revoke`; what became of each order.
        """
        lease_id = lease.lease_id if isinstance(lease, Lease) else lease
        named = [] if lease_id is None else [core.check_lease_id(lease_id)]
        grace_ms = duration_ms(grace, "grace")
        return revocations(self._control.revoke, named, chosen, reason, grace_ms)

    def clear_fence(
        self, lease: str | Lease, reason: str, *, accept_residue: bool = False
    ) -> core.Lease:
        """As an operator: erase and measure once more, and free what is clean.

        Returns the lease as it is then: released, or still fenced.
        """
        lease_id = lease.lease_id if isinstance(lease, Lease) else lease
        return self._control.clear(lease_id, reason, accept_residue=accept_residue)

    def set_quota(
        self, tenant: str = "default", kind: str = "mem", *, amount: int | None = None,
        leases: int | None = None,
    ) -> None:  # fmt: skip
        """What a tenant may hold at most, in the kind's unit and in leases."""
        limit = Limit(
            UNLIMITED if amount is None else amount, UNLIMITED if leases is None else leases
        )
        self._control.set_quota(tenant, Kind(kind), limit)

    def exhaust(self, node: str | None = None, kind: str = "mem", *, leave: int = 0) -> Fault:
        """Somebody else leases everything that is free, on this node or on all, but for `leave`."""
        stranger = self.connect("neighbour", tenant="neighbours")
        taken: list[Lease] = []
        for each in self.nodes if node is None else (node,):
            while (left := self.capacity(each, kind).free - leave) > 0:
                amount = min(left, self.capacity(each, kind).largest_free_extent)
                taken.append(_take(stranger, each, kind, amount))
        self.neighbours.update(lease.lease_id for lease in taken)

        def give_back() -> None:
            for lease in taken:
                lease.release()
            stranger.close()

        return Fault(f"{kind} is exhausted on {node or 'all nodes'}", give_back)

    def kill_holder(self, connection: Fabric | None = None) -> None:
        """A holder's process dies without a word: by default the one of this program.

        Its connection is of no more use; `connect()` is the next process.
        """
        dying = self.connection if connection is None else connection
        if not isinstance(dying, NearFabric) or dying not in self._connections:
            raise failure.of("INVALID", "connection: one of this fabric")
        with TIME.lock:
            for session, agent in dying.sessions():
                agent.sessions.pop(session, None)
                agent.verb("holder_exited", session)
        dying.perish()

    # What the clock asks

    def next_ms(self) -> int | None:
        agents = self._control.agents.values()
        all_are_heard = all(agent.hears_control for agent in agents)
        wall_ms = self._control.next_ms(all_are_heard=all_are_heard)
        due = [each.next_ms() for each in agents]
        due += [each.next_ms() for each in self._connections]
        if wall_ms is not None:
            due.append(wall_ms - TIME.now_ms + TIME.boot_ms)
        return min((at_ms for at_ms in due if at_ms is not None), default=None)

    def wake(self) -> None:
        for agent in self._control.agents.values():
            agent.beat()
        self._control.tick()
        for agent in self._control.agents.values():
            agent.wake()

    def beat(self) -> None:
        for connection in list(self._connections):
            connection.beat()

    # Inside

    def _agent(self, node: str) -> Agent:
        found = self._control.agents.get(node)
        if found is None:
            raise failure.of("NOT_FOUND", f"nodes: {', '.join(self.nodes)}")
        return found

    def _another_process(self) -> str:
        self._processes += 1
        return f"{USER}/{self._processes}-1"

    def _connected(self, identity: Identity) -> NearFabric:
        self.start()
        drawn = hashlib.sha256(f"{identity}/{self._dice.getrandbits(64)}".encode()).digest()
        private = ec.derive_private_key(int.from_bytes(drawn[1:], "big"), ec.SECP256R1())
        who = Caller(identity, certificates.thumbprint(private.public_key()))
        made = NearFabric(
            who, private, self._control, self._place, shared=self._shared, on_close=self._forget
        )
        self._connections.append(made)
        self.connections_ever.append(made)
        return made

    def _forget(self, connection: NearFabric) -> None:
        if connection in self._connections:
            self._connections.remove(connection)


def fabric(
    nodes: int = 1,
    *,
    memory: int | str = MEMORY_DEFAULT,
    blocks: int | str = BLOCKS_DEFAULT,
    seed: int = 0,
    shared: bool = True,
    labels: Mapping[str, Mapping[str, str]] | None = None,
) -> VirtualFabric:
    """A fabric in this process, with a clock of its own; a context manager.

    Args:
        nodes: called n1, n2, …
        memory: of each node, in bytes or as in `"64MiB"`; taken only while it is written to.
        blocks: the same, for block leases; 0 for none.
        seed: the same one gives the same ids, placements and signatures.
        shared: memory is handed over, as on one machine; else it is read and written by calls, as
            between machines.
        labels: by node id, for `where`.
    """
    return VirtualFabric(
        nodes=nodes, memory_bytes=_bytes(memory), block_bytes=_bytes(blocks), seed=seed,
        shared=shared, labels=labels or {},
    )  # fmt: skip


def _bytes(size: int | str) -> int:
    return parse_size(size) if isinstance(size, str) else size


def _take(stranger: Fabric, node: str, kind: str, amount: int) -> Lease:
    """All that is free; for a day."""
    if kind == "mem":
        builder = MemBuilder().min_bytes(amount)
        return builder.fabric(stranger).where(node=node).lease_secs(86_400).keep().acquire()
    blocks = BlockBuilder().min_blocks(amount)
    return blocks.fabric(stranger).where(node=node).lease_secs(86_400).keep().acquire()


def _refuse_beside_a_real_one() -> None:
    """The clock is the whole process's: a real lease would never end for its holder."""
    held = _real_leases()
    if held:
        held.clear()
        gc.collect()  # what a test before this one forgot in a cycle is nobody's
        held = _real_leases()
    if held:
        raise failure.of(
            "INVALID", f"this process holds {len(held)} leases of a real fabric: give them back"
        )


def _real_leases() -> list[Lease]:
    return [
        lease
        for connection in list(_open)
        if not isinstance(connection, NearFabric)
        for lease in list(connection._leases.values())
        if lease._end is None
    ]
