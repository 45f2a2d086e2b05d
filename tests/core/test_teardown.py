"""One teardown: its table by golden scripts, and what a receipt can carry of its evidence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grafos_core import receipt
from grafos_core.lease import TEARDOWN_MS_MAX, Kind
from grafos_core.teardown import GPU_MS_MAX, STEPS, Stage, Step, Teardown, limit_ms
from tests.core.teardown_script import Script
from tests.golden import run_golden, scripts

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("path", scripts(HERE, "teardown"), ids=lambda path: path.stem)
def test_a_teardown_goes_as_written_down(path: Path) -> None:
    run_golden(path, Script())


def test_every_step_leads_to_the_next_stage_and_the_last_is_the_measurement() -> None:
    stage, taken = Stage.DEAD, []
    while stage in STEPS:
        step, stage = STEPS[stage]
        taken.append(step)
    assert (stage, taken) == (Stage.MEASURED, list(Step))


def test_an_answer_to_an_older_attempt_is_not_expected() -> None:
    teardown = Teardown(0, 0, Stage.REAPED)
    assert teardown.expects(Step.ERASE, 1)
    teardown.failed(Step.ERASE, "EIO", 0)
    assert not teardown.expects(Step.ERASE, 1)
    assert teardown.expects(Step.ERASE, 2)


def test_device_memory_has_more_time() -> None:
    assert limit_ms(Kind.GPU) == GPU_MS_MAX > limit_ms(Kind.MEM) == TEARDOWN_MS_MAX


@given(
    st.dictionaries(
        st.text(max_size=40), st.text(max_size=200) | st.integers(0, 2**40) | st.booleans(),
        max_size=40,
    ),
    st.text(max_size=300),
)  # fmt: skip
def test_whatever_a_step_reports_fits_a_receipt(
    found: dict[str, str | int | bool], why: str
) -> None:
    teardown = Teardown(0, 0)
    teardown.done(Step.QUIESCE, found, 0)
    teardown.failed(Step.REAP, why, 0)
    teardown.failed(Step.REAP, why, 0)
    measured = teardown.measured()
    assert receipt._read_measured(measured) == measured
    assert str(measured["cause"]).startswith("reap: ")
