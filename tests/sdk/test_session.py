"""Descriptors that come from a node: ours alone, and none of them left over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from grafos import MemBuilder
from grafos._connection import Fabric
from grafos._session import DESCRIPTORS_MAX, LocalSession
from grafos_core.failure import Disconnected, FabricError, Incompatible

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
