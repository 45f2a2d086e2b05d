"""The gate and the epochs it remembers: golden scripts, and each shape against a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core.epochs import EpochWindow, ExtentEpochs
from grafos_core.failure import InvariantViolation
from grafos_core.gate import Gate
from grafos_core.lease import EPOCH_MAX, Kind
from grafos_core.node_effects import Instant
from tests.core.gate_script import Script
from tests.core.node_script import INCARNATION, NODE, WALL_MS, token
from tests.golden import run_golden, scripts

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("path", scripts(HERE, "gate"), ids=lambda path: path.stem)
def test_the_gate_answers_as_written_down(path: Path) -> None:
    run_golden(path, Script())


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 12))
def test_an_epoch_that_was_used_is_never_accepted_again_however_small_the_window(
    used: list[int], burnt_max: int
) -> None:
    window = EpochWindow(burnt_max=burnt_max)
    seen: set[int] = set()
    for epoch in used:
        acceptable = not window.refusal(epoch)
        assert not (acceptable and epoch in seen)
        assert window.use(epoch) == acceptable
        seen.add(epoch)
        window.check()
        assert all(window.refusal(one) for one in seen)
        assert not window.refusal(max(seen) + 1)
        assert window.high_water == max(seen)
    assert EpochWindow.of(window.value()).value() == window.value()


def test_a_full_window_forgets_in_the_safe_direction() -> None:
    window = EpochWindow(burnt_max=2)
    for epoch in (5, 7, 9):
        window.use(epoch)
    assert window.floor == 6
    assert [window.refusal(epoch) for epoch in (4, 5, 6, 7)] == [
        "EPOCH_STALE", "EPOCH_STALE", "", "EPOCH_BURNT",
    ]  # fmt: skip


extents = st.tuples(st.integers(0, 15), st.integers(1, 8), st.integers(1, 30))


@given(st.lists(extents, max_size=40))
def test_runs_of_blocks_say_what_a_number_per_block_would_say(
    used: list[tuple[int, int, int]],
) -> None:
    runs, blocks = ExtentEpochs(), [0] * 24
    for start, length, epoch in used:
        highest = max(blocks[start : start + length])
        expected = "" if epoch > highest else "EPOCH_BURNT" if epoch == highest else "EPOCH_STALE"
        assert runs.refusal(start, start + length, epoch) == expected
        runs.use(start, start + length, epoch)
        for block in range(start, start + length):
            blocks[block] = max(blocks[block], epoch)
        runs.check()
    told = [0] * 24
    for start, end, epoch in runs.runs:
        told[start:end] = [epoch] * (end - start)
    assert told == blocks
    assert ExtentEpochs.of(runs.value()).runs == runs.runs


@given(st.lists(extents, min_size=1, max_size=40))
def test_a_coarsened_map_refuses_at_least_what_the_fine_one_refuses(
    used: list[tuple[int, int, int]],
) -> None:
    fine, coarse = ExtentEpochs(), ExtentEpochs(runs_max=3)
    for start, length, epoch in used:
        fine.use(start, start + length, epoch)
        coarse.use(start, start + length, epoch)
        coarse.check()
    for block in range(24):
        for epoch in range(1, 31):
            if fine.refusal(block, block + 1, epoch):
                assert coarse.refusal(block, block + 1, epoch)


def test_a_fresh_gate_accepts_the_highest_epoch_there_is() -> None:
    gate = Gate(NODE, INCARNATION, {Kind.MEM: 8192})
    highest = token("a", {"epoch": str(EPOCH_MAX)}, Instant(0, WALL_MS))
    gate.check_bind(highest, "K")
    gate.bind(highest)
    gate.check()
    assert gate.high_waters() == {Kind.MEM: EPOCH_MAX}


def test_a_slice_that_is_still_open_is_not_freed() -> None:
    gate = Gate(NODE, INCARNATION, {Kind.MEM: 8192})
    gate.bind(token("a", {}, Instant(0, WALL_MS)))
    with pytest.raises(InvariantViolation, match="closed before it is free"):
        gate.free(token("a", {}, Instant(0, WALL_MS)).lease_id)


def test_a_gate_that_lost_count_is_seen() -> None:
    gate = Gate(NODE, INCARNATION, {Kind.MEM: 8192, Kind.BLOCK: 8})
    gate.bind(token("a", {}, Instant(0, WALL_MS)))
    gate.bind(token("b", {"kind": "block", "amount": "4", "epoch": "2"}, Instant(0, WALL_MS)))
    gate.check()
    gate._sums[Kind.MEM] -= 1
    with pytest.raises(InvariantViolation):
        gate.check()
    gate._sums[Kind.MEM] += 1
    gate._extents[Kind.BLOCK].append((3, 5))
    with pytest.raises(InvariantViolation):
        gate.check()
