"""Measures a fabric beside etcd and Redis in one run: `python -m tests.bench`, or `make bench`.

The table goes to standard output; the path of the JSON document is its last line. A missed target
is a finding: the status is 0, or 1 with --check. The status is 1 when a row could not be measured
to its end, 2 when nothing could be measured here.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

import grpc
import redis

from grafos import FabricError
from tests.bench import (
    acquire_rate,
    blocks,
    data_port_64,
    data_port_bulk,
    data_port_pipeline,
    far_reads,
    lease_cycle,
    read_64,
    reclaim,
    report,
    view,
)
from tests.bench.child import ChildError
from tests.bench.harness import Bench, Result
from tests.bench.noise import Noise
from tests.bench.place import Place, WrongPlaceError, open_place

FOLDER: Final = Path(__file__).resolve().parents[2] / "build" / "bench"
ROWS: Final[dict[str, tuple[str, Callable[[Bench, Result], None]]]] = {
    row.NAME: (row.WHAT, row.run)
    for row in (
        lease_cycle,
        read_64,
        view,
        reclaim,
        acquire_rate,
        far_reads,
        blocks,
        data_port_64,
        data_port_pipeline,
        data_port_bulk,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, interrupted)
    try:
        with open_place(options.dir) as place:
            noise = Noise(place.folder)
            bench = Bench(place, noise, quick=options.quick)
            results = [measure(name, bench) for name in options.only or ROWS]
            found = report.document(results, noise.report(), place, quick=options.quick)
    except WrongPlaceError as wrong:
        print(f"bench: {wrong}", file=sys.stderr)
        return 2
    path = report.write(options.json or FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}.json", found)
    print("\n".join(report.lines(found)))
    print(path)
    if options.check:
        return 0 if report.all_met(results) else 1
    return 1 if any(each.error for each in results) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tests.bench", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--only", action="append", choices=list(ROWS), help="this row; repeatable")
    made.add_argument("--quick", action="store_true", help="few rounds: to try it out")
    made.add_argument("--json", type=Path, help="where the JSON document goes")
    made.add_argument("--dir", type=Path, default=FOLDER, help="everybody's files, on a disk")
    made.add_argument("--check", action="store_true", help="status 1 when a target is missed")
    return made


def measure(name: str, bench: Bench) -> Result:
    """One row. What goes wrong in it is told in it, and the others are measured all the same."""
    print(f"measuring {name}", file=sys.stderr, flush=True)
    what, run = ROWS[name]
    result = Result(name, what)
    try:
        run(bench, result)
    except (FabricError, ChildError, AssertionError, OSError, grpc.RpcError, redis.RedisError) as e:
        result.error = f"{type(e).__name__}: {e}"
    return result


def interrupted(*_: object) -> NoReturn:
    """As if by the keyboard: everything that was started is ended on the way out."""
    raise KeyboardInterrupt


__all__ = ["ROWS", "Place", "main", "measure", "parser"]

if __name__ == "__main__":
    sys.exit(main())
