"""Who stands at the other end of the hand-over socket, told without the newer kernels' help.

A socket that is not a local one knows no process at its other end, as on a kernel before 6.5.
"""

from __future__ import annotations

import gc
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from grafos_core.failure import Denied
from services.nodeagent.handover import peer_pidfd

SELECT_MAX = 1_024


@pytest.fixture
def stranger() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET) as made:
        yield made


@pytest.fixture
def crowded() -> Iterator[None]:
    """A process that has as many descriptors as an agent with a thousand leases."""
    gc.collect()  # what the tests before this one left is not closed in the middle of it
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * SELECT_MAX, limits[1]), limits[1]))
    taken = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
    while taken[-1] <= SELECT_MAX:
        taken.append(os.dup(taken[0]))
    yield
    for each in taken:
        os.close(each)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("crowded")
def test_a_holder_is_known_by_its_pidfd_however_many_descriptors_are_open(
    stranger: socket.socket,
) -> None:
    pidfd = peer_pidfd(stranger, os.getpid())
    assert pidfd > SELECT_MAX
    os.close(pidfd)


@pytest.mark.usefixtures("crowded")
def test_a_holder_that_has_ended_is_not_taken_for_its_successor(stranger: socket.socket) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(Denied) as refusal:
            peer_pidfd(stranger, ended.pid)
    assert refusal.value.code == "HOLDER_MISMATCH"
    assert len(os.listdir("/proc/self/fd")) == before
