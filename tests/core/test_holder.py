"""What a holder believes: golden scripts, and that it is always out before the node's end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core.holder import (
    GUARD_MS_MIN,
    Belief,
    HolderLease,
    RenewalManager,
    RenewalPolicy,
    TickSummary,
)
from grafos_core.lease import RATE_ERROR
from tests.core.holder_script import Script
from tests.golden import run_golden, scripts

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("path", scripts(HERE, "holder"), ids=lambda path: path.stem)
def test_a_holder_believes_as_written_down(path: Path) -> None:
    run_golden(path, Script())


@given(
    remaining_ms=st.integers(1000, 86_400_000),
    way_there_ms=st.integers(0, 2000),
    way_back_ms=st.integers(0, 2000),
    slow=st.booleans(),
)
def test_a_holder_stops_before_its_node_though_its_clock_is_as_slow_as_allowed(
    remaining_ms: int, way_there_ms: int, way_back_ms: int, slow: bool
) -> None:
    """True time is the node's; the holder's clock counts 499 of 500 milliseconds."""

    def holders(true_ms: int) -> int:
        return true_ms * (RATE_ERROR - 1) // RATE_ERROR if slow else true_ms

    end_true_ms = way_there_ms + remaining_ms
    lease = HolderLease(
        "a", remaining_ms=remaining_ms, sent_ms=0, now_ms=holders(way_there_ms + way_back_ms)
    )
    assert not lease.usable(holders(end_true_ms))


@given(
    total_ms=st.integers(1000, 86_400_000), spent_ms=st.integers(0, 300), name=st.text(max_size=20)
)
def test_a_renewal_is_due_around_three_quarters_and_in_time_before_the_stop(
    total_ms: int, spent_ms: int, name: str
) -> None:
    lease = HolderLease(name, remaining_ms=total_ms, sent_ms=0, now_ms=spent_ms)
    guard_ms = max(3 * spent_ms, GUARD_MS_MIN)
    assert lease.renew_at_ms <= max(0, lease.usable_until_ms - guard_ms)
    assert lease.renew_at_ms <= total_ms * 0.85
    in_time = lease.renew_at_ms == max(0, lease.usable_until_ms - guard_ms)
    assert in_time or lease.renew_at_ms >= int(total_ms * 0.65)


def test_the_jitter_is_the_same_for_the_same_lease_and_spreads_many() -> None:
    policy = RenewalPolicy()
    due = [policy.renew_after_ms(100_000, f"lease-{number}") for number in range(500)]
    assert due == [policy.renew_after_ms(100_000, f"lease-{number}") for number in range(500)]
    assert min(due) < 66_000
    assert max(due) > 84_000
    assert all(65_000 <= one <= 85_000 for one in due)
    assert policy.renewal_deadline(7, 100_007, "lease-0") == 7 + due[0]


def test_the_pause_doubles_up_to_its_cap() -> None:
    policy = RenewalPolicy()
    pauses = [policy.backoff_ms(number) for number in range(1, 9)]
    assert pauses == [100, 200, 400, 800, 1600, 3200, 5000, 5000]
    assert policy.backoff_ms(10_000) == 5000


@pytest.mark.parametrize(
    "wrong",
    [
        {"renew_at_fraction": 1.0},
        {"renew_at_fraction": 0.95},
        {"jitter_fraction": -0.1},
        {"jitter_fraction": 0.8},
        {"renew_at_fraction": float("nan")},
        {"min_renew_secs": -1},
        {"max_backoff_secs": 0},
    ],
)
def test_a_policy_that_cannot_work_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must lie|durations"):
        RenewalPolicy(**wrong)  # type: ignore[arg-type]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 20_000), st.sampled_from([0, 0, 0, -50_000, 50_000]), st.booleans()
        ),
        max_size=30,
    )
)  # fmt: skip
def test_no_jump_of_the_wall_clock_hides_a_renewal_or_ends_a_lease(
    moves: list[tuple[int, int, bool]],
) -> None:
    manager, boot_ms, wall_ms = RenewalManager(), 0, 1_000_000
    ends_ms, renew_by_ms, pauses = 60_000, 51_000, 0
    manager.register("a", wall_ms + 60_000, now_ms=wall_ms, boot_ms=boot_ms)
    for passed, jump, renew in moves:
        boot_ms += passed
        wall_ms += passed + jump
        found = manager.tick(wall_ms, boot_ms)
        manager.check()
        if boot_ms < ends_ms:
            assert not found.expired
        if renew_by_ms <= boot_ms < ends_ms and pauses == 0:
            assert found.due == ("a",)
        if found.due:
            pauses += 1
        if found.due and renew:
            manager.renewed("a", wall_ms + 60_000, now_ms=wall_ms, boot_ms=boot_ms)
            ends_ms, renew_by_ms, pauses = boot_ms + 60_000, boot_ms + 51_000, 0
        if found.expired:
            assert boot_ms >= ends_ms
            assert manager.tick(wall_ms, boot_ms) == TickSummary()
            return


def test_a_wall_clock_stepped_back_after_it_was_due_does_not_silence_it() -> None:
    manager = RenewalManager()
    manager.register("a", 1_060_000, now_ms=1_000_000, boot_ms=0)
    assert manager.tick(1_000_000 - 3_600_000, 59_000).due == ("a",)
    assert manager.tick(1_000_000 - 3_600_000, 60_000).expired == ("a",)


def test_it_is_over_at_the_very_instant_of_the_stop() -> None:
    lease = HolderLease("a", remaining_ms=1000, sent_ms=0)
    stop_ms = lease.usable_until_ms
    assert lease.belief(stop_ms - 1) is Belief.HELD
    assert lease.belief(stop_ms) is Belief.OVER
    assert lease.remaining_ms(stop_ms) == 0
