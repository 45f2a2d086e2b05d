"""What a service is told at its start, and what it says when that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.runtime import faults, flags


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.arm("", development=True)


def read(*arguments: str, **environment: str) -> flags.Values:
    own = [flags.Flag("batch-max", "events in one commit", "256", flags.number(1, 1024))]
    return flags.read(
        "ledger", "The ledger.", own, arguments=["--state-dir", "/tmp", *arguments],
        environment=environment,
    )  # fmt: skip


def test_a_flag_rules_over_its_variable_and_that_over_the_default() -> None:
    assert read().batch_max == 256
    assert read(GRAFOS_BATCH_MAX="9").batch_max == 9
    assert read("--batch-max", "8", GRAFOS_BATCH_MAX="9").batch_max == 8
    assert read().listen == "127.0.0.1:0"
    assert read().state_dir == Path("/tmp")
    assert read().ledger is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch-max", "0"], "--batch-max: must be a whole number, 1 to 1024"),
        (["--batch-max", "1e3"], "--batch-max: must be a whole number"),
        (["--listen", "nowhere"], "--listen: must be unix:<absolute path> or <host>:<port>"),
        (["--listen", "unix:relative"], "--listen: must be unix:<absolute path"),
        (["--listen", "unix:/" + "x" * 107], "at most 105 bytes"),
        (["--listen", "a:65536"], "--listen: must be"),
        (["--mode", "test"], "--mode: must be one of: development, production"),
        (["--trust-domain", "UPPER"], "--trust-domain: trust domain"),
        (["--ready-fd", "999"], "--ready-fd: must be an open file descriptor"),
        (["--state-dir", "relative"], "--state-dir: must be an absolute path"),
        (["--no-such-flag", "1"], "unrecognized arguments"),
        (["--batch", "1"], "unrecognized arguments"),
    ],
)
def test_what_does_not_fit_is_named_and_the_exit_status_is_two(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(*arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_flag_that_must_be_given_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        flags.read("ledger", "The ledger.", arguments=[], environment={})
    assert caught.value.code == 2
    assert "--state-dir (or GRAFOS_STATE_DIR) is needed" in capsys.readouterr().err


def test_help_lists_every_flag_with_its_variable_and_every_fault_point(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in flags.COMMON:
        assert f"--{flag.name} " in text
        assert flag.variable in text
    for point in faults.POINTS:
        assert f"{point} " in text


def test_faults_are_refused_in_production_and_unknown_ones_everywhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, fault, said in (
        ([], "teardown.erase:EIO", "for development mode only"),
        (["--mode", "development"], "teardown.earse:EIO", "teardown.erase"),
        (["--mode", "development"], "teardown.erase:EWHAT", "an errno's name, kill, stop"),
        (["--mode", "development"], "teardown.erase:EIO:0", "the passage is a number from 1 on"),
    ):
        with pytest.raises(SystemExit) as caught:
            read(*arguments, GRAFOS_FAULT=fault)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err
