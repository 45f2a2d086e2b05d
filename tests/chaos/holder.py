"""A holder in a process of its own, to be killed: `python -m tests.chaos.holder`.

It loads the fabric whose `cluster.json` is named, with as many threads as asked for, until its
standard input ends; a line on it means to take it easier from now on. Each note goes to standard
output as one line before the next operation begins, so that whoever kills it still knows everything
it was told.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from grafos._cluster import description
from grafos._connection import to_cluster
from tests.chaos.load import HandedOn, Journal, Note, Worker


def to_line(note: Note) -> bytes:
    """At most a pipe's atomic length, so that lines of many threads never mix."""
    told = None if note.told is None else asdict(note.told)
    return (json.dumps([note.what, note.text[:500], told]) + "\n").encode()


def main(path: str, seed: str, threads: int) -> int:
    cluster = description.load(Path(path))
    if cluster is None:
        return 1
    fabric = to_cluster(cluster)
    journal = Journal(lambda note: _written(to_line(note)))
    handed_on: queue.Queue[HandedOn] = queue.Queue()
    workers = [Worker(fabric, journal, f"{seed}/{n}", handed_on) for n in range(threads)]
    running = [threading.Thread(target=worker.run) for worker in workers]
    for thread in running:
        thread.start()
    for _ in sys.stdin.buffer:
        for worker in workers:
            worker.ease()
    for worker in workers:
        worker.stop()
    for thread in running:
        thread.join()
    fabric.close()
    return 0


def _written(line: bytes) -> None:
    os.write(sys.stdout.fileno(), line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
