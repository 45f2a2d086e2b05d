"""`python -m tests.disk`: each store killed at each of its syncs, and the power cut all the while.

--seed S     which subsets of what was not synced are tried, and which sectors arrive
--subsets N  so many of them at each instant [12]
--store W    this one only: ledger, audit, agent, warden
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.disk.board import Op
from tests.disk.crash import Step, judged, record
from tests.disk.judges import JUDGES


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.disk", description=__doc__)
    parser.add_argument("--seed", type=int, default=time.time_ns() // 1_000_000 % 1_000_000)
    parser.add_argument("--subsets", type=int, default=12)
    parser.add_argument("--store", choices=sorted(JUDGES))
    given = parser.parse_args(words)
    states = wrong = 0
    for store in [given.store] if given.store else sorted(JUDGES):
        for killed, steps in recordings(store):
            found = judged(steps, JUDGES[store], seed=given.seed, subsets=given.subsets)
            states, wrong = states + found.states, wrong + len(found.wrong)
            print(
                f"{store:<7} {killed}: {found.states} disks, {len(found.wrong)} wrong", flush=True
            )
            for each in found.wrong[:5]:
                print(f"    {each}", flush=True)
    print(f"seed {given.seed}: {states} disks, {wrong} wrong", flush=True)
    return 1 if wrong else 0


def recordings(store: str) -> Iterator[tuple[str, list[Step]]]:
    """The store's work undisturbed, and killed before and after each sync of it."""
    with tempfile.TemporaryDirectory() as name:
        whole = _recorded(store, Path(name), ())
    yield "not killed", whole
    syncs = sum(step.op is Op.SYNC for step in whole)
    for nth in range(1, syncs + 1):
        with tempfile.TemporaryDirectory() as name:
            yield f"killed before sync {nth}", _recorded(store, Path(name), (("", Op.SYNC, nth),))


def _recorded(store: str, folder: Path, kills: tuple[tuple[str, Op, int], ...]) -> list[Step]:
    (folder / "state").mkdir(mode=0o700)
    (folder / "disk").mkdir()
    return record(store, folder / "state", folder / "disk", kills)


if __name__ == "__main__":
    sys.exit(main())
