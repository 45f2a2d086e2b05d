"""Lease memory, blocks and other devices of many machines; use them; get them back proved.

    import grafos

    with grafos.MemBuilder().min_bytes(4096).acquire() as lease:
        lease.mem().write(0, b"hello fabric")
        data = lease.mem().read(0, 12)

Everything is leased in the same way: a builder asks, a lease holds, a handle works, dropping gives
back. A failure is one of eight exceptions, each with a stable `code`. This module is the public
list; whatever begins with an underscore is ours to change. gRPC is loaded by the first connection,
not by the import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grafos._block import BlockBuilder, BlockLease, FabricBlock
from grafos._bundle import Bundle, BundleLease
from grafos._lease import Lease, LeaseStatus
from grafos._memory import FabricMem, MemBuilder, MemLease
from grafos._notice import Notice
from grafos._receipt import TeardownReceipt
from grafos._revocation import Revocation
from grafos_core.failure import (
    DeadlineExceeded,
    Degraded,
    Denied,
    Disconnected,
    FabricError,
    Failure,
    Fenced,
    Incompatible,
    InternalError,
    LeaseExpired,
    RateLimited,
    Revoked,
)

if TYPE_CHECKING:
    from grafos._connection import Fabric, connect
    from grafos._local import local_fabric
    from grafos._share import Share, SharedLease, ShareView, open_share
    from grafos._view import FabricView

__all__ = [
    "BlockBuilder",
    "BlockLease",
    "Bundle",
    "BundleLease",
    "DeadlineExceeded",
    "Degraded",
    "Denied",
    "Disconnected",
    "Fabric",
    "FabricBlock",
    "FabricError",
    "FabricMem",
    "FabricView",
    "Failure",
    "Fenced",
    "Incompatible",
    "InternalError",
    "Lease",
    "LeaseExpired",
    "LeaseStatus",
    "MemBuilder",
    "MemLease",
    "Notice",
    "RateLimited",
    "Revocation",
    "Revoked",
    "Share",
    "ShareView",
    "SharedLease",
    "TeardownReceipt",
    "connect",
    "local_fabric",
    "open_share",
]

_ON_DEMAND = {
    "Fabric": "grafos._connection",
    "FabricView": "grafos._view",
    "connect": "grafos._connection",
    "local_fabric": "grafos._local",
    "Share": "grafos._share",
    "ShareView": "grafos._share",
    "SharedLease": "grafos._share",
    "open_share": "grafos._share",
}
"""Names whose modules load gRPC, start processes, or are what few need."""


def __getattr__(name: str) -> Any:
    module = _ON_DEMAND.get(name)
    if module is None:
        raise AttributeError(f"module 'grafos' has no attribute {name!r}")
    found = getattr(importlib.import_module(module), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
