"""A whole fabric in one process, for unit tests: real decisions, its own clock, faults on order.

    import grafos
    from grafos.testing import fabric

    with fabric(nodes=2, memory="64MiB") as world:
        with grafos.MemBuilder().min_bytes(4096).lease_secs(5).acquire() as lease:
            lease.mem().write(0, b"hello")
            world.advance(6)                     # no second passes; the lease has expired

The lessor, placement, the agent's core, the warden and the gate are the ones that run in
production, and so is everything of the SDK above the calls: tokens and receipts are signed and
verified, memory is a sealed file of the kernel's. What is not there is processes, sockets, disks
and the passing of time.

Rules. Time moves by `advance`, and by calls that must wait; never by itself. The same seed and the
same calls give the same ids, the same placement, the same signatures. While a fabric of this kind
is open, this process cannot use a real one. Nothing is loaded before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grafos.testing._fabric import Fault, VirtualFabric, fabric
    from grafos.testing._leaks import Leak, LeakFound, assert_no_leaks, leaks
    from grafos.testing._time import VirtualTime

__all__ = [
    "Fault",
    "Leak",
    "LeakFound",
    "VirtualFabric",
    "VirtualTime",
    "assert_no_leaks",
    "fabric",
    "leaks",
]

_WHERE = {
    "Fault": "_fabric",
    "Leak": "_leaks",
    "LeakFound": "_leaks",
    "VirtualFabric": "_fabric",
    "VirtualTime": "_time",
    "assert_no_leaks": "_leaks",
    "fabric": "_fabric",
    "leaks": "_leaks",
}


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'grafos.testing' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"grafos.testing.{where}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
