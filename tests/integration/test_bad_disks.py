"""A durable call of each process fails, or is its last, under load: every law stays whole.

One fault for each process; `make chaos HARM=any` draws process, call, fault and moment, and also
stops processes and slows every sync down.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from grafos._local import LocalFabric
from tests.chaos.harm import DISKS, HarmedEpisode, on_a_bad_disk
from tests.disk.board import Disk, Fault

FAULTS = {
    "disk-ledger": Fault.IO,
    "disk-audit": Fault.KILL_BEFORE,
    "disk-agent": Fault.SHORT,
    "disk-warden": Fault.KILL_AFTER,
}


@pytest.fixture(scope="module")
def bad_disk() -> Iterator[tuple[LocalFabric, Disk]]:
    with on_a_bad_disk() as made:
        yield made


@pytest.mark.requires("cc")
@pytest.mark.parametrize("harm", DISKS)
def test_a_failing_durable_call_leaves_every_law_whole(
    harm: str, bad_disk: tuple[LocalFabric, Disk]
) -> None:
    episode = HarmedEpisode(*bad_disk, 2_000, harm, FAULTS[harm])
    report = episode.run()
    print(report.line(), episode.struck)
    assert report.wrong == []
    assert FAULTS[harm].name in episode.struck
