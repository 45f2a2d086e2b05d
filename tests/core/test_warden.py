"""The warden's core, by golden scripts; and that it takes back all, in time, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core.failure import InvariantViolation
from grafos_core.warden import WardenCore
from tests.core.node_script import lease_id
from tests.core.warden_script import Script
from tests.golden import run_golden, scripts

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("path", scripts(HERE, "warden"), ids=lambda path: path.stem)
def test_the_warden_does_as_written_down(path: Path) -> None:
    run_golden(path, Script())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["hold", "raise", "drop", "heard"]), st.sampled_from("abcd"),
            st.integers(0, 400), st.integers(0, 300),
        ),
        max_size=40,
    )
)  # fmt: skip
def test_who_sleeps_until_told_is_never_late_and_never_early(
    script: list[tuple[str, str, int, int]],
) -> None:
    """The shell wakes exactly when `timeout_ms` says; each lease is taken at its last deadline."""
    warden, now_ms = WardenCore(0, silent_ms_max=1000), 0
    deadlines: dict[str, int] = {}
    heard_ms = 0
    for what, name, passed, ahead in script:
        until_ms = now_ms + passed
        while (pause_ms := warden.timeout_ms(now_ms)) is not None and now_ms + pause_ms <= until_ms:
            now_ms += pause_ms
            for taken in warden.tick(now_ms):
                expected = min(deadlines.pop(taken.lease_id), heard_ms + 1000)
                assert now_ms == expected
        now_ms = until_ms
        lease = lease_id(name)
        if warden.agent_is_lost:
            break
        if what == "hold" and lease not in {one.lease_id for one in warden.taken()}:
            deadlines[lease] = max(deadlines.get(lease, 0), now_ms + ahead)
            warden_took = warden.hold(
                lease, slot=0, epoch=1, deadline_ms=now_ms + ahead, now_ms=now_ms
            )
            for taken in warden_took:
                assert deadlines.pop(taken.lease_id) == now_ms
        elif what == "raise" and warden.raise_deadline(lease, now_ms + ahead, now_ms) is not None:
            deadlines[lease] = max(deadlines[lease], now_ms + ahead)
        elif what == "drop":
            warden.drop(lease)
            deadlines.pop(lease, None)
        elif what == "heard":
            warden.agent_heard(now_ms)
            heard_ms = now_ms
        warden.check(now_ms)
        assert {one.lease_id: one.deadline_ms for one in warden.held()} == deadlines


def test_a_clock_that_goes_back_halts_the_warden() -> None:
    warden = WardenCore(10)
    with pytest.raises(InvariantViolation, match="does not go back"):
        warden.tick(9)


def test_a_lease_held_past_its_deadline_is_seen() -> None:
    warden = WardenCore(0)
    warden.hold("a" * 32, slot=0, epoch=1, deadline_ms=100, now_ms=0)
    with pytest.raises(InvariantViolation, match="past its deadline"):
        warden.check(100)


def test_a_watchman_who_slept_takes_nobodys_silence_for_death_and_still_keeps_the_hours() -> None:
    warden = WardenCore(0, silent_ms_max=5_000)
    warden.hold("a" * 32, slot=0, epoch=1, deadline_ms=20_000, now_ms=0)
    warden.hold("b" * 32, slot=1, epoch=1, deadline_ms=60_000, now_ms=0)
    warden.agent_heard(800)
    warden.slept(29_000, 30_000)
    assert [(one.lease_id, one.late_ms) for one in warden.tick(30_000)] == [("a" * 32, 10_000)]
    assert not warden.agent_is_lost
    assert [one.cause for one in warden.tick(34_800)] == ["agent_lost"], "but not for ever"


def test_sleep_is_not_saved_up() -> None:
    warden = WardenCore(0, silent_ms_max=5_000)
    warden.slept(100_000, 1_000)
    assert warden.timeout_ms(1_000) == 5_000
