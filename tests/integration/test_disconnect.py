"""Holders that are killed, and holders whose connection is cut while they live on.

Each is a process of its own. The node is told nothing: it sees that a connection has ended, or that
a process has, and does what was fixed with the lease.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping

import pytest

from grafos._cluster.programs import environment
from grafos._local import LocalFabric
from grafos_core.lease import EndCause
from tests.integration.town import Refused, Visitor

POLICIES: tuple[str | float, ...] = ("release", 2.5, "keep")
TTL_S = 30.0
SLACK_S = 1.0


@pytest.fixture(scope="module")
def fabric() -> Iterator[LocalFabric]:
    with LocalFabric(memory_bytes=4 << 20, block_bytes=1 << 20) as running:
        yield running


@pytest.fixture
def holder(fabric: LocalFabric) -> Iterator[Visitor]:
    around = environment(os.environ, "") | {
        "GRAFOS_RUN_DIR": str(fabric.layout.run),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    visiting = Visitor([sys.executable, "-m", "tests.integration.visitor"], around)
    yield visiting
    visiting.close()


def acquired(holder: Visitor) -> dict[str | float, str]:
    """A lease of each policy."""
    return {
        what: holder("acquire", kind="mem", node="n1", ttl=TTL_S, on_disconnect=what)["lease_id"]
        for what in POLICIES
    }


class Seen:
    """How the leases end, as the ledger tells it, and when."""

    def __init__(self, fabric: LocalFabric, leases: Mapping[str | float, str]) -> None:
        self._fabric, self._leases = fabric, leases
        self._begun_s = time.monotonic()

    def after_s(self, what: str | float, within_s: float) -> float:
        while (passed_s := time.monotonic() - self._begun_s) < within_s + SLACK_S:
            if self.cause(what) is not None:
                return passed_s
            time.sleep(0.02)
        pytest.fail(f"{what}: nothing has happened in {passed_s:.1f} s")

    def cause(self, what: str | float) -> EndCause | None:
        return self._fabric.connection.describe(self._leases[what]).cause


def test_a_killed_holder_ends_its_leases_at_once_whatever_a_lost_connection_would_do(
    fabric: LocalFabric, holder: Visitor
) -> None:
    leases = acquired(holder)
    seen = Seen(fabric, leases)
    holder.process.kill()
    for what in POLICIES:
        assert seen.after_s(what, 0) < SLACK_S
        assert seen.cause(what) is EndCause.HOLDER_EXIT


def test_a_cut_connection_does_what_was_fixed_with_the_lease(
    fabric: LocalFabric, holder: Visitor
) -> None:
    leases = acquired(holder)
    seen = Seen(fabric, leases)
    holder("hang_up")
    assert seen.after_s("release", 1) >= 1
    assert seen.cause(2.5) is None
    assert seen.after_s(2.5, 2.5) >= 2.5
    assert (seen.cause("release"), seen.cause(2.5)) == (EndCause.DISCONNECTED,) * 2
    for what in ("release", 2.5):
        with pytest.raises(Refused) as refused:
            holder("write", lease_id=leases[what], text="late")
        assert refused.value.failure == "LeaseExpired"
    holder("write", lease_id=leases["keep"], text="here")
    assert seen.cause("keep") is None
    assert holder("release", lease_id=leases["keep"])["credited"] is True


def test_who_comes_back_in_time_has_lost_nothing(fabric: LocalFabric, holder: Visitor) -> None:
    leases = acquired(holder)
    seen = Seen(fabric, leases)
    holder("hang_up")
    holder("poll")
    time.sleep(3)
    assert [seen.cause(what) for what in POLICIES] == [None, None, None]
    for lease_id in leases.values():
        holder("write", lease_id=lease_id, text="here")
        holder("release", lease_id=lease_id)


def test_a_stopped_holder_is_there_as_long_as_its_connection(
    fabric: LocalFabric, holder: Visitor
) -> None:
    leases = acquired(holder)
    seen = Seen(fabric, leases)
    os.kill(holder.process.pid, signal.SIGSTOP)
    time.sleep(2)
    causes = [seen.cause(what) for what in POLICIES]
    os.kill(holder.process.pid, signal.SIGCONT)
    assert causes == [None, None, None]
    for lease_id in leases.values():
        holder("release", lease_id=lease_id)
