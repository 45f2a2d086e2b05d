"""The list of what was handed out, across killed agents and restarted machines."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grafos_core.failure import FabricError, InvariantViolation
from grafos_core.gate import SLICES_MAX
from services.nodeagent.exports import ANY_AGE, FILE_BYTES, HEADER_BYTES, Exports

A, B, C = (f"{byte}" * 32 for byte in "abc")
BOOT, NEXT_BOOT = "0" * 36, "1" * 36


def listed(path: Path, suspects: list[str], boot_id: str = BOOT) -> list[str]:
    """What an agent that starts now believes to be in holders' hands."""
    exports = Exports(path, suspects, boot_id)
    found = [each for each in (A, B, C) if each in exports]
    exports.close()
    return found


def test_what_was_handed_out_is_known_to_the_next_agent_and_the_rest_is_not(tmp_path: Path) -> None:
    exports = Exports(tmp_path / "e", [], BOOT)
    for each in (A, B, A):
        exports.add(each)
    exports.remove(B)
    exports.remove(C)
    exports.close()
    assert listed(tmp_path / "e", [A, B, C]) == [A]
    assert listed(tmp_path / "e", [A, B, C]) == [A], "an agent that is killed at once forgets none"


def test_the_oldest_of_those_who_were_given_it_counts_also_for_the_next_agent(
    tmp_path: Path,
) -> None:
    exports = Exports(tmp_path / "e", [], BOOT)
    for since in (500, 300, 400):
        exports.add(A, since)
    exports.add(B, 700)
    exports.close()
    again = Exports(tmp_path / "e", [A, B], BOOT)
    assert [again.since(each) for each in (A, B, C)] == [300, 700, None]
    again.add(C, 9)
    again.remove(A)
    again.close()
    last = Exports(tmp_path / "e", [A, B, C], BOOT)
    assert [last.since(each) for each in (A, B, C)] == [None, 700, 9]
    last.close()
    os.truncate(tmp_path / "e", 10)
    unknown = Exports(tmp_path / "e", [A], BOOT)
    assert unknown.since(A) == ANY_AGE
    unknown.close()


def test_what_is_over_by_the_records_is_dropped(tmp_path: Path) -> None:
    exports = Exports(tmp_path / "e", [], BOOT)
    exports.add(A)
    exports.close()
    assert listed(tmp_path / "e", [B]) == []
    assert listed(tmp_path / "e", [A, B]) == []


def test_nothing_is_held_after_the_machine_was_started_anew(tmp_path: Path) -> None:
    exports = Exports(tmp_path / "e", [], BOOT)
    exports.add(A)
    exports.close()
    assert listed(tmp_path / "e", [A], NEXT_BOOT) == []


@pytest.mark.parametrize("length", [None, 0, 10, HEADER_BYTES, FILE_BYTES - 1])
def test_without_a_whole_list_everything_counts_as_handed_out_and_goes_on_doing_so(
    tmp_path: Path, length: int | None
) -> None:
    path = tmp_path / "e"
    if length is not None:
        listed(path, [])
        os.truncate(path, length)
    assert listed(path, [A, B]) == [A, B]
    assert listed(path, [A, B, C]) == [A, B]


def test_a_list_that_was_begun_and_not_finished_is_none(tmp_path: Path) -> None:
    path = tmp_path / "e"
    listed(path, [])
    with path.open("r+b") as file:
        file.write(bytes(HEADER_BYTES))
    assert listed(path, [A]) == [A]


def test_it_outlives_the_process_without_a_word_of_goodbye(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from services.nodeagent.exports import Exports\n"
        f"Exports(Path(sys.argv[1]), [], '{BOOT}').add('{A}')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "e")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert listed(tmp_path / "e", [A, B]) == [A]


def test_there_is_room_for_every_lease_and_used_room_comes_back(tmp_path: Path) -> None:
    exports = Exports(tmp_path / "e", [], BOOT)
    ids = [secrets.token_hex(16) for _ in range(SLICES_MAX)]
    for each in ids:
        exports.add(each)
    with pytest.raises(InvariantViolation):
        exports.add(A)
    exports.remove(ids[7])
    exports.add(A)
    exports.close()
    assert listed(tmp_path / "e", [A, *ids]) == [A]
    assert (tmp_path / "e").stat().st_size == FILE_BYTES


def test_a_list_that_cannot_be_written_hands_nothing_out(tmp_path: Path) -> None:
    exports = Exports(tmp_path / "e", [], BOOT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES, limits[1]))
    try:
        with pytest.raises(FabricError) as refusal:
            exports.add(A)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        exports.close()
    assert refusal.value.code == "STORAGE"
    assert isinstance(refusal.value.__cause__, OSError)
    assert refusal.value.__cause__.errno == errno.EFBIG
