"""Bundles: a place for every member, one commit for all of them.

Rules. The ledger grants all members in one transaction or none. Where it finds one of them without
room, that member is tried on other nodes, and the whole bundle decided anew. A bundle waits like a
single request, and holds nothing while it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from grafos_core import bundle, packing
from grafos_core.failure import FabricError
from grafos_core.lease import Lease, NodeId
from grafos_core.lessor import NodeView
from grafos_core.packing import NoPlace
from grafos_core.placement import Admit, Request, rounded
from grafos_core.spiffe import Identity
from grafos_proto.v1 import admission_pb2, ledger_pb2
from grafos_proto.wire import convert
from grafos_proto.wire.failures import failure_of
from services.admission import asking
from services.admission.ledger import Ledger
from services.admission.tokens import Minter

TRIES_MAX: Final = 8
"""Places that the ledger is asked about for one bundle, before it is refused or waits."""
NOWHERE: Final = "0" * 32
"""The incarnation of no node."""


class Bundles:
    """Safe from any thread."""

    def __init__(self, ledger: Ledger, minter: Minter) -> None:
        self._ledger, self._minter = ledger, minter

    def try_once(
        self, asks: Sequence[Request], request: admission_pb2.AcquireBundleRequest, who: Identity,
        nodes: Sequence[NodeView],
    ) -> list[Lease] | NoPlace | FabricError:  # fmt: skip
        barred: set[tuple[int, NodeId]] = set()
        refused: FabricError | None = None
        for _ in range(TRIES_MAX):
            places = packing.place_all(asks, nodes, barred)
            if isinstance(places, NoPlace):
                return refused or places
            outcome = self._grant(asks, request, who, places)
            if not isinstance(outcome, FabricError):
                return outcome
            refused = outcome
            member = bundle.member_of(outcome)
            if member is None or outcome.code not in asking.ELSEWHERE:
                break
            barred.add((member, places[member].node_id))
        assert refused is not None
        return refused

    def granted_before(
        self, asks: Sequence[Request], request: admission_pb2.AcquireBundleRequest, who: Identity
    ) -> list[Lease] | None:
        """What an earlier try of this request was granted, when there is no place any more.

        The ledger answers a request id that it knows; grants that name no node's incarnation ask
        for nothing else.
        """
        places = [Admit(NodeId("none"), NOWHERE, "", rounded(ask.kind, ask.amount)) for ask in asks]
        outcome = self._grant(asks, request, who, places)
        return None if isinstance(outcome, FabricError) else outcome

    def _grant(
        self, asks: Sequence[Request], request: admission_pb2.AcquireBundleRequest, who: Identity,
        places: Sequence[Admit],
    ) -> list[Lease] | FabricError:  # fmt: skip
        key_id = self._minter.key_id
        grants = [
            asking.grant_of(ask, member, who, place, key_id)
            for ask, member, place in zip(asks, request.members, places, strict=True)
        ]
        whole = ledger_pb2.GrantBundle(request_id=request.request_id, grants=grants)
        command = ledger_pb2.Command(grant_bundle=whole)
        (outcome,) = self._ledger.commit_all([command], asking.time_left_ms())
        if outcome.HasField("failure"):
            return failure_of(outcome.failure)
        return [convert.lease_from_proto(lease) for lease in outcome.leases]
