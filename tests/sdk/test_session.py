"""Descriptors that come from a node: ours alone, and none of them left over."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from grafos import MemBuilder
from grafos._connection import Fabric
from grafos._session import ARRIVED_MAX, DESCRIPTORS_MAX, LocalSession
from grafos_core.failure import Disconnected, FabricError, Incompatible
from tests.sdk.world import World

LEASE = "ab" * 16
_MEMFDS_OF_A_CHILD = """
import os
for fd in os.listdir("/proc/self/fd"):
    try:
        print(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass
"""


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def memory_files() -> int:
    """How many descriptors of leased memory this process has."""
    gc.collect()
    links = []
    for each in open_descriptors():
        with suppress(FileNotFoundError):  # that of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{each}"))
    return sum("memfd:lease" in link for link in links)


def exchange(folder: Path, answer: Callable[[socket.socket], None]) -> int | None:
    """A hand-over from a desk that gives this answer to whatever it is asked."""
    desk = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    desk.bind(str(folder / "d"))
    desk.listen(1)

    def serve() -> None:
        line, _ = desk.accept()
        with line:
            line.recv(4096)
            answer(line)

    thread = threading.Thread(target=serve)
    thread.start()
    session = LocalSession(str(folder / "d"), "cd" * 16, lambda notice: None)
    try:
        return session.hand_over(LEASE, b"s" * 16)
    finally:
        session.close()
        thread.join()
        desk.close()


def with_descriptors(count: int, packet: bytes) -> Callable[[socket.socket], None]:
    def answer(line: socket.socket) -> None:
        reading, writing = os.pipe()
        try:
            socket.send_fds(line, [packet], [reading] * count)
        finally:
            os.close(reading)
            os.close(writing)

    return answer


ANSWER = json.dumps({"v": 1, "lease_id": LEASE}).encode()


def test_a_second_lease_needs_no_question(world: World, fabric: Fabric) -> None:
    with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as first:
        world.control.before = lambda op: pytest.fail("it asked") if op == "hand_over" else None
        with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as second:
            assert (first.mem().path, second.mem().path) == ("shared", "shared")
            first.mem().write(0, b"first")
            second.mem().write(0, b"other")
            assert first.mem().read(0, 5) == b"first"


def test_what_another_thread_has_read_is_found_by_who_bound_it(
    world: World, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packet is there before the answer: somebody who polls may be the first to read it."""
    with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as first:
        node = first._grip.node
        before, has_come = memory_files(), node._has_come

        def polled(lease_id: str) -> bool:
            node.listen()
            return has_come(lease_id)

        monkeypatch.setattr(node, "_has_come", polled)
        with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as second:
            assert second.mem().path == "shared"
            second.mem().write(0, b"mine")
        grant = world.book.grants[second.lease_id]
        os.close(grant.fd)  # the node's, which is here, too
        grant.fd = -1
        assert memory_files() == before


def test_who_loses_his_session_while_he_binds_comes_for_it(
    world: World, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as first:
        node = first._grip.node
        has_come = node._has_come

        def broken(lease_id: str) -> bool:
            assert node._session is not None
            node._session.close()
            return has_come(lease_id)

        monkeypatch.setattr(node, "_has_come", broken)
        asked = world.control.asked.count("bind")
        with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as second:
            assert second.mem().path == "shared"
            assert world.control.asked.count("bind") == asked + 2
            assert "hand_over" not in world.control.asked[-1:]


def test_what_nobody_looks_for_is_closed(tmp_path: Path) -> None:
    """Of binds that were given up; and all of it with the session."""
    before = open_descriptors()
    desk = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    desk.bind(str(tmp_path / "d"))
    desk.listen(1)
    session = LocalSession(str(tmp_path / "d"), "cd" * 16, lambda notice: None)
    line, _ = desk.accept()
    reading, writing = os.pipe()
    for number in range(ARRIVED_MAX + 10):
        packet = json.dumps({"v": 1, "lease_id": f"{number:032x}"}).encode()
        socket.send_fds(line, [packet], [reading])
        session.poll()
    assert len(session._arrived) == ARRIVED_MAX
    assert len(open_descriptors()) == len(before) + ARRIVED_MAX + 5
    session.close()
    for each in (reading, writing):
        os.close(each)
    line.close()
    desk.close()
    assert open_descriptors() == before


def test_no_child_inherits_the_memory_of_a_lease(fabric: Fabric) -> None:
    with MemBuilder().fabric(fabric).min_bytes(4096).acquire() as lease:
        assert lease.mem().path == "shared"
        assert lease._memory is not None
        assert not os.get_inheritable(lease._memory.fd)
        own = os.readlink(f"/proc/self/fd/{lease._memory.fd}")
        child = subprocess.run(
            [sys.executable, "-c", _MEMFDS_OF_A_CHILD],
            capture_output=True, text=True, check=True, close_fds=False,
        )  # fmt: skip
    assert "memfd" in own
    assert own not in child.stdout.splitlines()


def test_only_the_first_descriptor_of_an_answer_is_kept(tmp_path: Path) -> None:
    before = open_descriptors()
    kept = exchange(tmp_path, with_descriptors(DESCRIPTORS_MAX, ANSWER))
    assert kept is not None
    os.close(kept)
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("count", "packet", "refusal"),
    [
        (DESCRIPTORS_MAX + 3, ANSWER, Disconnected),
        (1, b"no message of ours", Incompatible),
        (1, ANSWER[:-1] + b'," ":"' + b"x" * 70_000 + b'"}', Incompatible),
    ],
    ids=["more-descriptors-than-fit", "not-ours", "longer-than-fits"],
)
def test_what_comes_with_an_answer_that_is_refused_is_closed(
    tmp_path: Path, count: int, packet: bytes, refusal: type[FabricError]
) -> None:
    before = open_descriptors()
    with pytest.raises(refusal):
        exchange(tmp_path, with_descriptors(count, packet))
    assert open_descriptors() == before
