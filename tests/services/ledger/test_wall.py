"""Row G13, the ledger's part: its time neither goes back nor leaps."""

from __future__ import annotations

from services.ledger.wall import HOLD_MS, LedgerTime
from services.runtime.clock import Instant

NOW = 1_900_000_000_000
HOUR = 3_600_000


def test_time_is_the_wall_clocks_while_that_is_in_order() -> None:
    time = LedgerTime(0)
    assert time.read(Instant(100, NOW)) == NOW
    assert time.read(Instant(1_100, NOW + 1_002)) == NOW + 1_002
    assert time.why == ""


def test_a_wall_clock_set_back_stops_time_and_closes_the_gate() -> None:
    time = LedgerTime(0)
    time.read(Instant(0, NOW))
    assert time.read(Instant(1_000, NOW - HOUR)) == NOW
    assert "behind the time floor" in time.why
    assert time.read(Instant(2_000, NOW + 5)) == NOW + 5
    assert "was set" in time.why, "who was heard before it seems to be heard just now"
    time.read(Instant(2_000 + HOLD_MS, NOW + HOLD_MS))
    assert time.why == ""


def test_a_few_milliseconds_back_are_not_worth_a_word() -> None:
    time = LedgerTime(0)
    time.read(Instant(0, NOW))
    assert time.read(Instant(10, NOW - 400)) == NOW
    assert time.why == ""


def test_a_start_below_what_is_on_disk_waits_for_the_floor() -> None:
    time = LedgerTime(NOW + HOUR)
    assert time.read(Instant(0, NOW)) == NOW + HOUR
    assert time.why != ""
    assert time.read(Instant(HOUR, NOW + HOUR + 1)) == NOW + HOUR + 1
    assert time.why == ""


def test_a_wall_clock_that_leaps_is_not_followed() -> None:
    """Leases that are live would all be over at once."""
    time = LedgerTime(0)
    time.read(Instant(0, NOW))
    for second in (1, 2, 3):
        moved = time.read(Instant(second * 1_000, NOW + 365 * 24 * HOUR + second * 1_000))
        assert moved == NOW + second * 1_000
        assert "leapt ahead" in time.why
    assert time.read(Instant(4_000, NOW + 4_000)) == NOW + 4_000
    time.read(Instant(7_000, NOW + 7_000))
    assert time.why == ""


def test_a_leap_that_lasts_is_believed_at_the_next_start() -> None:
    time = LedgerTime(NOW)
    assert time.read(Instant(0, NOW + HOUR)) == NOW + HOUR
    assert time.why == ""


def test_a_machine_that_slept_has_not_leapt() -> None:
    time = LedgerTime(0)
    time.read(Instant(0, NOW))
    assert time.read(Instant(HOUR, NOW + HOUR)) == NOW + HOUR
    assert time.why == ""


def test_a_clock_that_was_behind_for_a_while_and_is_right_again_has_not_leapt() -> None:
    """The time that stood still meanwhile is made up for; else nothing would be granted again."""
    time = LedgerTime(0)
    time.read(Instant(0, NOW))
    for second in range(1, 10):
        assert time.read(Instant(second * 1_000, NOW + second * 1_000 - HOUR)) == NOW
    assert time.read(Instant(10_000, NOW + 10_000)) == NOW + 10_000
    time.read(Instant(13_001, NOW + 13_001))
    assert time.why == ""
    time.read(Instant(14_000, NOW + 14_000 - HOUR))
    assert time.read(Instant(60_000, NOW + 60_000 + HOUR)) == NOW + 60_000
    assert "leapt ahead" in time.why, "nor is a step back a way to hide one forward"


def test_a_step_back_that_was_waited_out_may_be_put_right_again() -> None:
    """The floor is passed after two seconds, and the clock counts; its correction is no leap."""
    time = LedgerTime(0)
    time.read(Instant(0, NOW))
    for second in range(1, 9):
        time.read(Instant(second * 1_000, NOW + (second - 2) * 1_000))
    assert time.why == ""
    assert time.read(Instant(9_000, NOW + 9_000)) == NOW + 9_000
    assert time.why == ""
    time.read(Instant(10_000, NOW + 12_000))
    assert "leapt ahead" in time.why


def test_a_slow_clock_is_followed_for_days_and_a_leap_still_seen() -> None:
    time = LedgerTime(0)
    for hour in range(48):
        time.read(Instant(hour * HOUR, NOW + hour * HOUR - hour * HOUR // 10_000))
        assert time.why == ""
    time.read(Instant(48 * HOUR, NOW + 48 * HOUR - 48 * HOUR // 10_000 + 2_000))
    assert "leapt ahead" in time.why
