"""Whoever is too late gets nothing: a holder that slept, an operation that took too long.

Known from the field: a resource given on while its former owner still uses it, and data of an
expired lease returned as a success. Here holders and fronts are stopped in the middle of their work
(SIGSTOP, which nobody can catch) until their lease is over, and go on afterwards.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from grafos import BlockBuilder, MemBuilder
from grafos._cluster.programs import environment
from grafos._local import LocalFabric
from grafos_core.failure import FabricError
from tests.chaos.laws import history_exclusive, node_history_exclusive
from tests.chaos.onlooker import Onlooker
from tests.integration.town import Refused, Visitor

MEMORY_BYTES, BLOCK_COUNT = 16 << 20, 256
"""Little enough that the first operation is over before the stop on a slow machine too."""
TTL_S = 1.0
STOP_AFTER_S, GO_ON_AFTER_S = 0.4, 1.6
SLACK_MS = 20
"""Between a bind and the end of `acquire`, and of reading the clock."""


@pytest.fixture(scope="module")
def fabric() -> Iterator[LocalFabric]:
    with LocalFabric(memory_bytes=MEMORY_BYTES, block_bytes=BLOCK_COUNT * 4096) as running:
        yield running


@pytest.fixture
def onlooker(fabric: LocalFabric) -> Iterator[Onlooker]:
    looking = Onlooker(fabric)
    yield looking
    looking.close()


@pytest.fixture
def visitor(fabric: LocalFabric) -> Iterator[Visitor]:
    """A holder in a process of its own."""
    paths = os.pathsep.join(filter(None, sys.path))
    around = environment(os.environ, "") | {
        "GRAFOS_RUN_DIR": str(fabric.layout.run),
        "PYTHONPATH": paths,
    }
    visiting = Visitor([sys.executable, "-m", "tests.integration.visitor"], around)
    yield visiting
    os.kill(visiting.process.pid, signal.SIGCONT)
    visiting.close()


def whole(kind: str) -> int:
    """All that the node has, so that nobody else gets any before it is back."""
    return MEMORY_BYTES if kind == "mem" else BLOCK_COUNT


@pytest.mark.parametrize("kind", ["mem", "block"])
def test_a_stopped_holder_is_revoked_and_wakes_up_to_nothing(
    fabric: LocalFabric, onlooker: Onlooker, visitor: Visitor, kind: str
) -> None:
    lease_id = visitor("acquire", kind=kind, node="n1", ttl=60, amount=whole(kind))["lease_id"]
    visitor("write", lease_id=lease_id, text="the first holder's")
    os.kill(visitor.process.pid, signal.SIGSTOP)
    builder: Any = MemBuilder() if kind == "mem" else BlockBuilder()
    builder = builder._with_amount(whole(kind))
    with pytest.raises(FabricError) as refused:
        builder.acquire()
    assert refused.value.code in ("NO_CAPACITY", "NO_EXTENT")
    onlooker.end_all()
    with builder.wait(10).acquire() as second:
        assert onlooker.wait_settled([lease_id], 0) == [], "given on before it was proved back"
        handle: Any = second.mem() if kind == "mem" else second.block()
        first = handle.read(0, 4096) if kind == "mem" else handle.read_block(0)
        assert first == bytes(4096)
        if kind == "mem":
            handle.write(0, b"the second one's")
        else:
            handle.write_block(0, b"the second one's".ljust(4096, b"\0"))
        os.kill(visitor.process.pid, signal.SIGCONT)
        for verb in ("write", "far write", "read", "far read"):
            found = visitor("use", lease_id=lease_id, verb=verb)
            assert found["count"] == 0, f"{verb} worked on a revoked lease"
            assert found["failure"] in ("Revoked", "Fenced"), found
        again = handle.read(0, 4096) if kind == "mem" else handle.read_block(0)
        assert again == b"the second one's".ljust(4096, b"\0")
    assert history_exclusive(onlooker.ledger_chain()) == []
    totals = {(book.node_id, book.kind): book.total for book in onlooker.books()}
    assert node_history_exclusive("n1", onlooker.node_chains()["n1"], totals) == []


@pytest.mark.parametrize(
    ("kind", "verb"),
    [
        ("mem", "read"),
        ("mem", "readinto"),
        ("mem", "write"),
        ("block", "read"),
        ("block", "write"),
        ("block", "flush"),
    ],
)
def test_a_holder_stopped_in_the_middle_of_an_operation_gets_no_bytes(
    visitor: Visitor, kind: str, verb: str
) -> None:
    """The operation is long, so that the stop meets it and not the moment after it."""
    lease_id = visitor("acquire", kind=kind, node="n1", ttl=TTL_S, wait=10, amount=whole(kind))[
        "lease_id"
    ]
    visitor.tell("use", lease_id=lease_id, verb=verb)
    time.sleep(STOP_AFTER_S)
    os.kill(visitor.process.pid, signal.SIGSTOP)
    time.sleep(GO_ON_AFTER_S - STOP_AFTER_S)
    os.kill(visitor.process.pid, signal.SIGCONT)
    found = visitor.hear("use")
    assert found["count"] > 0
    assert found["last_ms"] <= found["until_ms"], "an operation was done after the lease"
    assert found["failure"] == "LeaseExpired", found


@pytest.mark.parametrize("stopped", [["node-n1/front"], ["node-n1", "node-n1/front"]])
@pytest.mark.parametrize("verb", ["far read", "far write"])
@pytest.mark.parametrize("kind", ["mem", "block"])
def test_a_node_stopped_in_the_middle_of_an_operation_gives_no_bytes(
    fabric: LocalFabric, visitor: Visitor, kind: str, verb: str, stopped: list[str]
) -> None:
    """The holder does not look at its own clock here: the node alone has to refuse."""
    begun_ms = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    amount = 4 << 20 if kind == "mem" else BLOCK_COUNT
    lease_id = visitor("acquire", kind=kind, node="n1", ttl=TTL_S, wait=10, amount=amount)[
        "lease_id"
    ]
    acquired_ms = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    assert acquired_ms - begun_ms < 10_000
    visitor.tell("use", lease_id=lease_id, verb=verb)
    time.sleep(STOP_AFTER_S)
    pids = fabric.pids()
    for name in stopped:
        os.kill(pids[name], signal.SIGSTOP)
    try:
        time.sleep(GO_ON_AFTER_S - STOP_AFTER_S)
    finally:
        for name in stopped:
            resume(pids[name])
    found = visitor.hear("use")
    assert found["last_ms"] <= acquired_ms + 1000 * TTL_S + SLACK_MS, found
    assert found["failure"] in ("LeaseExpired", "Fenced", "Denied", "Disconnected"), found
    with pytest.raises(Refused):
        visitor("read", lease_id=lease_id, length=16)
    fabric.wait_ready()


def resume(pid: int) -> None:
    """Unless it was taken for hung and killed meanwhile, which is as good."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        pass
