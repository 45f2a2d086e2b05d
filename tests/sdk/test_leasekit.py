"""Renewal by ticks: no thread, no timer, and no clock but the one that is given."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from grafos import Degraded, Denied, Incompatible, MemBuilder, Notice
from grafos._clock import wall_ms
from grafos._connection import Fabric
from grafos.leasekit import RenewalManager, RenewalPolicy
from grafos_core import failure
from tests.sdk.test_lease import forgotten
from tests.sdk.world import World

EXACT = RenewalPolicy(jitter_fraction=0.0)


class Authority:
    """Something that renews, on a clock of its own."""

    def __init__(self) -> None:
        self.now_ms, self.ttl_ms = 1_000_000, 10_000
        self.asked: list[str] = []
        self.refuses = False

    def renew(self, lease_id: str) -> int:
        self.asked.append(lease_id)
        if self.refuses:
            raise failure.of("UNREACHABLE")
        return self.now_ms + self.ttl_ms


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def manager(authority: Authority) -> RenewalManager:
    made = RenewalManager(authority.renew)
    made.register("a", authority.now_ms + authority.ttl_ms, EXACT)
    made.tick(authority.now_ms)
    return made


class TestOnAClockOfItsOwn:
    def test_nothing_is_asked_before_three_quarters_of_the_ttl(
        self, authority: Authority, manager: RenewalManager
    ) -> None:
        for now_ms in range(authority.now_ms, authority.now_ms + 7_500, 250):
            assert manager.tick(now_ms).due == ()
        assert not authority.asked

    def test_then_it_is_asked_once(self, authority: Authority, manager: RenewalManager) -> None:
        authority.now_ms += 7_500
        summary = manager.tick(authority.now_ms)
        assert (summary.due, summary.renewed, summary.failed) == (("a",), ("a",), ())
        assert manager.tick(authority.now_ms).due == ()
        assert summary.next_due_ms == authority.now_ms + 7_500

    def test_a_failed_renewal_is_tried_again_after_a_pause_that_doubles(
        self, authority: Authority, manager: RenewalManager
    ) -> None:
        authority.refuses = True
        asked_at = []
        for now_ms in range(authority.now_ms + 7_000, authority.now_ms + 9_000, 50):
            if manager.tick(now_ms).failed:
                asked_at.append(now_ms - authority.now_ms)
        assert asked_at == [7_500, 7_600, 7_800, 8_200]

    def test_what_ran_out_is_told_once_and_forgotten(
        self, authority: Authority, manager: RenewalManager
    ) -> None:
        authority.refuses = True
        assert manager.tick(authority.now_ms + 10_000).expired == ("a",)
        assert "a" not in manager
        assert manager.tick(authority.now_ms + 10_001).expired == ()

    def test_a_lease_that_was_forgotten_is_not_renewed(
        self, authority: Authority, manager: RenewalManager
    ) -> None:
        manager.forget("a")
        manager.forget("nobody")
        assert manager.tick(authority.now_ms + 9_000).due == ()

    def test_leases_of_one_moment_are_not_due_at_one(self, authority: Authority) -> None:
        manager = RenewalManager(authority.renew)
        for index in range(50):
            manager.register(f"lease-{index}", authority.now_ms + 10_000)
        manager.tick(authority.now_ms)
        counts = [
            len(manager.tick(authority.now_ms + at_ms).due) for at_ms in range(6_000, 9_000, 100)
        ]
        assert sum(counts) >= 50
        assert max(counts) < 20


class TestOnRealLeases:
    def take(self, fabric: Fabric, ttl_s: float = 1) -> Any:
        return MemBuilder().fabric(fabric).min_bytes(4096).lease_secs(ttl_s).acquire()

    @pytest.mark.parametrize("by_id", [True, False])
    def test_ticks_keep_a_lease_alive(self, fabric: Fabric, by_id: bool) -> None:
        manager = RenewalManager()
        with self.take(fabric) as lease:
            if by_id:
                manager.register(lease.lease_id, lease.expiry_ms, RenewalPolicy.default())
            else:
                manager.register(lease)
            renewed = 0
            for _ in range(100):
                renewed += len(manager.tick(wall_ms()).renewed)
                threading.Event().wait(0.02)
            assert renewed >= 2
            assert lease.valid

    def test_a_wall_clock_that_was_put_back_hides_no_renewal(self, fabric: Fabric) -> None:
        manager = RenewalManager()
        with self.take(fabric) as lease:
            manager.register(lease)
            hour_ago_ms, renewed = wall_ms() - 3_600_000, 0
            for _ in range(60):
                renewed += len(manager.tick(hour_ago_ms).renewed)
                threading.Event().wait(0.02)
            assert renewed >= 1
            assert lease.valid

    def test_jeopardy_is_told_from_the_tick(self, world: World, fabric: Fabric) -> None:
        def silent(method: str) -> None:
            if method == "Renew":
                raise failure.of("NOT_READY")

        world.admission.before = silent
        heard: list[Notice] = []
        manager = RenewalManager()
        with self.take(fabric, 2) as lease:
            lease.on_notice(heard.append)
            manager.register(lease)
            for _ in range(200):
                manager.tick(wall_ms())
                if heard:
                    break
                threading.Event().wait(0.02)
            assert [type(each.failure) for each in heard] == [Degraded]

    def test_a_lease_that_is_over_is_told_and_forgotten(self, fabric: Fabric) -> None:
        manager = RenewalManager()
        lease = self.take(fabric)
        manager.register(lease)
        lease.release()
        assert manager.tick(wall_ms()).expired == (lease.lease_id,)
        assert len(manager) == 0

    def test_a_manager_holds_no_lease_alive(self, world: World, fabric: Fabric) -> None:
        manager = RenewalManager()
        held = [self.take(fabric, 30)]
        manager.register(held[0])
        with pytest.warns(ResourceWarning):
            forgotten(held)
        fabric.poll()
        assert world.control.asked.count("release") == 1
        assert len(manager.tick(wall_ms()).expired) == 1

    def test_what_cannot_be_renewed_is_refused(self, authority: Authority) -> None:
        with pytest.raises(Denied):
            RenewalManager().register("0" * 32, 1_000, RenewalPolicy.default())
        with pytest.raises(Incompatible):
            RenewalManager(authority.renew).register("a")


@pytest.mark.parametrize(
    "wrong",
    [
        {"renew_at_fraction": 0.0}, {"renew_at_fraction": 1.0}, {"jitter_fraction": 0.3},
        {"jitter_fraction": -0.1}, {"max_backoff_secs": 0}, {"min_renew_secs": -1},
    ],
)  # fmt: skip
def test_a_policy_that_cannot_work_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RenewalPolicy(**wrong)


def test_the_defaults_are_those_of_the_documentation() -> None:
    policy = RenewalPolicy.default()
    assert (policy.renew_at_fraction, policy.jitter_fraction) == (0.75, 0.10)
    assert (policy.min_renew_secs, policy.max_backoff_secs) == (30, 5)
