"""The golden-script runner is itself tested: a runner that cannot fail proves nothing."""

from pathlib import Path

import pytest

from tests.golden import Malformed, parse, replay, run_golden

SCRIPT = """\
# two plain cases
upper
one
----
ONE

upper
two
----
TWO
"""


def upper(commands: str) -> str:
    return "\n".join(commands.split("\n")[1:]).upper()


def test_a_script_whose_answers_hold_passes(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_text(SCRIPT)
    run_golden(path, upper)


def test_a_changed_answer_fails_and_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_text(SCRIPT.replace("TWO", "2"))
    with pytest.raises(AssertionError, match="line 7"):
        run_golden(path, upper)


def test_a_rewrite_writes_the_answers_and_keeps_the_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.txt"
    path.write_text(SCRIPT.replace("TWO", "2"))
    monkeypatch.setenv("REWRITE", "1")
    run_golden(path, upper)
    assert path.read_text() == SCRIPT


def test_an_answer_with_empty_lines_survives_a_rewrite() -> None:
    text = "say\n----\n"
    answer = "first\n\nsecond\n----\nstill"
    written = replay(text, lambda _commands: answer)
    assert parse(written)[0][0].answer == answer
    assert replay(written, lambda _commands: answer) == written


def test_commands_without_a_rule_are_refused() -> None:
    with pytest.raises(Malformed, match="lost"):
        parse("upper\n----\nX\n\nlost\n")


def test_an_empty_script_fails_rather_than_proving_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s.txt"
    path.write_text("# nothing\n")
    with pytest.raises(AssertionError, match="no case"):
        run_golden(path, upper)
