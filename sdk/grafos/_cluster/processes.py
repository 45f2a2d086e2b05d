"""Which processes a process has started: for people who want to know what belongs to whom."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def descendants(pids: Iterable[int]) -> dict[int, list[dict[str, Any]]]:
    """For each of the processes its children, `{"name", "pid", "start"}`.

    The name is the last part of the module that the child runs: `front`, `warden`.
    """
    wanted = set(pids)
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        parent, start = _parent_and_start(Path("/proc", entry))
        if parent in wanted:
            name = _module(Path("/proc", entry))
            found[parent].append({"name": name, "pid": int(entry), "start": start})
    return dict(found)


def _parent_and_start(folder: Path) -> tuple[int, int]:
    try:
        fields = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return -1, 0
    return int(fields[1]), int(fields[19])


def _module(folder: Path) -> str:
    try:
        words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return ""
    for flag, module in itertools.pairwise(words):
        if flag == "-m":
            return module.rpartition(".")[2]
    return os.path.basename(words[0])
