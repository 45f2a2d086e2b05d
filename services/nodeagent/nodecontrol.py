"""What the ledger and operators may ask of a node: NodeControl, one method per order.

Rules. Orders are idempotent: given again they are answered with how far the first one has come. A
clear order counts by its own signature, whoever brings it. Who calls has been established and found
to have the right by the listener.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import grpc

from grafos_core import failure
from grafos_core.lease import EPOCH_MAX, LeaseId, check_lease_id
from grafos_core.node import Instant, NodeCore
from grafos_core.node_effects import Effect, Ordered, Probed, Result, Target
from grafos_core.node_lease import FenceView, LeaseView
from grafos_core.quarantine import Finding
from grafos_core.receipt import ClearOrder
from grafos_proto.v1 import lease_pb2, node_pb2, node_pb2_grpc
from grafos_proto.wire import convert
from services.runtime import calls

GRACE_MS_MAX = 3_600_000
REASON_CHARS_MAX = 256

Question = Callable[[NodeCore, int, Instant], list[Effect]]
"""(core, request id, now) → effects, one of which is the answer."""


class Agent(Protocol):
    def ask(self, question: Question, timeout_ms: int) -> Result: ...

    def receipt_text(self, ordered: Ordered) -> str: ...

    def clear_order(self, text: str) -> ClearOrder: ...

    def leases(self) -> tuple[LeaseView, ...]: ...

    def target(self, lease_id: LeaseId, epoch: int) -> Target:
        """A lease that is or was bound here; refused where none was."""


class NodeControlServicer(node_pb2_grpc.NodeControlServicer):
    """NodeControl, on the control listener."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def Burn(
        self, request: node_pb2.NodeBurnRequest, context: grpc.ServicerContext
    ) -> node_pb2.NodeActionResponse:
        target = target_of(request.lease, request.lease_id, request.epoch)
        return self._ordered(lambda core, number, now: core.burn(number, target, now))

    def Revoke(
        self, request: node_pb2.NodeRevokeRequest, context: grpc.ServicerContext
    ) -> node_pb2.NodeActionResponse:
        if request.grace_ms > GRACE_MS_MAX:
            raise failure.of("RANGE", f"grace_ms: at most {GRACE_MS_MAX}")
        reason = (request.reason or request.cause)[:REASON_CHARS_MAX]
        target = self._agent.target(check_lease_id(request.lease_id), _epoch(request.epoch))
        if request.cause == "release":
            return self._ordered(lambda core, number, now: core.withdraw(number, target, now))
        return self._ordered(
            lambda core, number, now: core.revoke(number, target, request.grace_ms, reason, now)
        )

    def Clear(
        self, request: node_pb2.NodeClearRequest, context: grpc.ServicerContext
    ) -> node_pb2.NodeActionResponse:
        order = self._agent.clear_order(request.order)
        return self._ordered(lambda core, number, now: core.clear(number, order, now))

    def Probe(
        self, request: node_pb2.ProbeRequest, context: grpc.ServicerContext
    ) -> node_pb2.ProbeResponse:
        lease_id = check_lease_id(request.lease_id)
        result = self._agent.ask(
            lambda core, number, now: core.probe(number, lease_id, now), calls.deadline_left_ms()
        )
        failure.invariant(isinstance(result, Probed), "a probe is answered with what it found")
        assert isinstance(result, Probed)
        evidence = {name: str(value) for name, value in result.evidence.items()}
        return node_pb2.ProbeResponse(clean=result.clean, evidence=evidence)

    def ListLeases(
        self, request: node_pb2.ListNodeLeasesRequest, context: grpc.ServicerContext
    ) -> node_pb2.ListNodeLeasesResponse:
        wanted = request.lease_id
        leases = [one for one in self._agent.leases() if wanted in ("", one.lease_id)]
        return node_pb2.ListNodeLeasesResponse(leases=map(shown, leases))

    def _ordered(self, question: Question) -> node_pb2.NodeActionResponse:
        result = self._agent.ask(question, calls.deadline_left_ms())
        failure.invariant(isinstance(result, Ordered), "an order is answered with its stage")
        assert isinstance(result, Ordered)
        return node_pb2.NodeActionResponse(
            receipt=self._agent.receipt_text(result), stage=result.stage
        )


def target_of(lease: lease_pb2.Lease, lease_id: str, epoch: int) -> Target:
    """A lease as the ledger names it."""
    if lease.lease_id and lease.lease_id != lease_id:
        raise failure.of("INVALID", "lease and lease_id name different leases")
    return Target(
        LeaseId(check_lease_id(lease_id)),
        _epoch(epoch),
        convert.kind_from_proto(lease.kind),
        lease.amount,
        lease.extent_offset,
        lease.generation,
    )


def shown(view: LeaseView) -> node_pb2.NodeLease:
    return node_pb2.NodeLease(
        lease_id=view.lease_id,
        kind=convert.kind_to_proto(view.kind),
        epoch=view.epoch,
        generation=view.generation,
        amount=view.amount,
        extent_offset=view.extent_offset,
        remaining_ms=view.remaining_ms,
        stage=view.stage,
        fence_cause=view.fence_cause,
        exported=view.exported,
        evidence={name: str(value) for name, value in view.evidence.items()},
        revoke_stage=view.revoke_stage.value,
        fence=None if view.fence is None else shown_fence(view.fence),
    )


def shown_fence(fence: FenceView) -> node_pb2.Fence:
    return node_pb2.Fence(
        since_ms=fence.since_ms,
        probes=fence.probes,
        findings=map(shown_finding, fence.findings),
        latest=None if fence.latest is None else shown_finding(fence.latest),
        next_probe_ms=fence.next_probe_ms or 0,
    )


def shown_finding(finding: Finding) -> node_pb2.Finding:
    return node_pb2.Finding(
        at_ms=finding.at_ms,
        clean=finding.clean,
        asked=finding.asked,
        evidence={name: str(value) for name, value in finding.measured.items()},
        number=finding.number,
    )


def _epoch(epoch: int) -> int:
    if not 1 <= epoch <= EPOCH_MAX:
        raise failure.of("EPOCH_RANGE")
    return epoch
