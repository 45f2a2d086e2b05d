"""A forked child has none of its parent's leases, and does them no harm."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from grafos import Disconnected, MemBuilder
from grafos._connection import Fabric
from tests.sdk.world import World

CHILD_S = 20.0

PRELUDE = """
import gc, os, sys, warnings
from pathlib import Path
from grafos import MemBuilder, BlockBuilder, Disconnected, FabricError, connect
endpoint, folder = sys.argv[1:]
fabric = connect(endpoint, identity=Path(folder))
lease = MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(20).acquire()
memory = lease.mem()
memory.write(0, b"parent's")

def refused(use):
    try:
        use()
    except Disconnected as failed:
        return failed.code
    return "worked"
"""


def run(world: World, body: str) -> str:
    """The output of a program with a connection and a lease, in a process of its own."""
    path = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + body, world.endpoint,
         str(world.identity_folder())],
        capture_output=True, text=True, timeout=CHILD_S, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_handle_is_refused_in_a_forked_child(world: World) -> None:
    said = run(
        world,
        """
block = BlockBuilder().fabric(fabric).min_blocks(1).acquire()
pid = os.fork()
if pid == 0:
    uses = [
        lambda: memory.read(0, 8), lambda: memory.write(0, b"child"),
        lambda: memory.readinto(0, bytearray(4)), lambda: lease.renew(), lambda: lease.release(),
        lambda: lease.detach(), lambda: block.block().read_block(0), lambda: fabric.poll(),
        lambda: MemBuilder().fabric(fabric).min_bytes(1).acquire(),
        lambda: list(fabric.leases()),
    ]
    print([refused(use) for use in uses].count("FORKED_CHILD"), len(uses), lease.valid, flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(memory.read(0, 8), lease.valid)
lease.release(), block.release()
""",
    )
    assert said.splitlines() == ["10 10 False", 'b"parent\'s" True']


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)", "del lease, memory; gc.collect()"])
def test_however_the_child_ends_the_parent_keeps_its_lease(world: World, end: str) -> None:
    said = run(
        world,
        f"""
pid = os.fork()
if pid == 0:
    {end}
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(memory.read(0, 8))
lease.release()
""",
    )
    assert said == 'b"parent\'s"\n'
    assert world.control.asked.count("release") == 1
    assert world.control.asked.count("session_lost") <= 1


def test_a_block_that_ends_in_the_child_releases_nothing(world: World) -> None:
    run(
        world,
        """
with lease:
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        assert memory.read(0, 8) == b"parent's"
if pid == 0:
    os._exit(0)
""",
    )
    assert world.control.asked.count("release") == 1


def test_a_child_that_outlives_its_parent_does_not_hold_its_session(world: World) -> None:
    """Its copies of the session's socket are closed, so the parent's death is seen."""
    import threading
    import time

    said = run(
        world,
        """
pid = os.fork()
if pid == 0:
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    import time
    time.sleep(5)
    os._exit(0)
print(pid, flush=True)
os._exit(0)
""",
    )
    end = time.monotonic() + 4
    while "session_lost" not in world.control.asked:
        assert time.monotonic() < end, f"child {said} holds the session"
        threading.Event().wait(0.01)


def test_a_child_may_connect_anew_where_the_parent_had_no_connection(world: World) -> None:
    """gRPC does not survive a fork: fork first, connect then."""
    folder = world.identity_folder()
    path = os.pathsep.join(each for each in sys.path if each)
    script = """
import os, sys
from pathlib import Path
import grafos
pid = os.fork()
from grafos import MemBuilder, connect
with connect(sys.argv[1], identity=Path(sys.argv[2])):
    with MemBuilder().min_bytes(1).acquire() as lease:
        lease.mem().write(0, b"x")
if pid:
    assert os.waitpid(pid, 0)[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", script, world.endpoint, str(folder)], capture_output=True,
        text=True, timeout=CHILD_S, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert world.control.asked.count("release") == 2


def test_the_mark_of_a_fork_is_seen_by_every_operation(world: World, fabric: Fabric) -> None:
    """The same in one process: what the hook in the child sets stops everything."""
    lease = MemBuilder().fabric(fabric).min_bytes(4096).acquire()
    memory = lease.mem()
    fabric._in_child()
    uses: list[Callable[[], Any]] = [lambda: memory.read(0, 1), lambda: memory.write(0, b"x")]
    for use in [*uses, lease.release, lease.renew, fabric.poll]:
        with pytest.raises(Disconnected) as refused:
            use()
        assert refused.value.code == "FORKED_CHILD"
    assert world.book.grants[lease.lease_id].cause is None
