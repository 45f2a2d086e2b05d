"""A missing package is named: it skips a test, and under GRAFOS_REQUIRE_ALL=1 it fails it."""

import pytest

from tests import requirements

NOWHERE = "no-such-command-anywhere"


def test_what_is_there_does_not_skip() -> None:
    requirements.require("sh")


def test_what_is_missing_skips_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFOS_REQUIRE_ALL", raising=False)
    with pytest.raises(pytest.skip.Exception, match=NOWHERE):
        requirements.require("sh", NOWHERE)


def test_what_is_missing_fails_where_everything_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRAFOS_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match=NOWHERE):
        requirements.require(NOWHERE)


def test_a_missing_graphics_processor_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFOS_REQUIRE_ALL", "1")
    monkeypatch.setattr(requirements, "is_there", lambda name: name != "gpu")
    with pytest.raises(pytest.skip.Exception, match="gpu"):
        requirements.require("gpu")


def test_the_marker_is_obeyed(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFOS_REQUIRE_ALL", raising=False)
    pytester.makeconftest("from tests.conftest import pytest_runtest_setup")
    pytester.makeini("[pytest]\nmarkers = requires\n")
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.requires("sh")
        def test_there():
            pass

        @pytest.mark.requires("{NOWHERE}")
        def test_missing():
            raise AssertionError
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1, skipped=1)
    monkeypatch.setenv("GRAFOS_REQUIRE_ALL", "1")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1, errors=1)
