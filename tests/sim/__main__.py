"""`python -m tests.sim`: many seeds, or one seed again with its story, or the planted bugs."""

from __future__ import annotations

import argparse
import sys
import time

from grafos_core.failure import InvariantViolation
from tests.sim.bugs import BUGS, planted
from tests.sim.runs import run
from tests.sim.world import LawBroken

SEEDS_PER_BUG = 500


def main() -> int:
    parser = argparse.ArgumentParser("tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this one and tell its story")
    parser.add_argument("--first", type=int, default=0, help="first seed; default 0")
    parser.add_argument("--count", type=int, default=2_000, help="how many seeds; default 2000")
    parser.add_argument("--bugs", action="store_true", help="plant each mistake and look for it")
    options = parser.parse_args()
    if options.bugs:
        return hunt()
    if options.seed is not None:
        return replay(options.seed)
    return sweep(options.first, options.count)


def replay(seed: int) -> int:
    try:
        result = run(seed, narrate=print)
    except (LawBroken, InvariantViolation) as broken:
        print(f"seed {seed}: {broken}")
        return 1
    print(f"seed {seed}: every law holds; {result.counts}; trace {result.trace[:16]}")
    return 0


def sweep(first: int, count: int) -> int:
    started, events, broken_seeds = time.monotonic(), 0, []
    for number, seed in enumerate(range(first, first + count), start=1):
        try:
            events += run(seed).counts["events"]
        except (LawBroken, InvariantViolation) as broken:
            broken_seeds.append(seed)
            print(f"seed {seed}: {broken}", flush=True)
        if number % 100 == 0:
            took_s = time.monotonic() - started
            print(f"{number} seeds, {events} events, {took_s:.0f} s", flush=True)
    print(f"{count} seeds, {len(broken_seeds)} broke a law: {broken_seeds[:20]}")
    return 1 if broken_seeds else 0


def hunt() -> int:
    missed = 0
    for bug in BUGS:
        with planted(bug):
            found = next((seed for seed in range(SEEDS_PER_BUG) if breaks(seed)), None)
        missed += found is None
        print(f"law {bug.law}: {bug.label}: {'MISSED' if found is None else f'seed {found}'}")
    return 1 if missed else 0


def breaks(seed: int) -> bool:
    """Whether this seed breaks a law, or halts what it is planted in."""
    try:
        run(seed)
    except Exception:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
