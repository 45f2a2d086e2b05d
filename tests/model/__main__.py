"""Prints what becomes of the lease protocol without each of its defences.

    python -m tests.model            the table
    python -m tests.model -v         with the shortest way to each broken law
    python -m tests.model --json     those ways as JSON lines, for replay

The exit status is the number of verdicts that are not as expected.
"""

from __future__ import annotations

import argparse
import json
import sys

from tests.model.search import Action
from tests.model.variants import VARIANTS, Run, counterexample, plain, run


def line(done: Run) -> str:
    verdict = done.verdict
    found = "safe" if verdict.safe else f"{verdict.broken.split(':')[0]}"
    steps = str(len(verdict.trace)) if verdict.trace else "-"
    mark = "" if done.as_expected else f"   EXPECTED {done.variant.breaks or 'safe'}"
    states = f"{verdict.states_count:8}"
    return f"{done.variant.label:66} {found:24} {steps:>3} {states} {done.seconds:6.1f}{mark}"


def spoken(action: Action) -> str:
    verb, args = action
    return f"{verb} {' '.join(map(str, args))}".rstrip()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="print the paths")
    parser.add_argument("--json", action="store_true", help="print the paths as JSON lines")
    options = parser.parse_args(arguments)
    wrong, seconds = 0, 0.0
    if not options.json:
        print(f"{'variant':66} {'verdict':24} steps  states  seconds")
    for variant in VARIANTS:
        done = run(variant)
        wrong += not done.as_expected
        seconds += done.seconds
        example = counterexample(done)
        if options.json:
            if example is not None:
                print(json.dumps(plain(example)), flush=True)
            continue
        print(line(done), flush=True)
        if options.verbose and example is not None:
            print(f"    {example.broken}")
            print("    " + " · ".join(map(spoken, example.actions)))
    if not options.json:
        print(f"{len(VARIANTS)} variants, {wrong} not as expected, {seconds:.0f} s")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
