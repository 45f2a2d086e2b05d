"""Chain, quota and failure codes against what is written down of them."""

import pickle
from pathlib import Path

import pytest

from grafos_core import failure
from tests.core import chain_script, failure_script, quota_script, share_script
from tests.golden import run_golden, scripts

HERE = Path(__file__).parent


@pytest.mark.parametrize("path", scripts(HERE, "chain"), ids=lambda path: path.stem)
def test_the_chain_answers_as_written_down(path: Path) -> None:
    run_golden(path, chain_script.interpreter())


@pytest.mark.parametrize("path", scripts(HERE, "quota"), ids=lambda path: path.stem)
def test_the_tenants_book_answers_as_written_down(path: Path) -> None:
    run_golden(path, quota_script.interpreter())


@pytest.mark.parametrize("path", scripts(HERE, "share"), ids=lambda path: path.stem)
def test_shares_answer_as_written_down(path: Path) -> None:
    run_golden(path, share_script.interpreter())


@pytest.mark.parametrize("path", scripts(HERE, "failure"), ids=lambda path: path.stem)
def test_the_codes_are_as_written_down(path: Path) -> None:
    run_golden(path, failure_script.interpreter())


@pytest.mark.parametrize("code", failure.CODES)
def test_a_failure_keeps_its_type_through_pickle_and_through_its_fields(code: str) -> None:
    error = failure.of(code, "why", lease_id="a", epoch=3, retry_after_ms=7, details={"x": "y"})
    assert pickle.loads(pickle.dumps(error)) == error
    assert failure.from_fields(type(error).__name__, error.fields()) == error
    assert error.failure.value == type(error).failure.value


def test_an_unknown_code_is_our_own_bug() -> None:
    with pytest.raises(failure.InvariantViolation):
        failure.of("NO_SUCH_CODE")
