"""What holders ask of a node about shares: show one, end one, list them.

Rules. A share is ended in this order: struck out here, so that nothing begins under it; remembered
by control, so that the next front does not let it in; waited for, until nothing is in flight under
it; answered. Whoever asks speaks for his lease or for a share that he has shown, and about what is
below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from grafos_core import failure
from grafos_core.jws import HEX_128
from grafos_core.lease import EPOCH_MAX, check_lease_id
from grafos_core.sharebook import View
from grafos_proto.v1 import node_pb2
from services.nodeagent.datapath import DataPath
from services.nodeagent.shares import Shares
from services.runtime.calls import Peer

AGAIN_MS: Final = 100

Remember = Callable[[str, int, str, str], None]
"""Lease, epoch, share, who ended it: not to be forgotten as long as the lease lives."""


@dataclass(frozen=True, slots=True)
class ShareDesk:
    """For the listener's threads."""

    shares: Shares
    data: DataPath
    remember: Remember

    def open(self, caller: Peer, request: node_pb2.OpenShareRequest) -> node_pb2.OpenShareResponse:
        if not request.chain:
            raise failure.of("MISSING_FIELD", "chain")
        lease = self.shares.show(
            request.chain, key=caller.key_thumbprint, name=str(caller.identity)
        )
        assert lease.share is not None
        return node_pb2.OpenShareResponse(
            share=lease.share.digest,
            lease_id=lease.lease_id,
            epoch=lease.epoch,
            size_bytes=lease.size_bytes,
            remaining_ms=self.data.check_open(lease),
            ops=sorted(lease.ops),
        )

    def end(self, caller: Peer, request: node_pb2.EndShareRequest) -> node_pb2.EndShareResponse:
        if HEX_128.fullmatch(request.share_id) is None:
            raise failure.of("IDENTIFIER", "share_id")
        by = self._speaker(caller, request)
        where = (request.lease_id, request.epoch, request.share_id, by)
        ended = self.shares.end(*where)
        self.remember(*where)
        if self.data.wait_shares_quiet(ended):
            raise failure.of("RETRY_LATER", "operations under way", retry_after_ms=AGAIN_MS)
        return node_pb2.EndShareResponse(ended=len(ended))

    def tree(
        self, caller: Peer, request: node_pb2.ListSharesRequest
    ) -> node_pb2.ListSharesResponse:
        below = self._speaker(caller, request)
        views = self.shares.tree(request.lease_id, below)
        return node_pb2.ListSharesResponse(shares=[_view(each) for each in views])

    def _speaker(
        self, caller: Peer, request: node_pb2.EndShareRequest | node_pb2.ListSharesRequest
    ) -> str:
        if not 1 <= request.epoch <= EPOCH_MAX:
            raise failure.of("EPOCH_RANGE")
        lease_id, key = check_lease_id(request.lease_id), caller.key_thumbprint
        return self.shares.speaker(lease_id, request.epoch, request.by, key)


def _view(view: View) -> node_pb2.ShareView:
    return node_pb2.ShareView(
        share_id=view.share_id,
        parent_id=view.parent_id,
        depth=view.depth,
        to=str(view.scope.to),
        ops=view.scope.ops,
        offset=view.scope.offset,
        length=view.scope.length,
        remaining_ms=view.remaining_ms,
        state=view.state,
    )
