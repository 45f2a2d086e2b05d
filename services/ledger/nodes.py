"""Tells nodes at once what they owe: a burn, an end, a clear.

Rules. This only saves time: a node hears the same with each renewal of its registration, so a call
that fails harms nothing. A node that does not answer is asked again, less and less often, as long
as it owes. One call at a time per node, and few at a time in all, so that no node's slowness holds
up another's for long. A receipt that comes back with the answer is credited like any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from grafos_core.commands import Obligation
from grafos_core.failure import FabricError
from grafos_core.lease import NodeId
from grafos_core.lessor import Lessor
from grafos_core.spiffe import Identity, Role
from grafos_core.timers import Timers
from grafos_proto.v1 import ledger_pb2, node_pb2, node_pb2_grpc
from grafos_proto.wire.credentials import Provider
from services.ledger.writer import Ask, Ledger
from services.runtime.client import Dice, Remote
from services.runtime.clock import Clock
from services.runtime.logs import Log

CALL_MS: Final = 2_000
AGAIN_MS_MIN, AGAIN_MS_MAX = 500, 10_000
AT_A_TIME: Final = 8
PER_TURN: Final = 64
"""Obligations of one node that one turn tells of; the node itself asks for all."""


@dataclass(slots=True)
class _Known:
    endpoint: str
    remote: Remote[Any]
    tries: int = 0
    busy: bool = False
    again: bool = False
    """Something new came while a call was under way."""


class Nodes:
    """Started once; woken by the ledger's own thread."""

    def __init__(
        self, ledger: Ledger, to_proto: Callable[[Obligation, int], ledger_pb2.Obligation],
        credit: Callable[[str, str], Any], *, provider: Provider, trust_domain: str, dice: Dice,
        clock: Clock, log: Log,
    ) -> None:  # fmt: skip
        self._ledger, self._to_proto, self._credit = ledger, to_proto, credit
        self._provider, self._trust_domain = provider, trust_domain
        self._dice, self._clock, self._log = dice, clock, log
        self._timers: Timers[NodeId] = Timers()
        self._known: dict[NodeId, _Known] = {}
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self._pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="nodes")
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self, nodes: Iterable[NodeId]) -> None:
        """These nodes have something new to do."""
        with self._changed:
            for node_id in nodes:
                self._timers.set(node_id, self._clock.boot_ms())
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(CALL_MS / 1000)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for known in self._known.values():
            known.remote.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                due = self._timers.due(self._clock.boot_ms())
                if not due:
                    next_ms = self._timers.next_ms()
                    left_ms = None if next_ms is None else next_ms - self._clock.boot_ms()
                    self._changed.wait(None if left_ms is None else max(1, left_ms) / 1000)
                    continue
            for node_id in due:
                self._begin(node_id)

    def _begin(self, node_id: NodeId) -> None:
        with self._changed:
            known = self._known.get(node_id)
            if known is not None and known.busy:
                known.again = True
                return
            if known is not None:
                known.busy = True
            if not self._closed:
                self._pool.submit(self._turn, node_id).add_done_callback(self._done)

    def _done(self, turn: Future[None]) -> None:
        """What a turn raised that is no failure of ours would vanish in the pool."""
        error = None if turn.cancelled() else turn.exception()
        if error is not None:
            self._log.error("node.push_failed", error)

    def _turn(self, node_id: NodeId) -> None:
        """Tell one node of what it owes now; come back while it owes."""
        owed, known = 0, None
        try:
            owing, endpoint = self._ledger.read(lambda lessor, now: self._look(lessor, node_id))
            owed = len(owing)
            if owed and endpoint:
                known = self._remote(node_id, endpoint)
                self._tell(node_id, known.remote, owing)
                known.tries = 0
        except FabricError as error:
            self._log.debug("node.unreached", node_id=node_id, code=error.code)
        finally:
            self._end(node_id, known, owed)

    def _end(self, node_id: NodeId, known: _Known | None, owed: int) -> None:
        with self._changed:
            known = known or self._known.get(node_id)
            if known is None:
                return
            again, known.again, known.busy = known.again, False, False
            if again:
                self._timers.set(node_id, self._clock.boot_ms())
            elif owed:
                known.tries += 1
                grown = min(AGAIN_MS_MAX, AGAIN_MS_MIN * 2 ** min(known.tries, 8))
                pause_ms = int(grown * (0.75 + 0.5 * self._dice()))
                self._timers.set(node_id, self._clock.boot_ms() + pause_ms)
            self._changed.notify()

    def _look(self, lessor: Lessor, node_id: NodeId) -> tuple[list[Obligation], str]:
        node = lessor.state.nodes.get(node_id)
        endpoint = node.control_endpoint if node is not None else ""
        return lessor.obligations(node_id)[:PER_TURN], endpoint

    def _remote(self, node_id: NodeId, endpoint: str) -> _Known:
        with self._changed:
            known = self._known.get(node_id)
            if known is None or known.endpoint != endpoint:
                if known is not None:
                    known.remote.close()
                peer = Identity(self._trust_domain, Role.NODE, None, node_id)
                known = self._known[node_id] = _Known(
                    endpoint,
                    Remote(
                        endpoint, peer, self._provider, node_pb2_grpc.NodeControlStub,
                        dice=self._dice, clock=self._clock,
                    ),
                    busy=True,
                )  # fmt: skip
            return known

    def _tell(self, node_id: NodeId, remote: Remote[Any], owing: list[Obligation]) -> None:
        now_ms = self._ledger.read(lambda lessor, now: now)
        for each in owing:
            method, request = _call_for(self._to_proto(each, now_ms))
            answer = remote.call(method, request, timeout_ms=CALL_MS, tries_max=1)
            if answer.receipt:
                self._ledger.submit(Ask([self._credit(answer.receipt, node_id)]))


def _call_for(owed: ledger_pb2.Obligation) -> tuple[str, Any]:
    lease = owed.lease
    match owed.action:
        case "burn":
            request = node_pb2.NodeBurnRequest(
                lease_id=owed.lease_id, epoch=owed.epoch, lease=lease
            )
            return "Burn", request
        case "clear":
            return "Clear", node_pb2.NodeClearRequest(order=owed.clear_order)
        case _:
            return "Revoke", node_pb2.NodeRevokeRequest(
                lease_id=owed.lease_id, epoch=owed.epoch, grace_ms=owed.grace_ms,
                cause=lease.cause, reason=lease.reason,
            )  # fmt: skip
