"""`python -m tests.chaos -n 50`: kill processes over and over, each time with a printed seed.

    --seed S    begin with this seed; with -n 1 (the default beside it) exactly this episode
    --victim V  always this one, in the place of whom the seed draws
    --harm H    not a kill: its disk fails or is slow, or it stands still; `any`: the seed draws

Each episode has a fabric of its own, so that a seed that failed can be run again alone.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.chaos.episode import VICTIMS, Episode, Report, new_fabric
from tests.chaos.harm import HARMS, harmed_alone
from tests.chaos.machine import left_behind


def main(words: list[str] | None = None) -> int:
    given = _parser().parse_args(words)
    first = given.seed if given.seed is not None else time.time_ns() // 1_000_000 % 1_000_000
    count = given.n if given.n is not None else (1 if given.seed is not None else 8)
    failed = [seed for seed in range(first, first + count) if not _is_whole(seed, given)]
    print(f"{count - len(failed)} of {count} episodes left every law whole", flush=True)
    for seed in failed:
        victim = f" --victim {given.victim}" if given.victim else ""
        harm = f" --harm {given.harm}" if given.harm else ""
        print(f"again: python -m tests.chaos --seed {seed}{victim}{harm}", flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("-n", type=int, help="how many episodes [8]")
    parser.add_argument("--seed", type=int, help="of the first one; later ones count up")
    parser.add_argument("--victim", choices=sorted(VICTIMS))
    parser.add_argument("--harm", choices=(*HARMS, "any"))
    return parser


def _is_whole(seed: int, given: argparse.Namespace) -> bool:
    if given.harm:
        report = harmed_alone(seed, None if given.harm == "any" else given.harm)
    else:
        report = alone(seed, given.victim)
    print(report.line(), flush=True)
    for each in report.wrong:
        print(f"    {each}", flush=True)
    return not report.wrong


def alone(seed: int, victim: str | None) -> Report:
    """One episode in a fabric of its own, and nothing left of it."""
    fabric = new_fabric().start()
    try:
        report = Episode(fabric, seed, victim).run()
    finally:
        pids = fabric.pids()
        fabric.close()
    report.wrong += left_behind(pids)
    return report


if __name__ == "__main__":
    sys.exit(main())
