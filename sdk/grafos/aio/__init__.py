"""The same fabric for programs that await: every name of `grafos`, with `await` where it may wait.

    from grafos import aio

    async with aio.MemBuilder().min_bytes(4096).acquire() as lease:
        await lease.mem().write(0, b"hello fabric")
        async for notice in lease.notices(): …

It is the SDK itself, called in a few threads: one behaviour, one set of failures, nothing that
could drift apart. What asks nobody (`lease_id`, `remaining_ms()`, `status`, options of builders) is
no coroutine. What was acquired for a task that has been cancelled is given back.

Rules. Works with asyncio, in any number of event loops and threads at once. `connect()` and
`acquire()` can be awaited, or entered with `async with`. The lease underneath is `lease.sync`: for
an operation of a microsecond on shared memory a thread is a detour.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grafos import (
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
    LeaseStatus,
    Notice,
    RateLimited,
    Revocation,
    Revoked,
    TeardownReceipt,
)
from grafos.aio._builder import BlockBuilder, MemBuilder
from grafos.aio._bundle import Bundle, BundleLease
from grafos.aio._lease import BlockLease, FabricBlock, FabricMem, Lease, MemLease

if TYPE_CHECKING:
    from grafos._share import ShareView
    from grafos._view import FabricView
    from grafos.aio._fabric import Fabric, connect, local_fabric
    from grafos.aio._share import Share
    from grafos.aio._shared import SharedLease, open_share

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
    "Fabric": "grafos.aio._fabric",
    "FabricView": "grafos._view",
    "connect": "grafos.aio._fabric",
    "local_fabric": "grafos.aio._fabric",
    "Share": "grafos.aio._share",
    "ShareView": "grafos._share",
    "SharedLease": "grafos.aio._shared",
    "open_share": "grafos.aio._shared",
}


def __getattr__(name: str) -> Any:
    module = _ON_DEMAND.get(name)
    if module is None:
        raise AttributeError(f"module 'grafos.aio' has no attribute {name!r}")
    found = getattr(importlib.import_module(module), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
