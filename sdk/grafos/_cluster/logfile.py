"""Logs of long-lived processes that do not grow without bound.

Rules. A process writes straight into its file, so that it never waits for whoever reads. A file
that has grown past its bound is copied to `<name>.1`, in the place of the copy before, and cut to
nothing; writers append, so their next line is the first of the emptied file. What is written in the
instant between copying and cutting is lost: logs inform, they prove nothing. The chain proves.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Final

LOG_BYTES_MAX: Final = 4 << 20
TAIL_BYTES: Final = 65_536
WORDS_CHARS_MAX: Final = 300


def open_log(path: Path) -> int:
    """A descriptor that appends to the file, made 0600 if it is missing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    return os.open(path, flags, 0o600)


def rotate(path: Path, bytes_max: int = LOG_BYTES_MAX) -> bool:
    """Cut the file if it has grown past its bound; whether it had."""
    try:
        if path.stat().st_size <= bytes_max:
            return False
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)
    except OSError:
        return False  # full, or gone: tried again at the next look
    return True


def last_words(path: Path) -> str:
    """The last line in short: what a log line of ours is about, or the line as it is."""
    line = "".join(tail(path, 1)).strip()
    try:
        said = json.loads(line)
        trace = said.get("traceback") or [""]
        words = trace[-1] or " ".join(
            str(said[name]) for name in ("event", "detail", "code", "why") if name in said
        )
    except (ValueError, AttributeError, TypeError):
        words = line
    return str(words)[:WORDS_CHARS_MAX]


def tail(path: Path, lines_max: int) -> list[str]:
    """The last lines of the file, for an explanation."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-lines_max:]
    except OSError:
        return []
